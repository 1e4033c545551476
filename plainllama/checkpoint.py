"""Checkpoints: which ones a run has, and how one is written, verified and read back.

out/RUN/step_NNNNNN/              a Hugging Face model directory
    adapter/                            what LoRA has trained, as peft writes it
    train_state/optimizer.safetensors   the optimizers' state, each tensor as PARAMETER/KEY
    train_state/state.json              step, tokens, seconds, settings, when it was saved,
                                        and checksums of the data and of LoRA's base
    train_state/sha256.json             the checksums of all other files of the checkpoint
"""

import math
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import LLaMaTransformer
from plainllama.distributed import fill, rows_like
from plainllama.lora import adapter_parameters
from plainllama.metrics import val_losses
from plainllama.settings import fits, read_json, sha256, write_json
from plainllama.tensors import load_tensors
from plainllama.terminal import UserError, command, warning

MANIFEST = "train_state/sha256.json"


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
    runs = sorted(str(run) for run in Path("out").glob("*") if checkpoints(run))
    train = command("train.py", "config/tiny.py")
    there = f"runs here: {', '.join(runs)}" if runs else f"train one: {train}"
    if not ckpt or not root.exists():
        raise UserError(f"no checkpoint in {root}; {there}")
    if (root.parent / "config.json").is_file():
        there = f"its directory is --ckpt={root.parent}"
    raise UserError(
        f"ckpt={ckpt} is no directory with a config.json, and holds no step_NNNNNN with one "
        f"(pickles are never read); {there}"
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
    with warning(f"no checkpoint of {out_dir} is deleted"):
        best = best_checkpoint(out_dir)
        for path in checkpoints(out_dir)[:-keep_last]:
            if path == best or path.is_symlink():
                continue
            with warning(f"{path} cannot be deleted"):
                # Renamed first, so that a kill leaves no incomplete checkpoint.
                shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))


def remove_leftovers(out_dir: Path, more: Sequence[Path] = ()) -> None:
    """Delete what a kill has left half written or half deleted, and more; a failure is a warning.

    What links lead to stays.
    """
    for path in (*out_dir.glob(".tmp-*"), *out_dir.glob("snapshots/.tmp-*"), *more):
        with warning(f"{path} cannot be deleted"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json: step, tokens, seconds, config, and sha256 of the data."""
    path = checkpoint / "train_state" / "state.json"
    kinds = {"step": int, "tokens": int, "seconds": float, "config": dict, "data": dict}
    try:
        state = read_json(path)
        for key, kind in kinds.items():
            if not fits(state.get(key), kind) or (kind in (int, float) and state[key] < 0):
                raise UserError(f"{path} is damaged: {key}={state.get(key)!r}")
        if state["step"] != step_of(checkpoint):
            raise UserError(f"{path} is damaged: step={state['step']} in {checkpoint.name}")
    except UserError as error:
        raise UserError(f"{error}; {delete_to_go_on(checkpoint)}") from error
    return state


def delete_to_go_on(checkpoint: Path) -> str:
    """Return the way out of a damaged checkpoint."""
    return f"delete {checkpoint} to go on from the checkpoint before it"


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


def rename_into_place(scratch: Path, final: Path) -> None:
    """Give a finished directory its name: a kill leaves either no such directory or all of it.

    What it holds is brought to the disk itself before.
    """
    for path in filter(Path.is_file, scratch.rglob("*")):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    scratch.rename(final)


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
                f"{path} is damaged: it is not what was written; {delete_to_go_on(directory)}, "
                f"or {directory}/train_state if you changed it"
            )
