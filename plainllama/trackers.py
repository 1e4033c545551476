"""Where reports go besides metrics.jsonl, if that is asked for: TensorBoard, trackio, wandb.

A tracker is fed the very records of metrics.jsonl, as they are written: each number in them, under
its key, at the record's step. The library is imported only then, keeps its own settings
(environment variables such as WANDB_MODE=offline or TRACKIO_DIR), and cannot stop a run: when it
fails, a warning says so, and the run goes on without it.

Another one takes a function like those below, and its name in `TRACKERS`.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from plainllama.machine import say_on_stderr
from plainllama.settings import UserError, fits

Tracker = Literal["none", "tensorboard", "trackio", "wandb"]
Log = Callable[[dict[str, float], int], Any]  # numbers by name, and the step that they are of
PROJECT = "plainllama"  # under which trackio and wandb list runs


def tensorboard(out_dir: Path, settings: dict[str, Any], first: int) -> tuple[Log, Callable]:
    """Write event files into out/RUN/tensorboard: `tensorboard --logdir out` shows all runs."""
    from torch.utils.tensorboard import SummaryWriter

    # What came after the checkpoint that the run goes on from is taken back.
    writer = SummaryWriter(out_dir / "tensorboard", purge_step=first + 1 if first else None)
    writer.add_text("settings", "\n".join(f"    {k} = {v!r}" for k, v in settings.items()), first)

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def trackio(out_dir: Path, settings: dict[str, Any], first: int) -> tuple[Log, Callable]:
    """Write to trackio's database: `trackio show` lists the runs."""
    import trackio

    resume = "allow" if first else "never"
    run = trackio.init(project=PROJECT, name=out_dir.name, config=settings, resume=resume)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


def wandb(out_dir: Path, settings: dict[str, Any], first: int) -> tuple[Log, Callable]:
    """Send to Weights & Biases, or write into out/RUN/wandb with WANDB_MODE=offline."""
    import wandb

    resume = "auto" if first else None
    where = {"project": PROJECT, "name": out_dir.name, "dir": out_dir}
    run = wandb.init(**where, config=settings, resume=resume)
    return lambda numbers, step: run.log(numbers, step=step), run.finish


TRACKERS = {"tensorboard": tensorboard, "trackio": trackio, "wandb": wandb}


def check_installed(name: Tracker) -> None:
    """Raise a UserError if the package of a tracker is not there."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"tracker={name} needs a package that is not there: pip install {name}")


class Reports:
    """Hands records to the tracker called `name`, until it fails or the run ends."""

    def __init__(self, name: Tracker, config: Any, first: int) -> None:
        self.name, self.log, self.close = name, None, None
        if name != "none":
            start = TRACKERS[name]
            self.attempt(lambda: self.take(*start(Path(config.out_dir), asdict(config), first)))

    def take(self, log: Log, close: Callable) -> None:
        self.log, self.close = log, close

    def attempt(self, call: Callable[[], Any]) -> None:
        """Call what may fail, and give the tracker up if it does."""
        try:
            call()
        except (Exception, SystemExit) as error:  # whatever a library raises
            self.log = self.close = None
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            say_on_stderr(f"warning: the run goes on without {self.name}, which failed: {reason}")

    def add(self, record: dict[str, Any]) -> None:
        """Hand over the numbers of a record of metrics.jsonl."""
        if self.log:
            numbers = {k: v for k, v in record.items() if k != "step" and fits(v, float)}
            self.attempt(lambda: self.log(numbers, record["step"]))

    def end(self) -> None:
        """Let the tracker write what it holds back; it gets nothing afterwards."""
        if self.close:
            self.attempt(self.close)
            self.log = self.close = None
