"""The loader of settings: what files and flags may say, what is refused, and how a stage ends."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

from plainllama.settings import load
from plainllama.terminal import UserError, note, run_main, say

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Settings:
    """What the tests set."""

    # numbers
    n_layers: int = 6  # Blocks, one above the other.
    lr: float = 1e-3  # Peak learning rate.
    # choices
    warm_up: bool = True  # Begin slowly.
    resume: bool = False  # Go on.
    name: str = "run"  # What to call it.
    kind: Literal["bpe", "byte"] = "bpe"  # Which tokenizer.
    stop: tuple[str, ...] = ()  # Where to stop, 100% certain.

    def __post_init__(self) -> None:
        if self.n_layers == 13:
            raise ValueError(f"n_layers={self.n_layers} brings bad luck")


@dataclass(frozen=True)
class Inputs:
    """A stage that reads files."""

    # input
    inputs: tuple[str, ...] = ()  # Files, - is stdin.
    workers: int = 1  # Processes.


@dataclass(frozen=True)
class Longer(Settings):
    """Settings and more."""

    # more
    depth: int = 1  # How deep.


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A function that writes a config file in a fresh working directory and returns its path."""
    monkeypatch.chdir(tmp_path)
    Path("config").mkdir()

    def write(text: str, name: str = "config/mine.py") -> str:
        Path(name).write_text(text, encoding="utf-8")
        return name

    return write


def refused(*argv: str, cls: type = Settings) -> str:
    """Return the one line with which `argv` is refused."""
    with pytest.raises(UserError) as caught:
        load(cls, argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def printed(*argv: str, cls: type = Settings) -> str:
    """Return what load prints before it exits with 0."""
    with redirect_stdout(io.StringIO()) as output, pytest.raises(SystemExit) as caught:
        load(cls, argv)
    assert caught.value.code == 0
    return output.getvalue()


# --- What is accepted -------------------------------------------------------------------------


def test_flags_beat_later_files_beat_earlier_files_beat_defaults(write):
    first = write("n_layers = 1\nlr = 0.1\nname = 'first'", "first.py")
    second = write("n_layers = 2\nlr = 0.2", "second.py")
    assert load(Settings, []) == Settings()
    assert load(Settings, ["--n_layers=3", first, second]) == Settings(3, 0.2, name="first")
    assert load(Settings, [second, first]) == Settings(1, 0.1, name="first")


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--warm-up=False", {"warm_up": False}),
        ("--warm_up=false", {"warm_up": False}),
        ("--no-warm-up", {"warm_up": False}),
        ("--no-warm-up --warm-up", {"warm_up": True}),
        ("--resume", {"resume": True}),
        ("--resume=1 --n-layers 2", {"resume": True, "n_layers": 2}),
        ("--n_layers=2 --n_layers=3", {"n_layers": 3}),
        ("--n_layers -3", {"n_layers": -3}),
        ("--lr=-1e-3", {"lr": -1e-3}),
        ("--name=a=b", {"name": "a=b"}),
        ("--name -x", {"name": "-x"}),
        ("--name=--lr=2", {"name": "--lr=2"}),
        ("--name=", {"name": ""}),
        ("--name=None", {"name": "None"}),
        ("--kind byte", {"kind": "byte"}),
        ("--kind=byte --kind=bpe", {"kind": "bpe"}),
        ("--stop=a --resume --stop -c", {"resume": True, "stop": ("a", "-c")}),
    ],
)
def test_flags(words, expected):
    assert load(Settings, words.split()) == Settings(**expected)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("n_layers = 2 * 3 * 4  # blocks", {"n_layers": 24}),
        ("import math\n_half = 0.5\nlr = math.sqrt(_half**2)", {"lr": 0.5}),
        ("lr = 1", {"lr": 1.0}),
        ("warm_up = 1 > 2\nname = 'é\\n--x'", {"warm_up": False, "name": "é\n--x"}),
        ("stop = ('a', '-b')", {"stop": ("a", "-b")}),
    ],
)
def test_config_files(write, text, expected):
    assert load(Settings, [write(text)]) == Settings(**expected)


