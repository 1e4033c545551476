"""train.py: what a run depends on, what it survives, what it refuses, and what it writes."""

import itertools
import json
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, run_stage
from safetensors.torch import load_file, save_file
from several import SCRIPT, SMALL, TINY, finish, launch, wait_for
from training import (
    CPU,
    begin,
    distance,
    final_weights,
    losses,
    refusal,
    run_train,
    same,
    small_config,
    small_run,
)

import prepare
import train
from model import LLaMaTransformer, ModelConfig
from plainllama.checkpoint import checkpoints, read_state
from plainllama.data import Dataset, load_dataset, read_batch
from plainllama.generation import generate
from plainllama.huggingface import load_model
from plainllama.machine import choose_dtype, n_params
from plainllama.metrics import read_metrics
from plainllama.muon import Muon, newton_schulz
from plainllama.settings import load, read_json
from plainllama.tokenizer import load_tokenizer

# --- windows ---


def windows(step: int, count: int) -> np.ndarray:
    """The numbers of a step's windows since the run began."""
    return np.arange(step * count, (step + 1) * count)


def stream(tmp_path: Path, ids: list[int], dtype: str) -> Dataset:
    """A dataset whose training split is exactly `ids`."""
    np.array(ids, dtype=dtype).tofile(tmp_path / "train.bin")
    (tmp_path / "val.bin").touch()
    counts = {"train": len(ids), "val": 0}
    return Dataset(tmp_path, dtype, 5000, counts, counts, counts, {})


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_contiguous_windows_reshape_the_stream_and_targets_are_one_token_later(tmp_path, dtype):
    ids = [1202, 850, 149, 4211, 769, 1839, 3521, 4879, 2035, 1209, 954, 4461, 3546, 206, 4401]
    dataset = stream(tmp_path, ids, dtype)
    x, y = read_batch(dataset, "train", np.array([0, 6]), 6, torch.device("cpu"))
    assert x.tolist() == [ids[0:6], ids[6:12]]
    assert y.tolist() == [ids[1:7], ids[7:13]]
    assert y[0, -1] == x[1, 0] and y[1, -1] == 3546


@pytest.mark.parametrize("n_tokens", [11, 15, 60, 67])
def test_windows_start_uniformly_wherever_one_fits(n_tokens):
    length, count = 10, 50_000
    places = n_tokens - length
    starts = train.window_starts(0, windows(0, count), n_tokens, length)
    assert starts.min() == 0 and starts.max() == places - 1
    expected = count / places
    chi_square = ((np.bincount(starts, minlength=places) - expected) ** 2 / expected).sum()
    assert chi_square < (places - 1) + 5 * (2 * max(1, places - 1)) ** 0.5  # five deviations


@pytest.mark.parametrize(("n_tokens", "length"), [(100_000, 64), (1000, 10), (10_000, 1), (77, 7)])
def test_an_epoch_of_windows_reads_no_token_twice_and_nearly_all(n_tokens, length):
    slots = (n_tokens - length) // length
    for epoch in range(3):
        starts = np.sort(train.window_starts(5, windows(epoch, slots), n_tokens, length))
        assert np.diff(starts).min() >= length
    assert slots * length >= n_tokens - 2 * length


def test_equal_distances_of_windows_do_not_recur():
    n_tokens, length = 1_000_000, 256
    starts = train.window_starts(0, windows(0, 40_000), n_tokens, length)
    for lag in (1, 2, 55, 987, 2584, 3905):  # Fibonacci numbers, and the windows of an epoch
        distances = np.abs(starts[lag:] - starts[:-lag])
        assert np.median(distances) > 0.2 * n_tokens  # of independent places 0.29


def test_windows_of_a_trillion_tokens_need_no_table():
    starts = train.window_starts(1, windows(10**6, 512), 10**12, 2048)
    assert len(np.unique(starts)) == 512 and starts.max() > 9e11 and starts.min() < 1e11


def test_windows_depend_on_seed_and_number_alone():
    whole = train.window_starts(3, windows(0, 60), 5000, 16)
    parts = [train.window_starts(3, windows(step, 12), 5000, 16) for step in range(5)]
    assert np.array_equal(whole, np.concatenate(parts))
    assert not np.array_equal(whole, train.window_starts(4, windows(0, 60), 5000, 16))


def test_processes_and_micro_steps_share_out_the_same_windows(data_dir):
    config = small_config(data_dir, "--tokens_per_step=192", "--batch_size=2")
    dataset = load_dataset(data_dir)

    def windows(world_size: int, batch_size: int) -> list[list[int]]:
        """The tokens and the last target of all windows of step 5."""
        read, settings = [], replace(config, batch_size=batch_size)
        places, n_targets = train.step_places(5, dataset, settings)
        assert n_targets == 192
        for rank in range(world_size):
            machine = replace(CPU, rank=rank, world_size=world_size)
            for tokens, targets in train.step_batches(places, dataset, settings, machine):
                read += torch.cat([tokens, targets[:, -1:]], dim=1).tolist()
        return sorted(read)

    assert len(windows(1, 12)) == 12
    assert windows(1, 12) == windows(1, 2) == windows(2, 3) == windows(3, 2)


