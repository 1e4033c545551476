"""A run's directory as it is written: reports, checkpoints, and which of them are kept.

out/RUN/settings.json        the settings that it was last started with
out/RUN/metrics.jsonl        one JSON object a report: training, or an evaluation
out/RUN/curve.svg            its loss, drawn when the run ends
out/RUN/step_NNNNNN/         checkpoints: a Hugging Face directory each, and train_state/ to resume
out/RUN/snapshots/step_*/    weights at early and late steps, to look at; never pruned
"""

import json
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from model import LLaMaTransformer
from plainllama import curves
from plainllama.data import Dataset
from plainllama.files import check_space, lock, rename_into_place, seal, write_json
from plainllama.huggingface import save_model
from plainllama.machine import Machine, StopSignal, flops_per_token, n_params, say
from plainllama.optimizer_state import optimizer_tensors
from plainllama.processes import agreed, first_alone
from plainllama.run_directory import checkpoints, read_metrics, step_of, val_losses
from plainllama.settings import UserError
from plainllama.shard import local, whole
from plainllama.tensor_files import save_tensors
from plainllama.trackers import Reports


def snapshot_steps(count: int, max_steps: int) -> set[int]:
    """Return about `count` steps from 0 to max_steps, evenly spread on a logarithmic scale."""
    count = min(count, max_steps + 2)
    if count < 2:
        return set()
    return {0} | {round(max_steps ** (i / (count - 2 or 1))) for i in range(count - 1)}


