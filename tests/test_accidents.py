"""What befalls a run: signals, full disks, closed streams, damaged files, and two at once."""

import errno
import fcntl
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import namedtuple
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import load_file, save_file
from test_train import (
    command,
    data_dir,  # noqa: F401 (a fixture)
    final_weights,
    refusal,
    run_stage,
    run_train,
    same,
    uninterrupted,  # noqa: F401 (a fixture)
)

import prepare
import sample
import train
from plainllama import files, runs
from plainllama.checkpoint import MANIFEST, checkpoints, read_state
from plainllama.data import load_dataset, verify_dataset
from plainllama.metrics import val_losses
from plainllama.run import StopSignal
from plainllama.settings import UserError, load, run_main


def copied(run_dir: Path, tmp_path: Path, step: int = 4) -> Path:
    """A run that has come to `step`."""
    out_dir = tmp_path / "copied"
    name = f"step_{step:06d}"
    shutil.copytree(run_dir / name, out_dir / name)
    shutil.copy(run_dir / "metrics.jsonl", out_dir)
    return out_dir


def after_step(number: int, act, monkeypatch) -> None:
    """Call `act` when a step of a run was taken and before anything is said about it."""
    log_training = runs.Run.log_training

    def log(self, step, *more):
        if step == number:
            act()
        log_training(self, step, *more)

    monkeypatch.setattr(runs.Run, "log_training", log)


# --- two at once ---


def test_a_second_run_in_one_directory_is_refused_and_writes_nothing(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = copied(uninterrupted, tmp_path)
    with files.lock(out_dir / ".lock", str(out_dir)):
        before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
        line = refusal(capsys, data_dir, out_dir, "--resume")
        assert f"process {os.getpid()}" in line and str(out_dir) in line
        assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_a_run_that_another_process_has_overtaken_is_refused(uninterrupted, tmp_path):
    config = load(train.TrainConfig, [f"--out_dir={copied(uninterrupted, tmp_path)}"])
    with pytest.raises(UserError, match="another process"):
        runs.Run(config, {"step": 2}, True, 0.0, StopSignal())


def test_data_that_is_replaced_under_a_run_does_not_change_it(
    data_dir, uninterrupted, tmp_path, monkeypatch
):
    data, other = tmp_path / "data", tmp_path / "other.txt"
    shutil.copytree(data_dir, data)
    other.write_text("another text of other words. " * 300, encoding="utf-8")
    again = [other, f"--out={data}", "--vocab_size=270", "--overwrite"]
    after_step(2, lambda: run_stage(prepare.main, *again), monkeypatch)
    run_train(data, tmp_path / "out")
    assert load_dataset(data).vocab_size != load_dataset(data_dir).vocab_size
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))
    for checkpoint in checkpoints(tmp_path / "out"):
        read = (checkpoint / "tokenizer.json").read_bytes()
        assert read == (data_dir / "tokenizer.json").read_bytes()
        assert read_state(checkpoint)["data"] == load_dataset(data_dir).sha256


# --- damage ---


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_flipped_byte_of_the_data_is_refused(data_dir, tmp_path, capsys, split):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    verify_dataset(load_dataset(data))
    path = data / f"{split}.bin"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    assert f"{path} is damaged" in refusal(capsys, data, tmp_path / "out")


def test_data_is_compared_with_its_checksums_once_for_each_state_of_its_files(
    data_dir, tmp_path, monkeypatch, capsys
):
    data = tmp_path / "data"
    shutil.copytree(data_dir, data)
    verify_dataset(load_dataset(data))
    read = []
    digest = files.hashlib.file_digest
    monkeypatch.setattr("hashlib.file_digest", lambda *a: read.append(a) or digest(*a))
    verify_dataset(load_dataset(data))
    assert not read
    run_train(data, tmp_path / "out", "--verify")
    assert len(read) == 2
    assert "no checkpoint are what was written" in capsys.readouterr().out


