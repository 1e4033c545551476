"""runs.py: what it says of runs in any state, what it draws, and that it touches nothing; locks."""

import json
import math
import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
from helpers import refused, run_stage
from matplotlib.figure import Figure

import runs as stage
from plainllama.data import is_locked, lock

SETTINGS = {"vocab_size": 256, "max_steps": 40, "lr": 1e-3, "n_embd": 64, "compile": True}


def make_run(folder: Path, best: float = 2.0, steps: int = 40, **settings) -> Path:
    """A run with a report a step and an evaluation every ten, falling to `best` nats a token."""
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        record = {"step": step, "tokens": 100 * step, "loss": best + 3 / step, "lr": 1e-3}
        lines.append(record | {"tokens_per_second": 500.0 + step, "seconds": 2.0 * step})
        if step % 10 == 0:
            loss = best + 2 / step - 2 / steps
            evaluation = {"val_loss": loss, "val_perplexity": math.exp(loss), "val_bpb": loss / 2}
            lines.append({"step": step, "tokens": 100 * step} | evaluation)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    own = json.dumps(SETTINGS | settings | {"out_dir": str(folder)})
    (folder / "settings.json").write_text(own, encoding="utf-8")
    (folder / ".lock").write_text("1\n", encoding="utf-8")
    return folder


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """A folder of runs: out/, where one is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


def listed(capsys, *arguments: str) -> list[list[str]]:
    """The rows of the table, by cells, without the heading."""
    run_stage(stage.main, *arguments)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "run"
    return [re.split(r" {2,}", line) for line in lines[1:]]


def tree(folder: Path) -> dict[str, tuple]:
    """All that can be seen of the files below a folder, but when they were last read."""
    stats = {str(path): path.stat() for path in sorted(folder.rglob("*"))}
    return {
        name: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode)
        for name, s in stats.items()
    }


def test_runs_are_listed_best_first_with_their_differences(out, capsys):
    make_run(out / "wide", 1.5, n_embd=128)
    make_run(out / "usual", 2.0)
    make_run(out / "fast", 2.5, lr=2e-3)
    before = tree(out)
    rows = listed(capsys)
    assert rows[0] == (
        ["out/wide", "finished", "40/40", "4,000", "0:01:20", "1.5000", "0.7500", "530"]
        + ["n_embd=128"]
    )  # the speed is the median of steps 21 to 40: 530.5, rounded to even
    assert [row[0] for row in rows] == ["out/wide", "out/usual", "out/fast"]
    assert rows[1][8:] == [] and rows[2][8:] == ["lr=0.002"]
    assert tree(out) == before


def test_on_a_terminal_a_run_is_at_most_two_whole_lines(out, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    long = {f"key_{n}": n for n in range(30)} | {"norm_eps": 9.999999747378752e-06}
    make_run(out / "one", 1.5, **long, lr=3e-4, n_layers=4, data_dir="data/one", max_seq_len=1024)
    make_run(out / "a_run_of_a_name_that_is_longer_than_a_third_of_the_line", 2.0)
    make_run(out / "three", 2.5)
    run_stage(stage.main)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and len(lines) == 5
    assert lines[2].startswith("    data_dir=data/one n_layers=4 lr=0.0003 ")
    assert lines[2].endswith(" ...")
    words = " ".join(f"{key}={value}" for key, value in long.items()).split()
    whole = {*words, "norm_eps=1e-05", "max_seq_len=1024"}
    assert set(lines[2].split()[3:-1]) <= whole  # no value is cut
    assert "third_of_the_line  finished" in lines[3] and lines[3].endswith("530")


def test_the_lowest_evaluation_counts_not_the_last(out, capsys):
    folder = make_run(out / "overfit", 2.0)
    worse = {"step": 40, "tokens": 4000, "val_loss": 4.0, "val_perplexity": 55.0, "val_bpb": 2.0}
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(worse) + "\n")
    assert listed(capsys)[0][5:7] == ["2.0000", "1.0000"]


def test_a_run_on_conversations_shows_the_loss_of_its_answers(out, capsys):
    folder = make_run(out / "chat", 2.0)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text("utf-8").replace('"val_', '"answer_'), encoding="utf-8")
    assert listed(capsys)[0][5:7] == ["2.0000", "1.0000"]


def test_sorting(out, capsys):
    make_run(out / "b", 2.0)
    make_run(out / "a", 3.0, steps=20)
    make_run(out / "new", 3.0, steps=0)
    assert [row[0] for row in listed(capsys)] == ["out/b", "out/a", "out/new"]
    assert [row[0] for row in listed(capsys, "--sort=name")] == ["out/a", "out/b", "out/new"]
    assert [row[0] for row in listed(capsys, "--sort=time")] == ["out/a", "out/b", "out/new"]
    assert [row[0] for row in listed(capsys, "--sort=speed")] == ["out/b", "out/a", "out/new"]


def test_states(out, capsys):
    make_run(out / "finished")
    make_run(out / "stopped", steps=30)
    diverged = make_run(out / "not_finite", steps=30)
    with (diverged / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 31, "diverged": "loss nan"}\n')
    held = lock(make_run(out / "running", steps=30) / ".lock", "it")
    states = {row[0].removeprefix("out/"): row[1] for row in listed(capsys)}
    held.release()
    named = {name: name for name in ("finished", "stopped", "running")}
    assert states == {"not_finite": "diverged"} | named
    assert {row[0]: row[1] for row in listed(capsys)}["out/running"] == "stopped"


def test_looking_at_a_lock_neither_takes_nor_changes_it(tmp_path):
    path = tmp_path / ".lock"
    assert not is_locked(path) and not path.exists()
    held = lock(path, "it")
    before = tree(tmp_path)
    assert is_locked(path) and tree(tmp_path) == before
    held.release()
    assert not is_locked(path)
    lock(path, "it").release()


def test_damaged_and_half_written_runs_are_listed(out, capsys):
    half = make_run(out / "half", 2.0, steps=30)
    data = (half / "metrics.jsonl").read_bytes()
    (half / "metrics.jsonl").write_bytes(data[:-40])
    odd = make_run(out / "odd", 3.0)
    junk = b'\xff\xfe\n[]\n{"step": "x"}\n{"step": 3}\nnull\n{"step": 1, "val_loss": "a"}\n'
    junk += (
        b'{"step": 2, "val_loss": NaN, "tokens": 1e999, "seconds": null}\n' + b"[" * 9999 + b"\n"
    )
    (odd / "metrics.jsonl").write_bytes(junk + (odd / "metrics.jsonl").read_bytes() + b'{"step')
    (odd / "settings.json").write_bytes(b'{"vocab_size": ')
    empty = make_run(out / "empty", 3.0)
    for name in ("metrics.jsonl", "settings.json"):
        (empty / name).write_bytes(b"")
    (out / "not a run").mkdir()
    (out / "a file").write_bytes(b"")
    rows = {row[0]: row[1:] for row in listed(capsys, "--plot=all.png")[:-1]}
    assert rows["out/half"][:3] == ["stopped", "30/40", "3,000"]
    assert rows["out/half"][4] == f"{2.0 + 2 / 20 - 2 / 30:.4f}"  # that of step 30 was cut short
    assert rows["out/odd"][:2] == ["stopped", "40"] and rows["out/odd"][4] == "3.0000"
    assert rows["out/empty"] == ["stopped", "0", "-", "-", "-", "-", "-"]
    assert len(rows) == 3
    assert Path("all.png").read_bytes().startswith(b"\x89PNG")


def test_runs_and_folders_can_be_named(out, capsys):
    make_run(out / "one")
    make_run(out / "ladder" / "small", 3.0)
    make_run(out / "ladder" / "large", 2.5)
    assert len(listed(capsys)) == 1
    names = [row[0] for row in listed(capsys, "out/ladder", "out/one", "out/ladder/large")]
    assert names == ["out/one", "out/ladder/large", "out/ladder/small"]


def test_a_strangers_names_move_no_terminal(out, capsys):
    make_run(out / "\x1b[31mred\nrun", n_layers="\x1b[2J\n")
    make_run(out / "two", n_layers=2)
    run_stage(stage.main)
    table = capsys.readouterr().out
    assert "\x1b" not in table and len(table.splitlines()) == 3
    assert r"out/\x1b[31mred\nrun" in table and r"n_layers=\x1b[2J\n" in table


def test_bad_input_is_refused_in_a_line(out, capsys, monkeypatch):
    ask = lambda *words: refused(capsys, stage.main, *words)  # noqa: E731
    assert ask().startswith("error: there is no out here; to train: ")
    out.mkdir()
    assert "out is no run and holds none" in ask()
    assert "there is no out/tyni here" in ask("out/tyni")
    make_run(out / "one")
    assert "plot=loss.txt: " in ask("--plot=loss.txt")
    assert "nowhere/loss.png cannot be found" in ask("--plot=nowhere/loss.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # as where it is not installed
    assert "pip install matplotlib" in ask("--plot=loss.png")


# --- pictures ---


@pytest.mark.parametrize("axis, size", [("step", 1), ("tokens", 100), ("time", 2)])
def test_a_picture_shows_the_losses_of_all_runs(out, monkeypatch, axis, size):
    make_run(out / 'a "<&> run', 2.0)
    with (make_run(out / "b", 3.0, steps=20) / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 20, "tokens": 2000, "loss": NaN}\n')
    make_run(out / "new", steps=0)
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append((figure, path)))
    run_stage(stage.main, "--plot=loss.png", f"--axis={axis}")
    ((figure, path),) = drawn
    assert path == Path("loss.png")
    found = {}
    for line in figure.axes[0].lines:
        found.setdefault(line.get_color(), []).append([*zip(*line.get_data(), strict=True)])
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert labels == ['out/a "<&> run', "out/b", "out/new"] and len(found) == 3
    losses = [(2.0, 40), (3.0, 20)]
    for (best, steps), (trained, evaluated) in zip(losses, found.values(), strict=False):
        each, tenth = range(1, steps + 1), range(10, steps + 1, 10)
        assert trained == [(s * size, pytest.approx(best + 3 / s)) for s in each]
        assert evaluated == [(s * size, pytest.approx(best + 2 / s - 2 / steps)) for s in tenth]


# --- locks ---


def test_a_run_that_is_read_by_others_can_start(tmp_path):
    """A lock is asked for again, because who looks at it holds it for an instant."""
    path, ended = tmp_path / ".lock", threading.Event()
    path.touch()

    def look():
        while not ended.is_set():
            is_locked(path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(20):
            lock(path, "it").release()
    finally:
        ended.set()
        watcher.join()
