"""What a run begins with: its settings, its data, and new weights or those of a checkpoint.

choose_start(cls, files, flags)   a run's settings, and what it begins with
fit_to_data(config, start, ...)   its data, once settings, weights, data and machine fit each other
load_start(config, start, ...)    its model
"""

import math
import os
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from model import LLaMaTransformer, ModelConfig
from plainllama.architecture import check_architecture
from plainllama.chat import find_template
from plainllama.checkpoint import checkpoints, read_state, remove_leftovers, step_of, verify_sealed
from plainllama.data import Dataset, is_locked, lock, verify_dataset
from plainllama.families import base_of, read_config, resolved, told_keys
from plainllama.huggingface import load_model, weight_files
from plainllama.lora import add_adapters, init_adapters
from plainllama.machine import Machine, check_memory, count_parameters, new_model
from plainllama.metrics import val_losses
from plainllama.mixture import load_data
from plainllama.settings import Values, build, fits, nearest, read_json, sha256
from plainllama.terminal import UserError, say
from plainllama.tokenizer import TURNS, load_tokenizer, with_turns

DECIDED = ("optimizer", "seed", "tokens_per_step", "max_seq_len")  # resuming keeps these
DECIDED += ("lora_rank", "lora_alpha", "lora_targets")
LOSS_CHUNKS = 8  # with chunked_loss, logits are there for this part of a micro-step's tokens
Config = TypeVar("Config", bound=ModelConfig)


class Start(NamedTuple):
    """What a run begins with: `directory` has its weights, unless they are new."""

    kind: Literal["new", "weights", "resume", "finished"]
    directory: Path | None = None


def choose_start(cls: type[Config], files: Values, flags: Values) -> tuple[Config, Start]:
    """Return a run's settings and what it begins with, by what is asked for and what out_dir holds.

    `files` are the settings of config files, which a resumed run has already, `flags` those of the
    command line. UserError where what is asked for and what is there contradict each other.
    """
    given = changed_by(flags, files)
    out_dir = Path(given.get("out_dir", cls.out_dir))
    resume, eval_only, weights = map(given.get, ("resume", "eval_only", "init_from"))
    if not eval_only and is_locked(out_dir / ".lock"):
        lock(out_dir / ".lock", str(out_dir))  # which says so
    if not eval_only and (out_dir / "snapshots").is_symlink():
        raise UserError(f"{out_dir}/snapshots is a link: nothing is written through one; delete it")
    saved = checkpoints(out_dir)
    for path in out_dir.glob("step_*"):
        if step_of(path) >= 0 and path.is_dir() and path not in saved:
            raise UserError(f"{path} is damaged: it has no config.json; delete it to go on")
    if saved and (resume or (eval_only and not weights)):
        return go_on(cls, saved[-1], flags)
    if eval_only and not weights:
        raise UserError(f"out_dir={out_dir} has no checkpoint to evaluate")
    if saved and not eval_only:
        raise UserError(
            f"out_dir={out_dir} holds a run ({saved[-1].name}): add --resume to continue it, "
            "or choose another --out_dir"
        )
    if resume and not eval_only:
        began = begun_before(cls, out_dir, flags)
        if began:
            # Its windows stay as long as they were, whatever context the base has.
            return begin(build(cls, began | {"resume": False}), {*flags, "max_seq_len"})
    return begin(build(cls, given | {"resume": False}), {*given})


def go_on(cls: type[Config], checkpoint: Path, flags: Values) -> tuple[Config, Start]:
    """Return the settings with which a run goes on: its own, but for the flags."""
    state, path = read_state(checkpoint), checkpoint / "train_state" / "state.json"
    way_out = f"train anew, or go on from its weights alone with --init_from={checkpoint}"
    began = check_settings(cls, state["config"], path, way_out)
    began = began | {"out_dir": str(checkpoint.parent)}  # the directory may have been renamed
    config = build(cls, changed_by(flags, began))
    config = adopt_shape(config, checkpoint, {*flags, "max_seq_len"})
    if config.eval_only:
        return config, Start("resume", checkpoint)
    for key in DECIDED:
        if getattr(config, key) != began[key]:
            raise UserError(
                f"{key}={getattr(config, key)} cannot continue {checkpoint}, which has "
                f"{key}={began[key]}: leave it out, or begin a new run with "
                f"--init_from={checkpoint}"
            )
    step = state["step"]
    if config.max_steps < step and not config.epochs:
        raise UserError(
            f"max_steps={config.max_steps}, but {checkpoint} is past that; "
            f"--max_steps={2 * step} would go on"
        )
    changed = [
        key for key in flags if flags[key] != began[key] and key not in ("resume", "out_dir")
    ]
    if changed:
        shown = ", ".join(f"{key} {began[key]} → {flags[key]}" for key in changed)
        say(f"changed on resume: {shown}")
    done = step == config.max_steps and step in val_losses(checkpoint.parent)
    if not done or "epochs" in flags:
        return config, Start("resume", checkpoint)
    remove_leftovers(checkpoint.parent)
    say(f"{checkpoint} is the end of the run; --max_steps={2 * step} would go on")
    return config, Start("finished", checkpoint)