def test_a_flipped_byte_of_any_file_of_a_checkpoint_is_refused(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = copied(uninterrupted, tmp_path)
    run_train(data_dir, out_dir, "--verify")
    names = json.loads((out_dir / "step_000004" / MANIFEST).read_text())
    assert {"model.safetensors", "train_state/optimizer.safetensors"} < set(names)
    for name in names:
        path = out_dir / "step_000004" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        for flag in ("--resume", "--verify"):
            line = refusal(capsys, data_dir, out_dir, flag)
            assert str(path) in line or str(path.parent) in line
        path.write_bytes(whole)
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_weights_that_are_nan_are_named(data_dir, uninterrupted, tmp_path, capsys):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"][3] = math.nan
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    line = refusal(capsys, data_dir, tmp_path / "out", f"--init_from={checkpoint}")
    assert "model.norm.weight" in line and str(checkpoint) in line
    with pytest.raises(UserError, match=r"model\.norm\.weight"):
        run_stage(sample.main, f"--ckpt={checkpoint}", "--prompt=a", "--device=cpu")


OLD_STATE = "train_state/optimizer.safetensors"


@pytest.mark.parametrize("damage", ["gone", "nan", "shape", "step"])
def test_a_damaged_moment_is_named_where_there_are_no_checksums(
    data_dir, uninterrupted, tmp_path, capsys, damage
):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    (checkpoint / MANIFEST).unlink()
    tensors = load_file(checkpoint / OLD_STATE)
    key = next(key for key in tensors if key.endswith("norm.weight/exp_avg"))
    if damage == "gone":
        del tensors[key]
    elif damage == "step":
        del tensors[key.replace("exp_avg", "step")]
    else:
        tensors[key] = torch.full((32,), math.nan) if damage == "nan" else torch.zeros(31)
    save_file(tensors, checkpoint / OLD_STATE)
    line = refusal(capsys, data_dir, checkpoint.parent, "--resume")
    assert "damaged" in line and key.rpartition("/")[0] in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step", "4"),
        ("step", -4),
        ("step", 5),
        ("seconds", None),
        ("seconds", 10**400),
        ("config", []),
        ("data", 1),
        ("config", {"lr": "x"}),
    ],
)
def test_a_changed_state_is_refused(data_dir, uninterrupted, tmp_path, capsys, key, value):
    path = copied(uninterrupted, tmp_path) / "step_000004/train_state/state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    line = refusal(capsys, data_dir, tmp_path / "copied", "--resume")
    assert "state.json is damaged" in line


def test_records_that_are_none_are_left_out_and_other_names_are_no_checkpoints(
    data_dir, uninterrupted, tmp_path
):
    out_dir = copied(uninterrupted, tmp_path)
    odd = ["[]", "7", "null", '{"loss": 1}', '{"step": "4"}', '{"step": 4, "val_loss": "x"}', "{"]
    odd += ["[" * 100_000, '{"step": 4, "lr": null}', '{"step": true}']
    with open(out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write("\n".join(odd) + "\n")
    for name in ("step_²", "step_", "step_x", "step_-1", "step_٣"):
        (out_dir / name).mkdir()
        (out_dir / name / "config.json").write_text("{}")
    os.symlink(uninterrupted / "step_000008", out_dir / "step_000001")
    run_train(data_dir, out_dir, "--resume", "--keep_last=1")
    assert same(final_weights(out_dir), final_weights(uninterrupted))
    assert (uninterrupted / "step_000008/config.json").is_file()


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--lr=nan"], ["--lr", "a number", "nan"]),
        (["--lr=inf"], ["--lr", "a number", "inf"]),
        (["--weight_decay=nan"], ["--weight_decay", "nan"]),
        (["--norm_eps=nan"], ["--norm_eps", "nan"]),
        (["--beta2=1"], ["beta2=1.0", "below 1"]),
        (["--beta1=-0.1"], ["beta1=-0.1", "at least 0"]),
        ([f"--seed={2**70}"], ["seed=", "at most"]),
        (["--seed=-1"], ["seed=-1", "at least 0"]),
        (["--n_layers=1000000000"], ["parameters needs", "GB"]),
        (["--n_embd=100000000"], ["parameters needs", "GB"]),
        (["--hidden_dim=1000000000", "--n_embd=1000000000"], ["parameters needs", "GB"]),
        (["--vocab_size=1000000000000"], ["vocab_size=1000000000000", "1e9"]),
        (["--batch_size=100000000", "--tokens_per_step=1600000000"], ["batch_size", "GB"]),
        (["--tokens_per_step=4611686018427387904"], ["tokens_per_step", "GB"]),
        (["--rope_theta=0"], ["rope_theta=0"]),
        (["--grad_clip=-1"], ["grad_clip=-1"]),
        (["--n_heads=0"], ["n_heads=0", "more than 0"]),
    ],
)
def test_settings_that_cannot_be_are_refused_with_what_they_may_be(
    data_dir, tmp_path, capsys, flags, parts
):
    line = refusal(capsys, data_dir, tmp_path / "out", *flags)
    assert all(part in line for part in parts), line
    assert not (tmp_path / "out").exists()


