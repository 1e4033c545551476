"""The ladder: the curve that is fitted, what it predicts, runs that are resumed, the document."""

import json
import random
import re

import pytest
from helpers import ROOT, run_stage
from test_train import data_dir  # noqa: F401  (data_dir is a fixture)

from plainllama import scaling
from plainllama.settings import run
from tools import ladder

CURVE = scaling.Fit(E=0.8, A=30.0, a=0.34, B=90.0, b=0.28)


def points(noise: float = 0.0) -> list[scaling.Point]:
    """A ladder of six sizes and three budgets whose losses lie on a curve, or near it."""
    draw = random.Random(0)
    sizes = {f"{n}x32": 20_000 * 2**n for n in range(6)}
    return [
        scaling.Point(name, N, D, CURVE(N, D) * (1 + noise * draw.gauss(0, 1)), 60.0, 1000.0)
        for name, N in sizes.items()
        for D in (100_000, 300_000, 1_000_000)
    ]


def test_the_curve_is_found_and_predicts_beyond_its_points():
    found = scaling.fit(points())
    assert found == pytest.approx(CURVE, rel=1e-3)
    assert found(1e7, 1e8) == pytest.approx(CURVE(1e7, 1e8), rel=1e-3)
    assert max(map(abs, scaling.left_out(points()))) < 1e-6
    assert max(map(abs, scaling.largest_left_out(points()))) < 1e-6


def test_errors_of_left_out_runs_are_as_large_as_the_noise():
    errors = scaling.left_out(points(0.01))
    rms = (sum(e * e for e in errors) / len(errors)) ** 0.5
    assert 0.005 * CURVE(160_000, 300_000) < rms < 0.1


def test_losses_that_rise_with_tokens_have_no_curve():
    rising = [p._replace(bpb=p.tokens / 1e5 + p.parameters / 1e5) for p in points()]
    with pytest.raises(ValueError, match="does not fall"):
        scaling.fit(rising)


def test_a_prediction_has_a_range_and_says_when_it_is_a_guess(tmp_path):
    path = tmp_path / "scaling.json"
    assert scaling.predicted(10**6, 10**6, path) == ""
    content = {"corpus": "own text", "runs": points(0.01)}
    path.write_text(json.dumps(content), encoding="utf-8")
    inside = scaling.predicted(100_000, 500_000, path)
    bpb, low, high = map(float, re.findall(r"\d+\.\d\d", inside))
    assert low < bpb < high and bpb == pytest.approx(CURVE(100_000, 500_000), rel=0.03)
    assert "on own text" in inside and "guess" not in inside
    assert scaling.predicted(10**7, 500_000, path).endswith("a guess")


@pytest.mark.slow
def test_a_ladder_is_trained_resumed_and_written_down(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / "settings.py"
    settings.write_text('max_seq_len = 16\nbatch_size = 64\ndevice = "cpu"\ncompile = False\n')
    flags = [f"--data_dir={data_dir}", f"--config={settings}", "--out_dir=out", "--corpus=own text"]
    flags += ["--budgets=2048"]
    monkeypatch.setattr(scaling, "TABLE", tmp_path / "scaling.json")
    monkeypatch.setattr(ladder, "DOCUMENT", tmp_path / "SCALING.md")
    ladder.DOCUMENT.write_text("before\n" + "old\n".join(ladder.MARKS) + "after\n")
    run_stage(ladder.main, *flags, "--sizes=1x16")
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*/metrics.jsonl")}
    assert len(first) == 1
    run_stage(ladder.main, *flags, "--sizes=1x16 2x16", "--write")
    assert all(path.stat().st_mtime_ns == changed for path, changed in first.items())
    corpus, found = scaling.read_table(scaling.TABLE)
    assert corpus == "own text" and [p.name for p in found] == ["1x16", "2x16"]
    text = ladder.DOCUMENT.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert all(f"{p.bpb:.4f}" in text for p in found)


def test_the_document_is_what_its_runs_say():
    corpus, found = scaling.read_table()
    text = ladder.DOCUMENT.read_text(encoding="utf-8")
    written = text.partition(ladder.MARKS[0])[2].partition(ladder.MARKS[1])[0]
    assert written == (ladder.table(corpus, found) if found else "")
    assert ROOT in ladder.DOCUMENT.parents


@pytest.mark.parametrize("flag", ["--sizes=4", "--sizes=", "--sizes=2x33", "--budgets=many"])
def test_bad_ladders_are_refused(data_dir, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        run(lambda: run_stage(ladder.main, f"--data_dir={data_dir}", flag))
    assert stop.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