class Clock:
    """The time of a run over all its parts, and of training alone since the last report."""

    def __init__(self, seconds: float) -> None:
        self.started = self.mark = time.perf_counter()
        self.before, self.aside = seconds, 0.0

    def seconds(self) -> float:
        """Return the seconds of the run, those before it was resumed included."""
        return self.before + time.perf_counter() - self.started

    def lap(self) -> float:
        """Return the seconds of training since the last lap."""
        now = time.perf_counter()
        lap, self.mark = now - self.mark, now
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out of the lap what takes place inside."""
        start = time.perf_counter()
        yield
        took = time.perf_counter() - start
        self.mark += took
        self.aside += took  # of all pauses together


class Run:
    """Writes the directory of a run that goes on from `state`, in the first process only.

    `config` is train.py's; `peak_speed` is the tokens a second at the hardware's peak, 0 where that
    is not known.
    """

    def __init__(
        self, config: Any, state: dict[str, Any], writes: bool, peak_speed: float, stop: StopSignal
    ) -> None:
        self.config, self.writes, self.peak_speed, self.stop = config, writes, peak_speed, stop
        self.out_dir = Path(config.out_dir)
        self.first, self.tokens_before = state.get("step", 0), state.get("tokens", 0)
        self.reported = self.first  # the step of the last training record
        self.failure = ""  # why the run must end
        self.beside = ThreadPoolExecutor(1, "checkpoint")  # what still takes place ends the process
        self.sealing: Future[None] | None = None  # of the checkpoint that was written last
        self.clock = Clock(state.get("seconds", 0.0))
        if not writes:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.out_dir / ".lock", str(self.out_dir))  # held until the process ends
        if step_of((checkpoints(self.out_dir) or [Path()])[-1]) > self.first:
            raise UserError(f"another process has written to {self.out_dir} meanwhile; start again")
        for leftover in (*self.out_dir.glob(".tmp-*"), *self.out_dir.glob("snapshots/.tmp-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        # What is later than the checkpoint will be done again.
        kept = [r for r in read_metrics(self.out_dir) if r["step"] <= self.first]
        scratch = self.out_dir / "metrics.jsonl.tmp"
        scratch.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        scratch.replace(self.out_dir / "metrics.jsonl")
        write_json(self.out_dir / "settings.json", asdict(config))
        self.reports = Reports(config.tracker, config, self.first)

    def tokens(self, step: int) -> int:
        """Return how many tokens the run has read after `step`."""
        return self.tokens_before + (step - self.first) * self.config.tokens_per_step

    def log(self, record: dict[str, Any], line: str) -> None:
        """Append a record to metrics.jsonl and print a line; if that fails, let the run end."""
        self.append(record)
        if self.writes:
            last = f"{self.config.max_steps}"
            step = f"step {record['step']:>{len(last)}}/{last}"
            narrow = len(step) + len(line) > 77  # to fit a terminal
            say(f"{step} {line.replace('  ', ' ')}" if narrow else f"{step}  {line}")

    def append(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl; if that fails, let the run end."""
        path = self.out_dir / "metrics.jsonl"
        try:
            if self.writes:
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
                self.reports.add(record)
        except OSError as error:
            self.failure = f"{path} cannot be written ({error.strerror})"
            self.stop.came = True

    def end_reports(self) -> None:
        """Write curve.svg, and end the tracker; a run without them is complete, too."""
        if self.writes:
            self.reports.end()
            curve = curves.curve_of(self.out_dir.name, read_metrics(self.out_dir))
            with suppress(OSError):
                curves.save(self.out_dir / "curve.svg", [curve])

    def log_training(self, step: int, loss: float, norm: float, lr: float) -> None:
        """Record the loss of the step just taken and the speed since the last record."""
        self.check_finite(step, {"loss": loss, "gradient norm": norm})
        speed = (step - self.reported) * self.config.tokens_per_step / self.clock.lap()
        self.reported = step
        record = {"step": step, "tokens": self.tokens(step), "loss": loss, "lr": lr}
        record |= {"grad_norm": norm, "tokens_per_second": speed}
        record |= {"mfu": speed / self.peak_speed if self.peak_speed else None}
        record |= {"seconds": self.clock.seconds()}
        each = self.config.tokens_per_step / speed + self.clock.aside / (step - self.first)
        left = each * (self.config.max_steps - step)
        share = f"mfu {record['mfu']:.0%}" if self.peak_speed else f"norm {norm:.2f}"
        pace, left = tqdm.format_sizeof(speed), tqdm.format_interval(left)
        self.log(record, f"loss {loss:.4f}  lr {lr:.1e}  {share}  {pace:>5} tok/s  {left} left")

    def log_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Record an evaluation; warn of a model that predicts worse than one without training."""
        self.check_finite(step, {"validation loss": metrics["val_loss"]})
        record = {"step": step, "tokens": self.tokens(step)} | metrics
        self.log(record, evaluation_line(metrics))
        chance = math.log(self.config.vocab_size)
        if metrics["val_loss"] > chance + 1:
            say(f"warning: worse than chance, {chance:.2f}: the run diverged, lower the lr")

    def check_finite(self, step: int, values: dict[str, float]) -> None:
        """End the run where a value is not finite, before anything is overwritten."""
        if not all(map(math.isfinite, values.values())):
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            self.finish()
            self.append({"step": step, "diverged": shown})
            self.end_reports()
            raise UserError(
                f"not finite at step {step}: {shown}; lower lr={self.config.lr}; "
                f"last good checkpoint: {self.last_checkpoint(before=step)}"
            )

    def last_checkpoint(self, before: float = math.inf) -> Path | str:
        """Return the newest checkpoint of a step below `before`, or "none"."""
        return next((p for p in checkpoints(self.out_dir)[::-1] if step_of(p) < before), "none")

    def save(
        self,
        step: int,
        model: LLaMaTransformer,
        optimizers: list[torch.optim.Optimizer],
        files: dict[str, bytes],
        data: dict[str, str],
    ) -> None:
        """Write step_NNNNNN aside; `data` are its checksums.

        Processes that share the model out all call this, and hand their parts to the first. It
        returns when the system has all bytes. While training goes on, a thread computes checksums,
        waits for the disk, and renames the directory: `finish` waits for the thread.
        """
        final = self.out_dir / f"step_{step:06d}"
        if first_alone(lambda: self.finish() or final.exists()):
            return
        tensors = optimizer_tensors(model, optimizers)
        agreed(lambda: self.check_weights(step, model))
        like = {k: torch.empty(t.shape, dtype=t.dtype, device="meta") for k, t in tensors.items()}
        if not self.writes:
            save_model(model, final, files=files, writes=False)
            return save_tensors(final, like, lambda name: whole(tensors[name]), writes=False)
        needed = sum(t.nbytes for t in (*model.parameters(), *like.values()))
        scratch = self.out_dir / f".tmp-{final.name}"
        with self.in_one_line(scratch, final, needed):
            self.prune()
            check_space(self.out_dir, needed)
            save_model(model, scratch, files=files)
            (scratch / "train_state").mkdir()
            path = scratch / "train_state" / "optimizer.safetensors"
            save_tensors(path, like, lambda name: whole(tensors[name]))
            state = {"step": step, "tokens": self.tokens(step), "seconds": self.clock.seconds()}
            state |= {"saved_at": time.time(), "data": data, "config": asdict(self.config)}
            write_json(scratch / "train_state" / "state.json", state)
        self.sealing = self.beside.submit(self.complete, scratch, final, needed)

    def complete(self, scratch: Path, final: Path, needed: int) -> None:
        """Complete a checkpoint whose files are written; if that fails, let the run end."""
        try:
            with self.in_one_line(scratch, final, needed):
                seal(scratch, final)
        except UserError:
            self.stop.came = True
            raise

    def finish(self) -> None:
        """Wait until the last checkpoint is complete; UserError if it cannot be."""
        sealing, self.sealing = self.sealing, None
        if sealing:
            sealing.result()

    @contextmanager
    def in_one_line(self, scratch: Path, final: Path, needed: int) -> Iterator[None]:
        """Make a UserError of what keeps a checkpoint from being written."""
        try:
            yield
        except (OSError, SafetensorError) as error:  # the disk is full, for example
            shutil.rmtree(scratch, ignore_errors=True)
            size, free = needed / 1e6, shutil.disk_usage(self.out_dir).free / 1e6
            raise UserError(
                f"{final} cannot be written ({error}): it takes {size:,.1f} MB, {free:,.1f} MB are "
                f"free; last checkpoint: {self.last_checkpoint()}; to go on: {resume_command()}"
            ) from error

    def check_weights(self, step: int, model: LLaMaTransformer) -> None:
        """End the run if a weight that this process keeps is not finite."""
        for name, parameter in model.named_parameters():
            if not local(parameter).isfinite().all():
                self.check_finite(step, {name: math.nan})

    def save_snapshot(self, step: int, model: LLaMaTransformer, files: dict[str, bytes]) -> None:
        """Write snapshots/step_NNNNNN, the weights alone, unless it is there."""
        final = self.out_dir / "snapshots" / f"step_{step:06d}"
        if not first_alone(final.exists):
            scratch = final.with_name(f".tmp-{final.name}")
            save_model(model, scratch, files=files, writes=self.writes)
            if self.writes:
                rename_into_place(scratch, final)

    def prune(self) -> Path | None:
        """Delete all checkpoints but the newest keep_last and the best; return the best."""
        saved, losses = checkpoints(self.out_dir), val_losses(self.out_dir)
        evaluated = [path for path in saved if step_of(path) in losses]
        best = min(evaluated, key=lambda p: (losses[step_of(p)], -step_of(p)), default=None)
        for path in saved[: -self.config.keep_last] if self.writes else []:
            if path != best and not path.is_symlink():
                # Renamed first, so that a kill leaves no part of a checkpoint.
                shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))
        return best

    def conclude(self, step: int, stopped: bool) -> None:
        """Say how the run ended and what to do next."""
        took = tqdm.format_interval(time.perf_counter() - self.clock.started)
        first_alone(self.finish)
        best = self.prune()
        self.end_reports()
        if self.failure:
            saved = f"saved {self.last_checkpoint()}; to go on: {resume_command()}"
            raise UserError(f"{self.failure}; {saved}")
        ending = f"stopped after step {step}" if stopped else f"done in {took}"
        say(ending + (f"; best checkpoint: {best}" if best else ""))
        following = f'next: python sample.py --ckpt={self.out_dir} --prompt "..."'
        say(f"to go on: {resume_command()}" if stopped else following)


def evaluation_line(metrics: dict[str, float]) -> str:
    """Return the three figures of an evaluation as text."""
    perplexity = metrics["val_perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < 1e9 else "> 1e9"
    loss, bpb = metrics["val_loss"], metrics["val_bpb"]
    return f"val loss {loss:.4f}  perplexity {shown}  {bpb:.4f} bits per byte"


def resume_command() -> str:
    """Return the command line of this process, made to continue its run."""
    start = ["python"]
    if "LOCAL_WORLD_SIZE" in os.environ:
        local, world = (int(os.environ[f"{kind}WORLD_SIZE"]) for kind in ("LOCAL_", ""))
        start = ["torchrun", f"--nproc_per_node={local}"]
        if world > local:  # on each node; the port of this run's end may still be taken
            nodes = [f"--nnodes={world // local}", "--rdzv-backend=c10d"]
            identity = os.environ.get("TORCHELASTIC_RUN_ID", "")
            start += [*nodes, f"--rdzv-endpoint={os.environ['MASTER_ADDR']}:29400"]
            start += [f"--rdzv-id={identity}"] if identity not in ("", "none") else []
        restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
        start += [f"--max-restarts={restarts}"] if restarts != "0" else []
    words = [word for word in sys.argv if word != "--resume"]
    return shlex.join([*start, *words, "--resume"])


def describe(
    config: Any, dataset: Dataset, model: LLaMaTransformer, machine: Machine, micro_steps: int
) -> None:
    """Print what is about to be trained, on what, and how a step is made up."""
    epochs = config.max_steps * config.tokens_per_step / dataset.tokens["train"]
    how = "torch.compile" if config.compile else "eager"
    say(
        f"model    {n_params(model):,} parameters, {config.n_layers} layers, "
        f"{config.n_embd} wide, {flops_per_token(model) / 1e6:,.1f} MFLOPs/token\n"
        f"data     {config.data_dir}, vocabulary {dataset.vocab_size:,}\n"
        f"         {dataset.tokens['train']:,} training tokens, "
        f"{dataset.tokens['val']:,} validation tokens\n"
        f"step     {config.tokens_per_step:,} tokens = {config.batch_size} sequences × "
        f"{config.max_seq_len:,} × {micro_steps} micro-step{'s' * (micro_steps > 1)} × "
        f"{machine.world_size} process{'es' * (machine.world_size > 1)}\n"
        f"run      {config.max_steps:,} steps = {epochs:.1f} epochs, into {config.out_dir}\n"
        f"machine  {machine.device}, {str(machine.dtype).removeprefix('torch.')}, {how}"
    )
