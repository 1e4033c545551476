"""--tracker: what TensorBoard and wandb are told; none can stop a run."""

import sys
import types
from pathlib import Path

import numpy as np
import pytest
from training import refusal, run_train

import train
from plainllama.metrics import read_metrics


def reported(out_dir: Path, key: str) -> list[tuple[int, float]]:
    """What metrics.jsonl says under a key, by step."""
    return [(r["step"], r[key]) for r in read_metrics(out_dir) if key in r]


def scalars(out_dir: Path, key: str) -> list[tuple[int, float]]:
    """What TensorBoard shows under a key, by step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(key)]


def test_tensorboard_shows_what_metrics_jsonl_says_also_after_resuming(data_dir, tmp_path):
    out_dir = tmp_path / "out"
    more = ["--tracker=tensorboard", "--eval_interval=4"]
    run_train(data_dir, out_dir, *more, "--max_steps=10", "--checkpoint_interval=8")
    (last,) = out_dir.glob("step_000010")
    last.rename(tmp_path / "lost")  # so that steps 9 and 10 are taken again
    run_train(data_dir, out_dir, *more, "--max_steps=12", "--resume")
    for key in ("loss", "lr", "tokens_per_second", "val_loss", "val_bpb"):
        expected = [(step, np.float32(value)) for step, value in reported(out_dir, key)]
        assert scalars(out_dir, key) == expected
    assert [step for step, _ in scalars(out_dir, "loss")] == [*range(1, 13)]


def fake_wandb(monkeypatch, init) -> None:
    module = types.ModuleType("wandb")
    module.__spec__ = types.SimpleNamespace(name="wandb")
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


def test_a_tracker_gets_settings_and_numbers_and_is_ended(data_dir, tmp_path, monkeypatch):
    began, logged = [], []
    run = types.SimpleNamespace(
        log=lambda numbers, step: logged.append((step, numbers)),
        finish=lambda: logged.append("finished"),
    )
    fake_wandb(monkeypatch, lambda **given: began.append(given) or run)
    run_train(data_dir, tmp_path / "out", "--tracker=wandb")
    (given,) = began
    assert given["name"] == "out" and given["config"]["n_embd"] == 32
    assert logged.pop() == "finished"
    records = read_metrics(tmp_path / "out")
    expected = [{k: v for k, v in record.items() if v is not None} for record in records]
    assert [numbers | {"step": step} for step, numbers in logged] == expected


class Broken:
    """Fails at its third record, and counts what it is asked for afterwards."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, numbers: dict, step: int) -> None:
        self.calls += 1
        if self.calls == 3:
            raise ConnectionError("no route\nto host")

    def finish(self) -> None:
        raise AssertionError("it was given up")


def exit_at_once(**given) -> None:
    sys.exit("api key missing")


@pytest.mark.parametrize(
    "init, reason",
    [
        (lambda **given: Broken(), "ConnectionError: no route to host"),
        (exit_at_once, "SystemExit: api key missing"),
    ],
    ids=["log", "init"],
)
def test_a_tracker_that_fails_is_a_warning_and_the_run_the_same(
    data_dir, tmp_path, monkeypatch, capsys, init, reason
):
    run_train(data_dir, tmp_path / "without")
    capsys.readouterr()
    fake_wandb(monkeypatch, init)
    run_train(data_dir, tmp_path / "with", "--tracker=wandb")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [f"warning: the run goes on without wandb, which failed: {reason}"]
    assert reported(tmp_path / "with", "loss") == reported(tmp_path / "without", "loss")


def test_a_tracker_that_is_not_installed_is_refused(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refusal(capsys, data_dir, tmp_path / "out", "--tracker=trackio")
    assert "tracker=trackio is not installed: python -m pip install trackio" in line
    assert not (tmp_path / "out").exists()


def test_reports_are_not_written_through_a_link_that_comes_during_a_run(
    data_dir, tmp_path, monkeypatch, capsys
):
    path, precious, evaluate = tmp_path / "out/metrics.jsonl", tmp_path / "precious", train.evaluate
    precious.write_text("mine")

    def link(*args):
        path.unlink()
        path.symlink_to(precious)
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", link)
    run_train(data_dir, tmp_path / "out", "--eval_interval=0")
    assert precious.read_text() == "mine" and "metrics.jsonl lacks step" in capsys.readouterr().err
