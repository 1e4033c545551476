"""The fixtures that the tests of preparing text share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from prepared import run_script

import prepare
from plainllama.data import Dataset, load_dataset


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., Dataset]:
    """Run prepare.py in this process, in a folder of its own, and open what it wrote to `out`."""

    def call(*arguments: object) -> Dataset:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments), "--out=out"])
        prepare.main()
        return load_dataset(Path("out"))

    monkeypatch.chdir(tmp_path)
    return call


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory, plays_wheel) -> Dataset:
    folder = tmp_path_factory.mktemp("shakespeare")
    result = run_script(cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().endswith("config/tiny.py\n")
    return load_dataset(folder / "data" / "shakespeare")
