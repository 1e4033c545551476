"""The settings of a stage: defaults < config files, left to right < --key=value.

A stage's settings are a frozen dataclass. The comment on a field's own line is its help, and a
comment on a line of its own names the group of the fields below it:

    # batch
    batch_size: int = 32  # sequences per micro-step and process

A config file is plain assignments (`n_layers = 12`), so arithmetic and comments work; names that
start with an underscore are its own. A flag is `--key=value` or `--key value`, `-` and `_` are the
same, and booleans and switches also take `--key` and `--no-key`. `--print_config` prints the
settings that would be used, in the form of a config file.
"""

import argparse
import dataclasses
import difflib
import errno
import hashlib
import inspect
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tqdm import tqdm

Config = TypeVar("Config")
Switch = Literal["auto", "yes", "no"]  # --key is yes, --no-key is no
Values = dict[str, Any]  # key -> value, of the keys that are set

OTHER_NAMES = {  # what nanoGPT, llama2.c and transformers call a key, or what to do instead
    "learning_rate": "lr",
    "warmup_iters": "warmup_steps",
    "max_iters": "max_steps",
    "num_train_epochs": "epochs",
    "block_size": "max_seq_len",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "gradient_accumulation_steps": "tokens_per_step",
    "per_device_train_batch_size": "batch_size",
    "eval_iters": "eval_tokens",
    "dataset": "data_dir",
    "start": "prompt",
    "model": "ckpt",
    "max_tokens": "max_new_tokens",
}

ROOT = Path(__file__).resolve().parents[1]
# What a terminal obeys, but tabs and line ends: controls, and what turns the direction of text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
HALF = re.compile("[\ud800-\udfff]")  # half surrogates: how Python reads bytes that are no UTF-8
NO_MEMORY = re.compile(
    "out of memory|allocat.* memory|not enough memory|bad_alloc|ALLOC_FAILED|start new thread", re.I
)
PATH_ERRORS = {  # what is wrong with a path, where the system's words do not say what was meant
    errno.EEXIST: "is a file, and a directory is needed",
    errno.ENOTDIR: "leads through a file, and a directory is needed",
    errno.EISDIR: "is a directory, and a file is needed",
    errno.ENOENT: "cannot be found, or made",
}


class UserError(ValueError):
    """A mistake of the user's: shown as one line, the exit code is 2."""


