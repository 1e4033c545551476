"""tools/bench.py: it measures what it says, and runs peers at the same shape."""

import re
import struct
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import refused, run_stage

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
def test_each_row_of_the_gpu_table_runs_to_its_end_in_a_rehearsal(data_dir, monkeypatch, capsys):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # six compilations would take minutes
    small = ["--n_layers=1", "--n_embd=32", "--n_heads=2", "--n_kv_heads=0", "--max_seq_len=32"]
    small += ["--device=cpu", "--steps=2", "--n_tokens=20"]
    run_stage(bench.main, "gpu", *small, f"--data_dir={data_dir}")
    _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(bench.GPU_ROWS) and all("tokens/s" in row for row in rows)


def test_a_row_that_fails_costs_only_itself(tmp_path, capsys):
    def row(name: str, code: str) -> bench.Row:
        return bench.Row(name, [sys.executable, "-c", code], bench.read_speed)

    rows = [row("bad", "raise SystemExit('out of luck')"), row("good", "print('tok/s: 7')")]
    rows.append(bench.Row("missing", ["nowhere/run"], bench.read_speed))
    with pytest.raises(ValueError, match="these rows failed: bad, missing"):
        bench.measure_rows(rows, bench.BenchConfig(rounds=1, device="cpu"), tmp_path)
    _, bad, good, missing = capsys.readouterr().out.splitlines()
    assert "failed: out of luck" in bad and "tokens/s 7 " in good and "nowhere/run" in missing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "STAGE is one of train, sample, gpu"),
        (["train", "--data_dir=nowhere"], "no prepared data in nowhere"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments, said, capsys):
    assert said in refused(capsys, bench.main, *arguments)
