"""List the runs under out/, best first, and draw their loss curves.

Reads out/RUN/settings.json and metrics.jsonl, also while they are being written, and changes
nothing. Writes the picture that --plot asks for.

    python runs.py                                 all runs under out/
    python runs.py out/tiny out/ladder             a run, and those under a folder
    python runs.py --plot=loss.png --axis=time     their curves as a picture
"""

import plainllama.startup  # noqa: F401 isort: skip (first: see there)

import json
import shutil
import statistics
import sys
import textwrap
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple

from plainllama.data import is_locked
from plainllama.metrics import loss_of, read_metrics
from plainllama.settings import fits, load, read_json
from plainllama.terminal import UserError, command, printable, run_main, say

NOT_COMPARED = ("out_dir", "resume", "eval_only")
TELLING = ("data_dir", "init_from", "n_embd", "n_layers", "lr")  # what is said first
LAST = 20  # reports of training that the speed is the median of


@dataclass(frozen=True)
class RunsConfig:
    """List the runs under out/, best first, and draw their loss curves."""

    # runs
    inputs: tuple[str, ...] = ()  # runs, or folders of runs
    sort: Literal["bpb", "loss", "speed", "time", "tokens", "name"] = "bpb"  # what comes first
    # picture
    plot: str = ""  # draw the curves into this file: .png, .svg or .pdf
    axis: Literal["step", "tokens", "time"] = "tokens"  # what the curves are drawn over


class Summary(NamedTuple):
    """A run in one line; what is not known is None."""

    folder: Path
    state: str  # running, diverged, finished or stopped
    config: dict[str, Any]
    step: int = 0
    tokens: int | None = None
    seconds: float | None = None
    speed: float | None = None  # tokens a second
    loss: float | None = None  # the lowest validation loss, nats a token
    bpb: float | None = None  # bits per byte of that evaluation


def find_runs(inputs: tuple[str, ...]) -> list[Path]:
    """Return the directories of runs that are given, or lie in folders that are given.

    UserError for one that is neither.
    """
    found: dict[Path, None] = {}
    for word in inputs or ("out",):
        folder = Path(word)
        if not folder.is_dir():
            way_out = command("train.py", "config/tiny.py")
            raise UserError(f"there is no {folder} here; to train: {way_out}")
        runs = [path for path in [folder, *folder.iterdir()] if (path / "settings.json").is_file()]
        if not runs:
            raise UserError(f"{folder} is no run and holds none: there is no settings.json")
        found.update(dict.fromkeys(sorted(runs)))
    return list(found)


def summarize(folder: Path) -> Summary:
    """Return the summary of a run, whatever state its files are in."""
    config, records = {}, []
    with suppress(UserError, OSError):
        config = read_json(folder / "settings.json")
    with suppress(OSError):
        records = read_metrics(folder)
    best = min((r for r in records if fits(loss_of(r), float)), key=loss_of, default={})
    steps, tokens, seconds, speeds = (
        [record[key] for record in records[-2 * LAST :] if fits(record.get(key), float)]
        for key in ("step", "tokens", "seconds", "tokens_per_second")
    )
    step = int(max(steps, default=0))
    state = "finished" if step and step == config.get("max_steps") else "stopped"
    if is_locked(folder / ".lock"):
        state = "running"
    elif records and "diverged" in records[-1]:
        state = "diverged"
    return Summary(
        folder,
        state,
        config,
        step,
        tokens[-1] if tokens else None,
        seconds[-1] if seconds else None,
        statistics.median(speeds[-LAST:]) if speeds else None,
        loss_of(best),
        best.get("val_bpb", best.get("answer_bpb")),
    )


def differences(summaries: list[Summary]) -> list[str]:
    """Return, of each run, the settings that are not those of more than half of the runs."""
    kept = [{k: v for k, v in s.config.items() if k not in NOT_COMPARED} for s in summaries]
    said: list[list[str]] = [[] for _ in summaries]
    for key in dict.fromkeys([*TELLING, *(key for config in kept for key in config)]):
        values = [json.dumps(config.get(key)) for config in kept]
        common, count = Counter(values).most_common(1)[0]
        usual = common if 2 * count > len(values) else None
        for words, config, text in zip(said, kept, values, strict=True):
            if text != usual and key in config:
                value = config[key]
                words.append(f"{key}={value:.6g}" if type(value) is float else f"{key}={value}")
    return [one_line(" ".join(words)) for words in said]