def load(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Fill the frozen dataclass `cls` from the command line; UserError names what is wrong."""
    from_files, from_flags = read_arguments(cls, argv)
    return build(cls, from_files | from_flags)


def build(cls: type[Config], values: Values) -> Config:
    """Return `cls(**values)`; what its __post_init__ refuses is a UserError."""
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def read_arguments(cls: type, argv: Sequence[str] | None = None) -> tuple[Values, Values]:
    """Return what the config files and what the flags of `argv` set.

    A word that is no flag is a config file, unless `cls` has a field `inputs`, which takes it.
    """
    keys = get_type_hints(cls)
    words, flags = split_words(keys, sys.argv[1:] if argv is None else argv)
    options = {key for key, _ in flags} & {"help", "print_config"}
    if "help" in options:
        make_parser(cls).print_help()
        sys.exit(0)
    from_files: Values = {}
    from_flags: Values = {}
    for key, text in flags:
        if key in options:
            continue
        check_key(key, keys, "command line", "--")
        if get_origin(keys[key]) is tuple:  # it may be given several times
            from_flags[key] = (*from_flags.get(key, ()), text)
        else:
            from_flags[key] = parse_value(key, text, keys[key])
    if words and "inputs" in keys:
        from_flags["inputs"] = tuple(words)
    elif words:
        for word in words:
            from_files |= read_config_file(cls, word)
    if "print_config" in options:
        for key, value in dataclasses.asdict(build(cls, from_files | from_flags)).items():
            print(f"{key} = {value!r}")
        sys.exit(0)
    return from_files, from_flags


def split_words(
    keys: dict[str, Any], argv: Sequence[str]
) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the words that are no flags, and the key and value of each flag."""
    words: list[str] = []
    flags: list[tuple[str, str]] = []
    rest = iter(argv)
    for word in rest:
        if not word.startswith("--") and word != "-h":
            words.append(word)
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        key = "help" if word == "-h" else key.replace("-", "_")
        yes_no = {bool: ("True", "False"), Switch: ("yes", "no")}
        if keys.get(key) in yes_no and not equals:
            value = yes_no[keys[key]][0]
        elif keys.get(key.removeprefix("no_")) in yes_no and not equals:
            key = key.removeprefix("no_")
            value = yes_no[keys[key]][1]
        elif key in keys and not equals:
            value = next(rest, "--")
            if value.startswith("--"):
                raise UserError(f"--{key} needs a value: --{key}=VALUE")
        flags.append((key, value))
    return words, flags


def parse_value(key: str, text: str, hint: Any) -> Any:
    """Return the value of a flag of this type; UserError if the text is none."""
    value: Any = text
    if hint is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    elif hint in (int, float):
        with suppress(ValueError):
            value = hint(text)
    if not fits(value, hint):
        raise UserError(f"--{key} takes {wanted(hint)}, not {text!r}")
    return value


def make_parser(cls: type) -> argparse.ArgumentParser:
    """Return what prints the help of `cls`: its keys by groups, with their comments."""
    hints = get_type_hints(cls)
    takes = "INPUT ..." if "inputs" in hints else "CONFIG_FILE.py ..."
    parser = argparse.ArgumentParser(
        usage=f"python %(prog)s [{takes}] [--key=value ...]",
        description=(cls.__doc__ or "").replace("%", "%%"),
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the settings as a config file and exit"
    )
    groups: dict[str, Any] = {}
    for field, group, comment in described_fields(cls):
        if field.name == "inputs":
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        default = "" if field.default in ("", ()) else f" ({field.default})"
        groups[group].add_argument(
            f"--{field.name}",
            metavar=kind_of(hints[field.name]),
            help=(comment + default).replace("%", "%%"),
        )
    return parser


def described_fields(cls: type) -> list[tuple[dataclasses.Field, str, str]]:
    """Return the fields of a dataclass with their groups and comments, its own before inherited."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    described: dict[str, tuple[dataclasses.Field, str, str]] = {}
    for owner in filter(dataclasses.is_dataclass, cls.__mro__):
        group = "settings"
        for line in inspect.getsource(owner).splitlines():
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            elif match := re.match(r"    (\w+): .*?  # (.+)", line):
                described.setdefault(match[1], (fields[match[1]], group, match[2]))
            elif line.startswith("    def "):
                break
    return list(described.values())


def kind_of(hint: Any) -> str:
    """Return how help writes what a key of this type takes."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    return {bool: "BOOL", int: "INT", float: "FLOAT"}.get(hint, "STR")


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of a key; NaN and infinity are no numbers here."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint and not (hint is str and HALF.search(value))


def wanted(hint: Any) -> str:
    """Return what a key of this type takes, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a tuple of texts"
    return {bool: "True or False", int: "a whole number", float: "a number"}.get(hint, "UTF-8 text")


def read_config_file(cls: type, path: str) -> Values:
    """Run the config file at `path` and return its assignments, names and types checked."""
    if not Path(path).is_file():
        raise UserError(f"no config file {path!r}{suggestion(path, get_type_hints(cls))}")
    try:
        assigned = runpy.run_path(path)
    except Exception as error:  # whatever the user's own code raises
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    keys = get_type_hints(cls)
    values: Values = {}
    for key, value in assigned.items():
        if key.startswith("_") or isinstance(value, types.ModuleType):
            continue
        check_key(key, keys, path)
        if not fits(value, keys[key]):
            raise UserError(f"{path}: {key} = {value!r}: {key} takes {wanted(keys[key])}")
        values[key] = float(value) if keys[key] is float else value
    return values


def suggestion(word: str, keys: Iterable[str]) -> str:
    """Return `; did you mean ...?` for a word that is no flag and no config file."""
    path = Path(word)
    if word.startswith("-"):
        return f"; did you mean -{word}?"
    named = ("data_dir",) if (path / "meta.json").is_file() else ("ckpt", "out_dir")
    for key in named if path.is_dir() else ():
        if key in keys:
            return f"; did you mean --{key}={word}?"
    if "prompt" in keys:
        return f"; a text to continue is --prompt={word!r}"
    known = [path.stem for path in Path("config").glob("[!_]*.py")]
    return nearest(path.stem, known, "config/{}.py")


def check_key(key: str, keys: Iterable[str], where: str, prefix: str = "") -> None:
    """Raise a UserError that suggests the nearest valid key, unless `key` is one of `keys`."""
    if key in keys:
        return
    other = OTHER_NAMES.get(key, "")
    if other in keys:
        hint = f"; here it is {prefix}{other}"
    elif " " in other:
        hint = f"; {other}"
    else:
        hint = nearest(key, keys, prefix + "{}") or "; --help lists the keys"
    raise UserError(f"unknown key {prefix}{key} ({where}){hint}")


def nearest(name: str, names: Iterable[str], form: str = "{}") -> str:
    """Return `; did you mean NAME?` for the closest of `names`, written like `form`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {form.format(close[0])}?" if close else ""


def run_main(main: Callable[[], None]) -> None:
    """Call a stage's `main`; what is no bug becomes one line on stderr and exit code 2."""
    set_up_output()
    if os.getpid() == 1:  # in a container, where a signal that is not asked for does nothing
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed stdout: nothing more to say, as in any filter
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        line = explain(error)
        if not line:
            raise
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        print(f"error{rank}: {line}", file=sys.stderr)
        sys.exit(2)


def explain(error: Exception) -> str:
    """Return one line on what the user did or the machine lacks; nothing for a bug of ours."""
    text = str(error)
    if is_out_of_memory(error):
        text = f"out of memory ({text[:160]}): ask for less, or close other programs"
    elif isinstance(error, OSError) and error.filename:
        path = re.sub(r"\.tmp-|\.partial$", "", str(error.filename))  # what is called so for a time
        flags = {word.partition("=")[2]: word for word in sys.argv[1:]}
        named = (flags[value] for value in flags if value and f"{path}/".startswith(f"{value}/"))
        text = f"{next(named, path)} {PATH_ERRORS.get(error.errno, error.strerror)}"
    elif not isinstance(error, UserError | OSError):
        return ""
    return printable(" ".join(text.split()))


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was lacking: Python's, NumPy's, or that of one of PyTorch's devices."""
    says_so = isinstance(error, RuntimeError | OSError) and NO_MEMORY.search(str(error))
    return isinstance(error, MemoryError) or bool(says_so)


def printable(text: str) -> str:
    """Return a text of which a terminal obeys nothing: names in it may be a stranger's."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def command(*words: object, program: str = "python") -> str:
    """Return a command that works as it stands: a program of this Python's environment, quoted.

    A word that names a file of the project is found from other directories, too.
    """
    folder = Path(sys.executable).parent
    if not (folder / program).exists():  # it is python3 alone
        program = Path(sys.executable).name
    found = shutil.which(program)
    if not found or not os.path.samefile(Path(found).parent, folder):
        program = os.path.relpath(folder / program)
    names = [str(word) for word in words]
    elsewhere = {name for name in names if os.path.isfile(ROOT / name) and not os.path.exists(name)}
    return shlex.join([program, *(str(ROOT / n) if n in elsewhere else n for n in names)])


def set_up_output() -> None:
    """Make sure that nothing printed can fail: no character, and no stream that is closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; UserError names the file when it is missing or damaged."""
    if not path.is_file():  # reading a pipe or a device in its place would never end
        raise UserError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: no JSON object")
    return content


def to_json(content: dict[str, Any]) -> bytes:
    """Return a JSON object as it is written: indented, UTF-8."""
    return (json.dumps(content, indent=2) + "\n").encode()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object."""
    with write_aside(path) as aside:
        aside.write_bytes(to_json(content))


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    """Give a place beside `path` to write to; at the end it takes that name, in full or not at all.

    A link in either place is replaced, and what it leads to is left alone.
    """
    aside = path.with_name(f".tmp-{path.name}")
    aside.unlink(missing_ok=True)
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def warning(what: str) -> Iterator[None]:
    """Make a warning of what a disk refuses inside, where the rest can do without it."""
    try:
        yield
    except OSError as error:
        note(f"warning: {what}: {error.strerror or error}")


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(text: str) -> None:
    """Print a line on stdout, above the progress bar, in the first process only.

    When stdout is gone or full, a run that listens to signals is asked to save and to end.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        tqdm.write(printable(text), file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.raise_signal(signal.SIGTERM)


def note(text: str) -> None:
    """Tell the user something that is no part of the output, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), file=sys.stderr, flush=True)
