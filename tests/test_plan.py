"""tools/plan.py: it says what a run takes, writes and changes nothing."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import run_stage
from several import SMALL
from training import CPU, run_train, small_config

import train
from plainllama.checkpoint import checkpoints
from plainllama.data import load_dataset
from plainllama.start import Start
from tools import plan


def run_plan(capsys, data_dir: Path, *flags: str) -> dict[str, str]:
    """What a plan says, by the word that a line begins with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "SECONDS", 1e-6)
        run_stage(plan.main, *SMALL, f"--data_dir={data_dir}", *flags)
    return {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}


def test_a_plan_says_what_the_run_takes_and_writes_nothing(data_dir, tmp_path, capsys):
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


def test_the_parts_of_the_memory_have_their_sizes(data_dir, capsys):
    said = run_plan(capsys, data_dir, "--n_embd=256")["memory"]
    number = r"([\d.,]+) (?:MB|GB)"
    weights, gradients, optimizer = (
        float(re.search(f"{part} {number}", said)[1])
        for part in ("weights", "gradients", "optimizer")
    )
    config = replace(small_config(data_dir, "--n_embd=256"), vocab_size=257)
    model = train.build_model(config, Start("new"), CPU)
    exact = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    assert weights == gradients == pytest.approx(exact, abs=0.05)
    assert optimizer == pytest.approx(2 * exact, abs=0.1)  # AdamW's two moments


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
    model = train.build_model(config, Start("new"), CPU)
    plan.plan_time(model, [], load_dataset(data_dir), config, CPU)
    assert f"12 steps of {5 + 2 * 1000:.3g} s" in capsys.readouterr().out and max(seen) == 2
