"""Checkpoints: which a run has, what a run begins with, and how one is written and read back.

out/RUN/step_NNNNNN/              a Hugging Face model directory
    adapter/                            what LoRA has trained, as peft writes it
    train_state/optimizer.safetensors   the optimizers' state, each tensor as PARAMETER/KEY
    train_state/state.json              step, tokens, seconds, settings, and checksums of the data
    train_state/sha256.json             the checksums of all other files of the checkpoint
"""

import math
import os
import re
import shutil
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from model import LLaMaTransformer, ModelConfig
from plainllama.architecture import check_architecture
from plainllama.data import Dataset, load_dataset, verify_dataset
from plainllama.distributed import fill, rows_like
from plainllama.families import base_of, read_config, resolved, told_keys
from plainllama.huggingface import load_model, load_tensors, weight_files
from plainllama.lora import adapter_parameters, add_adapters, init_adapters
from plainllama.machine import Machine
from plainllama.metrics import val_losses
from plainllama.settings import UserError, Values, build, fits, read_json, say, sha256, write_json
from plainllama.tokenizer import load_tokenizer

MANIFEST = "train_state/sha256.json"
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets")
DECIDED = ("optimizer", "seed", "tokens_per_step", "max_seq_len", *ADAPTERS)  # resuming keeps them
Config = TypeVar("Config", bound=ModelConfig)


def step_of(checkpoint: Path) -> int:
    """Return the step in a checkpoint's name; -1 for any other name."""
    match = re.fullmatch(r"step_([0-9]+)", checkpoint.name)
    return int(match[1]) if match else -1


