"""How loss falls with parameters and tokens: a curve through the runs of docs/scaling.json.

L = E + A / N^a + B / D^b (arXiv:2203.15556, equation 2), for N parameters and D tokens, in bits per
byte. tools/ladder.py makes the runs and writes the file.
"""

import json
import statistics
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

TABLE = Path(__file__).parent.parent / "docs" / "scaling.json"
ENOUGH = 12  # runs, for a curve of five constants that is worth quoting
EXPONENTS = np.arange(0.02, 1.5, 0.02)


class Point(NamedTuple):
    """A finished run."""

    name: str
    parameters: int
    tokens: int
    bpb: float  # bits per byte of the validation text at its end
    seconds: float
    tokens_per_second: float


class Fit(NamedTuple):
    """The constants of the curve."""

    E: float
    A: float
    a: float
    B: float
    b: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """Return the bits per byte that the curve has for a run."""
        return self.E + self.A / parameters**self.a + self.B / tokens**self.b


def fit(points: Sequence[Point]) -> Fit:
    """Return the curve of least squares through at least five points.

    For given exponents the rest is linear; of a grid of exponents the best are taken.
    """
    N = np.array([p.parameters for p in points], dtype=float)
    D = np.array([p.tokens for p in points], dtype=float)
    L = np.array([p.bpb for p in points])
    a, b = (grid.reshape(-1, 1) for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    columns = (np.ones((len(a), len(L))), (N / N.min()) ** -a, (D / D.min()) ** -b)
    X = np.stack(columns, axis=-1)  # (exponents, points, 3)
    constants = np.linalg.pinv(X) @ L  # (exponents, 3)
    errors = (((X @ constants[..., None])[..., 0] - L) ** 2).sum(axis=1)
    errors[(constants < 0).any(axis=1)] = np.inf
    best = int(errors.argmin())
    if not np.isfinite(errors[best]):
        raise ValueError("loss does not fall with parameters and tokens")
    (E, A, B), a, b = map(float, constants[best]), float(a[best, 0]), float(b[best, 0])
    return Fit(E, A * N.min() ** a, a, B * D.min() ** b, b)


def left_out(points: Sequence[Point]) -> list[float]:
    """Return, for each point, what the curve through all others is wrong by, in bits per byte."""
    others = [[q for q in points if q != p] for p in points]
    return [
        fit(rest)(p.parameters, p.tokens) - p.bpb for rest, p in zip(others, points, strict=True)
    ]


def largest_left_out(points: Sequence[Point]) -> list[float]:
    """Return what the curve through all smaller models is wrong by, for runs of the largest."""
    most = max(p.parameters for p in points)
    curve = fit([p for p in points if p.parameters < most])
    return [curve(p.parameters, p.tokens) - p.bpb for p in points if p.parameters == most]


def read_table(path: Path = TABLE) -> tuple[str, list[Point]]:
    """Return what the runs were trained on, and the runs; no runs where there is no table."""
    with suppress(FileNotFoundError):
        content = json.loads(path.read_text(encoding="utf-8"))
        return content["corpus"], [Point(*values) for values in content["runs"]]
    return "", []


def predicted(parameters: int, tokens: int, path: Path = TABLE) -> str:
    """Return what the table says of a run of this size, as text; empty where it has too few."""
    corpus, points = read_table(path)
    if len(points) < ENOUGH:
        return ""
    bpb = fit(points)(parameters, tokens)
    error = 2 * statistics.pstdev(left_out(points), 0.0)
    sizes, budgets = [p.parameters for p in points], [p.tokens for p in points]
    inside = min(sizes) <= parameters <= max(sizes) and min(budgets) <= tokens <= max(budgets)
    beyond = "" if inside else ", beyond the table's sizes or tokens: a guess"
    return (
        f"{bpb:.2f} bits per byte ({bpb - error:.2f} to {bpb + error:.2f}) on {corpus} "
        f"(docs/SCALING.md){beyond}"
    )
