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

import dataclasses
import difflib
import hashlib
import inspect
import json
import os
import re
import runpy
import shutil
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from plainllama.terminal import UserError

Config = TypeVar("Config")
Switch = Literal["auto", "yes", "no"]  # --key is yes, --no-key is no
Values = dict[str, Any]  # key -> value, of the keys that are set

OTHER_NAMES = {  # what nanoGPT, llama2.c and transformers call a key
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

HALF = re.compile("[\ud800-\udfff]")  # half surrogates: how Python reads bytes that are no UTF-8


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
    rest = iter(sys.argv[1:] if argv is None else argv)
    words: list[str] = []
    from_flags: Values = {}
    for word in rest:
        if word in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        key, text = split_flag(word, rest, keys | {"print_config": bool})
        if key == "print_config":
            from_flags[key] = True
            continue
        check_key(key, keys, "command line", "--")
        value = parse_value(key, text, keys[key])
        if isinstance(value, tuple):  # it may be given several times
            value = from_flags.get(key, ()) + value
        from_flags[key] = value
    from_files: Values = {}
    if words and "inputs" in keys:
        from_flags["inputs"] = tuple(words)
    else:
        for word in words:
            from_files |= read_config_file(cls, word)
    if from_flags.pop("print_config", False):
        for key, value in dataclasses.asdict(build(cls, from_files | from_flags)).items():
            print(f"{key} = {value!r}")
        sys.exit(0)
    return from_files, from_flags


def split_flag(word: str, rest: Iterator[str], keys: Values) -> tuple[str, str]:
    """Return the key and the value of a flag; the value may be the first word of the `rest`."""
    key, equals, text = word.removeprefix("--").partition("=")
    key = key.replace("-", "_")
    yes_no = {bool: ("True", "False"), Switch: ("yes", "no")}
    positive = key.removeprefix("no_")
    if equals:
        return key, text
    if keys.get(key) in yes_no:
        return key, yes_no[keys[key]][0]
    if keys.get(positive) in yes_no:
        return positive, yes_no[keys[positive]][1]
    if key in keys:
        text = next(rest, "--")
        if text.startswith("--"):
            raise UserError(f"--{key} needs a value: --{key}=VALUE")
    return key, text


def parse_value(key: str, text: str, hint: Any) -> Any:
    """Return the value of a flag of this type; UserError if the text is none."""
    value: Any = text
    if hint is bool:
        value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    elif hint in (int, float):
        with suppress(ValueError):
            value = hint(text)
    elif get_origin(hint) is tuple:
        value = (text,)
    if not fits(value, hint):
        raise UserError(f"--{key} takes {wanted(hint)}, not {text!r}")
    return value


def help_text(cls: type) -> str:
    """Return the keys of `cls` by groups: what each takes, its comment and its default."""
    hints = get_type_hints(cls)
    takes = "INPUT ..." if "inputs" in hints else "CONFIG_FILE.py ..."
    width = max(40, shutil.get_terminal_size().columns - 30)
    lines = [f"usage: python {sys.argv[0]} [{takes}] [--key=value ...]"]
    lines += ["", inspect.cleandoc(cls.__doc__ or "")]
    lines += ["", "options:", "  --help, -h                  show this text"]
    lines += ["  --print_config              print the settings as a config file"]
    heading = ""
    for field, group, comment in described_fields(cls):
        if field.name == "inputs":
            continue
        if group != heading:
            lines += ["", f"{group}:"]
            heading = group
        left = f"  --{field.name} {kind_of(hints[field.name])}"
        default = "" if field.default in ("", ()) else f" ({field.default})"
        first, *more = textwrap.wrap(comment + default, width)
        lines.append(f"{left:<29} {first}")
        lines += [" " * 30 + line for line in more]
    return "\n".join(lines)


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
    else:
        hint = nearest(key, keys, prefix + "{}") or "; --help lists the keys"
    raise UserError(f"unknown key {prefix}{key} ({where}){hint}")


def nearest(name: str, names: Iterable[str], form: str = "{}") -> str:
    """Return `; did you mean NAME?` for the closest of `names`, written like `form`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {form.format(close[0])}?" if close else ""


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


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
