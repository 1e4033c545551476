"""The one loader of settings: defaults < config files, left to right < --key=value.

A config file is plain assignments (`n_layers = 12`), so arithmetic and comments work; names that
start with an underscore are its own. A flag is `--key=value` or `--key value`, `-` and `_` are
the same, and booleans also take `--key` and `--no-key`. `--help` lists every key of the stage,
`--print_config` prints the settings that would be used, in the form of a config file.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import runpy
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro

Config = TypeVar("Config")
Values = dict[str, list[str]]  # key -> texts as on a command line, several for a tuple only

TYRO = (tyro.conf.FlagConversionOff, tyro.conf.UseAppendAction)
TRUTH = {"true": "True", "1": "True", "false": "False", "0": "False"}


def load(cls: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Fill the frozen dataclass `cls` from the command line; a ValueError names what is wrong."""
    from_files, from_flags = read_arguments(cls, argv)
    return build(cls, from_files | from_flags)


def read_arguments(cls: type, argv: Sequence[str] | None = None) -> tuple[Values, Values]:
    """Return what the config files and what the flags of `argv` set, keys checked against `cls`.

    A word that is no flag is a config file, unless `cls` has a field `inputs`, which takes it.
    """
    keys = get_type_hints(cls)
    files: Values = {}
    flags: Values = {}
    print_config = False
    words = iter(sys.argv[1:] if argv is None else argv)
    for word in words:
        if word in ("-h", "--help"):
            tyro.cli(cls, args=["--help"], config=TYRO, use_underscores=True)
        elif word in ("--print_config", "--print-config"):
            print_config = True
        elif not word.startswith("--"):
            if "inputs" in keys:
                flags.setdefault("inputs", []).append(word)
            else:
                files |= read_file(cls, word)
        else:
            key, equals, text = word[2:].partition("=")
            key = key.replace("-", "_")
            negated = key.removeprefix("no_")
            if key not in keys and keys.get(negated) is bool and not equals:
                key, equals, text = negated, "=", "False"
            check_key(key, keys, "command line", "--")
            if not equals:
                text = "True" if keys[key] is bool else next(words, "--")
                if text.startswith("--"):
                    raise ValueError(f"--{key} needs a value: --{key}=VALUE")
            several = flags.get(key, []) if keys[key] not in (bool, int, float, str) else []
            flags[key] = [*several, text]
    if print_config:
        for key, value in dataclasses.asdict(build(cls, files | flags)).items():
            print(f"{key} = {value!r}")
        sys.exit(0)
    return files, flags


def read_file(cls: type, path: str) -> Values:
    """Run the config file at `path` and return its assignments, names and types checked."""
    if not Path(path).is_file():
        close = nearest(path, [p.as_posix() for p in Path("config").glob("[!_]*.py")])
        raise ValueError(f"no config file {path!r}{close}")
    try:
        assigned = runpy.run_path(path)
    except Exception as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    keys = get_type_hints(cls)
    public = {
        key: value
        for key, value in assigned.items()
        if not key.startswith("_") and not isinstance(value, types.ModuleType)
    }
    for key, value in public.items():
        check_key(key, keys, path)
        kind = get_origin(keys[key]) or keys[key]
        choices = get_args(keys[key]) if kind is Literal else ()
        fits = type(value) is kind or (kind is float and type(value) is int) or value in choices
        if not fits:
            wanted = f"one of {choices}" if choices else kind.__name__
            raise ValueError(f"{path}: {key} = {value!r}: {key} takes {wanted}")
    return as_values(public)


def as_values(config: Any) -> Values:
    """Return a config (or a dict of settings) in the form that `build` takes."""
    settings = config if isinstance(config, dict) else dataclasses.asdict(config)
    return {
        key: [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        for key, value in settings.items()
    }


def build(cls: type[Config], values: Values) -> Config:
    """Turn texts into a `cls`; a ValueError names the key, its text and what the key takes."""
    keys = get_type_hints(cls)
    arguments = []
    for key, texts in values.items():
        for text in texts:
            text = TRUTH.get(text.lower(), text) if keys[key] is bool else text
            arguments.append(text if key == "inputs" else f"--{key}={text}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, args=arguments, config=TYRO, use_underscores=True)
    except SystemExit:
        sentence = unboxed(complaint.getvalue()).removeprefix("Error parsing ")
        raise ValueError(sentence.removeprefix(f"{cls.__name__}: ")) from None


def check_key(key: str, keys: Iterable[str], where: str, prefix: str = "") -> None:
    """Raise a ValueError that suggests the nearest valid key, unless `key` is one of `keys`."""
    if key not in keys:
        close = nearest(key, keys, prefix) or "; --help lists the keys"
        raise ValueError(f"unknown key {prefix}{key} ({where}){close}")


def nearest(name: str, names: Iterable[str], prefix: str = "") -> str:
    """Return `; did you mean NAME?` for the closest of `names`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def unboxed(box: str) -> str:
    """Return the first sentence of the frame that tyro draws around an error, on one line."""
    lines = (line.strip("│ ") for line in box.splitlines()[1:])
    sentence = itertools.takewhile(lambda line: not line.startswith(("─", "╰")), lines)
    return " ".join(line for line in sentence if line)


def run(main: Callable[[], None]) -> None:
    """Call a stage's `main`; a user's mistake becomes one line on stderr and exit code 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` closed stdout: nothing more to say, as in any filter
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        rank = f" (rank {os.environ['RANK']})" if os.environ.get("RANK", "0") != "0" else ""
        print(f"error{rank}:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
