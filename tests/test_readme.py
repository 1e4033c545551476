"""README.md and docs/: the files, flags, targets and headings that they name are there."""

import importlib
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from plainllama.settings import load

ROOT = Path(__file__).parent.parent
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = TEXTS["README.md"]
FENCE = re.compile(r"^ *```\w*\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
CONFIGS = {  # program -> the settings that it takes
    "prepare.py": "PrepareConfig",
    "train.py": "TrainConfig",
    "sample.py": "SampleConfig",
    "export.py": "ExportConfig",
    "visualize.py": "VisualizeConfig",
    "runs.py": "RunsConfig",
    "tools/plan.py": "TrainConfig",
    "tools/bench.py": "BenchConfig",
}
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:python|torchrun(?: --\S+)*) (\S+\.py)(.*)")


def commands(code: list[str]) -> list[tuple[str, list[str]]]:
    """Return (program, words) of each line that starts one of ours."""
    found = []
    for line in code:
        match = COMMAND.match(line.strip())
        if match and match[1] in CONFIGS:
            words = shlex.split(match[2], comments=True)
            found.append((match[1], words[1:] if match[1] == "tools/bench.py" else words))
    return found


def blocks(text: str) -> list[str]:
    """Return the lines of fenced and indented code; a line that goes on in the next is one."""
    code = "\n".join([*FENCE.findall(text), *re.findall(r"^    (.*)$", text, re.MULTILINE)])
    return re.sub(r"\\\n\s*", "", code).splitlines()


def spans(text: str) -> list[str]:
    """Return what stands between backticks in prose and tables."""
    return [re.sub(r"\s+", " ", span) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def config_of(program: str) -> type:
    """Return the dataclass of the settings that a program takes."""
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    return getattr(module, CONFIGS[program])


@pytest.mark.parametrize("name", TEXTS)
def test_linked_files_and_headings_exist(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        path, _, heading = target.partition("#")
        place = (ROOT / name).parent / path if path else ROOT / name
        assert place.is_file(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, target


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name):
    text = TEXTS[name].partition("## The peers")[0]  # where the peers' own files are named
    for path in re.findall(r"`((?:\w+/)*\w+(?:\.py|\.md|/))`", text):
        if not path.startswith(("data/", "out/", "tasks/")):
            folders = (ROOT, ROOT / "config", ROOT / "plainllama")
            assert any((folder / path).exists() for folder in folders), path


@pytest.mark.parametrize("name", TEXTS)
def test_flags_that_are_quoted_exist(name):
    for program, words in commands(blocks(TEXTS[name]) + spans(TEXTS[name])):
        keys = {field.name for field in fields(config_of(program))} | {"help"}
        for word in words:
            if word.startswith("--"):
                key = word[2:].partition("=")[0].replace("-", "_")
                assert key in keys or key.removeprefix("no_") in keys, f"{program} {word}"


def test_commands_of_the_readme_are_accepted(monkeypatch):
    monkeypatch.chdir(ROOT)
    taken = [command for command in commands(blocks(README)) if "--help" not in command[1]]
    assert {program for program, _ in taken} >= {"prepare.py", "train.py", "sample.py"}
    for program, words in taken:
        load(config_of(program), words)


def test_the_readme_has_the_three_commands_in_order():
    code = "\n".join(line.partition("  #")[0].rstrip() for line in blocks(README))
    assert (
        "python prepare.py\n"
        "torchrun --nproc_per_node=8 train.py config/medium.py\n"
        'python sample.py --prompt "..."\n'
    ) in code


def test_the_readmes_tree_is_that_of_the_files():
    (tree,) = (block for block in FENCE.findall(README) if "plainllama/  " in block)
    listed = [re.split("  +", line.strip())[0] for line in tree.splitlines()]
    named = [name for line in listed for name in line.split(", ")]
    there = [path.name for place in (ROOT, ROOT / "plainllama") for path in place.glob("[a-z]*.py")]
    assert sorted(named) == sorted([*there, "plainllama/", "config/", "tools/"])


def test_make_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for text in TEXTS.values():
        for line in blocks(text) + spans(text):
            if match := re.match(r"make ([a-z-]+)", line.strip()):
                assert re.search(rf"^{match[1]}:", makefile, re.MULTILINE), match[1]


def test_extras_that_are_named_exist():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for text in TEXTS.values():
        for names in re.findall(r'-e "\.\[([\w,]+)\]"|--extra (\w+)', text):
            for name in "".join(names).split(","):
                assert re.search(rf"^{name} = \[", project, re.MULTILINE), name


def test_the_readme_is_read_in_a_sitting():
    lines = README.splitlines()
    assert len(lines) <= 130
    assert [line for line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_documents_name_no_package_index():
    assert not re.search(r"pypi\.org|pythonhosted|npmjs|debian\.org", "".join(TEXTS.values()))
