"""A run's directory as it is read: its checkpoints, its newest one, its reports.

Nothing here needs torch; plainllama/runs.py, which writes all of it, says what there is.
"""

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from plainllama.files import read_json
from plainllama.settings import UserError, fits


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
    with suppress(UserError, ValueError, TypeError):
        return float(read_json(checkpoint / "train_state" / "state.json")["saved_at"])
    metrics = checkpoint.parent / "metrics.jsonl"
    return metrics.stat().st_mtime if metrics.is_file() else 0.0


def find_checkpoint(ckpt: str) -> Path:
    """Return the Hugging Face directory that `ckpt` is, or the newest checkpoint of a run.

    Without `ckpt`, the run in out/ whose newest checkpoint was written last.
    """
    root = Path(ckpt or "out")
    if (root / "config.json").is_file():
        return root
    newest = [steps[-1] for run in (root, *root.glob("*")) if (steps := checkpoints(run))]
    if newest and step_of(newest[0]) >= 0 and newest[0].parent == root:
        return newest[0]
    if newest:
        return max(newest, key=lambda step: (last_written(step), step.parent.name))
    if not ckpt:
        raise UserError("no checkpoint under out/; train one: python train.py config/tiny.py")
    raise UserError(
        f"ckpt={ckpt} is neither a directory with a config.json nor one with such step_NNNNNN "
        "in it (pickles, .pt or .bin, are never read)"
    )


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; lines that a kill cut short are left out."""
    path = out_dir / "metrics.jsonl"
    return parse_metrics(path.read_bytes().splitlines() if path.is_file() else [])


def parse_metrics(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Return the records of lines of metrics.jsonl; those that are damaged are left out."""
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and fits(record.get("step"), int):
                records.append(record)
    return records


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json: step, seconds, tokens, config, and sha256 of the data."""
    path = checkpoint / "train_state" / "state.json"
    state = read_json(path)
    kinds = {"step": int, "seconds": float, "config": dict, "data": dict}
    for key, kind in kinds.items():
        if not fits(state.get(key), kind) or (kind in (int, float) and state[key] < 0):
            raise UserError(f"{path} is damaged: {key}={state.get(key)!r}")
    if state["step"] != step_of(checkpoint):
        raise UserError(f"{path} is damaged: step={state['step']} in {checkpoint.name}")
    if not fits(state.get("tokens"), int):  # older ones do not say
        state["tokens"] = state["step"] * state["config"].get("tokens_per_step", 0)
    return state


def val_losses(out_dir: Path) -> dict[int, float]:
    """Return the validation loss after each step that was evaluated."""
    records = read_metrics(out_dir)
    return {r["step"]: r["val_loss"] for r in records if fits(r.get("val_loss"), float)}