# --- what is not finite ---


def test_a_validation_loss_that_is_nan_stops_at_once_and_keeps_the_checkpoint_before(
    data_dir, tmp_path, capsys, monkeypatch
):
    evaluate = train.evaluate
    values = iter([1.0, math.nan])
    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) | {"val_loss": next(values)})
    line = refusal(capsys, data_dir, tmp_path / "out", "--eval_interval=4", "--keep_last=1")
    assert "not finite at step 8: validation loss nan" in line
    assert f"last good checkpoint: {tmp_path / 'out/step_000004'}" in line
    assert (tmp_path / "out/step_000004/model.safetensors").is_file()


def test_weights_that_became_nan_are_not_saved(data_dir, tmp_path, capsys, monkeypatch):
    take_step = train.take_step

    def step(number, model, *more):
        result = take_step(number, model, *more)
        if number == 7:
            model.norm.weight.data[0] = math.nan
        return result

    monkeypatch.setattr(train, "take_step", step)
    line = refusal(capsys, data_dir, tmp_path / "out")
    assert "norm.weight" in line and "step_000004" in line
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step_000004"]


def test_a_run_that_diverged_is_warned_of_with_a_perplexity_that_can_be_read(
    data_dir, tmp_path, capsys
):
    run_train(data_dir, tmp_path / "out", "--lr=30", "--max_steps=4", "--grad_clip=0")
    printed = capsys.readouterr().out
    assert f"warning: worse than chance, {math.log(257):.2f}" in printed
    assert "perplexity > 1e9" in printed


# --- full disks and closed streams ---


@pytest.mark.parametrize("how", ["no space", "file size limit"])
def test_a_disk_that_is_full_while_saving_is_one_line_and_the_run_goes_on_bit_identically(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch, how
):
    out_dir = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    usage = namedtuple("usage", "total used free")(10, 10, 0)

    def fill():
        if how == "no space":
            monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))

    after_step(8, fill, monkeypatch)
    try:
        line = refusal(capsys, data_dir, out_dir)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        monkeypatch.undo()
    assert "step_000008 cannot be written" in line and "it takes 0.4 MB" in line
    assert f"last checkpoint: {out_dir / 'step_000004'}" in line and "--resume" in line
    assert not list(out_dir.glob(".tmp-*"))
    gc.collect()  # which lets go of the lock, as the end of a process does
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_steps_go_on_while_a_checkpoint_is_flushed_and_the_next_one_waits(
    data_dir, uninterrupted, tmp_path, monkeypatch
):
    slow, seal, seen = threading.Event(), runs.seal, {}

    def sealed(scratch, final):
        assert slow.wait(60)
        seal(scratch, final)

    def look(step, found):
        seen[step] = [path.name for path in checkpoints(tmp_path / "out")]
        if found:
            slow.set()

    monkeypatch.setattr(runs, "seal", sealed)
    for step in (5, 7, 9):
        after_step(step, partial(look, step, step == 7), monkeypatch)
    run_train(data_dir, tmp_path / "out", "--keep_last=1", "--eval_interval=4")
    assert seen[5] == seen[7] == [] and seen[9]
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))
    losses = val_losses(tmp_path / "out")
    best = min(losses, key=lambda step: (losses[step], -step))
    kept = {path.name for path in checkpoints(tmp_path / "out")}
    assert kept == {"step_000012", f"step_{best:06d}"}


