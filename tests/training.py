"""Small runs of train.py, in this process or in one of their own, and what comes of them."""

from pathlib import Path

import several
import torch
from helpers import refused, run_stage
from safetensors.torch import load_file
from several import SCRIPT, SMALL, Worker

import train
from plainllama.checkpoint import checkpoints
from plainllama.machine import Machine
from plainllama.metrics import read_metrics
from plainllama.settings import load

CPU = Machine(torch.device("cpu"), torch.float32, rank=0, world_size=1)
OPTIMIZER = "train_state/optimizer.safetensors"


def small_run(data_dir: Path, out_dir: Path, *more: str) -> list[str]:
    """The words of a small run."""
    return [*SMALL, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *more]


def run_train(data_dir: Path, out_dir: Path, *more: str) -> None:
    run_stage(train.main, *small_run(data_dir, out_dir, *more))


def refusal(capsys, data_dir: Path, out_dir: Path, *more: str) -> str:
    """Run with a user's mistake; return the one line that is said about it."""
    return refused(capsys, train.main, *small_run(data_dir, out_dir, *more))


def begin(
    data_dir: Path, out_dir: Path, *more: str, script: str = SCRIPT, **environment: object
) -> Worker:
    """Start a run in a process of its own."""
    texts = {key: str(value) for key, value in environment.items()}
    (worker,) = several.start(1, small_run(data_dir, out_dir, *more), script=script, **texts)
    return worker


def small_config(data_dir: Path, *more: str) -> train.TrainConfig:
    return load(train.TrainConfig, [*SMALL, f"--data_dir={data_dir}", *more])


def final_weights(out_dir: Path, file: str = "model.safetensors") -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint, or what another of its files holds."""
    return load_file(checkpoints(out_dir)[-1] / file)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def distance(a: Path, b: Path, file: str = "model.safetensors") -> float:
    """The largest difference between the newest checkpoints of two runs."""
    first, second = final_weights(a, file), final_weights(b, file)
    assert first.keys() == second.keys()
    return max(float((first[k].double() - second[k].double()).abs().max()) for k in first)


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run) if "loss" in r]