# --- schedule and optimizer ---


@pytest.mark.parametrize(
    ("decay_fraction", "expected"),
    [
        (1.0, {0: 0.1, 9: 1, 10: 1, 55: 0.5, 99: 1 / 90, 100: 0}),
        (0.2, {0: 0.1, 9: 1, 80: 1, 90: 0.5, 99: 0.05, 100: 0}),
        (0.0, {0: 0.1, 9: 1, 99: 1, 100: 1}),
    ],
)
def test_the_learning_rate_rises_to_lr_and_falls_after_the_warm_up(
    data_dir, decay_fraction, expected
):
    more = ["--max_steps=100", "--warmup_steps=10", "--lr=1.0"]
    config = small_config(data_dir, *more, f"--decay_fraction={decay_fraction}")
    found = {step: train.learning_rate(step, config) for step in expected}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("decay_fraction", [0.0, 0.01, 0.5, 1.0])
def test_lr_is_reached_and_no_step_trains_with_less_than_nothing(data_dir, decay_fraction):
    config = small_config(data_dir, f"--decay_fraction={decay_fraction}", "--lr=5e-5")
    for warmup_steps, max_steps in itertools.product((0, 1, 7, 50, 100, 1000), (1, 2, 3, 100)):
        run = replace(config, warmup_steps=warmup_steps, max_steps=max_steps)
        rates = [train.learning_rate(step, run) for step in range(max_steps)]
        assert max(rates) == 5e-5 and min(rates) > 0
        peak = rates.index(5e-5)
        assert rates == sorted(rates[:peak]) + sorted(rates[peak:], reverse=True)
        assert peak + 1 <= max(1, max_steps / 2)  # a warm-up takes half of a run at most


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_muon_takes_the_matrices_of_the_blocks_and_only_matrices_decay(data_dir, name):
    shape = ModelConfig(vocab_size=64, n_layers=2, n_embd=16, n_heads=2, tie_embeddings=False)
    model = LLaMaTransformer(shape)
    adamw, *others = train.make_optimizers(model, small_config(data_dir, f"--optimizer={name}"))
    groups = [*adamw.param_groups, *(group for muon in others for group in muon.param_groups)]
    decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
    of_muon = {p for muon in others for group in muon.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in groups)
    for parameter_name, parameter in model.named_parameters():
        matrix = parameter.dim() == 2
        assert decay[parameter] == (0.1 if matrix else 0.0)
        inside = parameter_name.startswith("decoder_blocks.")
        assert (parameter in of_muon) == (matrix and inside and name == "muon")


@pytest.mark.parametrize("narrow", [True, False], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (1, 7), (67, 40)])
def test_orthogonal_matrices_are_those_of_the_polynomial_in_float64(shape, narrow, monkeypatch):
    monkeypatch.setattr("plainllama.muon.multiplies_bf16", lambda: narrow)
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    # Each of five steps rounds the terms of a polynomial whose coefficients sum to 10.25.
    bound = 5 * 10.25 * 2.0 ** -(8 if narrow else 24)
    for matrix, result in zip(matrices, newton_schulz(matrices), strict=True):
        u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        assert result.dtype == torch.float32
        expected = u @ values.diag() @ vh
        rounding = (result - expected).norm() / expected.norm()
        assert rounding < bound
        assert narrow == (rounding > 2.0**-16)