def test_flags_replace_the_tuple_of_a_file(write):
    assert load(Settings, [write("stop = ('a', 'b')"), "--stop=c"]).stop == ("c",)


def test_inputs_are_the_words_that_are_no_flags():
    config = load(Inputs, ["a.txt", "--workers", "2", "-", "b c.txt"])
    assert config == Inputs(("a.txt", "-", "b c.txt"), workers=2)
    assert load(Inputs, []) == Inputs()


@trials(max_examples=15, deadline=None, derandomize=True)
@given(
    st.builds(
        Settings,
        n_layers=st.integers(min_value=14),
        lr=st.floats(allow_nan=False, allow_infinity=False),
        warm_up=st.booleans(),
        name=st.text(),
        kind=st.sampled_from(["bpe", "byte"]),
        stop=st.lists(st.text(), max_size=2).map(tuple),
    )
)
def test_printed_config_is_a_config_file_of_the_same_settings(tmp_path_factory, config):
    scalars = [f"--{key}={value}" for key, value in asdict(config).items() if key != "stop"]
    text = printed("--print_config", *scalars, *(f"--stop={text}" for text in config.stop))
    path = tmp_path_factory.getbasetemp() / "printed.py"
    path.write_text(text, encoding="utf-8")
    assert load(Settings, [str(path)]) == config


@pytest.mark.parametrize("flag", ["--print_config", "--print-config"])
def test_printed_config_sums_up_files_and_flags(write, flag):
    text = printed("--lr=2", write("lr = 1\nn_layers = 3"), flag)
    assert load(Settings, [write(text)]) == Settings(3, 2.0)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_each_key_with_its_meaning_and_default(flag):
    text = printed("--n_layers=3", flag)
    lines = [line for line in text.splitlines() if "--" in line]
    for words in [
        ("--n_layers INT", "Blocks, one above the other.", "6"),
        ("--lr FLOAT", "Peak learning rate.", "0.001"),
        ("--warm_up", "Begin slowly.", "True"),
        ("--name STR", "What to call it.", "run"),
        ("--kind {bpe,byte}", "Which tokenizer.", "bpe"),
        ("--stop STR", "Where to stop, 100% certain."),
    ]:
        assert [line for line in lines if all(word in line for word in words)], text


# --- What is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--n_layer=3", ["--n_layer", "did you mean --n_layers?"]),
        ("--warm-upp", ["--warm_upp", "did you mean --warm_up?"]),
        ("--zzz=3", ["--zzz", "--help"]),
        ("--no-name", ["--no_name"]),
        ("--n_layers many", ["--n_layers takes a whole number, not 'many'"]),
        ("--lr=fast", ["--lr takes a number, not 'fast'"]),
        ("--warm_up=maybe", ["--warm_up", "'maybe'", "True", "False"]),
        ("--kind=bytes", ["--kind", "'bytes'", "'bpe', 'byte'"]),
        ("--lr=nan", ["--lr takes a number, not 'nan'"]),
        ("--lr=inf", ["--lr takes a number, not 'inf'"]),
        ("--lr", ["--lr needs a value"]),
        ("--lr --name=x", ["--lr needs a value"]),
        ("--n_layers=13", ["n_layers=13 brings bad luck"]),
        ("config/minr.py", ["config/minr.py", "did you mean config/mine.py?"]),
        ("nothing/like/it", ["no config file 'nothing/like/it'"]),
        ("mine", ["no config file 'mine'", "did you mean config/mine.py?"]),
        ("-lr=3", ["no config file '-lr=3'", "did you mean --lr=3?"]),
        ("--name=caf\udce9", ["--name takes UTF-8 text, not 'caf\\udce9'"]),
        ("-", ["no config file '-'"]),
    ],
)
def test_flags_are_refused_on_one_line(write, words, expected):
    write("")
    message = refused(*words.split())
    assert [word for word in expected if word not in message] == [], message