def checkpoints(out_dir: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    found = [path for path in out_dir.glob("step_*") if step_of(path) >= 0]
    return sorted((p for p in found if (p / "config.json").is_file()), key=step_of)


def last_written(checkpoint: Path) -> float:
    """Return when a checkpoint was written, by its own account, which copying does not change."""
    with suppress(UserError, LookupError, ValueError, TypeError):
        return float(read_json(checkpoint / "train_state" / "state.json")["saved_at"])
    return 0.0


def find_checkpoint(ckpt: str) -> Path:
    """Return the model's or adapter's directory that `ckpt` is, or a run's newest checkpoint.

    Without `ckpt`, the run in out/ whose newest checkpoint was written last.
    """
    root = Path(ckpt or "out")
    if any((root / name).is_file() for name in ("config.json", "adapter_config.json")):
        return root
    if saved := checkpoints(root):
        return saved[-1]
    newest = [steps[-1] for run in root.glob("*") if (steps := checkpoints(run))]
    if newest:
        return max(newest, key=lambda step: (last_written(step), step.parent.name))
    if not ckpt:
        raise UserError("no checkpoint under out/; train one: python train.py config/tiny.py")
    raise UserError(
        f"ckpt={ckpt} is neither a directory with a config.json nor one with such step_NNNNNN "
        "in it (pickles, .pt or .bin, are never read)"
    )


def last_checkpoint(out_dir: Path, before: float = math.inf) -> Path | str:
    """Return a run's newest checkpoint of a step below `before`, or "none"."""
    return next((p for p in checkpoints(out_dir)[::-1] if step_of(p) < before), "none")


def best_checkpoint(out_dir: Path) -> Path | None:
    """Return the checkpoint of the least validation loss, of equal ones the newest."""
    losses = val_losses(out_dir)
    evaluated = [path for path in checkpoints(out_dir) if step_of(path) in losses]
    return min(evaluated, key=lambda p: (losses[step_of(p)], -step_of(p)), default=None)


def prune(out_dir: Path, keep_last: int) -> None:
    """Delete all checkpoints but the newest keep_last and the best."""
    best = best_checkpoint(out_dir)
    for path in checkpoints(out_dir)[:-keep_last]:
        if path != best and not path.is_symlink():
            # Renamed first, so that a kill leaves no incomplete checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json: step, tokens, seconds, config, and sha256 of the data."""
    path = checkpoint / "train_state" / "state.json"
    state = read_json(path)
    kinds = {"step": int, "tokens": int, "seconds": float, "config": dict, "data": dict}
    for key, kind in kinds.items():
        if not fits(state.get(key), kind) or (kind in (int, float) and state[key] < 0):
            raise UserError(f"{path} is damaged: {key}={state.get(key)!r}")
    if state["step"] != step_of(checkpoint):
        raise UserError(f"{path} is damaged: step={state['step']} in {checkpoint.name}")
    return state


class Start(NamedTuple):
    """What a run begins with: `directory` has its weights, unless they are new."""

    kind: Literal["new", "weights", "resume", "finished"]
    directory: Path | None = None


def choose_start(cls: type[Config], files: Values, flags: Values) -> tuple[Config, Start]:
    """Return a run's settings and what it begins with, by what is asked for and what out_dir holds.

    `files` are the settings of config files, which a resumed run has already, `flags` those of the
    command line. UserError where what is asked for and what is there contradict each other.
    """
    given = files | flags
    out_dir = given.get("out_dir", cls.out_dir)
    saved = checkpoints(Path(out_dir))
    steps = [p for p in Path(out_dir).glob("step_*") if step_of(p) >= 0 and p.is_dir()]
    if broken := [path for path in steps if path not in saved]:
        raise UserError(f"{broken[0]} is damaged: it has no config.json; delete it to go on")
    weights, eval_only = given.get("init_from"), given.get("eval_only")
    if weights in ("resume", "scratch"):
        raise UserError(f"init_from={weights}: it takes a directory; to continue a run: --resume")
    if saved and (given.get("resume") or (eval_only and not weights)):
        config, step = continued(cls, saved[-1], flags), step_of(saved[-1])
        if step == config.max_steps and step in val_losses(Path(out_dir)) and not eval_only:
            say(f"{saved[-1]} is the end of the run; --max_steps={2 * step} would go on")
            return config, Start("finished", saved[-1])
        return config, Start("resume", saved[-1])
    config = build(cls, given | {"resume": False})
    asked = [key for key in ADAPTERS if key in given]
    if asked and not config.lora_rank:
        raise UserError(
            f"{asked[0]}={given[asked[0]]}, but adapters have a lora_rank of at least 1: give one, "
            "or leave this out to train all weights"
        )
    if config.lora_rank and config.optimizer == "muon":
        raise UserError(f"lora_rank={config.lora_rank}: adapters are trained by optimizer=adamw")
    if eval_only and not weights:
        raise UserError(f"out_dir={out_dir} has no checkpoint to evaluate")
    if saved and not eval_only:
        raise UserError(
            f"out_dir={out_dir} holds a run ({saved[-1].name}): add --resume to continue it, "
            "or choose another --out_dir"
        )
    start = Start("weights", Path(weights)) if weights else Start("new")
    if weights:
        config = adopt_shape(config, base_of(Path(weights)), {*given})
    elif config.lora_rank:
        raise UserError(f"lora_rank={config.lora_rank} tunes a model that exists: --init_from=DIR")
    if not eval_only:
        check_architecture(config)
    return config, start


def continued(cls: type[Config], checkpoint: Path, flags: Values) -> Config:
    """Return the settings with which a run goes on: its own, but for the flags."""
    state = read_state(checkpoint)
    types = {field.name: field.type for field in fields(cls)}
    began = state["config"]
    wrong = [key for key in began if key not in types or not fits(began[key], types[key])]
    if wrong or began.keys() != types.keys():
        odd = (wrong or sorted(types.keys() - began.keys()))[0]
        raise UserError(
            f"{checkpoint}/train_state/state.json is damaged, or of another version, by its "
            f"{odd}={began.get(odd)!r}: train anew, or go on from its weights alone with "
            f"--init_from={checkpoint}"
        )
    began = began | {"out_dir": str(checkpoint.parent)}  # the directory may have been renamed
    config = adopt_shape(build(cls, began | flags), checkpoint, {*flags})
    for key in DECIDED:
        value = getattr(config, key)
        if value != began[key] and not config.eval_only:
            raise UserError(
                f"{key}={value} cannot continue {checkpoint}, which has {key}={began[key]}: leave "
                f"it out, or begin a new run with --init_from={checkpoint}"
            )
    step = state["step"]
    if config.max_steps < step and not config.eval_only:
        raise UserError(
            f"max_steps={config.max_steps}, but {checkpoint} is past that; "
            f"--max_steps={2 * step} would go on"
        )
    changed = [key for key in flags if flags[key] != began[key]]
    changed = [key for key in changed if key not in ("resume", "eval_only", "out_dir")]
    if changed:
        shown = ", ".join(f"{key} {began[key]} → {flags[key]}" for key in changed)
        say(f"changed on resume: {shown}")
    return config


def adopt_shape(config: Config, directory: Path, given: set[str]) -> Config:
    """Return config with the model's shape; UserError if a key that was given contradicts it."""
    shape = read_config(directory)
    asked, has = asdict(resolved(config)), asdict(resolved(shape))
    known = told_keys(directory)
    different = [key for key in has if asked[key] != has[key] and key in known]
    different = [key for key in different if key not in ("max_seq_len", "multiple_of")]
    for key in different:
        if key in given:
            raise UserError(
                f"{key}={asked[key]}, but the model in {directory} has {key}={has[key]}: "
                f"leave {key} out"
            )
    length = config.max_seq_len if "max_seq_len" in given else shape.max_seq_len
    if not different:  # what was asked for, such as n_kv_heads=0, stays as it was asked for
        return replace(config, max_seq_len=length)
    shared = {key: value for key, value in asdict(shape).items() if key in known}
    return replace(config, **shared | {"max_seq_len": length})


def open_data(config: Any, start: Start) -> Dataset:
    """Open the prepared data; UserError if settings or weights do not fit it, or it is damaged."""
    dataset = load_dataset(Path(config.data_dir))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        verify_dataset(dataset)
        if start.kind == "resume":
            verify_sealed(start.directory)
            base = read_state(start.directory).get("base", [])
            if not config.eval_only and base != base_sums(config):
                raise UserError(
                    f"init_from={config.init_from} no longer has the weights beside which "
                    f"{start.directory} was trained: --init_from=DIR says where they are"
                )
    if start.directory:
        check_tokenizer(base_of(start.directory), dataset)
    if start.kind == "resume" and read_state(start.directory)["data"] != dataset.sha256:
        raise UserError(f"{config.data_dir} is not the data that {start.directory} was trained on")
    unused = config.vocab_size - dataset.vocab_size  # ids, of which pretrained models have some
    if config.vocab_size and (unused < 0 or (unused > 0 and start.kind == "new")):
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
    return dataset


def base_sums(config: Any) -> list[str]:
    """Return the checksums of the files of init_from beside whose weights adapters are trained."""
    files = weight_files(Path(config.init_from)) if config.lora_rank else []
    return [sha256(file) for file in files if file.is_file()]


def load_start(config: Any, start: Start, machine: Machine) -> LLaMaTransformer:
    """Return the model that a run begins with, or the base of its adapters with untrained ones."""
    is_adapted = config.lora_rank > 0 and not config.eval_only

    def share_out(model: LLaMaTransformer) -> None:
        if is_adapted:
            add_adapters(model, config)
        machine.share_out(model)

    directory = Path(config.init_from) if is_adapted else start.directory
    may_change = start.kind == "weights" and not is_adapted and not config.eval_only
    shape = config if may_change else None
    model = load_model(directory, config.max_seq_len, machine.device, shape, share_out)
    init_adapters(model)
    return model


def check_tokenizer(directory: Path, dataset: Dataset) -> None:
    """Raise a UserError unless the weights in a directory were trained on the dataset's ids."""
    path = directory / "tokenizer.json"
    if path.exists() and not load_tokenizer(path).gives_ids_of(dataset.tokenizer):
        raise UserError(
            f"{dataset.data_dir} has another tokenizer than {directory}: prepare the data with "
            f"--tokenizer={path}"
        )


def optimizer_tensors(
    model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Return the optimizers' state, each tensor as PARAMETER/KEY; adapters are PARAMETER/value."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    values = {f"{name}/value": p.detach() for name, p in adapter_parameters(model).items()}
    return values | {
        f"{names[parameter]}/{key}": tensor
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for key, tensor in state.items()
    }


def load_optimizers(
    model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer], checkpoint: Path
) -> None:
    """Read back what optimizer_tensors returned from a checkpoint whose checksums are right."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states: dict[str, dict[str, Tensor]] = defaultdict(dict)
    tensors = load_tensors(checkpoint / "train_state" / "optimizer.safetensors")
    for key, tensor in tensors.items():
        name, _, kind = key.rpartition("/")
        states[name][kind] = tensor
    for name, parameter in adapter_parameters(model).items():
        fill(parameter, states[name].pop("value"))
    for optimizer in optimizers:
        saved = optimizer.state_dict()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for index, parameter in enumerate(parameters):
            # Of what is mapped from the file, each process reads the rows that it keeps.
            saved["state"][index] = {
                kind: rows_like(tensor, parameter) if tensor.dim() else tensor
                for kind, tensor in states[names[parameter]].items()
            }
        optimizer.load_state_dict(saved)


def flush(directory: Path) -> None:
    """Bring a directory's files, and the directories that name them, to the disk itself."""
    paths = [directory, *directory.rglob("*")]
    for path in sorted(paths, reverse=True):  # what a directory holds before the directory
        if path.is_dir() and os.name == "nt":
            continue  # Windows cannot open directories
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename_into_place(scratch: Path, final: Path) -> None:
    """Give a finished directory its name: a kill leaves either no such directory or all of it."""
    flush(scratch)
    scratch.rename(final)
    if os.name != "nt":
        descriptor = os.open(final.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def seal(scratch: Path, final: Path) -> None:
    """Add the checksums of its files to a directory, and rename it into place."""
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    sums = {path.relative_to(scratch).as_posix(): sha256(path) for path in files}
    write_json(scratch / MANIFEST, sums)
    rename_into_place(scratch, final)


def verify_sealed(directory: Path) -> None:
    """Compare a directory's files with the checksums that were written with them."""
    for name, expected in read_json(directory / MANIFEST).items():
        path = directory / name
        inside = path.is_file() and directory.resolve() in path.resolve().parents
        if not inside or sha256(path) != expected:
            raise UserError(
                f"{path} is damaged: it is not what was written; delete {directory} to go on "
                "from the checkpoint before it"
            )
