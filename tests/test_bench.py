"""tools/bench.py: it measures what it says, and runs peers at the same shape."""

import json
import struct
import sys

import gguf
import numpy as np
import pytest
from helpers import run_stage

import prepare
from plainllama.settings import run_main
from tools import bench
from tools.bench_gpu import measured

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
    stage(bench.main, "train", *SHAPE, *STEPS, *where, "--quick")
    ours, theirs = json.loads((tmp_path / "all.json").read_text(encoding="utf-8"))["rows"].values()
    assert 0.5 < theirs[0]["tokens/s"] / (5 * 128 / 0.5) < 1.05  # a busy machine sleeps longer
    assert all(len(rows) == 1 and rows[0]["peak MB"] > 50 for rows in (ours, theirs))
    assert theirs[0]["first step s"] > 0 and ours[0]["tokens/s"] > 0
    table = capsys.readouterr().out.splitlines()[-2:]
    assert table[0].startswith("train.py, float32            1.00x | tokens/s")
    assert table[1].startswith("nanoGPT, float32")


@pytest.mark.skipif(sys.platform == "win32", reason="the peer here is a script with a #! line")
def test_decoding_is_timed_beside_a_file_of_the_same_shape(tmp_path, capsys):
    peer, copy = tmp_path / "run", tmp_path / "copy.bin"
    peer.write_text(f'#!/bin/sh\ncp "$1" {copy}\necho "achieved tok/s: 466.5"\n', encoding="utf-8")
    peer.chmod(0o755)
    more = ["--vocab_size=50", f"--llama2c={tmp_path}", "--quick", "--no-compile"]
    stage(bench.main, "sample", *SHAPE, *more)
    header = struct.unpack("7i", copy.read_bytes()[:28])
    assert header == (32, 96, 2, 2, 2, 50, 16)
    per_layer = 4 * 32 * 32 + 3 * 32 * 96 + 2 * 32
    tables = 2 * 16 * 16 // 2
    assert copy.stat().st_size == 28 + 4 * (50 * 32 + 2 * per_layer + 32 + tables)
    table = capsys.readouterr().out.splitlines()
    assert table[1].startswith("model.py, float32")
    assert table[-1].startswith("llama2.c, float32") and "tokens/s 466 (466-466)" in table[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="the peer here is a script with a #! line")
def test_decoding_is_timed_beside_llama_cpp_on_files_of_the_same_shape(tmp_path, capsys):
    peer, copies = tmp_path / "llama-bench", tmp_path / "copies"
    copies.mkdir()
    said = '[{\\"avg_ts\\": 123.4}]'
    peer.write_text(f'#!/bin/sh\ncp "$2" {copies}\necho "{said}"\n', encoding="utf-8")
    peer.chmod(0o755)
    more = [f"--llama_bench={peer}", "--quick", "--no-compile"]
    stage(bench.main, "sample", *SHAPE, *more, "--vocab_size=300")
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[-3:]] == [
        f"llama.cpp, {dtype}" for dtype in ("float32", "bfloat16", "q8_0")
    ]
    assert all("tokens/s 123 (123-123)" in line for line in table[-3:])
    sizes = [(copies / f"{dtype}.gguf").stat().st_size for dtype in ("float32", "bfloat16", "q8_0")]
    assert sizes == sorted(sizes, reverse=True)
    shapes = {t.name: t.shape.tolist() for t in gguf.GGUFReader(copies / "float32.gguf").tensors}
    assert shapes["token_embd.weight"] == [32, 300] and shapes["blk.1.ffn_up.weight"] == [32, 96]
    for flags, parts in (
        (["--vocab_size=50", *more], ["vocab_size=50", "257"]),
        (["--llama_bench=nowhere"], ["nowhere is no file", "build/bin"]),
    ):
        with pytest.raises(SystemExit) as stop:
            stage(bench.main, "sample", *SHAPE, *flags)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and all(part in said for part in parts)


def test_the_peak_memory_of_a_process_is_its_own(tmp_path):
    held = np.ones(40_000_000)  # 320 MB, which a child's figure would begin with
    code = "block = b'x' * 60_000_000; print('done')"
    seconds, cpu, megabytes, lines = bench.measure([sys.executable, "-c", code], tmp_path)
    assert 60 < megabytes < 120 < held.nbytes / 1e6
    assert cpu > 0 and lines[-1][0] <= seconds and lines[-1][1] == "done\n"


@pytest.mark.slow
def test_each_row_of_the_gpu_table_runs_to_its_end_in_a_rehearsal(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # six compilations would take minutes
    stage(bench.main, "gpu", "--rehearse", "--minutes=30", f"--json={tmp_path / 'gpu.json'}")
    rows = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["rows"]
    assert not any({"failed", "not measured"} & {*row} for row in rows.values())
    assert rows["resume after 10 of 20 steps"]["distance"] == 0
    losses = [row["losses"] for row in rows.values() if "losses" in row]
    assert len(losses) == 6 and all(len(each) == 20 for each in losses)
    for each in losses:  # 600 roundings a step, as in helpers.rounding, in each of 20
        assert np.abs(np.array(each) - losses[0]).max() < 4 * 2**-24 * (20 * 600) ** 0.5 * 11
    assert rows["124M, decoding 64 texts"]["compiled, tokens/s"] > 0
    assert rows["350M, compiled"]["tokens/s"] > 0


def test_a_row_that_fails_or_takes_too_long_costs_only_itself(tmp_path):
    run = lambda code, limit: measured(  # noqa: E731
        [sys.executable, "-c", code], limit, tmp_path, {}
    )
    assert "out of luck" in run("raise SystemExit('out of luck')", 30)["failed"]
    assert (
        "longer than 2 s: begun"
        in run("import time; print('begun', flush=True); time.sleep(60)", 2)["failed"]
    )
    assert run("print('talk'); print('{\"tokens/s\": 7}')", 30)["tokens/s"] == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "STAGE is one of train, sample, prepare, gpu"),
        (["train", "--step=3"], "did you mean --steps"),
        (["sample", "--rounds=0"], "rounds, steps and n_tokens must be at least 1"),
        (["train", "--data_dir=nowhere"], "no prepared data in nowhere"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        stage(bench.main, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


def test_a_failing_process_ends_the_measurement_with_its_last_words(tmp_path):
    with pytest.raises(ValueError, match="out of luck"):
        bench.measure([sys.executable, "-c", "raise RuntimeError('out of luck')"], tmp_path)
    with pytest.raises(ValueError, match="No such file.*nowhere"):
        bench.measure(["nowhere/run"], tmp_path)
