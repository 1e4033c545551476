"""What a run begins with: its settings, its weights (new, pretrained or its own last) and data."""

import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from model import ModelConfig
from plainllama.data import Dataset, load_dataset, verify_dataset
from plainllama.families import family_of, read_config, resolved
from plainllama.files import verify_sealed
from plainllama.machine import say
from plainllama.run_directory import checkpoints, read_state, step_of
from plainllama.settings import UserError, build, fits, read_arguments
from plainllama.tokenizer import Tokenizer, load_tokenizer
from plainllama.trackers import check_installed

Config = TypeVar("Config", bound=ModelConfig)


class Start(NamedTuple):
    """What a run begins with; `directory` has the weights, unless they are new."""

    kind: Literal["new", "weights", "resume", "evaluate", "verify"]
    directory: Path | None = None


def choose_start(cls: type[Config], argv: list[str] | None = None) -> tuple[Config, Start]:
    """Return the settings, and what to begin with, by what the command line and out_dir say."""
    files, flags = read_arguments(cls, argv)
    asked = files | flags
    out_dir = asked.get("out_dir", cls.out_dir)
    weights, evaluate_only = asked.get("init_from"), asked.get("eval_only")
    saved = checkpoints(Path(out_dir))
    steps = [p for p in Path(out_dir).glob("step_*") if step_of(p) >= 0 and p.is_dir()]
    if broken := [path for path in steps if path not in saved]:
        raise UserError(f"{broken[0]} is damaged: it has no config.json; delete it to go on")
    if weights in ("resume", "scratch"):
        raise UserError(f"init_from={weights}: it takes a directory; to continue a run: --resume")
    kind = "verify" if asked.get("verify") else "evaluate" if evaluate_only else "resume"
    if saved and (asked.get("resume") or kind == "verify" or (evaluate_only and not weights)):
        config = continued(cls, saved[-1], out_dir, flags)
        step = step_of(saved[-1])
        if kind == "resume" and config.max_steps < step:
            raise UserError(
                f"max_steps={config.max_steps}, but {saved[-1]} is past that; "
                f"--max_steps={2 * step} would go on"
            )
        return config, Start(kind, saved[-1])
    config = build(cls, asked | {"resume": False})
    if kind == "verify":
        return config, Start(kind)
    if saved and not evaluate_only and not config.plan:
        raise UserError(
            f"out_dir={out_dir} holds a run ({saved[-1].name}): add --resume to continue it, "
            "or choose another --out_dir"
        )
    if weights:
        config = adopt_shape(config, Path(weights), {*asked})
        return config, Start("evaluate" if evaluate_only else "weights", Path(weights))
    if evaluate_only:
        raise UserError(f"out_dir={out_dir} has no checkpoint to evaluate")
    family_of(config)  # what could not be saved is refused before it is trained
    return config, Start("new")


def continued(cls: type[Config], checkpoint: Path, out_dir: str, flags: dict[str, Any]) -> Config:
    """Return the settings with which a run goes on: its own, but for the flags."""
    state = read_state(checkpoint)
    types = {field.name: field.type for field in fields(cls)}
    began = {k: v for k, v in state["config"].items() if k in types}  # others were renamed since
    wrong = [f"{key}={value!r}" for key, value in began.items() if not fits(value, types[key])]
    if wrong:
        raise UserError(f"{checkpoint}/train_state/state.json is damaged: {wrong[0]}")
    began |= {"out_dir": out_dir}  # which may have been renamed since
    config = adopt_shape(build(cls, began | flags), checkpoint, {*flags})
    if config.optimizer != began.get("optimizer", config.optimizer):
        raise UserError(f"optimizer={config.optimizer} cannot continue {checkpoint}: leave it out")
    changed = [k for k in flags if k in began and flags[k] != began[k]]
    changed = [k for k in changed if k not in ("resume", "eval_only", "verify", "plan", "out_dir")]
    if changed:
        what = ", ".join(f"{key} {began[key]} → {flags[key]}" for key in changed)
        say(f"changed on resume: {what}")
    return config


def adopt_shape(config: Config, directory: Path, given: set[str]) -> Config:
    """Return config with the model's shape; UserError if a key that was given contradicts it."""
    shape = read_config(directory)
    asked, has = asdict(resolved(config)), asdict(resolved(shape))
    for key in given & has.keys() - {"max_seq_len", "multiple_of"}:
        if asked[key] != has[key]:
            raise UserError(
                f"{key}={asked[key]}, but the model in {directory} has {key}={has[key]}: "
                f"leave {key} out"
            )
    length = config.max_seq_len if "max_seq_len" in given else shape.max_seq_len
    return replace(config, **asdict(shape) | {"max_seq_len": length})


def open_data(config: Any, start: Start) -> tuple[Dataset, Tokenizer]:
    """Open the prepared data and its tokenizer; UserError if settings or weights do not fit."""
    check_installed(config.tracker)
    dataset = load_dataset(Path(config.data_dir))
    tokenizer = load_tokenizer(Path(config.data_dir, "tokenizer.json"))
    source = start.directory
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        verify_dataset(dataset, again=config.verify, note=not config.plan)
        if source and start.kind in ("resume", "verify"):
            verify_sealed(source)
    if tokenizer.n_vocab != dataset.vocab_size:
        raise UserError(
            f"{config.data_dir} contradicts itself: its tokenizer.json has {tokenizer.n_vocab} "
            f"ids, its meta.json {dataset.vocab_size}"
        )
    if source:
        check_tokenizer(source, tokenizer, config.data_dir)
    if start.kind == "resume" and read_state(source)["data"] != dataset.sha256:
        raise UserError(f"{config.data_dir} is not the data that {source} was trained on")
    unused = config.vocab_size - dataset.vocab_size  # ids, of which pretrained models have some
    if config.vocab_size and (unused < 0 or (unused > 0 and not source)):
        raise UserError(
            f"vocab_size={config.vocab_size}, but {config.data_dir} has {dataset.vocab_size}: "
            "prepare the data with the model's tokenizer, or leave vocab_size out"
        )
    for split in ("train", "val"):
        if dataset.tokens[split] <= config.max_seq_len:
            raise UserError(
                f"{dataset.path(split)} has {dataset.tokens[split]:,} tokens, less than a window "
                f"of max_seq_len + 1 = {config.max_seq_len + 1:,}: lower max_seq_len, or prepare "
                "more text"
            )
    return dataset, tokenizer


def check_tokenizer(source: Path, tokenizer: Tokenizer, data_dir: str) -> None:
    """Raise a UserError unless the weights in `source` were trained on these very ids."""
    path = source / "tokenizer.json"
    if path.exists() and ids_of(load_tokenizer(path)) != ids_of(tokenizer):
        raise UserError(
            f"{data_dir} has another tokenizer than {source}: prepare the data with "
            f"--tokenizer={path}"
        )


def ids_of(tokenizer: Tokenizer) -> tuple:
    """Return all that decides which ids a text gets."""
    vocabulary = tokenizer.ranks, tokenizer.special_tokens, tokenizer.words
    return *vocabulary, tokenizer.pattern, tokenizer.nfc, tokenizer.begin_of_text
