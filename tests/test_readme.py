"""README.md and docs/: what they quote is true, and what they point to is there."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from plainllama.settings import load
from train import TrainConfig

ROOT = Path(__file__).parent.parent
DOCUMENTS = (
    "README.md",
    "docs/BENCHMARKS.md",
    "docs/DECISIONS.md",
    "docs/RUNS.md",
    "docs/INSTALL.md",
)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README = TEXTS["README.md"]
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CONFIGS = {  # the settings of what a command may run
    "prepare.py": "PrepareConfig",
    "train.py": "TrainConfig",
    "sample.py": "SampleConfig",
    "export.py": "ExportConfig",
    "visualize.py": "VisualizeConfig",
    "runs.py": "RunsConfig",
    "tools/ladder.py": "LadderConfig",
    "tools/bench.py train": "SpeedBench",
    "tools/bench.py sample": "SpeedBench",
    "tools/bench.py prepare": "PrepareBench",
}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return (STAGE, words) of each `python STAGE ...` in code blocks and in code among prose."""
    code = [line for block in FENCE.findall(text) for line in unbroken(block).splitlines()]
    code += [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]
    found = []
    for line in code:
        match = re.match(
            r"(?:\$ )?(?:[A-Z_]+=\S+ )?(?:python|torchrun(?: --\S+)*) (.*\.py.*)", line
        )
        if not match:
            continue
        stage, *words = shlex.split(match[1], comments=True)
        if stage == "tools/bench.py":
            stage = f"{stage} {words.pop(0)}"
        if stage in CONFIGS:
            found.append((stage, words))
    return found


def unbroken(block: str) -> str:
    """Join the lines that end with a backslash to those that follow."""
    return re.sub(r"\\\n\s*", "", block)


def config_of(stage: str) -> type:
    """Return the dataclass of the settings that a stage takes."""
    module = stage.split()[0].removesuffix(".py").replace("/", ".")
    return getattr(importlib.import_module(module), CONFIGS[stage])


def test_the_quoted_refusal_is_what_is_said(monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments, message = re.search(r"\$ python train.py (.*)\nerror: (.*)\n", README).groups()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load(TrainConfig, arguments.split())


@pytest.mark.parametrize("name", DOCUMENTS)
def test_linked_files_headings_and_pictures_exist(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        path, _, heading = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        assert place.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_that_are_named_exist(name):
    """`train.py`, `config/tiny.py`, `plainllama/` …: of ours, unless a peer's path is quoted."""
    text = TEXTS[name].partition("## The peers")[0]
    for path in re.findall(r"`((?:\w+/)*\w+(?:\.py|\.md|\.svg|/))`", text):
        if not path.startswith(("data/", "out/", "notes/")):
            assert any(
                (folder / path).exists()
                for folder in (ROOT, ROOT / "config", ROOT / "plainllama", ROOT / "tools")
            ), path


def test_each_stage_and_folder_is_on_the_map():
    section = README.partition("## The files")[2]
    ours = [path.name for path in ROOT.glob("*.py")]
    ours += [f"{path.name}/" for path in ROOT.glob("[a-z]*") if (path / "__init__.py").is_file()]
    assert [name for name in ours if f"`{name}`" not in section] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_that_are_quoted_exist(name):
    quoted = commands(TEXTS[name])
    assert quoted or name == "docs/DECISIONS.md"
    for stage, words in quoted:
        keys = {field.name for field in fields(config_of(stage))} | {"print_config", "help"}
        for word in words:
            key = word[2:].partition("=")[0].replace("-", "_")
            if word.startswith("--") and "learning_rate" not in word:  # which is quoted as refused
                assert key in keys or key.removeprefix("no_") in keys, f"{stage} {word}"


def test_commands_in_code_blocks_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [block for block in FENCE.findall(README) if not block.startswith("$")]
    taken = [command for block in blocks for command in commands(f"```\n{block}```")]
    assert {stage for stage, _ in taken} >= {"prepare.py", "train.py", "sample.py", "export.py"}
    for stage, words in taken:
        load(config_of(stage), words)


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in TEXTS.values():
        for target in re.findall(r"(?:`|\$ )make ([\w-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_is_read_in_a_sitting():
    lines = README.splitlines()
    prose = [line for line in lines if not line.startswith("|")]
    assert len(lines) <= 150
    assert [line for line in prose if len(line) > 100] == []