def begin(config: Config, given: set[str]) -> tuple[Config, Start]:
    """Return the settings of a new run, of which some were given, and what it begins with."""
    if config.init_from in ("resume", "scratch"):
        raise UserError(
            f"init_from={config.init_from}: it takes a directory; to continue a run: --resume"
        )
    start = Start("new")
    if config.init_from:
        newest = checkpoints(Path(config.init_from))[-1:]  # if it is a run
        config = replace(config, init_from=str((newest or [config.init_from])[0]))
        start = Start("weights", Path(config.init_from))
        config = adopt_shape(config, base_of(start.directory), given)
    elif config.lora_rank:
        raise UserError(f"lora_rank={config.lora_rank} tunes a model that exists: --init_from=DIR")
    if not config.eval_only:
        check_architecture(config)
    return config, start


def begun_before(cls: type[Config], out_dir: Path, flags: Values) -> Values:
    """Return the settings of a run that has no checkpoint yet, but for the flags.

    UserError where there is none either, unless torchrun may restart the same command line: {}.
    """
    path = out_dir / "settings.json"
    if path.is_file():
        began = check_settings(cls, read_json(path), path, f"delete {out_dir}, and train anew")
        say(f"{out_dir} has no checkpoint yet: its run begins again, with its settings")
        return changed_by(flags, began | {"out_dir": str(out_dir)})  # it may have been renamed
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        return {}
    close = nearest(str(out_dir), [str(path.parent) for path in out_dir.parent.glob("*/step_*")])
    raise UserError(f"out_dir={out_dir} holds no run to resume{close or ': leave --resume out'}")


def changed_by(flags: Values, settings: Values) -> Values:
    """Return settings of config files, or of a run that began, but for the flags."""
    if "max_steps" in flags:
        settings = settings | {"epochs": 0.0}  # unless a flag asks for them, too
    return settings | flags


def check_settings(cls: type[Config], began: Values, path: Path, way_out: str) -> Values:
    """Return the settings that a file has for a run; UserError unless they are all that one has."""
    types = {field.name: field.type for field in fields(cls)}
    for key in types | began:
        if key not in types or not fits(began.get(key), types[key]):
            odd = f"{key}={began.get(key)!r}"
            raise UserError(f"{path} is damaged, or of another version, by its {odd}: {way_out}")
    return began


def adopt_shape(config: Config, directory: Path, given: set[str]) -> Config:
    """Return config with the model's shape; UserError if a key that was given contradicts it."""
    shape, known = read_config(directory), told_keys(directory) - {"max_seq_len", "multiple_of"}
    asked, has = asdict(resolved(config)), asdict(resolved(shape))
    different = [key for key in has if key in known and asked[key] != has[key]]
    for key in different:
        if key in given:
            raise UserError(
                f"{key}={asked[key]}, but the model in {directory} has {key}={has[key]}: "
                f"leave {key} out"
            )
    length = config.max_seq_len if "max_seq_len" in given else shape.max_seq_len
    if length < shape.max_seq_len and shape.position == "rope":
        say(f"trained on windows of {length}; the model keeps its context of {shape.max_seq_len:,}")
    if different:  # else what was asked for, such as n_kv_heads=0, stays as it was asked for
        config = replace(config, **{k: v for k, v in asdict(shape).items() if k in known})
    return replace(config, max_seq_len=length)


def fit_to_data(config: Any, start: Start, machine: Machine) -> tuple[Any, Dataset]:
    """Return config with the vocabulary of its data, and the data.

    UserError if data, weights and settings do not fit each other, or memory could never hold them.
    """
    data = open_data(config, start)
    config = replace(config, vocab_size=max(config.vocab_size, data.vocab_size))
    if config.epochs:
        tokens = config.epochs * data.epoch_tokens(config.max_seq_len)
        config = replace(config, max_steps=math.ceil(tokens / config.tokens_per_step))
    count_micro_steps(config, machine.world_size)
    parameters = count_parameters(config)
    what = f"a step of tokens_per_step={config.tokens_per_step:,}, batch_size="
    what += f"{config.batch_size:,} and {parameters:,} parameters"
    check_memory(least_memory(config, parameters, machine), what, machine.device)
    return config, data


