"""metrics.jsonl: one JSON object a report, of training or of an evaluation, written and read.

Training reports `step`, `tokens`, `loss`, `lr`, `grad_norm`, `tokens_per_second`, `mfu`, `seconds`;
evaluations `step`, `tokens`, `val_loss` (nats per token), `val_perplexity`, `val_bpb`; of
conversations `answer_loss`, `answer_perplexity`, `answer_bpb`, over what is learned.
"""

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeVar

from plainllama.settings import fits, write_aside
from plainllama.terminal import UserError, command, note, say, warning

T = TypeVar("T")
Tracker = Literal["none", "tensorboard", "trackio", "wandb"]


def read_metrics(out_dir: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; lines that are damaged or cut short are left out."""
    path, records = out_dir / "metrics.jsonl", []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
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
    """Return the three figures of an evaluation as text, and of several directories each loss."""
    kind = "val" if "val_loss" in metrics else "answer"
    perplexity = metrics[f"{kind}_perplexity"]
    shown = f"{perplexity:.2f}" if perplexity < 1e9 else "> 1e9"
    loss, bpb = metrics[f"{kind}_loss"], metrics[f"{kind}_bpb"]
    of_each = [f"{key.partition('/')[2]} {x:.4f}" for key, x in metrics.items() if "/" in key]
    lines = [f"{kind} loss {loss:.4f}  perplexity {shown}  {bpb:.4f} bits per byte"]
    return "\n         ".join(lines + [", ".join(of_each)] * bool(of_each))


class Metrics:
    """Writes metrics.jsonl, and hands the numbers of each record to a tracker if one is asked for.

    A tracker is imported only then, keeps its own settings (environment variables such as
    WANDB_MODE=offline), and cannot stop a run: when it fails, a warning says so.
    """

    def __init__(self, config: Any, writes: bool) -> None:
        """`config` is train.py's; one process `writes`. UserError if the tracker is not there."""
        self.config, self.writes = config, writes
        self.path = Path(config.out_dir, "metrics.jsonl")
        self.tracker: Any = None  # it has wandb's two methods, log and finish
        if config.tracker != "none" and importlib.util.find_spec(config.tracker) is None:
            install = command("-m", "pip", "install", config.tracker)
            raise UserError(f"tracker={config.tracker} is not installed: {install}")

    def begin(self, first: int) -> None:
        """Take back what is later than the step `first`, for it will be done again."""
        with warning(f"{self.path} is left as it was"), write_aside(self.path) as aside:
            kept = [record for record in read_metrics(self.path.parent) if record["step"] <= first]
            aside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
        if self.config.tracker != "none":
            self.tracker = self.attempt(lambda: start_tracker(self.config, first))

    def log(self, record: dict[str, Any], line: str) -> None:
        """Append a record, and print a line."""
        self.append(record)
        last = f"{self.config.max_steps}"
        step = f"step {record['step']:>{len(last)}}/{last}"
        first, *more = line.splitlines()
        is_narrow = len(step) + len(first) > 77  # to fit a terminal
        say(f"{step} {first.replace('  ', ' ')}" if is_narrow else f"{step}  {first}")
        for further in more:
            say(further)

    def append(self, record: dict[str, Any]) -> None:
        """Add a record to the file, and its numbers to the tracker; a failure is a warning."""
        if not self.writes:
            return
        with (
            warning(f"{self.path} lacks step {record['step']}"),
            open(self.path, "a", encoding="utf-8", opener=open_no_link) as file,
        ):
            file.write(json.dumps(record) + "\n")
        if self.tracker:
            numbers = {k: v for k, v in record.items() if k != "step" and fits(v, float)}
            self.attempt(lambda: self.tracker.log(numbers, step=record["step"]))

    def close(self) -> None:
        """Let the tracker write what it holds back; it gets nothing afterwards."""
        if self.tracker:
            self.attempt(self.tracker.finish)
            self.tracker = None

    def attempt(self, call: Callable[[], T]) -> T | None:
        """Return what `call` does, or give the tracker up if it fails."""
        try:
            return call()
        except (Exception, SystemExit) as error:  # whatever a library raises
            self.tracker = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            note(f"warning: the run goes on without {self.config.tracker}, which failed: {reason}")
            return None


def open_no_link(path: str, flags: int) -> int:
    """Open a file, but not through a link that somebody put in its place."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag


def start_tracker(config: Any, first: int) -> Any:
    """Return the tracker of a run that goes on from the step `first`; another one goes here."""
    out_dir = Path(config.out_dir)
    if config.tracker == "tensorboard":  # tensorboard --logdir out
        return TensorBoard(config, out_dir, first)
    tracker = importlib.import_module(config.tracker)  # trackio is used as wandb is
    more = {"resume": "allow" if first else "never"}
    if config.tracker == "wandb":
        more = {"resume": "auto" if first else None, "dir": out_dir}
    return tracker.init(project="plainllama", name=out_dir.name, config=asdict(config), **more)


class TensorBoard:
    """TensorBoard with the methods of wandb's runs."""

    def __init__(self, config: Any, out_dir: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What came after the checkpoint that the run goes on from is taken back.
        purge_step = first + 1 if first else None
        self.writer = SummaryWriter(out_dir / "tensorboard", purge_step=purge_step)
        settings = "\n".join(f"    {key} = {value!r}" for key, value in asdict(config).items())
        self.writer.add_text("settings", settings, first)
        self.finish = self.writer.close

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)


class Clock:
    """The time of a run over all its parts, and of training alone since the last report."""

    def __init__(self, seconds: float) -> None:
        """The parts before this one took `seconds`."""
        self.mark = time.perf_counter()
        self.began = self.mark - seconds

    def seconds(self) -> float:
        """Return the seconds of the run."""
        return time.perf_counter() - self.began

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
        self.mark += time.perf_counter() - start