def in_order(summaries: list[Summary], sort: str) -> list[Summary]:
    """Return summaries, lowest first or, of speeds, highest; those that lack the figure last."""
    key = {"name": "folder", "time": "seconds"}.get(sort, sort)
    with_it = [s for s in summaries if getattr(s, key) is not None]
    without = [s for s in summaries if getattr(s, key) is None]
    return sorted(with_it, key=lambda s: getattr(s, key), reverse=sort == "speed") + without


def table(summaries: list[Summary]) -> str:
    """Return a table of runs: one line each or, on a terminal, two that fit its width."""
    rows = [["run", "state", "step", "tokens", "time", "val loss", "bits/byte", "tok/s"]]
    for s in summaries:
        most = s.config.get("max_steps")
        step = f"{s.step}/{most}" if fits(most, int) else f"{s.step}"
        took = "-" if s.seconds is None else str(timedelta(seconds=round(s.seconds)))
        figures = shown(s.loss, ".4f"), shown(s.bpb, ".4f"), shown(s.speed, ",.0f")
        name = one_line(s.folder.as_posix())
        rows.append([name, s.state, step, shown(s.tokens, ","), took, *figures])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if width:  # the ends of long names, so that the figures are whole
        widths[0] = min(widths[0], max(9, width - sum(widths[1:]) - 2 * len(widths[1:])))
    form = ("{:<%d}  {:<%d}" + "  {:>%d}" * 6) % (*widths,)
    lines = []
    for (place, *figures), differs in zip(rows, ["", *differences(summaries)], strict=True):
        lines.append(form.format(place[-widths[0] :], *figures))
        if not width:
            lines[-1] = f"{lines[-1]}  {differs}".rstrip()
        elif differs:
            lines.append("    " + textwrap.shorten(differs, width - 4, placeholder=" ..."))
    return "\n".join(lines)


def one_line(text: str) -> str:
    """Return a text as a part of a line: names and settings may be a stranger's."""
    return printable(text).replace("\n", "\\n")


def shown(value: float | None, form: str) -> str:
    """Return a number as text; - where there is none."""
    return "-" if value is None else format(value, form)


def draw(folders: list[Path], path: Path, axis: str) -> None:
    """Write a picture of the runs' losses, those of validation with dots."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    except ImportError:
        how = command("-m", "pip", "install", "matplotlib")
        raise UserError(f"plot needs a package that is not there: {how}") from None
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    over = "seconds" if axis == "time" else axis
    for number, folder in enumerate(folders):
        records, seconds = read_metrics(folder), 0.0
        for record in records:  # an evaluation has the time of the last training report
            seconds = record.setdefault("seconds", seconds)
            record["val_loss"] = loss_of(record)  # of answers, where there is no other
        for key, style, label in (("loss", "-", None), ("val_loss", "o-", folder.as_posix())):
            points = [r for r in records if fits(r.get(key), float)]
            x, y = [r[over] for r in points], [r[key] for r in points]
            axes.plot(x, y, style, label=label, color=f"C{number}", linewidth=1, markersize=4)
    axes.set_xlabel(over)
    axes.set_ylabel("loss, nats per token (validation: dots)")
    axes.legend()
    if path.is_symlink():  # what it leads to is left alone
        path.unlink()
    try:
        figure.savefig(path)
    except ValueError as error:  # an ending that it does not know
        raise UserError(f"plot={path}: {error}") from None


def run(config: RunsConfig) -> None:
    """List runs, and draw their curves if config asks for it."""
    summaries = in_order([*map(summarize, find_runs(config.inputs))], config.sort)
    say(table(summaries))
    if config.plot:
        draw([summary.folder for summary in summaries], Path(config.plot), config.axis)
        print(f"wrote {config.plot}")


def main() -> None:
    run(load(RunsConfig))


if __name__ == "__main__":
    run_main(main)
