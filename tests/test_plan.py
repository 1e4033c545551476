"""train.py --plan: it says what a run allocates, finds what fits, writes and changes nothing."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import GPT2, LATENT, ROOT
from test_train import (  # noqa: F401  (data_dir is a fixture)
    CPU,
    data_dir,
    final_weights,
    refusal,
    run_train,
    same,
    small_config,
)

import train
from plainllama import plan
from plainllama.data import load_dataset
from plainllama.run_directory import checkpoints

TRAINING = plan.Training(train.make_optimizers, train.take_step, train.evaluate)
MEASURE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from dataclasses import replace
from plainllama import plan
from plainllama.data import load_dataset
from plainllama.machine import Machine, spare_memory
from plainllama.settings import load
from model import LLaMaTransformer

def status(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

def steps(config, count):
    model = LLaMaTransformer(config)
    spare_memory(model, config)
    optimizers = train.make_optimizers(model, config)
    for step in range(count):
        train.take_step(step, model, optimizers, dataset, config, machine)

config = load(train.TrainConfig)
dataset = load_dataset(config.data_dir)
config = replace(config, vocab_size=3000)
machine = Machine(torch.device("cpu"), torch.float32, 0, 1)
training = plan.Training(train.make_optimizers, train.take_step, train.evaluate)
parts = plan.step_memory(config, dataset, machine, training)
tiny = replace(config, n_layers=1, n_embd=32, n_heads=2, n_kv_heads=0, vocab_size=257)
steps(replace(tiny, hidden_dim=0, batch_size=1, tokens_per_step=config.max_seq_len), 2)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins again
before = status("VmRSS")
steps(config, 2)
print(status("VmHWM") - before, *(parts[part] for part in plan.PARTS))
"""
SIZES = ["--n_layers=2", "--n_embd=384", "--n_heads=6", "--max_seq_len=128", "--no-compile"]
CASES = {
    "activations": ["--batch_size=12", "--tokens_per_step=3072"],
    "weights, muon": [
        "--batch_size=1",
        "--tokens_per_step=128",
        "--optimizer=muon",
        "--n_layers=8",
    ],
    "recomputed": ["--batch_size=12", "--tokens_per_step=1536", "--activation_checkpointing"],
    "chunked": ["--batch_size=12", "--tokens_per_step=1536", "--chunked_loss"],
    "GPT-2": ["--batch_size=6", "--tokens_per_step=768", *(f"--{k}={v}" for k, v in GPT2.items())],
    "latent": [
        "--batch_size=6",
        "--tokens_per_step=768",
        *(f"--{k}={v}" for k, v in LATENT.items()),
    ],
}

SLOW = ("weights, muon", "recomputed", "chunked", "GPT-2", "latent")


@pytest.fixture(autouse=True)
def short_trials(monkeypatch):
    monkeypatch.setattr(plan, "SECONDS", 0.1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "flags",
    [pytest.param(f, id=n, marks=[pytest.mark.slow] * (n in SLOW)) for n, f in CASES.items()],
)
def test_the_parts_add_up_to_what_a_run_allocates(data_dir, tmp_path, flags):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE, encoding="utf-8")
    # Otherwise the C library keeps what it is given back, in pieces that fit nothing else.
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, str(script), *SIZES, f"--data_dir={data_dir}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    allocated, *parts = map(int, done.stdout.split())
    print(f"allocated {allocated / 1e6:.1f} MB, planned {sum(parts) / 1e6:.1f} MB: {parts}")
    assert sum(parts) == pytest.approx(allocated, rel=0.1)


def needed(data_dir: Path, batch_size: int, *more: str) -> int:
    config = small_config(data_dir, *more, f"--batch_size={batch_size}")
    config = replace(config, vocab_size=257)
    machine = train.set_up_machine("cpu", "float32", config.n_embd, False)
    with machine.attention():
        return plan.step_memory(config, load_dataset(data_dir), machine, TRAINING).total()


def test_known_parts_have_their_sizes(data_dir):
    config = replace(small_config(data_dir), vocab_size=257)
    parts = plan.step_memory(config, load_dataset(data_dir), CPU, TRAINING)
    model = train.LLaMaTransformer(config)
    weights = sum(4 * p.numel() for p in model.parameters())
    assert parts["weights"] == weights + sum(4 * b.numel() for b in model.buffers())
    assert parts["gradients"] == weights
    n_tensors = len([*model.parameters()])
    assert (
        parts["optimizer"] == 2 * weights + 4 * n_tensors
    )  # two moments, and a step's number each
    assert parts["logits"] >= 2 * 64 * 257 * 4  # of the loss, and their gradient