def least_memory(config: Any, parameters: int, machine: Machine) -> int:
    """Return bytes that a step takes in any case; what it takes beyond depends on its kernels."""
    # Weights and, unless frozen, gradients and AdamW's two moments, all fp32.
    state = (4 if config.lora_rank or config.eval_only else 16) * parameters
    shares = machine.mesh.size(-1) if machine.mesh else 1
    logits = config.vocab_size / (LOSS_CHUNKS if config.chunked_loss else 1)
    blocks = 0 if config.activation_checkpointing or config.eval_only else config.n_layers
    values = logits + blocks * (3 * config.n_embd + 2 * config.hidden_width)  # of a token
    activations = 2 * config.batch_size * config.max_seq_len * values  # bfloat16
    windows = 64 * (config.tokens_per_step // config.max_seq_len)  # to choose them
    return state // shares + int(activations) + windows


def count_micro_steps(config: Any, world_size: int) -> int:
    """Derive the micro-steps of a step; UserError with the nearest tokens_per_step that fit."""
    tokens = config.batch_size * config.max_seq_len * world_size
    count, remainder = divmod(config.tokens_per_step, tokens)
    if remainder:
        near = " or ".join(f"{n * tokens:,}" for n in (count, count + 1) if n)
        raise UserError(
            f"tokens_per_step={config.tokens_per_step:,} is no multiple of {tokens:,} = "
            f"{config.batch_size} sequences (batch_size) × {config.max_seq_len:,} × {world_size} "
            f"processes: take {near}, or another batch_size"
        )
    return count


def open_data(config: Any, start: Start) -> Dataset:
    """Open the prepared data; UserError if settings or weights do not fit it, or it is damaged."""
    dataset = load_data(config.data_dir)
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        for part in dataset.parts():
            verify_dataset(part, again=config.eval_only)
        if start.directory:
            verify_sealed(start.directory, weights_alone=start.kind == "weights")
        goes_on = start.kind == "resume" and not config.eval_only
        if goes_on and base_sums(config) != read_state(start.directory).get("base", []):
            raise UserError(
                f"init_from={config.init_from} no longer has the weights beside which "
                f"{start.directory} was trained: --init_from=DIR says where they are"
            )
    if start.directory:
        check_tokenizer(base_of(start.directory), dataset)
    if start.kind == "resume" and read_state(start.directory)["data"] != dataset.sha256:
        raise UserError(
            f"{config.data_dir} is not the data that {start.directory} was trained on, in the same "
            f"order and shares; --init_from={start.directory} begins a new run with its weights"
        )
    unused = config.vocab_size - dataset.vocab_size  # ids, of which pretrained models have some
    may_lack = start.kind == "weights" and dataset.conversations
    least = -len(TURNS) if may_lack else 0  # check_tokenizer knows which they are
    if config.vocab_size and (unused < least or (unused > 0 and start.kind == "new")):
        raise UserError(
            f"vocab_size={config.vocab_size}, but {config.data_dir} has {dataset.vocab_size}: "
            "prepare the data with the model's tokenizer, or leave vocab_size out"
        )
    check_lengths(dataset, config.max_seq_len)
    return dataset


def check_lengths(dataset: Dataset, length: int) -> None:
    """Raise a UserError unless all that is trained or validated by itself has windows, or rows."""
    if dataset.conversations:
        dataset.rows("train", length)
        for part in dataset.parts():
            part.rows("val", length)
        return
    read = [("train", source) for source in dataset.sources()]
    for split, part in [*read, *(("val", part) for part in dataset.parts())]:
        if part.tokens[split] <= length:
            raise UserError(
                f"{part.path(split)} has {part.tokens[split]:,} tokens, less than a window "
                f"of max_seq_len + 1 = {length + 1:,}: lower max_seq_len, or prepare more text"
            )


def base_sums(config: Any) -> list[str]:
    """Return the checksums of the files of init_from beside whose weights adapters are trained."""
    files = weight_files(Path(config.init_from)) if config.lora_rank else []
    return [sha256(file) for file in files if file.is_file()]


def load_start(config: Any, start: Start, machine: Machine) -> LLaMaTransformer:
    """Return the model that a run begins with, or the base of its adapters with untrained ones."""
    if start.kind == "new":
        return new_model(config, machine)
    is_adapted = config.lora_rank > 0 and not config.eval_only

    def share_out(model: LLaMaTransformer) -> None:
        if is_adapted:
            add_adapters(model, config)
        machine.share_out(model)

    directory = Path(config.init_from) if is_adapted else start.directory
    may_change = start.kind == "weights" and not is_adapted and not config.eval_only
    shape, words = config if may_change else None, {"vocab_size": config.vocab_size}
    model = load_model(directory, config.max_seq_len, machine.device, shape, share_out, **words)
    init_adapters(model)
    return model


def check_tokenizer(directory: Path, dataset: Dataset) -> None:
    """Raise a UserError unless the weights in a directory were trained on the dataset's ids.

    Conversations may have the words of TURNS besides, and have the model's template if it has one.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return
    way_out = f"prepare the data with --tokenizer={path}"
    tokenizer = load_tokenizer(path)
    same = tokenizer.gives_ids_of(dataset.tokenizer)
    if dataset.conversations and not same:
        same = with_turns(tokenizer).gives_ids_of(dataset.tokenizer)
    if not same:
        raise UserError(f"{dataset.data_dir} has another tokenizer than {directory}: {way_out}")
    template = find_template(directory, tokenizer) if dataset.conversations else None
    if template and template.source != dataset.template.source:
        raise UserError(f"{dataset.data_dir} has another chat template than {directory}: {way_out}")
