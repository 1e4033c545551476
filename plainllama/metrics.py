"""metrics.jsonl: one JSON object a report, of training or of an evaluation, written and read.

Training reports `step`, `tokens`, `loss`, `lr`, `grad_norm`, `tokens_per_second`, `mfu`, `seconds`;
evaluations `step`, `tokens`, `val_loss` (nats per token), `val_perplexity`, `val_bpb`; of
conversations `answer_loss`, `answer_perplexity`, `answer_bpb`, over what is learned.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from plainllama.settings import UserError, command, fits, note, say, warning, write_aside

T = TypeVar("T")
Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
Log = Callable[[dict[str, float], int], Any]  # numbers by name, and the step that they are of


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


def val_losses(out_dir: Path) -> dict[int, float]:
    """Return the validation loss after each step that was evaluated."""
    records = read_metrics(out_dir)
    return {r["step"]: loss_of(r) for r in records if fits(loss_of(r), float)}


def loss_of(record: dict[str, Any]) -> Any:
    """Return the validation loss in a record, of text or of answers; None if there is none."""
    return record.get("val_loss", record.get("answer_loss"))


def evaluation_line(metrics: dict[str, float]) -> str:
    """Return the three figures of an evaluation as text."""
    kind = "val" if "val_loss" in metrics else "answer"
    perplexity = metrics[f"{kind}_perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < 1e9 else "> 1e9"
    loss, bpb = metrics[f"{kind}_loss"], metrics[f"{kind}_bpb"]
    return f"{kind} loss {loss:.4f}  perplexity {shown}  {bpb:.4f} bits per byte"


class Metrics:
    """Writes metrics.jsonl, and hands the numbers of each record to a tracker if one is asked for.

    A tracker is imported only then, keeps its own settings (environment variables such as
    WANDB_MODE=offline), and cannot stop a run: when it fails, a warning says so.
    """

    def __init__(self, config: Any, writes: bool) -> None:
        """`config` is train.py's; one process `writes`. UserError if the tracker is not there."""
        self.config, self.writes = config, writes
        self.path = Path(config.out_dir, "metrics.jsonl")
        self.track: tuple[Log, Callable[[], Any]] | None = None
        tracker = config.tracker
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            install = command("-m", "pip", "install", tracker)
            raise UserError(f"tracker={tracker} is not installed: {install}")

    def begin(self, first: int) -> None:
        """Take back what is later than the step `first`, for it will be done again."""
        with warning(f"{self.path} is left as it was"), write_aside(self.path) as aside:
            kept = [record for record in read_metrics(self.path.parent) if record["step"] <= first]
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        if self.config.tracker != "none":
            self.track = self.attempt(lambda: start_tracker(self.config, first))

    def log(self, record: dict[str, Any], line: str) -> None:
        """Append a record, and print a line."""
        self.append(record)
        last = f"{self.config.max_steps}"
        step = f"step {record['step']:>{len(last)}}/{last}"
        is_narrow = len(step) + len(line) > 77  # to fit a terminal
        say(f"{step} {line.replace('  ', ' ')}" if is_narrow else f"{step}  {line}")

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to the file, and its numbers to the tracker; a failure is a warning."""
        if not self.writes:
            return
        with (
            warning(f"{self.path} lacks step {record['step']}"),
            open(self.path, "a", encoding="utf-8", opener=open_no_link) as file,
        ):
            file.write(json.dumps(record) + "\n")
        if self.track:
            log, _ = self.track
            numbers = {k: v for k, v in record.items() if k != "step" and fits(v, float)}
            self.attempt(lambda: log(numbers, record["step"]))

    def close(self) -> None:
        """Let the tracker write what it holds back; it gets nothing afterwards."""
        if self.track:
            _, close = self.track
            self.attempt(close)
            self.track = None

    def attempt(self, call: Callable[[], T]) -> T | None:
        """Return what `call` does, or give the tracker up if it fails."""
        try:
            return call()
        except (Exception, SystemExit) as error:  # whatever a library raises
            self.track = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            note(f"warning: the run goes on without {self.config.tracker}, which failed: {reason}")
            return None


def open_no_link(path: str, flags: int) -> int:
    """Open a file, but not through a link that somebody put in its place."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag


def start_tracker(config: Any, first: int) -> tuple[Log, Callable[[], Any]]:
    """Return what takes numbers and a step, and what ends the tracker; another one goes here."""
    out_dir = Path(config.out_dir)
    if config.tracker == "tensorboard":  # tensorboard --logdir out
        from torch.utils.tensorboard import SummaryWriter

        # What came after the checkpoint that the run goes on from is taken back.
        writer = SummaryWriter(out_dir / "tensorboard", purge_step=first + 1 if first else None)
        settings = "\n".join(f"    {key} = {value!r}" for key, value in asdict(config).items())
        writer.add_text("settings", settings, first)

        def log(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        return log, writer.close
    if config.tracker == "trackio":  # trackio show
        import trackio as tracker

        resume = "allow" if first else "never"
        run = tracker.init("plainllama", name=out_dir.name, config=asdict(config), resume=resume)
    else:
        import wandb as tracker

        run = tracker.init(
            project="plainllama",
            name=out_dir.name,
            dir=out_dir,
            config=asdict(config),
            resume="auto" if first else None,
        )
    return lambda numbers, step: run.log(numbers, step=step), run.finish


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