def numbers(line: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\d(?:\.\d+)?", line)]


def report(capsys) -> dict[str, str]:
    """What a plan says, by the word that a line begins with."""
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line for line in lines if not line.startswith(" ")}


def test_a_plan_says_what_the_run_takes_and_changes_nothing(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path / "before")
    (data_dir / ".verified").unlink()
    files = sorted(data_dir.rglob("*"))
    capsys.readouterr()
    more = ("--eval_interval=5", "--snapshots=3")
    run_train(data_dir, tmp_path / "after", "--plan", *more)
    said = report(capsys)
    assert sorted(data_dir.rglob("*")) == files and not (tmp_path / "after").exists()
    tokens = load_dataset(data_dir).tokens["train"]
    assert "12 steps of 64 tokens: 768 tokens" in said["compute"]
    assert f"{768 / tokens:.1f} epochs" in said["compute"]
    assert "3 evaluations" in said["time"] and "compiling" not in said["time"]
    assert "3 checkpoints" in said["disk"] and "3 snapshots" in said["disk"]
    run_train(data_dir, tmp_path / "after")
    assert same(final_weights(tmp_path / "before"), final_weights(tmp_path / "after"))


def test_a_plan_of_the_rest_of_a_run_changes_nothing_of_it(data_dir, tmp_path, capsys):
    run_train(data_dir, tmp_path / "out", "--max_steps=8")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    run_train(data_dir, tmp_path / "out", "--resume", "--max_steps=20", "--plan")
    assert "12 steps of 64 tokens" in report(capsys)["compute"]
    run_train(data_dir, tmp_path / "out", "--plan")  # one that begins anew is planned as well
    assert "12 steps of 64 tokens" in report(capsys)["compute"]
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_the_size_on_disk_is_that_of_the_run(data_dir, tmp_path, capsys):
    shape = ("--n_embd=256", "--snapshots=4", "--keep_last=1", "--checkpoint_interval=6")
    run_train(data_dir, tmp_path / "out", *shape, "--plan")
    (planned, *_) = numbers(report(capsys)["disk"])
    run_train(data_dir, tmp_path / "out", *shape)
    files = [path for path in (tmp_path / "out").rglob("*.safetensors") if path.is_file()]
    kept = len(checkpoints(tmp_path / "out"))
    assert kept == 1  # the newest is the best; room is planned for two
    checkpoint = sum(f.stat().st_size for f in files if "snapshots" not in f.parts)
    found = sum(f.stat().st_size for f in files) + checkpoint
    assert planned * 1e6 == pytest.approx(found, rel=0.1)  # on disk there are no padding rows


def test_the_largest_batch_size_that_fits_is_found(data_dir, tmp_path, monkeypatch, capsys):
    needs = {n: needed(data_dir, n, "--tokens_per_step=192") for n in (1, 3, 12)}
    assert sorted(needs.values()) == [*needs.values()]
    for fits in (1, 3):
        monkeypatch.setattr(plan, "device_memory", lambda device, n=needs[fits]: (10 * n, n))
        flags = ("--plan", "--batch_size=12", "--tokens_per_step=192", "--max_steps=4")
        run_train(data_dir, tmp_path / "out", *flags)
        out = capsys.readouterr().out
        assert f"batch_size={fits} is the largest that does" in out
        assert f"192 tokens = {fits} sequences" in out  # which is what is tried and timed


def test_what_does_not_fit_at_batch_size_1_is_refused(data_dir, tmp_path, monkeypatch, capsys):
    least = needed(data_dir, 1)
    monkeypatch.setattr(plan, "device_memory", lambda device: (10 * least, least - 1))
    line = refusal(capsys, data_dir, tmp_path / "out", "--plan")
    assert "does not fit: at batch_size=1 a step takes" in line and "lower max_seq_len" in line


def test_long_steps_are_planned_from_those_of_one_and_two_micro_steps(data_dir):
    config = replace(small_config(data_dir, "--tokens_per_step=64000"), vocab_size=257)
    seen = []

    def take_step(step, model, optimizers, dataset, config, machine):
        micro_steps = config.tokens_per_step // 64
        seen.append(micro_steps)
        clock.now += 5 + 2 * micro_steps  # seconds
        return train.torch.zeros(()), train.torch.zeros(())

    class Clock:
        now = 0.0

    clock = Clock()
    training = plan.Training(train.make_optimizers, take_step, train.evaluate)
    trial = plan.Trial(config, load_dataset(data_dir), CPU, training, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan.time, "perf_counter", lambda: clock.now)
        seconds, _ = trial.seconds_of_step([], 1000)
    assert seconds == 5 + 2 * 1000 and max(seen) == 2