@pytest.mark.parametrize(
    "text, expected",
    [
        ("n_layer = 3", ["n_layer ", "did you mean n_layers?"]),
        ("zzz = 3", ["zzz", "--help"]),
        ("n_layers = 3.0", ["n_layers = 3.0", "n_layers takes a whole number"]),
        ("n_layers = True", ["n_layers = True", "n_layers takes a whole number"]),
        ("lr = '0.1'", ["lr = '0.1'", "lr takes a number"]),
        ("lr = 10**400", ["lr takes a number"]),
        ("warm_up = 1", ["warm_up = 1", "warm_up takes True or False"]),
        ("name = None", ["name = None", "name takes UTF-8 text"]),
        ("kind = 'bytes'", ["'bytes'", "'bpe', 'byte'"]),
        ("n_layers =", ["SyntaxError", "line 1"]),
        ("lr = 1\nname = nmae", ["NameError", "nmae"]),
        ("n_layers = 13", ["n_layers=13 brings bad luck"]),
    ],
)
def test_config_files_are_refused_on_one_line(write, text, expected):
    message = refused(write(text))
    named = [] if "bad luck" in message else ["config/mine.py"]  # a check of several sources' sum
    assert [word for word in named + expected if word not in message] == [], message


# --- How a stage ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error, rank, code, line",
    [
        (UserError("lr=2\n  is too much"), "0", 2, "error: lr=2 is too much\n"),
        (UserError("no"), "3", 2, "error (rank 3): no\n"),
        (FileNotFoundError(2, "No such file", "x"), "0", 2, "error: x cannot be found, or made\n"),
        (OSError(19, "No such device"), "0", 2, "error: [Errno 19] No such device\n"),
        (UserError("no \x1b[31mred\x9b"), "0", 2, "error: no \\x1b[31mred\\x9b\n"),
        (KeyboardInterrupt(), "0", 130, "stopped by Ctrl-C\n"),
    ],
)
def test_a_stage_ends_a_mistake_with_one_line_and_an_exit_code(
    capsys, monkeypatch, error, rank, code, line
):
    monkeypatch.setenv("RANK", rank)

    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_main(main)
    assert caught.value.code == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: np.empty(2**55),
        lambda: torch.empty(2**55),
        lambda: bytearray(2**60),
        lambda: [None] * 2**60,
    ],
)
def test_memory_that_is_not_there_is_one_line(capsys, ask):
    with pytest.raises(SystemExit) as caught:
        run_main(ask)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")


@pytest.mark.parametrize(
    "flag, open_it, line",
    [
        ("--out_dir=a.md", lambda: Path("a.md").mkdir(), "is a file, and a directory is needed"),
        ("--out=a.md/b", lambda: Path("a.md/b").mkdir(), "leads through a file, and a directory"),
        ("--file=no", lambda: Path(".tmp-no").read_bytes(), "cannot be found, or made"),
        (
            "--file=config",
            lambda: Path("config").read_bytes(),
            "is a directory, and a file is needed",
        ),
        ("--out=/proc/x", lambda: Path("/proc/x.partial").mkdir(), "cannot be found, or made"),
    ],
)
def test_a_file_that_is_no_file_is_named_by_its_flag(
    write, capsys, monkeypatch, flag, open_it, line
):
    write("", "a.md")
    monkeypatch.setattr(sys, "argv", ["stage.py", "--other=a", "--empty=", flag])
    with pytest.raises(SystemExit):
        run_main(open_it)
    assert capsys.readouterr().err.startswith(f"error: {flag} {line}")


def test_what_is_said_of_a_strangers_names_moves_no_terminal(capsys):
    name = "\x1b[31mred\x07\r\x9b2J\u202e\x7f"
    say(f"{name}\ttext\nline")
    note(f"{name}\nline")
    out, err = capsys.readouterr()
    shown = r"\x1b[31mred\x07\r\x9b2J\u202e\x7f"
    assert (out, err) == (f"{shown}\ttext\nline\n", f"{shown}\nline\n")


