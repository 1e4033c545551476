"""README.md: what it quotes is what is printed, and what it points to is there."""

import re
from pathlib import Path

import pytest

from plainllama.settings import load
from train import TrainConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quoted_refusal_is_what_is_said():
    arguments, message = re.search(r"\$ python train.py (.*)\nerror: (.*)\n", README).groups()
    with pytest.raises(ValueError, match=re.escape(message)):
        load(
            TrainConfig, [str(ROOT / word) if ".py" in word else word for word in arguments.split()]
        )


def test_the_pictures_exist():
    assert all((ROOT / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", README))
