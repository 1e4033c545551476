"""tools/plan.py: it says what a run allocates, finds what fits, writes and changes nothing."""

import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from helpers import GPT2, LATENT, refused, run_stage
from several import SMALL
from training import CPU, run_train, small_config

import train
from plainllama.checkpoint import Start, checkpoints
from plainllama.data import load_dataset
from tools import plan

TWELVE = ["--batch_size=12", "--tokens_per_step=768"]
CASES = {
    "two micro-steps": ["--batch_size=12", "--tokens_per_step=1536"],
    "muon": ["--batch_size=1", "--tokens_per_step=64", "--optimizer=muon", "--n_layers=4"],
    "recomputed": [*TWELVE, "--activation_checkpointing"],
    "chunked": [*TWELVE, "--chunked_loss"],
    "GPT-2": [*TWELVE, *(f"--{key}={value}" for key, value in GPT2.items())],
    "latent": [*TWELVE, *(f"--{key}={value}" for key, value in LATENT.items())],
}


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_the_parts_add_up_to_what_a_run_allocates(data_dir, flags):
    shape = ["--n_layers=2", "--n_embd=64", "--max_seq_len=64", *flags]
    config, dataset = (
        replace(small_config(data_dir, *shape), vocab_size=3000),
        load_dataset(data_dir),
    )
    planned = sum(plan.step_memory(config, dataset, CPU).values())
    with torch.profiler.profile(profile_memory=True) as profile:
        model = train.build_model(config, Start("new"), CPU)
        optimizers = train.make_optimizers(model, config)
        for step in range(2):
            train.take_step(step, model, optimizers, dataset, config, CPU)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    assert planned == pytest.approx(max(accumulate(sizes)), rel=0.1)


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
    line = refused(capsys, plan.main, *SMALL, f"--data_dir={data_dir}", *flags)
    assert "batch_size=1 takes more than" in line and "lower max_seq_len" in line


def test_long_steps_are_planned_from_those_of_one_and_two_micro_steps(
    data_dir, monkeypatch, capsys
):
    seen = []

    def slow_step(step, model, optimizers, dataset, config, machine):
        seen.append(config.tokens_per_step // 64)
        return {"loss": torch.zeros(())}, {}

    def seconds(call):
        call()
        return 5 + 2 * seen[-1]

    monkeypatch.setattr(train, "take_step", slow_step)
    monkeypatch.setattr(plan, "median_seconds", seconds)
    config = replace(small_config(data_dir, "--tokens_per_step=64000"), vocab_size=257)
    plan.plan_time(config, Start("new"), load_dataset(data_dir), CPU)
    assert f"12 steps of {5 + 2 * 1000:.3g} s" in capsys.readouterr().out and max(seen) == 2
