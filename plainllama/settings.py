"""The settings of a stage: defaults < config files, left to right < --key=value.

A stage's settings are a frozen dataclass. The comment on a field's own line is its help, and a
comment on a line of its own names the group of the fields below it:

    # batch
    batch_size: int = 32  # sequences per micro-step and process

A config file is plain assignments (`n_layers = 12`), so arithmetic and comments work; names that
start with an underscore are its own. A flag is `--key=value` or `--key value`, `-` and `_` are the
same, and booleans also take `--key` and `--no-key`. `--print_config` prints the settings that would
be used, in the form of a config file.
"""

import argparse
import dataclasses
import difflib
import hashlib
import inspect
import json
import linecache
import os
import re
import runpy
import signal
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from tqdm import tqdm

Config = TypeVar("Config")
Values = dict[str, Any]  # key -> value, of the keys that are set

OTHER_NAMES = {  # what nanoGPT, llama2.c and transformers call a key, or what to do instead
    "learning_rate": "lr",
    "min_lr": "the rate falls to zero: --decay_fraction",
    "lr_decay_iters": "decay_fraction",
    "warmup_iters": "warmup_steps",
    "max_iters": "max_steps",
    "epochs": "there are no epochs: --max_steps",
    "num_train_epochs": "there are no epochs: --max_steps",
    "block_size": "max_seq_len",
    "max_position_embeddings": "max_seq_len",
    "dim": "n_embd",
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "gradient_accumulation_steps": "tokens_per_step",
    "micro_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "eval_iters": "eval_tokens",
    "dataset": "data_dir",
    "start": "prompt",
    "checkpoint": "ckpt",
    "model": "ckpt",
    "max_tokens": "max_new_tokens",
    "dropout": "there is no dropout: --weight_decay, or more text",
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
    print_config = "--print_config" in flags
    flags = [flag for flag in flags if flag != "--print_config"]
    parser = make_parser(cls)
    try:
        namespace, unknown = parser.parse_known_args(flags)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name} {error.message}") from None
    for flag in unknown:
        check_key(flag[2:].partition("=")[0], keys, "command line", "--")
    files: Values = {}
    from_flags = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(namespace).items()
    }
    if "inputs" in keys:
        from_flags |= {"inputs": tuple(words)} if words else {}
    else:
        for word in words:
            files |= read_file(cls, word)
    if print_config:
        for key, value in dataclasses.asdict(build(cls, files | from_flags)).items():
            print(f"{key} = {value!r}")
        sys.exit(0)
    return files, from_flags


