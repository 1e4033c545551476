"""Train a ladder of sizes and token budgets, fit loss against both, and write docs/SCALING.md.

    python tools/ladder.py --data_dir=data/code --corpus="the source of transformers"
    python tools/ladder.py --data_dir=data/code --sizes="1x32 2x64" --budgets="1e5 2e5"

A run is that of --config with another size and length; its rate falls to zero within its own
budget. Runs that are finished are skipped and those that were stopped go on, so the command may be
stopped and given again at any time. A rung "4x128" is 4 layers, 128 wide, heads of 32.
"""

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from plainllama import scaling  # noqa: E402
from plainllama.data import load_dataset  # noqa: E402
from plainllama.run_directory import checkpoints, read_metrics  # noqa: E402
from plainllama.settings import UserError, load, run  # noqa: E402

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "SCALING.md"
MARKS = "<!-- by tools/ladder.py -->\n", "<!-- end -->\n"


@dataclass(frozen=True)
class LadderConfig:
    """Train a ladder of sizes and token budgets, and fit loss against both."""

    # runs
    data_dir: str = "data/code"  # prepared data
    corpus: str = ""  # what the data is, for the table
    config: str = "config/tiny.py"  # what all runs share
    sizes: str = "2x32 3x48 3x64 4x96 4x128 5x160"  # layers x width of each model
    budgets: str = "1e6 3e6 1e7"  # tokens of each run
    out_dir: str = "out/ladder"  # where the runs are
    seed: int = 0  # of all runs
    train: bool = True  # False: take the runs that are finished, and no others
    # table
    write: bool = False  # write docs/scaling.json and the table in docs/SCALING.md


def rungs(config: LadderConfig) -> list[tuple[int, int, int]]:
    """Return (layers, width, tokens) of all runs, the cheapest first."""
    sizes = [re.fullmatch(r"(\d+)x(\d+)", word) for word in config.sizes.split()]
    if not sizes or None in sizes or any(int(m[2]) % 32 and int(m[2]) % 16 for m in sizes):
        raise UserError(f'sizes={config.sizes!r} must be like "2x32 4x128", widths multiples of 16')
    try:
        budgets = [int(float(word)) for word in config.budgets.split()]
    except ValueError:
        raise UserError(f'budgets={config.budgets!r} must be like "1e6 3e6"') from None
    shapes = [(int(m[1]), int(m[2])) for m in sizes]
    cost = lambda rung: rung[0] * rung[1] ** 2 * rung[2]  # noqa: E731
    return sorted(((*shape, tokens) for tokens in budgets for shape in shapes), key=cost)