def test_muon_takes_the_steps_of_torch_optim_muon_divided_by_those_of_each_row():
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(*shape)) for shape in ((16, 16), (16, 48), (16, 16))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    muon = Muon(ours, momentum=0.9, weight_decay=0.1)
    keys = {"momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    peer = torch.optim.Muon(theirs, lr=0.02, **keys)
    for group in muon.param_groups:
        group["lr"] = 0.02
    squares = [torch.full((len(p), 1), 1 / max(p.shape)).double() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        before = [p.detach().clone() for p in ours]
        muon.step()
        peer.step()
        for start, a, b, square in zip(before, ours, theirs, squares, strict=True):
            decay = -0.02 * 0.1 * start
            update = (b.detach() - start - decay).double() / (0.02 * 0.2 * max(a.shape) ** 0.5)
            square.mul_(0.95).add_(0.05 * update.square().mean(dim=1, keepdim=True))  # NorMuon
            moved, wanted = a.detach() - start, decay + 0.02 * 0.2 * update / square.sqrt()
            # Theirs are computed in bfloat16, ours only where the CPU multiplies it fast.
            assert (moved - wanted).norm() < 0.05 * wanted.norm()
            b.data.copy_(a.data)


def test_accumulated_micro_steps_equal_one_large_batch(data_dir):
    dataset = load_dataset(data_dir)
    weights = []
    for batch_size in (1, 4):
        config = small_config(data_dir, f"--batch_size={batch_size}", "--vocab_size=257")
        torch.manual_seed(0)
        model = LLaMaTransformer(config)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)  # unlike AdamW, linear in the sum
        train.take_step(0, model, [optimizer], dataset, config, CPU)
        weights.append(model.embeddings.weight.detach())
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


# --- evaluation ---


def plain_evaluation(model: LLaMaTransformer, data_dir: Path, T: int) -> tuple[float, float]:
    """Loss and bits per byte, a window at a time, from the definition."""
    ids = np.fromfile(data_dir / "val.bin", dtype=np.uint16).astype(np.int64)
    nats, count, n_bytes = 0.0, 0, 0
    for start in range(0, len(ids) - 1, T):
        targets = ids[start + 1 : start + T + 1]
        begin = min(start, len(ids) - 1 - T)
        logits, _ = model(torch.from_numpy(ids[None, begin : begin + T]))
        chosen = F.log_softmax(logits[0, -len(targets) :], dim=-1)[range(len(targets)), targets]
        nats -= float(chosen.sum())
        count += len(targets)
        n_bytes += int((targets != 256).sum())
    return nats / count, nats / math.log(2) / n_bytes


@torch.no_grad()
def test_evaluation_counts_every_token_of_the_split_once(data_dir):
    config = small_config(data_dir, "--vocab_size=257", "--eval_tokens=0", "--batch_size=7")
    dataset = load_dataset(data_dir)
    torch.manual_seed(0)
    model = LLaMaTransformer(config)
    metrics = train.evaluate(model, dataset, config, CPU)
    loss, bpb = plain_evaluation(model, data_dir, config.max_seq_len)
    assert metrics["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["val_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert metrics["val_bpb"] == pytest.approx(bpb, abs=1e-5)


@pytest.mark.parametrize("eval_tokens", [0, 320])
def test_evaluation_windows_are_shared_out_over_processes(data_dir, eval_tokens):
    config = small_config(data_dir, f"--eval_tokens={eval_tokens}", "--batch_size=3")
    dataset = load_dataset(data_dir)

    def counted(rank: int, world_size: int) -> list[tuple[int, ...]]:
        machine = replace(CPU, rank=rank, world_size=world_size)
        batches = train.evaluation_batches(dataset, config, machine)
        return [tuple(row[row >= 0].tolist()) for _, y in batches for row in y if (row >= 0).any()]

    alone, shared = counted(0, 1), [row for rank in range(3) for row in counted(rank, 3)]
    assert sorted(alone) == sorted(shared)
    n_targets = sum(map(len, alone))
    if eval_tokens:  # the last window of the split, which is always among them, may be shorter
        assert eval_tokens - config.max_seq_len < n_targets <= eval_tokens
    else:
        assert n_targets == dataset.tokens["val"] - 1


def test_evaluating_does_not_change_the_run(data_dir, uninterrupted, tmp_path):
    run_train(data_dir, tmp_path / "out", "--eval_interval=1", "--sample_interval=5")
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))


def test_eval_only_reports_the_whole_split_and_writes_nothing(
    data_dir, uninterrupted, tmp_path, capsys
):
    before = sorted(uninterrupted.rglob("*"))
    run_train(data_dir, uninterrupted, "--eval_only")
    model = load_model(uninterrupted / "step_000012")
    with torch.no_grad():
        loss, bpb = plain_evaluation(model, data_dir, 16)
    printed = capsys.readouterr().out
    assert f"{loss:.4f}" in printed and f"{bpb:.4f} bits per byte" in printed
    assert sorted(uninterrupted.rglob("*")) == before


# --- interruption and resume ---