def test_a_checkpoint_that_cannot_be_flushed_ends_the_run_with_one_line(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    out_dir = tmp_path / "out"

    def full(*any):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    after_step(6, lambda: monkeypatch.setattr(files, "flush", full), monkeypatch)
    line = refusal(capsys, data_dir, out_dir)
    monkeypatch.undo()
    assert "step_000008 cannot be written" in line and "Input/output error" in line
    assert f"last checkpoint: {out_dir / 'step_000004'}" in line
    assert not list(out_dir.glob(".tmp-*"))
    gc.collect()
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_a_kill_while_a_checkpoint_is_flushed_leaves_the_one_before(
    data_dir, uninterrupted, tmp_path
):
    script = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "import train\nfrom plainllama import runs\nseal = runs.seal\n"
        "def slow(scratch, final):\n"
        "    if final.name == 'step_000008':\n"
        "        print('flushing', flush=True); time.sleep(60)\n"
        "    seal(scratch, final)\n"
        "runs.seal = slow\ntrain.run_main(train.main)\n"
    )
    (tmp_path / "slow.py").write_text(script, encoding="utf-8")
    out_dir = tmp_path / "out"
    with subprocess.Popen(
        command(data_dir, out_dir, script=tmp_path / "slow.py"), stdout=subprocess.PIPE, text=True
    ) as process:
        assert any("flushing" in line for line in process.stdout)
        process.kill()
    assert [path.name for path in checkpoints(out_dir)] == ["step_000004"]
    assert list(out_dir.glob(".tmp-*"))
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))
    assert not list(out_dir.glob(".tmp-*"))


def test_a_full_disk_under_the_metrics_saves_and_ends_the_run(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    metrics = tmp_path / "out/metrics.jsonl"

    def fill():
        metrics.unlink()
        metrics.symlink_to("/dev/full")

    after_step(6, fill, monkeypatch)
    line = refusal(capsys, data_dir, tmp_path / "out")
    monkeypatch.undo()
    assert "metrics.jsonl cannot be written (No space left on device)" in line
    assert "saved" in line and "step_000007" in line and "--resume" in line
    gc.collect()
    run_train(data_dir, tmp_path / "out", "--resume")
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))


