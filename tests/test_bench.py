"""tools/bench.py: it measures what it says, and runs peers at the same shape."""

import json
import re
import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import ROOT, refused, run_stage

from tools import bench

SHAPE = ["--n_layers=2", "--n_embd=32", "--n_heads=2", "--max_seq_len=16", "--device=cpu"]
STEPS = ["--batch_size=4", "--tokens_per_step=128", "--no-compile"]
PEER = """
import sys, time
given = dict(word.removeprefix("--").split("=") for word in sys.argv[1:])
assert given["n_layer"] == "2" and given["n_embd"] == "32" and given["block_size"] == "16"
assert given["batch_size"] == "4" and given["gradient_accumulation_steps"] == "2"
assert len(open("data/bench/train.bin", "rb").read()) > 0 and open("configurator.py")
for step in range(0, 11, 5):
    print(f"iter {step}: loss 1.0, time 1.0ms")
    time.sleep(0.5)
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory, for bench.jsonl."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def written(folder: Path) -> list[dict]:
    """What bench.py has written, one record a row."""
    return [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_training_is_timed_beside_a_peer_of_the_same_shape(data_dir, tmp_path, capsys):
    (tmp_path / "train.py").write_text(PEER, encoding="utf-8")
    (tmp_path / "configurator.py").touch()
    where = [f"--data_dir={data_dir}", f"--against={tmp_path}"]
    begun = time.monotonic()
    run_stage(bench.main, "train", *SHAPE, *STEPS, *where, "--rounds=2", "--steps=5")
    longest = time.monotonic() - begun
    header, ours, theirs = capsys.readouterr().out.splitlines()
    assert "median of 2 rounds" in header and f"torch {torch.__version__}" in header
    assert ours.startswith("train.py, float32  ") and theirs.startswith("nanoGPT, float32  ")
    speed = float(re.search(r"tokens/s ([\d,]+) ", theirs)[1].replace(",", ""))
    # The peer sleeps 0.5 s for five steps; a busy machine sleeps longer, but not than all took.
    assert 5 * 128 / longest < speed < 1.05 * 5 * 128 / 0.5
    assert re.search(r"peak MB \d\d", theirs) and "first step s" in theirs


@pytest.mark.skipif(sys.platform == "win32", reason="the peers here are scripts with a #! line")
def test_decoding_is_timed_beside_peers_on_files_of_the_same_shape(tmp_path, monkeypatch, capsys):
    # Ours is not run here: what is held is that the peers read what they should.
    monkeypatch.setattr(bench, "RUN_SCRIPT", [tmp_path / "ours"])
    script(tmp_path / "ours", "echo tok/s: 55")
    script(tmp_path / "run", f'cp "$1" {tmp_path}/copy.bin', "echo achieved tok/s: 466.5")
    script(tmp_path / "llama-bench", f'cp "$2" {tmp_path}', """echo '[ { "avg_ts": 123.4 } ]'""")
    flags = [*SHAPE, "--no-compile", "--rounds=1", "--n_tokens=15", "--vocab_size=300"]
    peers = [f"--llama2c={tmp_path}", f"--llama_bench={tmp_path / 'llama-bench'}"]
    run_stage(bench.main, "sample", *flags, *peers)
    table = capsys.readouterr().out.splitlines()[-6:]
    names = [line.partition("  ")[0] for line in table]
    dtypes = ("float32", "bfloat16", "q8_0")
    ours = ["model.py, float32", "model.py, int8", "llama2.c, float32"]
    assert names == ours + [f"llama.cpp, {dtype}" for dtype in dtypes]
    speeds = [re.search(r"tokens/s ([\d.]+) ", line)[1] for line in table]
    assert speeds == ["55", "55", "466", "123", "123", "123"]
    copy = (tmp_path / "copy.bin").read_bytes()
    assert struct.unpack("7i", copy[:28]) == (32, 96, 2, 2, 2, 300, 16)
    per_layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    tables = 2 * 16 * 16 // 2
    assert len(copy) == 28 + 4 * (300 * 32 + 2 * per_layer + 32 + tables)
    sizes = [(tmp_path / f"{dtype}.gguf").stat().st_size for dtype in dtypes]
    assert sizes == sorted(sizes, reverse=True)
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(tmp_path / "float32.gguf").tensors}
    assert shapes["token_embd.weight"] == [32, 300] and shapes["blk.1.ffn_up.weight"] == [32, 96]


def script(path: Path, *lines: str) -> None:
    path.write_text("\n".join(["#!/bin/sh", *lines, ""]), encoding="utf-8")
    path.chmod(0o755)


@pytest.mark.parametrize("way", ["--int8", "--no-int8"])
def test_decoding_says_its_speed(way, capsys):
    flags = ["--no-compile", "--dtype=float32", "--n_tokens=15", "--vocab_size=50"]
    run_stage(bench.main, "decode", *SHAPE, *flags, "--batch_size=2", way)
    assert re.fullmatch(r"tok/s: [\d.]+\n", capsys.readouterr().out)


def test_the_peak_memory_of_a_process_is_its_own(tmp_path):
    held = np.ones(40_000_000)  # 320 MB, which a child's figure would begin with
    code = "block = b'x' * 60_000_000; print('done')"
    lines = bench.measure([sys.executable, "-c", code], tmp_path)
    assert 60 < bench.peak(lines) < 120 < held.nbytes / 1e6
    assert lines[0][1] == "done\n" and lines[0][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("group", ["gpu_1.txt", "gpu_2.txt"])
def test_each_row_for_a_gpu_runs_to_its_end_in_a_rehearsal(
    group, data_dir, folder, monkeypatch, capsys
):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # many compilations would take minutes
    (folder / "config").symlink_to(ROOT / "config")
    small = ["--n_layers=1", "--n_embd=32", "--n_heads=2", "--n_kv_heads=0", "--max_seq_len=32"]
    small += ["--device=cpu", "--steps=2", "--n_tokens=20", "--seconds=3000"]
    rows = ROOT / "tools" / group
    run_stage(bench.main, "gpu", *small, f"--data_dir={data_dir}", f"--rows={rows}")
    names = [line for line in rows.read_text().splitlines() if line and line[0] != "#"]
    _, *printed = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in printed] == names
    for record, name in zip(written(folder), names, strict=True):
        (figures,) = record["rounds"]
        assert record["row"] == name and figures["tokens/s"] > 0 and not record["failed"]
        assert ("computed MB" in figures) == ("train " in name)


def test_a_row_of_the_gpu_has_its_environment_flags_and_several_micro_steps(
    data_dir, folder, monkeypatch, capsys
):
    # Instead of training, what it would be told is printed.
    script(folder / "told", 'echo "$MODE $*"', "echo tok/s: 1")
    monkeypatch.setattr(bench, "RUN_SCRIPT", [folder / "told"])
    monkeypatch.setattr(bench, "read_steps", lambda _, lines: said.extend(lines) or {"it": 1.0})
    said: list[tuple[float, str]] = []
    Path("rows.txt").write_text("# why\nMODE=fast train --batch_size=2 --n_heads=4\n")
    shape = ["--device=cpu", "--n_embd=48", "--max_seq_len=16", "--rows=rows.txt"]
    run_stage(bench.main, "gpu", *shape, f"--data_dir={data_dir}")
    line = said[0][1]
    assert line.startswith("fast ") and "--n_heads=4 " in line and "--batch_size=2 " in line
    assert "--tokens_per_step=128 " in line and "--max_steps=8 " in line


def test_a_row_that_fails_costs_only_itself(tmp_path, folder, capsys):
    rows = [row("bad", "raise SystemExit('out of luck')"), row("good", "print('tok/s: 7')")]
    rows.append(bench.Row("missing", ["nowhere/run"], bench.read_speed))
    rows.append(row("silent", "print('all is well')"))
    with pytest.raises(ValueError, match="these rows failed: bad, missing, silent"):
        bench.measure_rows(rows, bench.BenchConfig(rounds=1, device="cpu"), tmp_path)
    _, bad, good, missing, _ = capsys.readouterr().out.splitlines()
    assert "failed: out of luck" in bad and "tokens/s 7 " in good and "nowhere/run" in missing
    assert [len(record["rounds"]) for record in written(folder)] == [0, 1, 0, 0]


def test_a_row_past_its_limit_is_ended_and_the_others_go_on(tmp_path, folder, capsys):
    rows = [row("slow", "import time; time.sleep(600)"), row("good", "print('tok/s: 7')")]
    with pytest.raises(ValueError, match="these rows failed: slow$"):
        bench.measure_rows(rows, bench.BenchConfig(rounds=1, device="cpu"), tmp_path, seconds=8)
    _, slow, good = capsys.readouterr().out.splitlines()
    assert "failed: timed out after " in slow and "tokens/s 7 " in good
    assert [record["row"] for record in written(folder)] == ["slow", "good"]


def row(name: str, code: str) -> bench.Row:
    return bench.Row(name, [sys.executable, "-c", code], bench.read_speed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "STAGE is one of train, sample, gpu"),
        (["train", "--data_dir=nowhere"], "no prepared data in nowhere"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments, said, capsys):
    assert said in refused(capsys, bench.main, *arguments)
