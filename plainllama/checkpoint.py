"""Checkpoints: which a run has, what a run begins with, and how one is written and read back.

out/RUN/step_NNNNNN/              a Hugging Face model directory
    adapter/                            what LoRA has trained, as peft writes it
    train_state/optimizer.safetensors   the optimizers' state, each tensor as PARAMETER/KEY
    train_state/state.json              step, tokens, seconds, settings, and checksums of the data
    train_state/sha256.json             the checksums of all other files of the checkpoint
"""

import errno
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
from plainllama.chat import find_template
from plainllama.data import Dataset, is_locked, load_dataset, lock, verify_dataset
from plainllama.distributed import fill, rows_like
from plainllama.families import base_of, read_config, resolved, told_keys
from plainllama.huggingface import load_model, load_tensors, weight_files
from plainllama.lora import adapter_parameters, add_adapters, init_adapters
from plainllama.machine import Machine
from plainllama.metrics import val_losses
from plainllama.settings import (
    UserError,
    Values,
    build,
    command,
    fits,
    nearest,
    read_json,
    say,
    sha256,
    warning,
    write_json,
)
from plainllama.tokenizer import TURNS, load_tokenizer, with_turns

KINDS = {  # of tensors that an optimizer keeps for a parameter
    "AdamW": {"step", "exp_avg", "exp_avg_sq"},
    "Muon": {"momentum_buffer", "row_square"},
}
MANIFEST = "train_state/sha256.json"
ADAPTERS = ("lora_rank", "lora_alpha", "lora_targets")
DECIDED = ("optimizer", "seed", "tokens_per_step", "max_seq_len", *ADAPTERS)  # resuming keeps them
NO_FSYNC = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS)  # said of directories by CIFS and FUSE
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

    Without `ckpt`, the run in out/ whose newest checkpoint was written last. Where there are
    checksums beside the weights, these are compared with them.
    """
    root = Path(ckpt or "out")
    is_model = any((root / name).is_file() for name in ("config.json", "adapter_config.json"))
    found = [root] if is_model else checkpoints(root)[-1:]
    found = found or [steps[-1] for run in root.glob("*") if (steps := checkpoints(run))]
    if found:
        directory = max(found, key=lambda step: (last_written(step), step.parent.name))
        verify_sealed(directory, weights_alone=True)
        return directory
    runs = [str(run) for run in Path("out").glob("*") if checkpoints(run)]
    there = f"; runs here: {', '.join(sorted(runs))}" if runs else ""
    if not ckpt or not root.exists():
        there = there or f"; train one: {command('train.py', 'config/tiny.py')}"
        raise UserError(f"no checkpoint in {root}{there}")
    if (root.parent / "config.json").is_file():
        there = f"; its directory is --ckpt={root.parent}"
    kind = "a dataset" if (root / "meta.json").is_file() else "no directory with a config.json"
    raise UserError(
        f"ckpt={ckpt} is {kind}, and holds no step_NNNNNN with one (pickles are never read){there}"
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
    """Delete all checkpoints but the newest keep_last and the best; a failure is a warning."""
    old: list[Path] = []
    with warning(f"no checkpoint of {out_dir} is deleted"):
        best = best_checkpoint(out_dir)
        old = [path for path in checkpoints(out_dir)[:-keep_last] if path != best]
    for path in [path for path in old if not path.is_symlink()]:
        with warning(f"{path} cannot be deleted"):
            # Renamed first, so that a kill leaves no incomplete checkpoint.
            shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))


def scratch_of(out_dir: Path) -> list[Path]:
    """Return what a kill has left half written or half deleted."""
    return [*out_dir.glob(".tmp-*"), *out_dir.glob("snapshots/.tmp-*")]


def remove(paths: list[Path]) -> None:
    """Delete directories, and of links not what they lead to; a failure is a warning."""
    for path in paths:
        with warning(f"{path} cannot be deleted"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


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
    out_dir = Path(given.get("out_dir", cls.out_dir))
    weights, eval_only = given.get("init_from"), given.get("eval_only")
    if not eval_only and (out_dir / "snapshots").is_symlink():
        raise UserError(f"{out_dir}/snapshots is a link: nothing is written through one; delete it")
    if not eval_only and is_locked(out_dir / ".lock"):
        lock(out_dir / ".lock", str(out_dir))  # which says so
    steps = [path for path in out_dir.glob("step_*") if step_of(path) >= 0]
    saved = checkpoints(out_dir)
    if broken := [path for path in steps if path not in saved and path.is_dir()]:
        raise UserError(f"{broken[0]} is damaged: it has no config.json; delete it to go on")
    if weights in ("resume", "scratch"):
        raise UserError(f"init_from={weights}: it takes a directory; to continue a run: --resume")
    if saved and (given.get("resume") or (eval_only and not weights)):
        config, step = continued(cls, saved[-1], flags), step_of(saved[-1])
        done = step == config.max_steps and step in val_losses(out_dir)
        if done and not eval_only and "epochs" not in flags:
            remove(scratch_of(out_dir))
            say(f"{saved[-1]} is the end of the run; --max_steps={2 * step} would go on")
            return config, Start("finished", saved[-1])
        return config, Start("resume", saved[-1])
    if given.get("resume") and not eval_only:
        given = begun_again(cls, out_dir, flags) or given
        weights = given.get("init_from")
    config = build(cls, given | {"resume": False})
    asked = [f"{key}={given[key]}" for key in ADAPTERS if key in files | flags]
    if asked and not config.lora_rank:
        raise UserError(
            f"{asked[0]}: adapters have a lora_rank of at least 1; without one, all weights are "
            "trained"
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


def begun_again(cls: type[Config], out_dir: Path, flags: Values) -> Values:
    """Return the settings of a run that has no checkpoint yet, but for the flags.

    UserError where there is none either, unless torchrun may restart the same command line: {}.
    """
    path = out_dir / "settings.json"
    if path.is_file():
        began = check_settings(cls, read_json(path), path, f"delete {out_dir}, and train anew")
        say(f"{out_dir} has no checkpoint yet: its run begins again, with its settings")
        return began | {"out_dir": str(out_dir)} | flags
    if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        return {}
    close = nearest(str(out_dir), [str(path.parent) for path in out_dir.parent.glob("*/step_*")])
    raise UserError(f"out_dir={out_dir} holds no run to resume{close or ': leave --resume out'}")


def check_settings(cls: type[Config], began: Values, path: Path, way_out: str) -> Values:
    """Return the settings that a file has for a run; UserError unless they are all that one has."""
    types = {field.name: field.type for field in fields(cls)}
    wrong = [key for key in began if key not in types or not fits(began[key], types[key])]
    if wrong or began.keys() != types.keys():
        odd = (wrong or sorted(types.keys() - began.keys()))[0]
        raise UserError(
            f"{path} is damaged, or of another version, by its {odd}={began.get(odd)!r}: {way_out}"
        )
    return began


def continued(cls: type[Config], checkpoint: Path, flags: Values) -> Config:
    """Return the settings with which a run goes on: its own, but for the flags."""
    state, path = read_state(checkpoint), checkpoint / "train_state" / "state.json"
    way_out = f"train anew, or go on from its weights alone with --init_from={checkpoint}"
    began = check_settings(cls, state["config"], path, way_out)
    began = began | {"out_dir": str(checkpoint.parent)}  # the directory may have been renamed
    if "max_steps" in flags:
        began = began | {"epochs": 0.0}  # unless a flag asks for them, too
    config = adopt_shape(build(cls, began | flags), checkpoint, {*flags, "max_seq_len"})
    for key in DECIDED:
        value = getattr(config, key)
        if value != began[key] and not config.eval_only:
            raise UserError(
                f"{key}={value} cannot continue {checkpoint}, which has {key}={began[key]}: leave "
                f"it out, or begin a new run with --init_from={checkpoint}"
            )
    step = state["step"]
    if config.max_steps < step and not (config.eval_only or config.epochs):
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
    if length < shape.max_seq_len and config.position == "rope":
        say(f"trained on windows of {length}; the model keeps its context of {shape.max_seq_len:,}")
    if not different:  # what was asked for, such as n_kv_heads=0, stays as it was asked for
        return replace(config, max_seq_len=length)
    shared = {key: value for key, value in asdict(shape).items() if key in known}
    return replace(config, **shared | {"max_seq_len": length})


def open_data(config: Any, start: Start) -> Dataset:
    """Open the prepared data; UserError if settings or weights do not fit it, or it is damaged."""
    dataset = load_dataset(Path(config.data_dir))
    if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
        verify_dataset(dataset, again=config.eval_only)
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
        raise UserError(f"{config.data_dir} is not the data that {start.directory} was trained on")
    unused = config.vocab_size - dataset.vocab_size  # ids, of which pretrained models have some
    may_lack = start.kind == "weights" and dataset.conversations
    least = -len(TURNS) if may_lack else 0  # check_tokenizer knows which they are
    if config.vocab_size and (unused < least or (unused > 0 and start.kind == "new")):
        raise UserError(
            f"vocab_size={config.vocab_size}, but {config.data_dir} has {dataset.vocab_size}: "
            "prepare the data with the model's tokenizer, or leave vocab_size out"
        )
    for split in ("train", "val"):
        if dataset.conversations:
            dataset.rows(split, config.max_seq_len)
        elif dataset.tokens[split] <= config.max_seq_len:
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
            state, whole = states[names[parameter]], ("exp_avg", "exp_avg_sq", "momentum_buffer")
            wrong = [k for k, t in state.items() if k in whole and t.shape != parameter.shape]
            if state.keys() != KINDS[type(optimizer).__name__] or wrong:
                odd = wrong or sorted(state)
                raise UserError(
                    f"{checkpoint}: {names[parameter]} does not fit its optimizer's {odd}"
                )
            # Of what is mapped from the file, each process reads the rows that it keeps.
            saved["state"][index] = {
                kind: rows_like(tensor, parameter) if tensor.dim() else tensor
                for kind, tensor in state.items()
            }
        optimizer.load_state_dict(saved)


def flush(*paths: Path) -> None:
    """Bring files, and the names that directories hold, to the disk itself."""
    for path in paths:
        if path.is_dir() and os.name == "nt":
            continue  # Windows cannot open directories
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not path.is_dir() or error.errno not in NO_FSYNC:
                raise
        finally:
            os.close(descriptor)


def rename_into_place(scratch: Path, final: Path) -> None:
    """Give a finished directory its name: a kill leaves either no such directory or all of it."""
    flush(*sorted(scratch.rglob("*"), reverse=True), scratch)  # what is inside comes first
    scratch.rename(final)
    flush(final.parent)


def seal(scratch: Path, final: Path) -> None:
    """Add the checksums of its files to a directory, and rename it into place."""
    files = sorted(path for path in scratch.rglob("*") if path.is_file())
    sums = {path.relative_to(scratch).as_posix(): sha256(path) for path in files}
    write_json(scratch / MANIFEST, sums)
    rename_into_place(scratch, final)


def verify_sealed(directory: Path, weights_alone: bool = False) -> None:
    """Compare a directory's files with the checksums that were written with them.

    Weights alone are what any stage reads, and also come from directories that have no checksums.
    """
    if weights_alone and not (directory / MANIFEST).is_file():
        return
    for name, expected in read_json(directory / MANIFEST).items():
        path = directory / name
        is_weights = re.fullmatch(r"model[^/]*\.safetensors.*", name) and path.is_file()
        if weights_alone and not is_weights:
            continue
        inside = path.is_file() and directory.resolve() in path.resolve().parents
        if not inside or sha256(path) != expected:
            raise UserError(
                f"{path} is damaged: it is not what was written; delete {directory} to go on from "
                f"the checkpoint before it, or {directory}/train_state if you changed it"
            )
