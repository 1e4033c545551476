"""Say what a run would take before it is started: memory, the batch that fits, time and disk.

    python tools/plan.py config/tiny.py --batch_size=64

Takes the config files and keys of train.py, for one process, and writes nothing. On a GPU the
memory is the peak of two real steps. Elsewhere it is an estimate for a model that is not compiled:
train.py's own step is taken with fake tensors, which have shapes but no numbers, while torch counts
their bytes. The time is that of a few real steps and evaluations, whose results are thrown away.
"""

import math
import shutil
import statistics
import sys
import time
from bisect import bisect_left
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stages are

from plainllama.checkpoint import Start, choose_start  # noqa: E402
from plainllama.data import Dataset, load_dataset  # noqa: E402
from plainllama.machine import (  # noqa: E402
    Machine,
    compile_for_training,
    device_memory,
    set_up_machine,
)
from plainllama.settings import UserError, run_main, say  # noqa: E402
from train import (  # noqa: E402
    TrainConfig,
    build_model,
    count_micro_steps,
    evaluate,
    make_optimizers,
    take_step,
)

SECONDS = 5  # of trial steps
Memory = dict[str, int]  # bytes of each part at the peak of a step


def estimate_memory(config: TrainConfig, dataset: Dataset, machine: Machine) -> Memory:
    """Return the memory of a step that is not compiled, without taking it."""
    first = replace(config, batch_size=1, tokens_per_step=config.max_seq_len)
    one = replace(config, tokens_per_step=config.batch_size * config.max_seq_len)
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build_model(first, Start("new"), machine)
        optimizers = make_optimizers(model, config)
        tracker.track_external(model, *optimizers)
        with tracker:
            take_step(0, model, optimizers, dataset, first, machine)  # makes the optimizers' state
            tracker.reset_mod_stats()
            if config.tokens_per_step > one.tokens_per_step:
                for parameter in model.parameters():  # which a second micro-step finds there
                    parameter.grad = torch.zeros_like(parameter)
            take_step(0, model, optimizers, dataset, one, machine)
    counted = max(tracker.get_tracker_snapshot("peak").values(), key=lambda count: count["Total"])
    parts = {
        "weights": counted[_MemRefType.PARAM] + counted[_MemRefType.BUFFER],
        "gradients": counted[_MemRefType.GRAD],
        "optimizer": counted[_MemRefType.OPT],
    }
    return {**parts, "activations": counted["Total"] - sum(parts.values())}


def measure_memory(config: TrainConfig, dataset: Dataset, machine: Machine) -> Memory:
    """Return the memory of two real steps on a GPU; torch.OutOfMemoryError if it lacks that."""
    one = config.batch_size * config.max_seq_len
    config = replace(config, tokens_per_step=min(config.tokens_per_step, 2 * one))
    before = torch.cuda.memory_allocated(machine.device)
    torch.cuda.reset_peak_memory_stats(machine.device)
    model, optimizers = set_up(config, Start("new"), machine)
    weights = torch.cuda.memory_allocated(machine.device) - before
    for step in range(2):
        take_step(step, model, optimizers, dataset, config, machine)
    kept = torch.cuda.memory_allocated(machine.device) - before
    peak = torch.cuda.max_memory_allocated(machine.device) - before
    parts = {"weights": weights, "optimizer": kept - weights}
    return {**parts, "gradients and activations": peak - kept}


def set_up(config: TrainConfig, start: Start, machine: Machine) -> tuple:
    """Return model and optimizers as train.py makes them, the model compiled if config says so."""
    model = build_model(config, start, machine)
    optimizers = make_optimizers(model, config)
    if config.compile:
        torch.compiler.reset()  # or another batch_size would be compiled for any size
        by_block = config.activation_checkpointing or config.chunked_loss
        compile_for_training(model, config.batch_size, machine, by_block)
    return model, optimizers


