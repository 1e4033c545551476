"""Say what a run would take before it is started: memory, the batch that fits, time and disk.

    python tools/plan.py config/tiny.py --batch_size=64

Takes the config files and keys of train.py, for one process. Memory is an estimate for a model that
is not compiled: train.py's step is taken with fake tensors, which have shapes but no numbers, while
torch counts their bytes. A few real steps and evaluations, whose results are thrown away, give the
time, and on a GPU the peak of its memory. It writes nothing but the note that the data are sound.
"""

import math
import shutil
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stages are

import train  # noqa: E402
from model import LLaMaTransformer  # noqa: E402
from plainllama.checkpoint import choose_start  # noqa: E402
from plainllama.data import Dataset  # noqa: E402
from plainllama.machine import Machine, compile_for_training, device_memory  # noqa: E402
from plainllama.settings import UserError, read_arguments, run_main, say  # noqa: E402
from train import TrainConfig  # noqa: E402

SECONDS = 3  # in which what is timed is repeated, at least three times


def main() -> None:
    files, flags = read_arguments(TrainConfig)
    flags["out_dir"] = "out/(planned)"  # where there is no run: the plan is that of a new one
    config, start = choose_start(TrainConfig, files, flags)
    machine = train.set_up_machine(config)
    with machine.attention():
        config, dataset = train.fit_to_data(config, start, machine)
        config = plan_memory(config, dataset, machine)
        model = train.build_model(config, start, machine)
        optimizers = train.make_optimizers(model, config)
        plan_time(model, optimizers, dataset, config, machine)
    plan_disk(model, optimizers, config)


def plan_memory(config: TrainConfig, dataset: Dataset, machine: Machine) -> TrainConfig:
    """Say what a step takes and what fits; return config with a batch_size that fits."""

    @cache
    def memory(batch_size: int) -> dict[str, int]:
        return step_memory(replace(config, batch_size=batch_size), dataset, machine)

    parts = memory(config.batch_size)
    shown = ", ".join(f"{part} {bytes_text(size)}" for part, size in parts.items())
    whole = bytes_text(sum(parts.values()))
    say(f"memory   {whole} at the peak of a step (eager estimate): {shown}")
    has = device_memory(machine.device)
    if not has:
        return config
    total, free = has
    sequences = config.tokens_per_step // config.max_seq_len
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    n_fitting = bisect_left(sizes, True, key=lambda size: sum(memory(size).values()) > free)
    if n_fitting == 0:
        raise UserError(
            f"does not fit: at batch_size=1 a step takes {bytes_text(sum(memory(1).values()))}, "
            f"{machine.device} has {bytes_text(free)} free; lower max_seq_len or the model's size, "
            "or try --activation_checkpointing and --chunked_loss"
        )
    largest = sizes[n_fitting - 1]
    say(
        f"fits     batch_size={largest} is the largest that divides {sequences:,} sequences; "
        f"{machine.device} has {bytes_text(total)}, {bytes_text(free)} of it free"
    )
    return replace(config, batch_size=min(config.batch_size, largest))


def step_memory(config: TrainConfig, dataset: Dataset, machine: Machine) -> dict[str, int]:
    """Return the bytes of each part at the peak of a step that is not compiled."""
    first = replace(config, batch_size=1, tokens_per_step=config.max_seq_len)
    one = replace(config, tokens_per_step=config.batch_size * config.max_seq_len)
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(machine.device):  # not build_model, for fake tensors cannot be moved
            model = LLaMaTransformer(config)
        model.recompute = config.activation_checkpointing
        model.loss_chunks = train.LOSS_CHUNKS if config.chunked_loss else 1
        optimizers = train.make_optimizers(model, config)
        tracker.track_external(model, *optimizers)
        with tracker:
            train.take_step(0, model, optimizers, dataset, first, machine)  # makes their state
            tracker.reset_mod_stats()  # it follows one forward pass alone
            if config.tokens_per_step > one.tokens_per_step:
                for parameter in model.parameters():  # as a second forward pass would find it
                    parameter.grad = torch.zeros_like(parameter)
            train.take_step(0, model, optimizers, dataset, one, machine)
    peak = max(tracker.get_tracker_snapshot("peak").values(), key=lambda parts: parts["Total"])
    parts = {
        "weights": peak[_MemRefType.PARAM] + peak[_MemRefType.BUFFER],
        "gradients": peak[_MemRefType.GRAD],
        "optimizer": peak[_MemRefType.OPT],
    }
    return {**parts, "activations": peak["Total"] - sum(parts.values())}


def plan_time(
    model: LLaMaTransformer,
    optimizers: list[torch.optim.Optimizer],
    dataset: Dataset,
    config: TrainConfig,
    machine: Machine,
) -> None:
    """Say how long the run takes, from a few steps and evaluations."""
    begin = time.perf_counter()
    if config.compile:
        by_block = model.recompute or model.loss_chunks > 1
        compile_for_training(model, config.batch_size, machine, by_block)
    compiling = time.perf_counter() - begin
    batch = config.batch_size * config.max_seq_len

    def step(micro_steps: int) -> None:
        short = replace(config, tokens_per_step=micro_steps * batch)
        train.take_step(0, model, optimizers, dataset, short, machine)[0].item()

    def evaluate() -> None:
        train.evaluate(model, dataset, replace(config, eval_tokens=batch), machine)

    n_steps, micro_steps = config.max_steps, config.tokens_per_step // batch
    seconds = median_seconds(lambda: step(1))
    if micro_steps > 1:  # each further one takes what the second adds
        seconds += (micro_steps - 1) * (median_seconds(lambda: step(2)) - seconds)
    targets = min(config.eval_tokens or sys.maxsize, dataset.tokens["val"])
    evaluation = math.ceil(targets / batch) * median_seconds(evaluate)
    evaluations = times(config.eval_interval, n_steps)
    whole = timedelta(seconds=round(compiling + n_steps * seconds + evaluations * evaluation))
    say(
        f"time     {whole}: {n_steps:,} steps of {seconds:.3g} s, {evaluations} evaluations of "
        f"{evaluation:.3g} s, {compiling:.0f} s of compiling; "
        f"{config.tokens_per_step / seconds:,.0f} tokens/s, "
        f"{n_steps * config.tokens_per_step / dataset.tokens['train']:.1f} epochs"
    )
    if machine.device.type == "cuda":
        say(f"peak     {bytes_text(torch.cuda.max_memory_allocated(machine.device))} of real steps")


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call, after one that loads what is loaded once."""
    call()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < SECONDS:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


def plan_disk(
    model: LLaMaTransformer, optimizers: list[torch.optim.Optimizer], config: TrainConfig
) -> None:
    """Say how much the run's directory will hold at most."""
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    checkpoint = weights + sum(tensor.nbytes for state in states for tensor in state.values())
    kept = min(times(config.checkpoint_interval, config.max_steps), config.keep_last + 1)
    needed = (kept + 1) * checkpoint + config.snapshots * weights
    say(
        f"disk     {bytes_text(needed)}: {kept} checkpoints of {bytes_text(checkpoint)} and one "
        f"being written, {config.snapshots} snapshots of {bytes_text(weights)}; "
        f"{bytes_text(shutil.disk_usage('.').free)} free here"
    )


def times(interval: int, steps: int) -> int:
    """Return how often what is due every `interval` steps (0: never), and at the end, happens."""
    return math.ceil(steps / interval) if interval else 1


def bytes_text(n_bytes: float) -> str:
    """Return a number of bytes as text."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_main(main)
