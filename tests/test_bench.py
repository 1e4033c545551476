"""tools/bench.py: it measures what it says, and runs peers at the same shape."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from helpers import run_stage

import prepare
from plainllama.settings import run_main
from tools import bench

SHAPE = ["--n_layers=2", "--n_embd=32", "--n_heads=2", "--max_seq_len=16", "--device=cpu"]
STEPS = ["--batch_size=4", "--tokens_per_step=128", "--no-compile"]
TOKENS = ["--no-compile", "--rounds=1", "--n_tokens=15"]
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


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("the cat sees a dog. " * 200, encoding="utf-8")
    stage(prepare.main, folder / "text.txt", f"--out={folder / 'bytes'}", "--tokenizer=byte")
    return folder / "bytes"


def stage(main, *arguments) -> None:
    run_stage(lambda: run_main(main), *arguments)


@pytest.mark.slow
def test_training_is_timed_beside_a_peer_of_the_same_shape(data_dir, tmp_path, capsys):
    (tmp_path / "train.py").write_text(PEER, encoding="utf-8")
    (tmp_path / "configurator.py").touch()
    where = [f"--data_dir={data_dir}", f"--against={tmp_path}", f"--json={tmp_path / 'all.json'}"]
    stage(bench.main, "train", *SHAPE, *STEPS, *where, "--rounds=2", "--steps=5")
    ours, theirs = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))["rows"].values()
    assert 0.5 < theirs[0]["tokens/s"] / (5 * 128 / 0.5) < 1.05  # a busy machine sleeps longer
    assert all(len(rows) == 2 and rows[0]["peak MB"] > 50 for rows in (ours, theirs))
    assert theirs[0]["first step s"] > 0 and ours[0]["tokens/s"] > 0
    header, *table = capsys.readouterr().out.splitlines()[-3:]
    assert "median of 2 rounds" in header and f"torch {torch.__version__}" in header
    assert table[0].startswith("train.py, float32  ") and " 1.00x | peak MB" in table[0]
    assert table[1].startswith("nanoGPT, float32  ")


@pytest.mark.skipif(sys.platform == "win32", reason="the peer here is a script with a #! line")
def test_decoding_is_timed_beside_a_file_of_the_same_shape(tmp_path, capsys):
    peer, copy = tmp_path / "run", tmp_path / "copy.bin"
    peer.write_text(f'#!/bin/sh\ncp "$1" {copy}\necho "achieved tok/s: 466.5"\n', encoding="utf-8")
    peer.chmod(0o755)
    stage(bench.main, "sample", *SHAPE, *TOKENS, "--vocab_size=50", f"--llama2c={tmp_path}")
    header = struct.unpack("7i", copy.read_bytes()[:28])
    assert header == (32, 96, 2, 2, 2, 50, 16)
    per_layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    tables = 2 * 16 * 16 // 2
    assert copy.stat().st_size == 28 + 4 * (50 * 32 + 2 * per_layer + 32 + tables)
    table = capsys.readouterr().out.splitlines()
    names = [line.partition("  ")[0] for line in table[1:]]
    assert names == ["model.py, float32", "model.py, int8", "llama2.c, float32"]
    assert "tokens/s 466 " in table[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="the peer here is a script with a #! line")
def test_decoding_is_timed_beside_llama_cpp_on_files_of_the_same_shape(tmp_path, capsys):
    peer, copies = tmp_path / "llama-bench", tmp_path / "copies"
    copies.mkdir()
    said = '[ { \\"avg_ts\\": 123.4 } ]'
    peer.write_text(f'#!/bin/sh\ncp "$2" {copies}\necho "{said}"\n', encoding="utf-8")
    peer.chmod(0o755)
    flags = [*SHAPE, *TOKENS, f"--llama_bench={peer}"]
    stage(bench.main, "sample", *flags, "--vocab_size=300")
    table = capsys.readouterr().out.splitlines()
    dtypes = ("float32", "bfloat16", "q8_0")
    names = [line.partition("  ")[0] for line in table[-3:]]
    assert names == [f"llama.cpp, {dtype}" for dtype in dtypes]
    assert all("tokens/s 123 " in line for line in table[-3:])
    sizes = [(copies / f"{dtype}.gguf").stat().st_size for dtype in dtypes]
    assert sizes == sorted(sizes, reverse=True)
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(copies / "float32.gguf").tensors}
    assert shapes["token_embd.weight"] == [32, 300] and shapes["blk.1.ffn_up.weight"] == [32, 96]
    assert_refused(capsys, ["sample", *flags, "--vocab_size=50"], "vocab_size=50", "257")


def test_the_peak_memory_of_a_process_is_its_own(tmp_path):
    held = np.ones(40_000_000)  # 320 MB, which a child's figure would begin with
    code = "block = b'x' * 60_000_000; print('done')"
    measured = bench.measure([sys.executable, "-c", code], tmp_path)
    assert 60 < measured.peak_megabytes < 120 < held.nbytes / 1e6
    assert measured.cpu_seconds > 0 and measured.lines[-1][1] == "done\n"
    assert measured.lines[-1][0] <= measured.seconds


@pytest.mark.slow
def test_each_row_of_the_gpu_table_runs_to_its_end_in_a_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # six compilations would take minutes
    stage(bench.main, "gpu", "--rehearse", "--minutes=60", f"--json={tmp_path / 'gpu.json'}")
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert len(rows) == len(bench.GPU_ROWS) - 1  # there is no clone of nanoGPT here
    assert all(result["tokens/s"] > 0 for [result] in rows.values())


def test_a_row_that_fails_or_takes_too_long_costs_only_itself(tmp_path, capsys):
    def row(name: str, code: str) -> bench.Row:
        return bench.Row(name, [sys.executable, "-c", code], bench.read_speed)

    sleepy = "import time; print('begun', flush=True); time.sleep(60)"
    rows = [row("bad", "raise SystemExit('out of luck')"), row("good", "print('tok/s: 7')")]
    rows += [row("slow", sleepy), bench.Row("missing", ["nowhere/run"], bench.read_speed)]
    with pytest.raises(ValueError, match="these rows failed: bad, slow, missing"):
        bench.measure_rows(rows, bench.BenchConfig(rounds=1, device="cpu"), tmp_path, 24)
    _, bad, good, slow, missing = capsys.readouterr().out.splitlines()
    assert "failed: out of luck" in bad and "tokens/s 7 " in good
    assert "begun" in slow and "(limit: 6 s)" in slow and "nowhere/run" in missing


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "STAGE is one of train, sample, prepare, gpu"),
        (["train", "--step=3"], "did you mean --steps"),
        (["sample", "--rounds=0"], "rounds, steps and n_tokens must be at least 1"),
        (["train", "--data_dir=nowhere"], "no prepared data in nowhere"),
        (["sample", "--llama_bench=nowhere"], "nowhere is no file"),
        (["gpu", "--device=cpu"], "there is no CUDA device here; --rehearse"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments, said, capsys):
    assert_refused(capsys, arguments, said)


def assert_refused(capsys, arguments: list[str], *parts: str) -> None:
    with pytest.raises(SystemExit) as stop:
        stage(bench.main, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and all(part in lines[0] for part in parts)
