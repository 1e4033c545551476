"""Draw the loss curve of a run: python tools/plot_curve.py out/tiny/metrics.jsonl curve.svg."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)


def main(metrics: str, picture: str) -> None:
    lines = Path(metrics).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    trained = [r for r in records if "loss" in r]
    evaluated = [r for r in records if "val_loss" in r]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([r["tokens"] / 1e6 for r in trained], [r["loss"] for r in trained], lw=1)
    axes.plot([r["tokens"] / 1e6 for r in evaluated], [r["val_loss"] for r in evaluated], "o-")
    last = evaluated[-1]
    axes.annotate(
        f"{last['val_loss']:.3f} nats per token\n{last['val_bpb']:.3f} bits per byte",
        (last["tokens"] / 1e6, last["val_loss"]),
        xytext=(-10, 40),
        textcoords="offset points",
        ha="right",
        arrowprops={"arrowstyle": "-"},
    )
    axes.set(xlabel="million tokens", ylabel="loss (nats per token)")
    axes.legend(["training", "validation"], frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