def plan_memory(config: TrainConfig, dataset: Dataset, machine: Machine) -> TrainConfig:
    """Say what a step takes and what fits; return config with a batch_size that fits."""
    on_gpu = machine.device.type == "cuda"
    total, free = device_memory(machine.device) or (0, sys.maxsize)

    @cache
    def memory(batch_size: int) -> Memory:
        changed = replace(config, batch_size=batch_size)
        if not on_gpu:
            return estimate_memory(changed, dataset, machine)
        try:
            return measure_memory(changed, dataset, machine)
        except torch.OutOfMemoryError:
            return {"more than there is": sys.maxsize}

    sequences = config.tokens_per_step // config.max_seq_len
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    fitting = bisect_left(sizes, True, key=lambda size: sum(memory(size).values()) > free)
    largest = sizes[max(0, fitting - 1)]
    parts = memory(config.batch_size)
    how = "measured in two steps" if on_gpu else "an estimate, not compiled"
    say(f"memory   {size_text(sum(parts.values()))} at the peak of a step, {how}")
    say("         " + ", ".join(f"{part} {size_text(count)}" for part, count in parts.items()))
    if not total:
        say(f"fits     what {machine.device} has is not known")
        return config
    if fitting == 0:
        raise UserError(
            f"does not fit: at batch_size=1 a step takes {size_text(sum(memory(1).values()))}, "
            f"{machine.device} has {size_text(free)} free; lower max_seq_len or the model's size, "
            "or try --activation_checkpointing and --chunked_loss"
        )
    say(
        f"fits     batch_size={largest} at most, of those that divide {sequences:,} sequences; "
        f"{machine.device} has {size_text(total)}, {size_text(free)} of it free"
    )
    return replace(config, batch_size=min(config.batch_size, largest))


def size_text(n_bytes: int) -> str:
    """Return a number of bytes as text."""
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def seconds_of_step(model, optimizers, dataset, config: TrainConfig, machine: Machine) -> float:  # noqa: ANN001
    """Return the time of a step: that of one micro-step, and for each other what a second adds."""
    one = config.batch_size * config.max_seq_len
    micro_steps = config.tokens_per_step // one

    def timed(count: int) -> float:
        begin = time.perf_counter()
        short = replace(config, tokens_per_step=count * one)
        take_step(0, model, optimizers, dataset, short, machine)[0].item()
        return time.perf_counter() - begin

    timed(1)  # loads what is loaded once
    single: list[float] = []
    double: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(single) < 3:
        single.append(timed(1))
        double.append(timed(min(2, micro_steps)))
    added = max(0.0, statistics.median(double) - statistics.median(single))
    return statistics.median(single) + (micro_steps - 1) * added


def times(interval: int, steps: int) -> int:
    """Return how often what is due every `interval` steps (0: never), and at the end, happens."""
    return math.ceil(steps / interval) if interval else 1


def main() -> None:
    scratch = Path("out", "no run has this name")  # so that a plan is that of a new run
    config, start = choose_start(TrainConfig, [*sys.argv[1:], f"--out_dir={scratch}"])
    dataset = load_dataset(Path(config.data_dir))
    config = replace(config, vocab_size=max(config.vocab_size, dataset.vocab_size))
    count_micro_steps(config, 1)
    machine = set_up_machine(config)
    with machine.attention():
        config = plan_memory(config, dataset, machine)
        begin = time.perf_counter()
        model, optimizers = set_up(config, start, machine)
        starting = time.perf_counter() - begin
        step = seconds_of_step(model, optimizers, dataset, config, machine)
        begin = time.perf_counter()
        batch = replace(config, eval_tokens=config.batch_size * config.max_seq_len)
        evaluate(model, dataset, np.ones(config.vocab_size), batch, machine)
        evaluation = time.perf_counter() - begin
    targets = min(config.eval_tokens or sys.maxsize, dataset.tokens["val"])
    evaluation *= math.ceil(targets / batch.eval_tokens)
    evaluations = times(config.eval_interval, config.max_steps)
    seconds = starting + config.max_steps * step + evaluations * evaluation
    tokens = config.max_steps * config.tokens_per_step
    say(
        f"time     {timedelta(seconds=round(seconds))}: {config.max_steps:,} steps of {step:.3g} s "
        f"({config.tokens_per_step / step:,.0f} tokens/s), {evaluations} evaluations of "
        f"{evaluation:.1f} s, {starting:.0f} s before the first step\n"
        f"tokens   {tokens:,}, {tokens / dataset.tokens['train']:.1f} epochs"
    )
    weights = sum(parameter.nbytes for parameter in model.parameters())
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    checkpoint = weights + sum(tensor.nbytes for state in states for tensor in state.values())
    kept = min(times(config.checkpoint_interval, config.max_steps), config.keep_last + 1)
    needed = (kept + 1) * checkpoint + config.snapshots * weights  # one is written, one then goes
    say(
        f"disk     {size_text(needed)}: {kept} checkpoints of {size_text(checkpoint)} and one in "
        f"the making, {config.snapshots} snapshots of {size_text(weights)}; "
        f"{size_text(shutil.disk_usage('.').free)} free"
    )


if __name__ == "__main__":
    run_main(main)
