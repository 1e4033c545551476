"""The fixtures that the tests of preparing text share."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from prepared import LINE, run_script

import prepare
from plainllama.data import Dataset, load_dataset
from plainllama.tokenizer import (
    PATTERNS,
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    new_tokenizer,
    save_tokenizer,
    train_bpe,
)


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
    assert result.stdout.decode().endswith("next: python train.py config/tiny.py\n")
    return load_dataset(folder / "data" / "shakespeare")


@pytest.fixture(scope="session")
def trained(shakespeare) -> Tokenizer:
    return load_tokenizer(shakespeare.data_dir / "tokenizer.json")


@pytest.fixture(scope="session")
def pairs(tmp_path_factory, trained, gpt2_vocabulary):
    """Tokenizers as tiktoken and as `tokenizers` read them from the same file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    ranks = trained.ranks
    made = [new_tokenizer(ranks, 4095, pattern) for pattern in PATTERNS.values()]
    made += [find_tokenizer("gpt2"), train_bpe([LINE.encode() * 9], 400)]
    for number, tokenizer in enumerate(made):
        save_tokenizer(tokenizer, folder / f"{number}.json")
    return [
        (load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path)))
        for path in folder.iterdir()
    ]