def command(config: LadderConfig, layers: int, width: int, tokens: int) -> list[str]:
    """Return the command line of a run."""
    per_step = 1024
    steps = max(2, round(tokens / per_step))
    heads = width // 32 if width % 32 == 0 else width // 16
    flags = {
        "data_dir": config.data_dir,
        "out_dir": f"{config.out_dir}/{layers}x{width}_{tokens}",
        "n_layers": layers,
        "n_embd": width,
        "n_heads": heads,
        "max_steps": steps,
        "warmup_steps": max(1, steps // 12),
        "tokens_per_step": per_step,
        "eval_interval": 0,
        "eval_tokens": 65_536,
        "checkpoint_interval": 2000,
        "keep_last": 1,
        "sample_interval": 0,
        "snapshots": 0,
        "log_interval": max(1, steps // 50),
        "dtype": "float32",  # on every processor
        "seed": config.seed,
    }
    words = [f"--{key}={value}" for key, value in flags.items()]
    return [sys.executable, str(ROOT / "train.py"), config.config, *words, "--resume"]


def finished(out_dir: Path, steps: int) -> dict[str, float]:
    """Return the numbers of a run that has come to its end; {} if it has not."""
    records = read_metrics(out_dir)
    last = [r for r in records if r["step"] == steps]
    result: dict[str, float] = {}
    for record in last:
        result |= record
    speeds = sorted(r["tokens_per_second"] for r in records if "tokens_per_second" in r)
    ready = {"val_bpb", "seconds"} <= result.keys()
    return result | {"speed": speeds[len(speeds) // 2]} if ready else {}


def train(config: LadderConfig) -> list[scaling.Point]:
    """Take all runs that are not finished, and return all."""
    points = []
    for rung in rungs(config):
        words = command(config, *rung)
        flags = dict(word[2:].split("=") for word in words if "=" in word)
        out_dir, steps = Path(flags["out_dir"]), int(flags["max_steps"])
        if not (result := finished(out_dir, steps)):
            if not config.train:
                continue
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise UserError(f"{out_dir} ended with exit code {done.returncode}; start again")
            result = finished(out_dir, steps)
        parameters = parameters_of(out_dir)
        tokens, speed = int(result["tokens"]), result["speed"]
        name = f"{rung[0]}x{rung[1]}"
        point = scaling.Point(name, parameters, tokens, result["val_bpb"], result["seconds"], speed)
        print(f"{out_dir}: {parameters:,} parameters, {point.bpb:.4f} bits per byte", flush=True)
        points.append(point)
    return sorted(points, key=lambda p: (p.parameters, p.tokens))


def parameters_of(out_dir: Path) -> int:
    """Return the number of parameters of a run's model, by its last checkpoint."""
    from plainllama.families import read_config
    from plainllama.machine import count_parameters

    return count_parameters(read_config(checkpoints(out_dir)[-1]))


def table(corpus: str, points: list[scaling.Point]) -> str:
    """Return the runs, the curve through them and its errors, as Markdown."""
    budgets = sorted({p.tokens for p in points})
    found = {(p.name, p.tokens): p for p in points}
    names = dict.fromkeys((p.name, p.parameters) for p in points)
    lines = [
        f"Bits per byte on {corpus}; in parentheses minutes and tokens a second:",
        "",
        "| layers x width | parameters | " + " | ".join(f"{t:,} tokens" for t in budgets) + " |",
        "|---|---" + "|---" * len(budgets) + "|",
    ]
    for name, parameters in names:
        cells = []
        for budget in budgets:
            p = found.get((name, budget))
            took = p and f"({p.seconds / 60:.1f}; {p.tokens_per_second:,.0f})"
            cells.append(f"{p.bpb:.4f} {took}" if p else "not run")
        lines.append(f"| {name} | {parameters:,} | " + " | ".join(cells) + " |")
    if len(points) >= scaling.ENOUGH:
        c = scaling.fit(points)
        one, most = scaling.left_out(points), scaling.largest_left_out(points)
        rms = (sum(e * e for e in one) / len(one)) ** 0.5
        lines += [
            "",
            f"bits per byte = {c.E:.3f} + {c.A:.4g} / N^{c.a:.2f} + {c.B:.4g} / D^{c.b:.2f}, "
            "with N parameters and D tokens.",
            f"Error of a run that was left out of the fit: {rms:.4f} (root mean square), at most "
            f"{max(map(abs, one)):.4f}.",
            "Error for the largest model when only the smaller ones are fitted: "
            + ", ".join(f"{e:+.4f}" for e in most)
            + ".",
        ]
    return "\n".join(lines) + "\n"


def write(corpus: str, points: list[scaling.Point]) -> None:
    """Write docs/scaling.json, and the table into docs/SCALING.md."""
    rows = ",\n".join("    " + json.dumps([*point]) for point in points)
    content = f'{{\n  "corpus": {json.dumps(corpus)},\n  "runs": [\n{rows}\n  ]\n}}\n'
    scaling.TABLE.write_text(content, encoding="utf-8")
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    text = before + MARKS[0] + table(corpus, points) + MARKS[1] + after
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    config = load(LadderConfig)
    load_dataset(Path(config.data_dir))
    points = train(config)
    print(table(config.corpus or config.data_dir, points))
    if config.write:
        write(config.corpus or config.data_dir, points)


if __name__ == "__main__":
    run(main)
