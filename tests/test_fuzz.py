"""tools/fuzz.py: some files of every kind are damaged, and no stage ends with a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="it forks and limits memory")
def test_no_damaged_file_ends_in_a_traceback_or_goes_unnoticed():
    command = [sys.executable, ROOT / "tools" / "fuzz.py", "--files=60", "--seed=20000"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 unnoticed, 0 traceback" in done.stdout