def test_printed_commands_work_as_they_stand(tmp_path):
    folder = tmp_path / "my folder"
    folder.mkdir()
    bare = os.environ | {"PATH": os.defpath, "PYTHONPATH": str(ROOT)}
    code = "from plainllama.terminal import command as c; print(c('runs.py', '--help', 'a b'))"
    for python in (sys.executable, os.path.relpath(sys.executable, folder)):
        call = [python, "-c", code]
        line = subprocess.run(call, cwd=folder, env=bare, capture_output=True, text=True).stdout
        assert line.endswith("runs.py --help 'a b'\n")
        done = subprocess.run(["sh", "-c", line], cwd=folder, env=bare, capture_output=True)
        assert done.returncode == 0 and done.stdout.startswith(b"usage: python ")


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (
            "ModuleNotFoundError(\"No module named 'torch'\", name='torch')",
            2,
            "No module named 'to",
        ),
        (
            "ImportError('torch.so: failed to map segment from shared object')",
            2,
            "torch.so: failed",
        ),
        ("MemoryError()", 2, "out of memory"),
        ("KeyboardInterrupt()", 130, "stopped by Ctrl-C"),
        ("ImportError(\"cannot import name 'x' from 'model'\")", 1, "Traceback"),
    ],
)
def test_what_goes_wrong_while_packages_are_imported_is_one_line(tmp_path, raised, code, line):
    (tmp_path / "torch.py").write_text(f"raise {raised}")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    call = [sys.executable, str(ROOT / "train.py"), "--help"]
    done = subprocess.run(call, capture_output=True, env=environment, text=True)
    assert done.returncode == code and done.stderr.removeprefix("error: ").startswith(line)
    assert len(done.stderr.splitlines()) == 1 or line == "Traceback"


@pytest.mark.parametrize("bug", [lambda: 1 / 0, lambda: int("x"), lambda: {}["key"]])
def test_a_bug_is_seen_with_its_traceback(bug):
    with pytest.raises((ZeroDivisionError, ValueError, KeyError)) as caught:
        run_main(bug)
    assert not isinstance(caught.value, UserError)


def test_output_that_cannot_be_encoded_or_written_is_no_bug():
    code = "from plainllama.terminal import run_main; run_main(lambda: print('8 × 東', input))"
    for encoding in ("ascii", "cp1252"):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        call = [sys.executable, "-c", code]
        done = subprocess.run(call, capture_output=True, cwd=ROOT, env=environment)
        assert (done.returncode, done.stderr) == (0, b"") and b"?" in done.stdout
    for closed in ("0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"):
        call = ["sh", "-c", f'exec "{sys.executable}" -c "{code}" {closed}']
        assert subprocess.run(call, capture_output=True, cwd=ROOT).returncode == 0
    call = ["sh", "-c", f'exec "{sys.executable}" -c "{code}" > /dev/full']
    done = subprocess.run(call, capture_output=True, cwd=ROOT, text=True)
    assert (done.returncode, done.stderr) == (2, "error: [Errno 28] No space left on device\n")


def test_names_of_other_trainers_lead_to_ours():
    from sample import SampleConfig
    from train import TrainConfig

    for theirs, ours in [
        ("--learning_rate=1", "--lr"),
        ("--block_size=8", "--max_seq_len"),
        ("--max_iters=8", "--max_steps"),
    ]:
        assert ours in refused(theirs, cls=TrainConfig)
    assert "--prompt" in refused("--start=KING", cls=SampleConfig)
    assert "--prompt='KING'" in refused("KING", cls=SampleConfig)


def test_help_groups_a_stages_own_keys_before_those_it_shares():
    text = printed("--help", cls=Longer)
    headings = [line for line in text.splitlines() if line.endswith(":")]
    assert headings == ["options:", "more:", "numbers:", "choices:"]
    assert "[CONFIG_FILE.py ...]" in text and "100% certain" in text


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_stage_ends_silently_when_its_reader_has_gone(lines):
    code = f"from plainllama.terminal import run_main; run_main(lambda: print('text\\n' * {lines}))"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=buffered,
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141