def test_a_closed_stdout_saves_and_ends_the_run(data_dir, uninterrupted, tmp_path):
    out_dir = tmp_path / "out"
    process = subprocess.Popen(
        command(data_dir, out_dir, "--max_steps=100000", "--decay_fraction=0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if re.match(" *step +3/", line):
            break
    process.stdout.close()
    errors = process.stderr.read().strip().splitlines()
    assert process.wait() == 0
    assert len(errors) == 1 and errors[0].startswith("stopping after this step")
    state = read_state(checkpoints(out_dir)[-1])
    assert 3 < state["step"] < 100_000


@pytest.mark.parametrize("closed", ["0", "1", "2"])
def test_a_stream_that_is_closed_before_the_start_is_no_error(uninterrupted, closed):
    ckpt = f"--ckpt={uninterrupted}"
    words = [sys.executable, sample.__file__, ckpt, "--prompt=the cat", "--max_new_tokens=4"]
    close = f'exec "$@" {closed}>&-' if closed != "0" else 'exec "$@" <&-'
    done = subprocess.run(["sh", "-c", close, "sh", *words], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout.startswith("the cat") or closed == "1"


def test_a_full_disk_under_stdout_is_one_line(uninterrupted):
    ckpt = f"--ckpt={uninterrupted}"
    words = [sys.executable, sample.__file__, ckpt, "--prompt=the cat", "--max_new_tokens=4"]
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: [Errno 28] No space left on device"


# --- signals ---


def test_ctrl_c_is_answered_at_once_and_a_second_one_quits(data_dir, tmp_path):
    one_long_step = ["--tokens_per_step=6400000", "--max_steps=1"]
    process = subprocess.Popen(
        command(data_dir, tmp_path / "out", *one_long_step),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:
        if line.startswith("machine"):
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = [process.stderr.readline() for _ in range(2)][1]
    assert said == (
        "stopping after this step, then saving; Ctrl-C again quits now, last checkpoint: none\n"
    )
    process.send_signal(signal.SIGINT)
    assert "quit without saving; last checkpoint: none" in process.communicate()[1]
    assert process.returncode == 130


def listened(monkeypatch, capfd, numbers: list[int], environment: dict[str, str]) -> str:
    """What is said of signals, none of which may end this process."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    with StopSignal() as stop:
        stop.listen(lambda: "out/step_000004")
        stop.stepping = True
        for number in numbers:
            signal.raise_signal(number)
            time.sleep(0.1)
        assert stop.came
    return capfd.readouterr().err


def test_under_torchrun_which_repeats_signals_a_second_one_does_not_quit(monkeypatch, capfd):
    numbers = [signal.SIGINT, signal.SIGINT, signal.SIGTERM]
    said = listened(monkeypatch, capfd, numbers, {"LOCAL_WORLD_SIZE": "2"})
    assert said.count("stopping after this step") == 1 and "torchrun itself ends" in said


def test_a_hang_up_stops_a_run_but_not_under_nohup(monkeypatch, capfd):
    assert "out/step_000004" in listened(monkeypatch, capfd, [signal.SIGHUP], {})
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            stop.listen(lambda: "")
            stop.stepping = True
            signal.raise_signal(signal.SIGHUP)
            time.sleep(0.1)
            assert not stop.came
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_compiling_ends_at_once_with_one_line(data_dir, tmp_path):
    process = subprocess.Popen(
        command(data_dir, tmp_path / "out", "--compile"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    for line in process.stdout:
        if line.startswith("compiling"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert errors == "\nstopped before the first step, with nothing to save\n"
    assert process.returncode == 130


def test_ctrl_c_before_a_run_is_set_up_is_one_line(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit):
        run_main(main)
    assert capsys.readouterr().err == "stopped by Ctrl-C\n"


# --- terminals ---


def in_terminal(columns: int, *words: object, **environment: str) -> tuple[int, str]:
    """Run a stage on a terminal of so many columns; return the exit code and all that it shows."""
    pty = pytest.importorskip("pty")
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        **dict.fromkeys(("stdin", "stdout", "stderr"), end),
    )
    os.close(end)
    shown = b""
    with suppress(OSError):  # Linux ends the output of a terminal that nobody has open with an EIO
        while part := os.read(terminal, 65536):
            shown += part
    os.close(terminal)
    return process.wait(), shown.decode()


@pytest.mark.parametrize("columns", [80, 110])
def test_no_line_of_a_run_or_of_a_sample_wraps_on_a_terminal(data_dir, tmp_path, columns):
    out_dir = tmp_path / "out"
    many = ["--max_steps=600000", "--eval_interval=2", "--checkpoint_interval=0"]
    stop = tmp_path / "stop.py"
    stop.write_text(
        "import os, signal, sys, train\n"
        "from plainllama import runs\n"
        "log = runs.Run.log_training\n"
        "def log_then_stop(self, step, loss, norm, lr):\n"
        "    log(self, step, 10 + loss, 100 + norm, lr)\n"
        "    self.stop.came = step == 4\n"
        "runs.Run.log_training = log_then_stop\n"
        "train.main()\n"
    )
    words = command(data_dir, out_dir, *many, script=stop)[1:]
    code, shown = in_terminal(columns, *words, PYTHONPATH=str(Path(train.__file__).parent))
    assert code == 0, shown
    settings = re.compile(r"to go on: |next: |data  |run  |best checkpoint")  # which have paths
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown)):
        assert len(line) <= columns or settings.search(line), line
    code, shown = in_terminal(columns, train.__file__, "--lr=abc")
    assert (code, shown) == (2, "error: --lr takes a number, not 'abc'\r\n")


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_console_that_lacks_characters_does_not_end_a_run(data_dir, tmp_path, encoding):
    words = command(data_dir, tmp_path / "out", "--max_steps=2", "--sample_interval=1")
    environment = os.environ | {"PYTHONIOENCODING": encoding, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    assert checkpoints(tmp_path / "out")[-1].name == "step_000002"


def test_a_lost_config_and_a_name_of_another_project_are_refused(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = copied(uninterrupted, tmp_path)
    (out_dir / "step_000004/config.json").unlink()
    for flags in ((), ("--resume",), ("--verify",)):
        line = refusal(capsys, data_dir, out_dir, *flags)
        assert f"{out_dir / 'step_000004'} is damaged: it has no config.json" in line
    line = refusal(capsys, data_dir, tmp_path / "new", "--init_from=resume")
    assert "--resume" in line
