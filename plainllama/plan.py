"""What a run will take, told before it is started: memory by part, time, disk, and what fits.

The memory of a step is found by taking it with fake tensors, which have shapes but no numbers: it
is the very step of train.py, and any batch_size can be tried that way, on any device, without
taking the memory. The time is that of a few real steps, whose results are thrown away. Nothing is
written.
"""

import shutil
import statistics
import sys
import time
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import LLaMaTransformer
from plainllama.data import Dataset
from plainllama.machine import (
    LOSS_CHUNKS,
    Machine,
    WithoutNumbers,
    device_memory,
    flops_per_token,
    n_params,
    say,
    spare_memory,
)
from plainllama.optimizer_state import optimizer_tensors
from plainllama.scaling import predicted
from plainllama.settings import UserError

SECONDS = 10  # of trial steps, at least, unless the whole run is shorter
PARTS = ("weights", "gradients", "optimizer", "activations", "logits")


class Training(NamedTuple):
    """The functions of train.py that make up a step and an evaluation."""

    make_optimizers: Callable[..., list[torch.optim.Optimizer]]
    take_step: Callable[..., tuple[Tensor, Tensor]]
    evaluate: Callable[..., dict[str, float]]


class LiveMemory(TorchDispatchMode):
    """Inside, counts the bytes of the tensors that are alive, and keeps those of the peak.

    Logits, with a row for each of `rows` tokens, as wide as one of `widths`, are counted apart.
    """

    def __init__(self, rows: int, widths: set[int]) -> None:
        super().__init__()
        self.rows, self.widths = rows, widths
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self.alive: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return result

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory, unless it is another's and so counted already."""
        storage = tensor.untyped_storage()
        if storage in self.seen:
            return
        self.seen.add(storage)
        width = tensor.shape[-1] if tensor.dim() else 0
        wide = width in self.widths and tensor.numel() >= self.rows * width
        part, n_bytes = "logits" if wide else "other", storage.nbytes()
        self.alive[part] += n_bytes
        weakref.finalize(storage, self.alive.subtract, {part: n_bytes})
        if self.alive.total() > self.peak.total():
            self.peak = self.alive.copy()


def step_memory(config: Any, dataset: Dataset, machine: Machine, training: Training) -> Counter:
    """Return the bytes of each part at the peak of a step, in a process that is on its own."""
    alone = Machine(machine.device, machine.dtype, rank=0, world_size=1)
    rows = config.batch_size * config.max_seq_len
    micro_steps = 1 if config.tokens_per_step == rows else 2  # the second finds gradients there
    config = replace(config, tokens_per_step=micro_steps * rows)
    padded = -(-config.vocab_size // 64) * 64
    of_loss = rows // LOSS_CHUNKS if config.chunked_loss else rows  # whose logits are there at once
    live = LiveMemory(of_loss, {config.vocab_size, padded})
    with FakeTensorMode(allow_non_fake_inputs=True), live:
        with torch.device(machine.device), WithoutNumbers():
            model = LLaMaTransformer(config)
        spare_memory(model, config)
        optimizers = training.make_optimizers(model, config)
        small = replace(config, batch_size=1, tokens_per_step=config.max_seq_len)
        training.take_step(0, model, optimizers, dataset, small, alone)  # makes their state
        live.peak = Counter()
        training.take_step(0, model, optimizers, dataset, config, alone)
        parts = Counter(weights=nbytes([*model.parameters(), *model.buffers()]))
        parts["optimizer"] = nbytes([*optimizer_tensors(model, optimizers).values()])
        parts["logits"] = live.peak["logits"]
        gradients = nbytes([p for p in model.parameters() if p.requires_grad])
    rest = live.peak.total() - parts.total()
    parts["gradients"] = min(gradients, rest)  # not all are there where the peak comes early
    parts["activations"] = rest - parts["gradients"]
    return parts


def nbytes(tensors: list[Tensor]) -> int:
    """Return the bytes of tensors, those of a shared one counted once."""
    return sum({id(t): t.numel() * t.element_size() for t in tensors}.values())


def size(n_bytes: float) -> str:
    """Return a number of bytes as text."""
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.2f} {name}"
    return f"{n_bytes / 1e6:,.1f} MB"


