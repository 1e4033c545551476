"""README.md: its table of files is true, and what it quotes is what is printed."""

import re
from pathlib import Path

import pytest

from config import load
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_of_files_has_the_right_line_counts():
    table = dict(re.findall(r"\| `(\S+\.py)` \| (\d+) \|", README))
    assert {"prepare.py", "model.py", "train.py", "sample.py"} <= table.keys()
    counts = {name: len((ROOT / name).read_bytes().splitlines()) for name in table}
    assert {name: int(count) for name, count in table.items()} == counts


def test_the_quoted_refusal_is_what_is_said():
    arguments, message = re.search(r"\$ python train.py (.*)\nerror: (.*)\n", README).groups()
    with pytest.raises(ValueError, match=re.escape(message)):
        load(
            TrainConfig, [str(ROOT / word) if ".py" in word else word for word in arguments.split()]
        )


def test_the_pictures_exist():
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))
