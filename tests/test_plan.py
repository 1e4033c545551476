"""tools/plan.py: it says what a run allocates, finds what fits, writes and changes nothing."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import GPT2, LATENT, ROOT, run_stage
from test_train import (  # noqa: F401  (data_dir is a fixture)
    CPU,
    SMALL,
    data_dir,
    run_train,
    small_config,
)

import train
from plainllama.checkpoint import Start, checkpoints
from plainllama.data import load_dataset
from plainllama.settings import run_main
from tools import plan

MEASURE = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, train
from dataclasses import replace
from plainllama.checkpoint import Start
from plainllama.data import load_dataset
from plainllama.machine import Machine
from plainllama.settings import load
from tools import plan

def status(key):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(key))

def steps(config, count):
    model = train.build_model(config, Start("new"), machine)
    optimizers = train.make_optimizers(model, config)
    for step in range(count):
        train.take_step(step, model, optimizers, dataset, config, machine)

config = load(train.TrainConfig)
dataset = load_dataset(config.data_dir)
config = replace(config, vocab_size=3000)
machine = Machine(torch.device("cpu"), torch.float32, 0, 1)
parts = plan.step_memory(config, dataset, machine)
tiny = replace(config, n_layers=1, n_embd=32, n_heads=2, n_kv_heads=0, vocab_size=257)
steps(replace(tiny, hidden_dim=0, batch_size=1, tokens_per_step=config.max_seq_len), 2)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins again
before = status("VmRSS")
steps(config, 2)
print(status("VmHWM") - before, sum(parts.values()))
"""
SIZES = ["--n_layers=2", "--n_embd=256", "--n_heads=4", "--max_seq_len=128", "--no-compile"]
TWELVE = ["--batch_size=12", "--tokens_per_step=1536"]
CASES = {
    "two micro-steps": ["--batch_size=12", "--tokens_per_step=3072"],
    "muon": ["--batch_size=1", "--tokens_per_step=128", "--optimizer=muon", "--n_layers=8"],
    "recomputed": [*TWELVE, "--activation_checkpointing"],
    "chunked": [*TWELVE, "--chunked_loss"],
    "GPT-2": [*TWELVE, *(f"--{key}={value}" for key, value in GPT2.items())],
    "latent": [*TWELVE, *(f"--{key}={value}" for key, value in LATENT.items())],
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(flags, id=name, marks=[pytest.mark.slow] * (name != "two micro-steps"))
        for name, flags in CASES.items()
    ],
)
def test_the_parts_add_up_to_what_a_run_allocates(data_dir, tmp_path, flags):
    script = tmp_path / "measure.py"
    script.write_text(MEASURE, encoding="utf-8")
    # Otherwise the C library keeps what it is given back, in pieces that fit nothing else.
    env = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PATH": ""}
    command = [sys.executable, str(script), *SIZES, f"--data_dir={data_dir}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    allocated, planned = map(int, done.stdout.split())
    assert planned == pytest.approx(allocated, rel=0.1)


def memory(data_dir: Path, *flags: str) -> dict[str, int]:
    config = replace(small_config(data_dir, *flags), vocab_size=257)
    machine = train.set_up_machine(config)
    with machine.attention():
        return plan.step_memory(config, load_dataset(data_dir), machine)


def test_known_parts_have_their_sizes(data_dir):
    parts = memory(data_dir, "--tokens_per_step=128")  # whose second micro-step finds gradients
    config = replace(small_config(data_dir), vocab_size=257)
    model = train.build_model(config, Start("new"), CPU)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert parts["weights"] == weights + sum(buffer.nbytes for buffer in model.buffers())
    assert parts["gradients"] == weights
    counts = 4 * len([*model.parameters()])  # of the steps, beside two moments
    assert parts["optimizer"] == 2 * weights + counts


def run_plan(capsys, data_dir: Path, *flags: str) -> dict[str, str]:
    """What a plan says, by the word that a line begins with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SECONDS", 1e-6)
        run_stage(plan.main, *SMALL, f"--data_dir={data_dir}", *flags)
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


def test_a_plan_says_what_the_run_takes_and_writes_nothing(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "device_memory", lambda device: None)
    folder = tmp_path / "out"
    shape = ("--n_embd=256", "--snapshots=4", "--checkpoint_interval=3", "--eval_interval=5")
    run_train(data_dir, folder, *shape, "--keep_last=1")
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in (*folder.rglob("*"), *data_dir.rglob("*"))}
    said = run_plan(capsys, data_dir, f"--out_dir={folder}", *shape, "--keep_last=1")
    found = (*folder.rglob("*"), *data_dir.rglob("*"))
    assert before == {path: path.stat().st_mtime_ns for path in found}
    assert "12 steps of " in said["time"] and "3 evaluations of " in said["time"]
    assert "3 checkpoints" in said["disk"] and "4 snapshots" in said["disk"]
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    snapshots = sum(path.stat().st_size for path in files if "snapshots" in path.parts)
    one = sum(path.stat().st_size for path in checkpoints(folder)[-1].rglob("*.safetensors"))
    planned = float(re.search(r"([\d,.]+) MB", said["disk"])[1].replace(",", ""))
    assert planned * 1e6 == pytest.approx(3 * one + snapshots, rel=0.1)  # no padding rows there


def test_the_largest_batch_size_that_fits_is_found(data_dir, monkeypatch, capsys):
    flags = ("--tokens_per_step=192", "--max_steps=4", "--batch_size=12")

    def needs(config, dataset, machine):
        return {"weights": 60, "optimizer": 40, "activations": config.batch_size}

    monkeypatch.setattr(plan, "step_memory", needs)
    monkeypatch.setattr(plan, "plan_time", lambda config, *_: print("planned", config.batch_size))
    for largest, free in ((1, 101), (3, 103), (12, 999)):
        monkeypatch.setattr(plan, "device_memory", lambda device, free=free: (10 * free, free))
        said = run_plan(capsys, data_dir, *flags)
        assert f"batch_size={largest} is the largest" in said["fits"]
        assert said["planned"] == f"planned {largest}"
    monkeypatch.setattr(plan, "device_memory", lambda device: (1000, 100))
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run_plan(capsys, data_dir, *flags))
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "batch_size=1 takes more than" in line
    assert "lower max_seq_len" in line


def test_long_steps_are_planned_from_those_of_one_and_two_micro_steps(
    data_dir, monkeypatch, capsys
):
    seen = []

    def slow_step(step, model, optimizers, dataset, config, machine):
        seen.append(config.tokens_per_step // 64)
        return train.torch.zeros(()), train.torch.zeros(())

    def seconds(call):
        call()
        return 5 + 2 * seen[-1]

    monkeypatch.setattr(train, "take_step", slow_step)
    monkeypatch.setattr(plan, "median_seconds", seconds)
    config = replace(small_config(data_dir, "--tokens_per_step=64000"), vocab_size=257)
    plan.plan_time(config, Start("new"), load_dataset(data_dir), CPU)
    assert f"12 steps of {5 + 2 * 1000:.3g} s" in capsys.readouterr().out and max(seen) == 2