def fitting(config: Any, dataset: Dataset, machine: Machine, training: Training) -> Any:
    """Say what a step's memory consists of; return config with the largest batch_size that fits.

    Smaller ones than config's are tried until one fits; UserError if 1 does not.
    """
    shares = machine.mesh.size(-1) if machine.mesh else 1

    @cache
    def needed(batch_size: int) -> Counter:
        parts = step_memory(replace(config, batch_size=batch_size), dataset, machine, training)
        for part in ("weights", "gradients", "optimizer"):
            parts[part] //= shares
        return parts

    has = device_memory(machine.device)
    parts = needed(config.batch_size)
    say("memory   " + ", ".join(f"{part} {size(parts[part])}" for part in PARTS))
    if has is None:
        say(f"         {size(parts.total())} in a step; what {machine.device} has is not known")
        return config
    total, free = has
    say(
        f"         {size(parts.total())} at the peak of a step, eager; {machine.device} has "
        f"{size(total)}, {size(free)} of it free"
    )
    if parts.total() <= free:
        return config
    rows = config.tokens_per_step // config.max_seq_len // machine.world_size
    fit, others = 0, [n for n in range(1, config.batch_size) if rows % n == 0]
    tried = []
    while others:  # halve what is left: a larger batch never takes less
        middle = others[len(others) // 2]
        tried.append(middle)
        if (parts := needed(middle)).total() <= free:
            fit, others = middle, [n for n in others if n > middle]
        else:
            others = [n for n in others if n < middle]
    if not fit:
        parts = needed(1)
        raise UserError(
            f"does not fit: at batch_size=1 a step takes {size(parts.total())}, {machine.device} "
            f"has {size(free)} free; lower max_seq_len or the model's size, or try "
            "--activation_checkpointing, or --shard=all on several devices"
        )
    say(
        f"         does not fit; batch_size={fit} is the largest that does, of those that divide "
        f"{rows:,} sequences (tried: {', '.join(map(str, tried))}): --batch_size={fit}"
    )
    return replace(config, batch_size=fit)


class Trial:
    """Takes trial steps with a model, and says what the run would take."""

    def __init__(
        self, config: Any, dataset: Dataset, machine: Machine, training: Training, model: nn.Module
    ) -> None:
        self.config, self.dataset, self.machine, self.training = config, dataset, machine, training
        self.model = model

    def seconds_of_step(
        self, optimizers: list[torch.optim.Optimizer], micro_steps: int
    ) -> tuple[float, int]:
        """Return the time of a step, and how many were taken.

        Long steps of many micro-steps are not taken whole: those of one and of two are timed.
        """
        c = self.config
        one = c.tokens_per_step // micro_steps

        def timed(count: int) -> float:
            begin = time.perf_counter()
            short = replace(c, tokens_per_step=count * one)
            state = self.model, optimizers, self.dataset, short, self.machine
            self.training.take_step(0, *state)[0].item()
            return time.perf_counter() - begin

        timed(1)  # loads what is loaded once
        single = timed(1)
        (longest,) = self.machine.total(single)  # so that all processes choose the same
        longest *= micro_steps / self.machine.world_size
        whole = longest <= SECONDS / 3
        enough = min(SECONDS, longest * c.max_steps)  # seconds
        counts = (micro_steps,) if whole else (1, 2)
        took: dict[int, list[float]] = {count: [] for count in counts}
        begin = time.perf_counter()
        while True:
            for count in counts:
                took[count].append(timed(count))
            ended = time.perf_counter() - begin >= enough and len(took[counts[0]]) >= 3
            if self.machine.total(ended)[0] > 0:
                break
        taken = sum(map(len, took.values()))
        medians = [statistics.median(times) for times in took.values()]
        if whole:
            return medians[0], taken
        each = max(0.0, medians[1] - medians[0])
        return medians[0] + (micro_steps - 1) * each, taken

    def seconds_of_evaluation(self, lengths: Any) -> float:
        """Return the time of an evaluation, from that of one batch in each process."""
        c, T = self.config, self.config.max_seq_len
        batch = c.batch_size * T * self.machine.world_size
        windows = -(-(self.dataset.tokens["val"] - 1) // T)
        windows = min(windows, max(1, c.eval_tokens // T)) if c.eval_tokens else windows
        took = []
        for _ in range(3):
            begin = time.perf_counter()
            short = replace(c, eval_tokens=batch)
            self.training.evaluate(self.model, self.dataset, lengths, short, self.machine)
            took.append(time.perf_counter() - begin)
        return min(took) * -(-windows * T // batch)

    def report(
        self,
        first: int,
        micro_steps: int,
        optimizers: list[torch.optim.Optimizer],
        lengths: Any,
        compiling: float,
    ) -> None:
        """Print what the run from step `first` on would take; `compiling` are the seconds of it."""
        c, steps = self.config, self.config.max_steps - first
        step, taken = self.seconds_of_step(optimizers, micro_steps)
        evaluation = self.seconds_of_evaluation(lengths)
        evaluations = times(c.eval_interval, first, c.max_steps)
        compiling = compiling if c.compile else 0.0
        seconds = compiling + steps * step + evaluations * evaluation
        tokens = steps * c.tokens_per_step
        flops = tokens * flops_per_token(self.model)
        speed = c.tokens_per_step / step
        end = datetime.now() + timedelta(seconds=seconds)
        took = timedelta(seconds=round(seconds))
        say(
            f"trial    {taken} steps, median {step:.3g} s, {speed:,.0f} tokens/s; "
            f"{peak(self.machine.device)}\n"
            f"compute  {steps:,} steps of {c.tokens_per_step:,} tokens: {tokens:,} tokens, "
            f"{tokens / self.dataset.tokens['train']:.1f} epochs, {flops:.2g} FLOPs\n"
            f"time     {took}: {timedelta(seconds=round(steps * step))} of steps, "
            f"{evaluations} evaluation{'s' * (evaluations > 1)} of {evaluation:.1f} s"
            + (f", {compiling:.0f} s of compiling" if c.compile else "")
            + f"; begun now it ends at {end:%Y-%m-%d %H:%M}\n"
            f"disk     {self.disk(first, optimizers)}"
        )
        tokens = c.max_steps * c.tokens_per_step
        if loss := "" if c.init_from else predicted(n_params(self.model), tokens):
            say(f"loss     {loss}")

    def disk(self, first: int, optimizers: list[torch.optim.Optimizer]) -> str:
        """Return how much a run's directory will hold, and what the disk has free."""
        c = self.config
        weights = nbytes([*self.model.parameters()])
        checkpoint = weights + nbytes([*optimizer_tensors(self.model, optimizers).values()])
        written = times(c.checkpoint_interval, first, c.max_steps)
        kept = min(written, c.keep_last + 1)  # and the best
        needed = kept * checkpoint + c.snapshots * weights
        folder = Path(c.out_dir).absolute()
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        snapshots = f", {c.snapshots} snapshots of {size(weights)}" if c.snapshots else ""
        more = needed + checkpoint  # one more is written before one is deleted
        return (
            f"{size(needed)}: {kept} checkpoints of {size(checkpoint)}{snapshots}; "
            f"{size(free)} free" + (": TOO LITTLE" if more > free else "")
        )


def times(interval: int, first: int, last: int) -> int:
    """Return how often what is due every `interval` steps (0: never), and at the end, happens."""
    if not interval:
        return 1
    return last // interval - first // interval + (last % interval > 0)


def peak(device: torch.device) -> str:
    """Return the most memory that was taken so far, as text."""
    if device.type == "cuda":
        return f"{size(torch.cuda.max_memory_allocated(device))} allocated at most"
    with suppress(ImportError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        most = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return f"the process took up to {size(most)}, code included"
    return "memory not measured"