def split_words(keys: dict[str, Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words that are no flags, and each flag as one word, `--key=value`."""
    words: list[str] = []
    flags: list[str] = []
    rest = iter(argv)
    for word in rest:
        if word in ("-h", "--help"):
            flags.append("--help")
        elif not word.startswith("--"):
            words.append(word)
        else:
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key not in keys and keys.get(key.removeprefix("no_")) is bool and not equals:
                key, equals, value = key.removeprefix("no_"), "=", "False"
            elif keys.get(key) is bool and not equals:
                equals, value = "=", "True"
            elif key in keys and not equals:
                equals, value = "=", next(rest, "--")
                if value.startswith("--"):
                    raise UserError(f"--{key} needs a value: --{key}=VALUE")
            flags.append(f"--{key}{equals}{value}")
    return words, flags


def make_parser(cls: type) -> argparse.ArgumentParser:
    """Return the parser of the flags of `cls`, whose help shows each field's comment."""
    takes = "INPUT ..." if "inputs" in get_type_hints(cls) else "CONFIG_FILE.py ..."
    parser = argparse.ArgumentParser(
        usage=f"python %(prog)s [{takes}] [--key=value ...]",
        description=(cls.__doc__ or "").replace("%", "%%"),
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--print_config", action="store_true", help="print the settings as a config file and exit"
    )
    groups: dict[str, Any] = {}
    hints = get_type_hints(cls)
    for field, group, comment in described_fields(cls):
        if field.name == "inputs":
            continue
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        hint = hints[field.name]
        several = get_origin(hint) is tuple
        default = "" if field.default in ("", ()) else f" ({field.default})"
        groups[group].add_argument(
            f"--{field.name}",
            action="append" if several else "store",
            type=converter(str if several else hint),
            metavar=kind_of(hint),
            help=(comment + default).replace("%", "%%"),
        )
    return parser


def described_fields(cls: type) -> list[tuple[dataclasses.Field, str, str]]:
    """Return the fields of a dataclass with their groups and comments, its own before inherited."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    described: dict[str, tuple[dataclasses.Field, str, str]] = {}
    for owner in cls.__mro__:
        if not dataclasses.is_dataclass(owner):
            continue
        group = "settings"
        try:  # by hand, for inspect.getsource() parses all of the file: 0.1 s at each start
            lines = linecache.getlines(inspect.getfile(owner))
        except (OSError, TypeError):  # it is typed in, and help lacks the comments
            continue
        begin = (f"class {owner.__name__}(", f"class {owner.__name__}:")
        first = next((n for n, line in enumerate(lines, 1) if line.startswith(begin)), len(lines))
        for line in map(str.rstrip, lines[first:]):
            if heading := re.fullmatch(r"    # (.+)", line):
                group = heading[1]
            elif match := re.match(r"    (\w+): .*?  # (.+)", line):
                if match[1] in fields:
                    described.setdefault(match[1], (fields[match[1]], group, match[2]))
            elif line.startswith("    def ") or re.match(r"\S", line):
                break
    for name, field in fields.items():
        described.setdefault(name, (field, "settings", ""))
    return list(described.values())


def kind_of(hint: Any) -> str:
    """Return how help writes what a key of this type takes."""
    if get_origin(hint) is Literal:
        return "{" + ",".join(get_args(hint)) + "}"
    return {bool: "BOOL", int: "INT", float: "FLOAT"}.get(hint, "STR")


def converter(hint: Any) -> Callable[[str], Any]:
    """Return the function from a flag's text to a value of this type."""

    def convert(text: str) -> Any:
        value: Any = text
        if hint is bool:
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
        elif hint in (int, float):
            try:
                value = hint(text)
            except ValueError:
                value = None
        if not fits(value, hint):
            raise argparse.ArgumentTypeError(f"takes {wanted(hint)}, not {text!r}")
        return value

    return convert


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value has the type of a key; NaN and infinity are no numbers here."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(part, str) for part in value)
    if hint is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is hint


def wanted(hint: Any) -> str:
    """Return what a key of this type takes, in words."""
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a tuple of texts"
    return {bool: "True or False", int: "a whole number", float: "a number"}.get(hint, "a text")


def read_file(cls: type, path: str) -> Values:
    """Run the config file at `path` and return its assignments, names and types checked."""
    if not Path(path).is_file():
        close = nearest(path, [p.as_posix() for p in Path("config").glob("[!_]*.py")])
        if "prompt" in get_type_hints(cls):
            close = f"; a text to continue is --prompt={path!r}"
        raise UserError(f"no config file {path!r}{close}")
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
        hint = nearest(key, keys, prefix) or "; --help lists the keys"
    raise UserError(f"unknown key {prefix}{key} ({where}){hint}")


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean NAME?` for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def run_main(main: Callable[[], None]) -> None:
    """Call a stage's `main`; a user's mistake becomes one line on stderr and exit code 2."""
    set_up_output()
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed stdout: nothing more to say, as in any filter
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:  # the disk's or the network's faults are no bugs of ours
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        print(f"error{rank}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


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
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no {path.name} in {path.parent}") from None
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
    path.write_bytes(to_json(content))


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
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except OSError:
        if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signal.raise_signal(signal.SIGTERM)


def note(text: str) -> None:
    """Tell the user something that is no part of the output, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
