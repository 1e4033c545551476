"""Say what a run would take before it is started: memory, time and disk.

    python tools/plan.py config/tiny.py --batch_size=64

Takes the config files and keys of train.py, for one process. It takes a few steps and evaluations
as train.py does, measures them, and throws their results away. It writes nothing but the note that
the data are sound.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the stages are

import train
from model import LLaMaTransformer
from plainllama.checkpoint import optimizer_tensors
from plainllama.data import Dataset
from plainllama.machine import Machine, compile_for_training, device_memory
from plainllama.settings import read_arguments
from plainllama.start import choose_start
from plainllama.terminal import run_main, say
from train import TrainConfig

SECONDS = 3  # for which what is timed is repeated


def main() -> None:
    files, flags = read_arguments(TrainConfig)
    flags["out_dir"] = "out/(planned)"  # where there is no run: the plan is that of a new one
    config, start = choose_start(TrainConfig, files, flags)
    machine = train.set_up_machine(config)
    with machine.attention():
        config, data = train.fit_to_data(config, start, machine)
        model = train.build_model(config, start, machine)
        optimizers = train.make_optimizers(model, config)
        plan_time(model, optimizers, data, config, machine)
    weights = sum(p.nbytes for p in model.parameters())
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    moments = sum(t.nbytes for t in optimizer_tensors(model, optimizers).values())
    there = device_memory(machine.device)
    of_it = f" of {bytes_text(there)}" if there else ""
    say(
        f"memory   {peak_memory(machine.device)}{of_it}: weights {bytes_text(weights)}, "
        f"gradients {bytes_text(trained)}, optimizer {bytes_text(moments)}, and what steps take"
    )
    kept = config.keep_last + 2  # the newest, the best, and one that is being written
    needed = kept * (weights + moments) + config.snapshots * weights
    say(
        f"disk     at most {bytes_text(needed)}: {kept} checkpoints of "
        f"{bytes_text(weights + moments)} and {config.snapshots} snapshots; "
        f"{bytes_text(shutil.disk_usage('.').free)} free here"
    )


def plan_time(
    model: LLaMaTransformer,
    optimizers: list[torch.optim.Optimizer],
    data: Dataset,
    config: TrainConfig,
    machine: Machine,
) -> None:
    """Say how long the run takes, from a few steps and evaluations."""
    begin = time.perf_counter()
    if config.compile:
        compile_for_training(model, config.batch_size, machine, data.conversations is not None)
    compiling = time.perf_counter() - begin
    batch = config.batch_size * config.max_seq_len

    def step(micro_steps: int) -> None:
        short = replace(config, tokens_per_step=micro_steps * batch)
        train.take_step(0, model, optimizers, data, short, machine)[0]["loss"].item()

    def evaluate() -> None:
        train.evaluate(model, data, replace(config, eval_tokens=batch), machine)

    n_steps, micro_steps = config.max_steps, config.tokens_per_step // batch
    seconds = median_seconds(lambda: step(1))
    if micro_steps > 1:  # each further one takes what the second adds
        seconds += (micro_steps - 1) * (median_seconds(lambda: step(2)) - seconds)
    evaluation = median_seconds(evaluate)
    if not data.conversations:  # which are all read
        targets = min(config.eval_tokens or sys.maxsize, data.tokens["val"])
        evaluation *= math.ceil(targets / batch)
    evaluations = math.ceil(n_steps / config.eval_interval) if config.eval_interval else 1
    whole = timedelta(seconds=round(compiling + n_steps * seconds + evaluations * evaluation))
    say(
        f"time     {whole}: {n_steps:,} steps of {seconds:.3g} s, {evaluations} evaluations of "
        f"{evaluation:.3g} s, {compiling:.0f} s of compiling; "
        f"{config.tokens_per_step / seconds:,.0f} tokens/s"
    )


def median_seconds(call: Callable[[], Any]) -> float:
    """Return the median time of a call that is repeated for some seconds, after one to warm up."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=SECONDS).median


def peak_memory(device: torch.device) -> str:
    """Return the most memory that this process has had, in words."""
    if device.type == "cuda":
        return f"{bytes_text(torch.cuda.max_memory_allocated(device))} at the peak"
    if device.type != "cpu" or sys.platform == "win32":
        return "unknown"
    import resource  # which Windows lacks

    unit = 1 if sys.platform == "darwin" else 1024
    return f"{bytes_text(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)} at the peak"


def bytes_text(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


if __name__ == "__main__":
    run_main(main)
