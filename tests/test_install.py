"""Ways to install and to start: pins agree, the notebook's cells run, stages can be spawned."""

import importlib
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, run_stage
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins(name: str) -> set[str]:
    """Return what a requirements file asks for, with the files that it includes."""
    lines = (ROOT / name).read_text(encoding="utf-8").split("\n")
    included = [pins(line.removeprefix("-r ")) for line in lines if line.startswith("-r ")]
    return {line for line in lines if "==" in line}.union(*included)


def extra(name: str) -> set[str]:
    """Return what an extra adds, with the extras that it includes."""
    words = EXTRAS[name]
    inner = [re.match(r"plainllama\[(.*)\]", word) for word in words]
    included = [extra(part) for match in inner if match for part in match[1].split(",")]
    return {word for word, match in zip(words, inner, strict=True) if not match}.union(*included)


def test_requirements_and_pyproject_pin_the_same():
    base = {*PROJECT["dependencies"]}
    assert base == pins("requirements.txt") and "torch==2.13.0" in base
    assert base | extra("fast") == pins("requirements-demo.txt")
    assert base | extra("dev") == pins("requirements-dev.txt")
    assert base.union(*map(extra, EXTRAS)) == pins("requirements-dev.txt")


def test_the_lock_has_all_that_is_asked_for_and_names_no_host():
    text = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    locked = [Requirement(line) for line in text.splitlines()]
    assert "/" not in text and all(re.fullmatch(r"==[^,]+", str(r.specifier)) for r in locked)
    pinned = {f"{r.name}{r.specifier}" for r in locked}
    assert pins("requirements-dev.txt") <= pinned


def test_the_dockerfile_copies_what_is_there():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (files,) = re.findall(r"COPY (requirements\S.*) \./", text)
    assert all((ROOT / name).is_file() for name in files.split())
    (installed,) = re.findall(r"pip install .*-r (\S+)", text)
    assert installed in files
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert not [name for name in ignored if name in ("plainllama", "config", "page")]


@pytest.mark.slow
def test_the_notebooks_cells_run(tmp_path, plays_wheel):
    notebook = json.loads((ROOT / "colab.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    for name in ("plainllama", "page", "config", "tools"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    with (tmp_path / "config" / "tiny.py").open("a", encoding="utf-8") as file:
        file.write(
            "\nn_layers = 1\nn_embd = 32\nmax_steps = 4\neval_tokens = 1024\nsnapshots = 2\n"
        )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = []
    for cell in cells:
        for line in "".join(cell["source"]).splitlines():
            if not line.startswith(("!", "%")):
                compile(line, "cell", "exec")
            elif match := re.match(r"%pip install -q -r (\S+)", line):
                assert (tmp_path / match[1]).is_file()
            elif match := re.match(r"!python (\S+\.py.*)", line):
                words = [sys.executable, *shlex.split(match[1])]
                done = subprocess.run(
                    words, cwd=tmp_path, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, (line, done.stderr)
                ran.append(match[1].split()[0])
    programs = ["prepare.py", "tools/plan.py", "train.py", "sample.py", "runs.py", "visualize.py"]
    assert ran == programs
    assert all((tmp_path / name).is_file() for name in ("loss.svg", "page.html"))


def call_stages(stages: dict[str, list[str]]) -> None:
    """Run each stage; a spawned process imports this module, and the stages, anew."""
    for stage, words in stages.items():
        run_stage(importlib.import_module(stage).main, *words)


@pytest.mark.slow
def test_stages_run_in_a_spawned_process_with_the_paths_of_the_platform(tmp_path):
    source = Path(tmp_path, "texts", "a.txt")
    source.parent.mkdir()
    source.write_text("the cat sees a dog. " * 400, encoding="utf-8")
    data, out = os.path.join(tmp_path, "data", "own"), os.path.join(tmp_path, "out", "run")
    shape = ["--n_layers=1", "--n_embd=16", "--n_heads=2", "--max_seq_len=16", "--max_steps=2"]
    shape += ["--batch_size=2", "--tokens_per_step=32", "--eval_tokens=64", "--no-compile"]
    stages = {
        "prepare": [str(source.parent), f"--out={data}", "--tokenizer=byte"],
        "train": [f"--data_dir={data}", f"--out_dir={out}", "--device=cpu", *shape],
        "sample": [f"--ckpt={out}", "--prompt=a", "--max_new_tokens=2", "--device=cpu"],
        "visualize": [f"--ckpt={out}", "--prompt=a cat"],
        "export": [f"--ckpt={out}", f"--out={os.path.join(tmp_path, 'small')}", "--dtype=float16"],
        "runs": [out, f"--plot={os.path.join(tmp_path, 'loss.svg')}"],
    }
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=call_stages, args=(stages,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert Path(out, "page.html").is_file() and Path(tmp_path, "loss.svg").is_file()
