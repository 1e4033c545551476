"""Say what a run would take before it is started: memory, the batch that fits, time and disk.

    python tools/plan.py config/tiny.py --batch_size=64

Takes the config files and keys of train.py, for one process. Memory is an estimate for a model that
is not compiled: train.py's step is taken with fake tensors, which have shapes but no numbers, while
torch counts their bytes. A few real steps and evaluations, whose results are thrown away, give the
time, and on a GPU the peak of its memory. It writes nothing but the note that the data are sound.
"""

import math
import shutil
import sys
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stages are

import train  # noqa: E402
from model import LLaMaTransformer  # noqa: E402
from plainllama.checkpoint import Start, choose_start  # noqa: E402
from plainllama.data import Dataset  # noqa: E402
from plainllama.lora import add_adapters  # noqa: E402
from plainllama.machine import Machine, compile_for_training, device_memory  # noqa: E402
from plainllama.settings import UserError, read_arguments, run_main, say  # noqa: E402
from train import TrainConfig  # noqa: E402

SECONDS = 3  # for which what is timed is repeated


def main() -> None:
    files, flags = read_arguments(TrainConfig)
    flags["out_dir"] = "out/(planned)"  # where there is no run: the plan is that of a new one
    config, start = choose_start(TrainConfig, files, flags)
    machine = train.set_up_machine(config)
    with machine.attention():
        config, dataset = train.fit_to_data(config, start, machine)
        parts = step_memory(config, dataset, machine)
        shown = ", ".join(f"{part} {bytes_text(size)}" for part, size in parts.items())
        whole = bytes_text(sum(parts.values()))
        say(f"memory   {whole} at the peak of a step (eager estimate): {shown}")
        if device_memory(machine.device):
            largest = largest_batch_size(config, dataset, machine)
            config = replace(config, batch_size=min(config.batch_size, largest))
        plan_time(config, start, dataset, machine)
    checkpoint = parts["weights"] + parts["optimizer"]
    most = config.keep_last + 2  # the newest, the best, and one that is being written
    needed = most * checkpoint + config.snapshots * parts["weights"]
    say(
        f"disk     at most {bytes_text(needed)}: {most} checkpoints of {bytes_text(checkpoint)} "
        f"and {config.snapshots} snapshots; {bytes_text(shutil.disk_usage('.').free)} free here"
    )


def step_memory(config: TrainConfig, dataset: Dataset, machine: Machine) -> dict[str, int]:
    """Return the bytes of each part at the peak of a step that is not compiled."""
    first = replace(config, batch_size=1, tokens_per_step=config.max_seq_len)
    one = replace(config, tokens_per_step=config.batch_size * config.max_seq_len)
    tracker = MemTracker()
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(machine.device):  # not build_model, for fake tensors cannot be moved
            model = LLaMaTransformer(config)
        if config.lora_rank:
            add_adapters(model, config)
        model.dropout, model.recompute = config.dropout, config.activation_checkpointing
        model.loss_chunks = train.LOSS_CHUNKS if config.chunked_loss else 1
        optimizers = train.make_optimizers(model, config)
        tracker.track_external(model, *optimizers)
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        with tracker:
            model.requires_grad_(True)  # in a first pass it hangs hooks on all
            with torch.no_grad():
                model(torch.zeros(1, 1, dtype=torch.long, device=machine.device))
            for parameter in frozen:
                parameter.requires_grad_(False)
            tracker.reset_mod_stats()
            train.take_step(0, model, optimizers, dataset, first, machine)  # makes their state
            tracker.reset_mod_stats()  # it follows one forward pass alone
            if config.tokens_per_step > one.tokens_per_step:
                for parameter in model.parameters():  # as a second forward pass would find it
                    if parameter.requires_grad:
                        parameter.grad = torch.zeros_like(parameter)
            train.take_step(0, model, optimizers, dataset, one, machine)
    peak = max(tracker.get_tracker_snapshot("peak").values(), key=lambda parts: parts["Total"])
    parts = {
        "weights": peak[_MemRefType.PARAM] + peak[_MemRefType.BUFFER],
        "gradients": peak[_MemRefType.GRAD],
        "optimizer": peak[_MemRefType.OPT],
    }
    return {**parts, "activations": peak["Total"] - sum(parts.values())}


def largest_batch_size(config: TrainConfig, dataset: Dataset, machine: Machine) -> int:
    """Say and return the largest batch_size of which a step fits the device's free memory."""
    total, free = device_memory(machine.device)
    sequences = config.tokens_per_step // config.max_seq_len
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]

    def is_too_large(size: int) -> bool:
        parts = step_memory(replace(config, batch_size=size), dataset, machine)
        return sum(parts.values()) > free

    n_fitting = bisect_left(sizes, True, key=is_too_large)
    if n_fitting == 0:
        raise UserError(
            f"batch_size=1 takes more than the {bytes_text(free)} that are free; lower max_seq_len "
            "or the model's size, or try --activation_checkpointing and --chunked_loss"
        )
    say(
        f"fits     batch_size={sizes[n_fitting - 1]} is the largest that divides {sequences:,} "
        f"sequences; {machine.device} has {bytes_text(total)}, {bytes_text(free)} of it free"
    )
    return sizes[n_fitting - 1]


def plan_time(config: TrainConfig, start: Start, dataset: Dataset, machine: Machine) -> None:
    """Say how long the run takes, from a few steps and evaluations."""
    model = train.build_model(config, start, machine)
    optimizers = train.make_optimizers(model, config)
    begin = time.perf_counter()
    if config.compile:
        by_block = model.recompute or model.loss_chunks > 1
        compile_for_training(model, config.batch_size, machine, by_block)
    compiling = time.perf_counter() - begin
    batch = config.batch_size * config.max_seq_len

    def step(micro_steps: int) -> None:
        short = replace(config, tokens_per_step=micro_steps * batch)
        train.take_step(0, model, optimizers, dataset, short, machine)[0]["loss"].item()

    def evaluate() -> None:
        train.evaluate(model, dataset, replace(config, eval_tokens=batch), machine)

    n_steps, micro_steps = config.max_steps, config.tokens_per_step // batch
    seconds = median_seconds(lambda: step(1))
    if micro_steps > 1:  # each further one takes what the second adds
        seconds += (micro_steps - 1) * (median_seconds(lambda: step(2)) - seconds)
    targets = min(config.eval_tokens or sys.maxsize, dataset.tokens["val"])
    evaluation = math.ceil(targets / batch) * median_seconds(evaluate)
    evaluations = math.ceil(n_steps / config.eval_interval) if config.eval_interval else 1
    whole = timedelta(seconds=round(compiling + n_steps * seconds + evaluations * evaluation))
    say(
        f"time     {whole}: {n_steps:,} steps of {seconds:.3g} s, {evaluations} evaluations of "
        f"{evaluation:.3g} s, {compiling:.0f} s of compiling; "
        f"{config.tokens_per_step / seconds:,.0f} tokens/s"
    )
    if machine.device.type == "cuda":
        say(f"peak     {bytes_text(torch.cuda.max_memory_allocated(machine.device))} of real steps")


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call that is repeated for some seconds, after one to warm up."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median


def bytes_text(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_main(main)
