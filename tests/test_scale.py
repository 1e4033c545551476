"""docs/SCALE.md says what the arithmetic says, and the arithmetic what the sharding code does."""

import subprocess
import sys

import pytest
from helpers import ROOT

sys.path.append(str(ROOT / "tools"))
import scale  # noqa: E402


def test_the_documents_table_is_what_the_arithmetic_gives():
    text = (ROOT / "docs" / "SCALE.md").read_text(encoding="utf-8")
    assert scale.table() in text


# In a process of its own: the fake process group must not meet other tests.
SIMULATE = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tools"]
import scale
e = scale.expected(scale.MODELS["8B"], {n}, {shard!r})
found = scale.simulate(scale.MODELS["8B"], {n}, shard={shard!r})
print(e["kept"] / 4, found["kept"] / 1e9, e["sent"], sum(found["sent"].values()) / 1e9)
"""


@pytest.mark.parametrize(
    "n, shard", [(64, "node"), pytest.param(1024, "all", marks=pytest.mark.slow)]
)
def test_a_process_keeps_and_sends_what_the_arithmetic_says(n, shard):
    code = SIMULATE.format(root=str(ROOT), n=n, shard=shard)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, counted, sent, added_up = map(float, done.stdout.split())
    # Norms have fewer rows than 1,024 processes share evenly; that is all that differs.
    assert counted == pytest.approx(kept, rel=0.01)
    assert added_up == pytest.approx(sent, rel=0.01)
    text = (ROOT / "docs" / "SCALE.md").read_text(encoding="utf-8")
    assert f"{counted:.2f} GB" in text