# The system kills a process that lets a file grow beyond the limit: here in the middle of it.
LIMITED = """
import resource, signal, train
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""
UNSEALED = """
import os, signal
from plainllama import run
run.seal = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
"""
KILLED = {
    "in the weights": LIMITED.format(limit=100_000),
    "in the optimizer's state": LIMITED.format(limit=200_000),
    "before the checksums": UNSEALED,
}


@pytest.mark.parametrize("killed", KILLED.values(), ids=KILLED)
def test_killed_while_a_checkpoint_is_written_leaves_nothing_that_looks_complete(
    data_dir, uninterrupted, tmp_path, killed
):
    out_dir = tmp_path / "out"
    ((code, _, _),) = finish([begin(data_dir, out_dir, script=killed + SCRIPT)])
    assert code in (-signal.SIGXFSZ, -signal.SIGKILL)
    assert checkpoints(out_dir) == [] and list(out_dir.glob(".tmp-*"))
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))
    assert not list(out_dir.glob(".tmp-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_stop_signal_ends_the_step_saves_and_says_how_to_go_on(data_dir, tmp_path, number):
    out_dir, endless = tmp_path / "out", ["--max_steps=100000", "--decay_fraction=0"]
    endless += ["--checkpoint_interval=0", "--log_interval=1000"]
    worker = begin(data_dir, out_dir, *endless)
    wait_for(worker, "step      1/100000")
    worker.send_signal(number)
    ((code, output, errors),) = finish([worker])
    assert code == 0 and "Traceback" not in errors
    assert errors.startswith("\nstopping after this step, then saving; Ctrl-C again quits now")
    step = int(re.search(r"stopped after step (\d+)", output).group(1))
    assert [path.name for path in checkpoints(out_dir)] == [f"step_{step:06d}"]
    assert re.search(r"to go on: python .*--resume", output)
    if number == signal.SIGINT:
        run_train(data_dir, out_dir, "--resume", f"--max_steps={step + 2}")
        run_train(data_dir, tmp_path / "whole", *endless, f"--max_steps={step + 2}")
        assert same(final_weights(out_dir), final_weights(tmp_path / "whole"))


def test_muon_lowers_the_loss_and_resumes_bit_identically_with_muon_alone(
    data_dir, tmp_path, capsys
):
    a, b, muon = tmp_path / "a", tmp_path / "b", "--optimizer=muon"
    run_train(data_dir, a, muon, "--keep_last=9")
    assert losses(a)[-1] < losses(a)[0] - 1
    shutil.copytree(a / "step_000004", b / "step_000004")
    assert "optimizer=adamw" in refusal(capsys, data_dir, b, "--resume", "--optimizer=adamw")
    run_train(data_dir, b, "--resume")
    assert same(final_weights(a), final_weights(b))


COUNT_GRAPHS = """
from torch._dynamo.utils import counters
print(counters["stats"]["unique_graphs"], "graphs")
print(counters["aot_autograd"]["autograd_cache_miss"], "compiled")
"""


@pytest.mark.slow
def test_a_compiled_run_follows_an_eager_one_and_resumes_bit_identically(data_dir, tmp_path):
    runs = [tmp_path / name for name in ("whole", "resumed", "eager")]
    more = ["--n_layers=1", "--max_seq_len=128", "--batch_size=16", "--tokens_per_step=2048"]
    more += ["--eval_interval=4", "--dtype=float32", "--keep_last=9"]
    worker = begin(data_dir, runs[0], *more, "--compile", script=SCRIPT + COUNT_GRAPHS)
    ((_, output, _),) = finish([worker])
    *_, graphs, compiled = output.splitlines()  # evaluation's code is training's, from the cache
    assert graphs == "2 graphs" and compiled in ("0 compiled", "1 compiled")
    shutil.copytree(runs[0] / "step_000004", runs[1] / "step_000004")
    ((_, _, errors),) = finish([begin(data_dir, runs[1], *more, "--compile", "--resume")])
    assert errors == "" and same(final_weights(runs[0]), final_weights(runs[1]))
    run_train(data_dir, runs[2], *more)
    assert losses(runs[0]) == pytest.approx(losses(runs[2]), abs=1e-4)


@pytest.mark.slow
def test_an_empty_library_that_a_kill_left_in_the_compilers_cache_is_compiled_again(
    data_dir, tmp_path
):
    more = ["--compile", "--n_layers=1", "--max_steps=1", "--dtype=float32"]
    cache = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    finish([begin(data_dir, tmp_path / "whole", *more, **cache)])
    for library in (tmp_path / "cache").rglob("*.so"):
        library.write_bytes(b"")
    ((code, _, errors),) = finish([begin(data_dir, tmp_path / "again", *more, **cache)])
    assert (code, errors) == (0, "")
    assert same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "again"))


def test_resume_keeps_the_settings_that_the_run_began_with(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path / "a", "--max_steps=4", "--lr=1e-3", "--decay_fraction=0")
    config_file = tmp_path / "other.py"
    config_file.write_text("lr = 0.5\n", encoding="utf-8")
    where = [f"--out_dir={tmp_path / 'a'}", "--max_steps=8", "--resume"]
    run_stage(train.main, config_file, *where)
    run_train(data_dir, tmp_path / "b", "--max_steps=8", "--lr=1e-3", "--decay_fraction=0")
    assert same(final_weights(tmp_path / "a"), final_weights(tmp_path / "b"))


def test_what_changed_on_resume_is_named(data_dir, tmp_path, capsys):
    where = data_dir, tmp_path / "out"
    run_train(*where, "--max_steps=8")
    run_train(*where, "--max_steps=9", "--resume", "--weight_decay=0.2", "--lr=1e-2")
    printed = capsys.readouterr().out
    assert "changed on resume: max_steps 8 → 9, weight_decay 0.1 → 0.2\n" in printed


def test_a_run_begun_from_other_weights_is_continued_by_the_command_that_torchrun_restarts(
    data_dir, uninterrupted, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    begin = [f"--init_from={uninterrupted / 'step_000012'}", "--decay_fraction=0", "--resume"]
    run_train(data_dir, tmp_path / "a", *begin, "--max_steps=4")
    run_train(data_dir, tmp_path / "a", *begin, "--max_steps=8")
    run_train(data_dir, tmp_path / "b", *begin, "--max_steps=8")
    assert same(final_weights(tmp_path / "a"), final_weights(tmp_path / "b"))


def test_resuming_a_finished_run_says_so_and_changes_nothing(data_dir, uninterrupted, capsys):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    run_train(data_dir, uninterrupted, "--resume")
    assert "end of the run" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(
    data_dir, tmp_path, capsys
):
    line = refusal(capsys, data_dir, tmp_path / "out", "--checkpoint_interval=1", "--lr=1e30")
    good = checkpoints(tmp_path / "out")
    assert "not finite" in line and "lr=1e+30" in line and str(good[-1]) in line
    assert read_metrics(tmp_path / "out")[-1].keys() == {"step", "diverged"}
    weights = final_weights(tmp_path / "out")
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# --- dropout, patience, and what goes wrong in small runs ---


def test_dropout_resumes_bit_identically_and_is_off_in_evaluation(data_dir, tmp_path, capsys):
    a, b, c = (tmp_path / name for name in "abc")
    dropout = ["--dropout=0.3", "--eval_interval=4"]
    run_train(data_dir, a, *dropout, "--keep_last=9")
    shutil.copytree(a / "step_000004", b / "step_000004")
    run_train(data_dir, b, "--resume")
    assert same(final_weights(a), final_weights(b))
    run_train(data_dir, c, *dropout, "--activation_checkpointing")
    assert same(final_weights(a), final_weights(c))
    capsys.readouterr()
    run_train(data_dir, a, "--eval_only", "--eval_tokens=0")
    val_loss = read_metrics(a)[-1]["val_loss"]
    run_train(data_dir, tmp_path / "again", "--eval_only", f"--init_from={a / 'step_000012'}")
    model = load_model(a / "step_000012")
    config = small_config(data_dir, "--vocab_size=257")
    evaluated = train.evaluate(model, load_dataset(data_dir), config, CPU)
    assert evaluated["val_loss"] == pytest.approx(val_loss, abs=1e-6)


def test_dropout_may_change_on_resume(data_dir, uninterrupted, tmp_path, capsys):
    shutil.copytree(uninterrupted, tmp_path / "out")
    run_train(data_dir, tmp_path / "out", "--resume", "--max_steps=13", "--dropout=0.5")
    assert "changed on resume: max_steps 12 → 13, dropout 0.0 → 0.5\n" in capsys.readouterr().out


def test_dropout_is_the_same_on_any_number_of_processes(data_dir, tmp_path):
    def words(name: str, *more: str) -> list[str]:
        return small_run(data_dir, tmp_path / name, *TINY[len(SMALL) :], "--lr=1e-3", *more)

    run_stage(train.main, *words("one", "--dropout=0.3"))
    run_stage(train.main, *words("none"))
    launch(2, words("two", "--dropout=0.3"))
    two, none = (distance(tmp_path / "one", tmp_path / name) for name in ("two", "none"))
    assert two < 1e-5 < 1e-3 < none


@pytest.mark.slow
def test_dropout_that_is_compiled_resumes_bit_identically(data_dir, tmp_path):
    more = ["--compile", "--dropout=0.3", "--n_layers=1", "--dtype=float32", "--keep_last=9"]
    finish([begin(data_dir, tmp_path / "whole", *more)])
    shutil.copytree(tmp_path / "whole/step_000004", tmp_path / "resumed/step_000004")
    ((_, _, errors),) = finish([begin(data_dir, tmp_path / "resumed", *more, "--resume")])
    assert errors == ""
    assert same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "resumed"))
    run_train(data_dir, tmp_path / "none", *more[2:])
    assert not same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "none"))


def test_patience_ends_a_run_that_gets_no_better_and_names_the_best(
    data_dir, tmp_path, monkeypatch, capsys
):
    found = iter([3.0, 2.0, 2.5, 2.1, 1.9, 1.8])

    def evaluate(*arguments):
        return {"val_loss": next(found), "val_perplexity": 1.0, "val_bpb": 1.0}

    monkeypatch.setattr(train, "evaluate", evaluate)
    out = tmp_path / "out"
    more = ["--patience=2", "--eval_interval=2", "--checkpoint_interval=0", "--keep_last=1"]
    run_train(data_dir, out, *more)
    best, last = out / "step_000004", out / "step_000008"
    assert checkpoints(out) == [best, last]
    printed = capsys.readouterr().out
    assert f"ended after step 8: patience=2 is at its end; best checkpoint: {best}\n" in printed
    assert f"next: python sample.py --ckpt={best} " in printed
    run_train(data_dir, out, *more, "--resume")
    assert "ended after step 8" in capsys.readouterr().out and checkpoints(out) == [best, last]
    run_train(data_dir, out, *more, "--resume", "--patience=0", "--max_steps=10")
    assert checkpoints(out) == [out / "step_000010"]


def constant_step(*arguments) -> tuple[dict, dict]:
    return {"loss": torch.tensor(1.0)}, {"grad_norm": torch.tensor(1.0)}


def test_a_text_that_is_read_too_often_is_warned_of(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "take_step", constant_step)
    more = ["--log_interval=9999", "--checkpoint_interval=0", "--max_steps=4900"]
    run_train(data_dir, tmp_path / "out", *more)
    printed = capsys.readouterr().out
    assert "warning: a text that is read 20 times is learned by heart;\n" in printed
    assert "--max_steps=964 reads it 4 times" in printed
    run_train(data_dir, tmp_path / "less", *more, "--max_steps=4800")
    assert "learned by heart" not in capsys.readouterr().out


def test_a_warm_up_that_is_cut_is_said(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path / "out", "--max_steps=5", "--warmup_steps=3")
    assert "warning: warmup_steps=3 is cut to 2, half of the run\n" in capsys.readouterr().out


def test_a_dead_run_says_so(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path / "out", "--lr=300", "--max_steps=6")
    printed = capsys.readouterr().out
    assert printed.count("warning: no better than chance, 5.55: nothing is learned") == 1


# --- what a run writes ---


def test_a_checkpoint_is_a_hugging_face_directory(data_dir, uninterrupted):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    checkpoint = uninterrupted / "step_000012"
    ours = load_model(checkpoint)
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "the dog bites a man. Ünïcode\n\t東"
    ids = load_tokenizer(checkpoint / "tokenizer.json").encode(text)
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.eos_token_id == theirs.generation_config.eos_token_id == 256
    tokens = torch.tensor([ids[:16]])
    with torch.no_grad():
        assert (ours(tokens)[0] - theirs(tokens).logits).abs().max() <= 1e-5
    greedy = theirs.generate(tokens[:, :4], max_new_tokens=12, do_sample=False, pad_token_id=0)
    mine = [int(token) for token in generate(ours, tokens[:, :4], 12, lambda x: x.argmax(-1))]
    assert greedy[0, 4:].tolist() == mine[: greedy.size(1) - 4]


def test_a_batched_pipeline_continues_prompts_as_if_each_were_alone(uninterrupted):
    from transformers import pipeline

    write = pipeline("text-generation", model=str(uninterrupted / "step_000012"), device="cpu")
    prompts = ["the cat ", "a"]
    how = {"max_new_tokens": 6, "do_sample": False}
    together = write(prompts, batch_size=2, **how)
    assert together == [write(prompt, **how) for prompt in prompts]
    assert write.tokenizer.model_max_length == 16


def test_snapshots_are_weights_alone_from_the_first_to_the_last_step_ever_further_apart(
    data_dir, tmp_path
):
    run_train(data_dir, tmp_path / "out", "--snapshots=4")
    names = ["step_000000", "step_000001", "step_000003", "step_000012"]
    folder = tmp_path / "out" / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == names
    final = load_file(folder / names[-1] / "model.safetensors")
    assert same(final, load_file(tmp_path / "out" / names[-1] / "model.safetensors"))
    assert not (folder / names[-1] / "train_state").exists()


def test_metrics_have_the_documented_keys_and_count_the_tokens_that_were_read(data_dir, tmp_path):
    run_train(data_dir, tmp_path / "out", "--max_steps=2", "--eval_interval=1")
    more = ["--max_steps=4", "--resume", "--eval_interval=2"]
    run_train(data_dir, tmp_path / "out", *more)
    records = read_metrics(tmp_path / "out")
    trained = [r for r in records if "loss" in r]
    keys = ["step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "mfu", "seconds"]
    assert all(sorted(r) == sorted(keys) for r in trained)
    assert [r["tokens"] for r in trained] == [64, 128, 192, 256]
    evaluated = [r for r in records if "val_loss" in r]
    assert [r["step"] for r in evaluated] == [1, 2, 4]
    assert all({"tokens", "val_loss", "val_perplexity", "val_bpb"} <= r.keys() for r in evaluated)


def test_further_numbers_of_a_step_reach_metrics_and_the_line(
    data_dir, tmp_path, monkeypatch, capsys
):
    take_step = train.take_step

    def with_entropy_and_norms(step, model, *more):
        parts, wholes = take_step(step, model, *more)
        norms = {f"norm_{n}": block.norm1.weight.detach().norm() for n, block in blocks_of(model)}
        return parts | {"entropy": torch.tensor(2.5 + step)}, wholes | norms

    def blocks_of(model):
        return enumerate(model.decoder_blocks)

    monkeypatch.setattr(train, "take_step", with_entropy_and_norms)
    run_train(data_dir, tmp_path / "out", "--max_steps=2")
    found = [record for record in read_metrics(tmp_path / "out") if "loss" in record]
    assert [record["entropy"] for record in found] == [2.5, 3.5]
    assert all(record["norm_1"] == pytest.approx(32**0.5, rel=0.02) for record in found)
    assert re.search(r"norm \d\.\d\d +entropy 3\.5 +norm_0 5\.\d+ +norm_1", capsys.readouterr().out)


def test_settings_json_is_what_a_run_was_started_with_also_after_resuming(
    data_dir, uninterrupted, tmp_path
):
    began = read_json(uninterrupted / "settings.json")
    assert began == read_state(checkpoints(uninterrupted)[-1])["config"]
    assert began["max_steps"] == 12 and began["vocab_size"] == 257
    shutil.copytree(uninterrupted, tmp_path / "out")
    run_train(data_dir, tmp_path / "out", "--resume", "--max_steps=13")
    after = read_json(tmp_path / "out/settings.json")
    changed = {key for key in began if began[key] != after[key]}
    assert began["n_kv_heads"] == began["hidden_dim"] == 0  # and not the widths that follow
    assert changed == {"max_steps", "out_dir", "resume"}


def test_the_newest_checkpoints_and_the_best_are_kept(data_dir, uninterrupted, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(uninterrupted, out_dir)
    better = {4: 1.0, 8: 3.0, 12: 2.0}  # than any that follows
    records = [json.dumps({"step": step, "val_loss": loss}) for step, loss in better.items()]
    (out_dir / "metrics.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    more = ["--max_steps=20", "--keep_last=2", "--eval_interval=4"]
    run_train(data_dir, out_dir, "--resume", *more)
    kept = [path.name for path in checkpoints(out_dir)]
    assert kept == ["step_000004", "step_000016", "step_000020"]


def test_training_lowers_the_validation_loss_and_init_from_starts_there(data_dir, tmp_path, capsys):
    more = ["--max_steps=60", "--checkpoint_interval=0"]
    run_train(data_dir, tmp_path / "a", *more)
    reached = read_metrics(tmp_path / "a")[-1]["val_loss"]
    assert reached < 2.5 < math.log(257)
    source = checkpoints(tmp_path / "a")[-1]
    run_train(data_dir, tmp_path / "b", f"--init_from={source}", "--max_steps=1", "--lr=1e-6")
    assert read_metrics(tmp_path / "b")[-1]["val_loss"] == pytest.approx(reached, abs=1e-3)


def test_without_a_working_compiler_the_run_is_eager_and_says_so_once(
    data_dir, uninterrupted, tmp_path, capsys
):
    torch.compiler.reset()
    broken = {"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False}
    with torch._inductor.config.patch(broken):
        run_train(data_dir, tmp_path / "out", "--compile", "--dtype=float32")
    assert capsys.readouterr().err.count("warning: training without torch.compile") == 1
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))


# --- refusals ---


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "damage", "parts"),
    [
        ("train.bin", lambda data: data[:-100], ["bytes instead of", "--overwrite"]),
        ("train.bin", lambda data: data[:999] + b"\xff" + data[1000:], ["is damaged"]),
        ("val.bin", lambda data: data[:999] + b"\xff" + data[1000:], ["is damaged"]),
        ("val.bin", lambda data: None, ["is missing", "--overwrite"]),
        ("tokenizer.json", lambda data: data.replace(b"256", b"255"), ["is damaged"]),
        ("meta.json", lambda data: data[:15], ["is damaged", "--overwrite"]),
    ],
)
def test_damaged_data_is_refused(
    data_dir, uninterrupted, tmp_path, capsys, resume, name, damage, parts
):
    shutil.copytree(data_dir, tmp_path / "data")
    more = []
    if resume:  # the data was compared with its checksums, which is noted beside it
        run_train(tmp_path / "data", tmp_path / "out", "--max_steps=1")
        more = ["--resume", "--max_steps=2"]
    path = tmp_path / "data" / name
    damaged = damage(path.read_bytes())
    path.unlink()
    if damaged is not None:
        path.write_bytes(damaged)
    line = refusal(capsys, tmp_path / "data", tmp_path / "out", *more)
    assert all(part in line for part in [str(path), *parts])


def test_an_out_dir_with_a_run_in_it_is_refused(data_dir, uninterrupted, capsys):
    line = refusal(capsys, data_dir, uninterrupted)
    assert str(uninterrupted) in line and "--resume" in line and "step_000012" in line


def test_other_data_than_the_runs_is_refused_on_resume(data_dir, uninterrupted, tmp_path, capsys):
    text, more = data_dir.parent / "text.txt", ["--tokenizer=byte", "--val_fraction=0.2"]
    run_stage(prepare.main, text, f"--out={tmp_path / 'other'}", *more)
    line = refusal(capsys, tmp_path / "other", uninterrupted, "--resume", "--max_steps=20")
    assert f"{tmp_path / 'other'} is not the data that" in line


def test_another_shape_or_fewer_steps_than_the_checkpoints_are_refused(
    data_dir, uninterrupted, capsys, tmp_path
):
    checkpoint = uninterrupted / "step_000012"
    line = refusal(capsys, data_dir, uninterrupted, "--resume", "--n_layers=3")
    assert "n_layers=3" in line and "n_layers=2" in line
    line = refusal(capsys, data_dir, tmp_path, f"--init_from={checkpoint}", "--n_embd=64")
    assert "n_embd=64" in line and "n_embd=32" in line
    line = refusal(capsys, data_dir, uninterrupted, "--resume", "--max_steps=5")
    assert f"max_steps=5, but {checkpoint} is past that" in line


@pytest.mark.parametrize(
    "flag", ["seed=1", "tokens_per_step=128", "max_seq_len=8", "optimizer=muon"]
)
def test_what_decides_windows_or_state_is_not_changed_on_resume(
    data_dir, uninterrupted, capsys, flag
):
    line = refusal(capsys, data_dir, uninterrupted, "--resume", "--max_steps=20", f"--{flag}")
    assert f"{flag} cannot continue {uninterrupted / 'step_000012'}, which has" in line
    assert "leave it out" in line and "--init_from=" in line


def test_the_same_tokens_under_other_ids_are_another_tokenizer(
    data_dir, uninterrupted, tmp_path, capsys
):
    content = json.loads((data_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tmp_path / "t.json").write_text(json.dumps(content), encoding="utf-8")
    text, other = data_dir.parent / "text.txt", tmp_path / "other"
    run_stage(prepare.main, text, f"--out={other}", f"--tokenizer={tmp_path / 't.json'}")
    checkpoint = uninterrupted / "step_000012"
    line = refusal(capsys, other, tmp_path / "out", f"--init_from={checkpoint}")
    assert f"{other} has another tokenizer than {checkpoint}" in line


def test_weights_that_are_no_numbers_are_refused(data_dir, uninterrupted, tmp_path, capsys):
    checkpoint = tmp_path / "weights"
    shutil.copytree(uninterrupted / "step_000012", checkpoint)
    shutil.rmtree(checkpoint / "train_state")  # with its checksums
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    line = refusal(capsys, data_dir, tmp_path / "out", f"--init_from={checkpoint}")
    assert str(checkpoint) in line and "model.norm.weight" in line


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--data_dir=none"], ["no prepared data in none", "prepare.py"]),
        (["--max_seq_len=8192", "--tokens_per_step=32768"], ["val.bin", "8,193", "max_seq_len"]),
        (["--vocab_size=300"], ["vocab_size=300", "257"]),
        (["--tokens_per_step=100"], ["100", "64 or 128"]),
        (["--n_layer=3"], ["--n_layer", "--n_layers"]),
        (["--dtype=float8"], ["float8", "bfloat16"]),
        (["--max_steps=0"], ["max_steps=0", "1"]),
        (["--decay_fraction=2"], ["decay_fraction=2", "between 0 and 1"]),
        (["--eval_only"], ["no checkpoint"]),
        (["--device=warp"], ["warp", "cpu"]),
        (["--n_embd=30", "--n_heads=4"], ["n_embd=30", "n_heads=4"]),
        (["--init_from=nowhere"], ["nowhere", "config.json"]),
        (["--init_from=resume"], ["init_from=resume", "--resume"]),
        (["--lr=nan"], ["--lr", "a number", "nan"]),
        (["--beta2=1"], ["beta2=1.0", "below 1"]),
        (["--dropout=1"], ["dropout=1.0", "below 1"]),
        (["--patience=3"], ["patience=3", "eval_interval"]),
        ([f"--seed={2**70}"], ["seed=", "at most"]),
        (["--seed=-1"], ["seed=-1", "at least 0"]),
        (["--n_layers=1000000000"], ["parameters needs", "GB"]),
        (["--vocab_size=1000000000000"], ["vocab_size=1000000000000", "1e9"]),
        (["--batch_size=100000000", "--tokens_per_step=1600000000"], ["batch_size", "GB"]),
        (["--tokens_per_step=4611686018427387904"], ["tokens_per_step", "GB"]),
        (["--rope_theta=0"], ["rope_theta=0"]),
        (["--n_heads=0"], ["n_heads=0", "more than 0"]),
    ],
)
def test_wrong_settings_are_refused_with_what_they_may_be(data_dir, tmp_path, capsys, flags, parts):
    line = refusal(capsys, data_dir, tmp_path / "out", *flags)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("width", "asked", "compiled", "onednn", "multiplies", "narrow"),
    [
        (128, "auto", False, True, True, False),
        (129, "auto", False, False, True, True),
        (129, "float32", False, False, True, False),
        (128, "auto", True, True, True, True),
        (128, "auto", True, False, True, False),
        (129, "auto", True, True, False, False),
    ],
)
def test_layers_are_multiplied_in_bfloat16_where_the_cpu_gains(
    width, asked, compiled, onednn, multiplies, narrow, monkeypatch
):
    monkeypatch.setattr("plainllama.machine.multiplies_bf16", lambda: multiplies)
    monkeypatch.setattr("plainllama.machine.onednn_is_faster", lambda: onednn)
    expected = torch.bfloat16 if narrow else torch.float32
    assert choose_dtype(asked, torch.device("cpu"), width, compiled) == expected


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("[!_]*.py")), ids=lambda p: p.stem)
def test_shipped_configs_reach_their_lr_and_all_their_intervals(path):
    config = load(train.TrainConfig, [str(path)])
    assert config.warmup_steps <= config.max_steps // 2
    for key in ("eval_interval", "checkpoint_interval", "sample_interval"):
        assert getattr(config, key) <= config.max_steps, key


def test_shipped_configs_have_the_sizes_that_they_state():
    sizes = {"tiny": (257, 0.5e6, 5e6), "small": (50257, 10e6, 40e6)}
    sizes |= {"medium": (50257, 118e6, 130e6), "large": (50257, 330e6, 370e6)}
    sizes |= {"xl": (50257, 1.0e9, 1.2e9), "shakespeare_char": (257, 0.4e6, 0.5e6)}
    for name, (vocab_size, least, most) in sizes.items():
        config = load(train.TrainConfig, [str(ROOT / "config" / f"{name}.py")])
        with torch.device("meta"):
            model = LLaMaTransformer(replace(config, vocab_size=vocab_size))
        assert least < n_params(model) < most, name
        for world_size in (1, 2, 4, 8):
            if name not in ("tiny", "shakespeare_char"):
                train.count_micro_steps(config, world_size)
