"""The layout of the repository: who may import whom, and that importing does nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, save_random

STAGES = sorted({path.stem for path in ROOT.glob("*.py")} - {"model"})
ALLOWED = {ROOT / "model.py": set()}  # file -> what of ours it may import
ALLOWED |= {path: {"model", "plainllama"} for path in (ROOT / "plainllama").glob("*.py")}
ALLOWED |= {ROOT / f"{stage}.py": {"model", "plainllama"} for stage in STAGES}


def imported(path: Path) -> set[str]:
    """Return the modules of ours that a file imports anywhere in it, by their first name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "plainllama").partition(".")[0])
    return names & {*STAGES, "model", "plainllama", "config", "tools", "tests"}


@pytest.mark.parametrize("path", ALLOWED, ids=lambda path: path.stem)
def test_files_import_what_they_may(path):
    assert imported(path) <= ALLOWED[path]


def test_no_shared_module_is_named_as_a_stage():
    assert not {path.stem for path in (ROOT / "plainllama").glob("*.py")} & {*STAGES, "model"}


def test_sampling_imports_no_compiler_and_importing_the_stages_prints_and_writes_nothing(tmp_path):
    """torch._dynamo and sympy take as long to import as torch itself."""
    model, here = save_random(tmp_path / "model"), tmp_path / "here"
    here.mkdir()
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
        f"runpy.run_path({str(ROOT / 'sample.py')!r}, run_name='__main__'); "
        "print('found:', {'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules}); "
        f"print('sampled', file=sys.stderr); import {', '.join(STAGES)}"
    )
    flags = [f"--ckpt={model}", "--prompt=the cat", "--max_new_tokens=5", "--device=cpu"]
    call = [sys.executable, "-B", "-c", code, *flags]
    done = subprocess.run(call, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("found: set()\n") and done.stderr.endswith("\nsampled\n")
    assert list(here.iterdir()) == []
