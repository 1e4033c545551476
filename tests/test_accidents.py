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
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from several import SCRIPT, finish
from test_train import (
    begin,
    data_dir,  # noqa: F401 (a fixture)
    final_weights,
    refusal,
    run_stage,
    run_train,
    same,
    uninterrupted,  # noqa: F401 (a fixture)
)

import prepare
import train
from plainllama import checkpoint as checkpoint_module
from plainllama.checkpoint import MANIFEST, checkpoints, read_state
from plainllama.data import load_dataset, lock
from plainllama.run import Run, StopSignal
from plainllama.settings import sha256, write_json

STATE = "train_state/optimizer.safetensors"


def copied(run_dir: Path, tmp_path: Path, step: int = 4) -> Path:
    """A run that has come to `step`."""
    out_dir = tmp_path / "copied"
    name = f"step_{step:06d}"
    shutil.copytree(run_dir / name, out_dir / name)
    shutil.copy(run_dir / "metrics.jsonl", out_dir)
    return out_dir


def after_step(number: int, act, monkeypatch) -> None:
    """Call `act` when a step of a run was taken and before anything is said about it."""
    log_training = Run.log_training

    def log(self, step, *more):
        if step == number:
            act()
        log_training(self, step, *more)

    monkeypatch.setattr(Run, "log_training", log)


# --- two at once ---


def test_a_second_run_in_one_directory_is_refused_and_writes_nothing(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = copied(uninterrupted, tmp_path)
    with lock(out_dir / ".lock", str(out_dir)):
        before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
        line = refusal(capsys, data_dir, out_dir, "--resume")
        assert "another process is writing" in line and str(out_dir) in line
        assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_a_run_that_another_process_has_overtaken_is_refused(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    out_dir, build_model = copied(uninterrupted, tmp_path), train.build_model

    def overtaken(*given):
        shutil.copytree(uninterrupted / "step_000008", out_dir / "step_000008")
        return build_model(*given)

    monkeypatch.setattr(train, "build_model", overtaken)
    assert "another process has written to" in refusal(capsys, data_dir, out_dir, "--resume")


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


def test_a_flipped_byte_of_any_file_of_a_checkpoint_is_refused(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = copied(uninterrupted, tmp_path)
    names = json.loads((out_dir / "step_000004" / MANIFEST).read_text(encoding="utf-8"))
    assert {"model.safetensors", STATE} < set(names)
    for name in [*names, MANIFEST]:
        path = out_dir / "step_000004" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        line = refusal(capsys, data_dir, out_dir, "--resume")
        assert str(path.parent) in line
        path.write_bytes(whole)
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


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


@pytest.mark.parametrize("how", ["cut", "lacking", "unknown"])
def test_an_optimizer_that_does_not_fit_its_model_is_refused(
    data_dir, uninterrupted, tmp_path, capsys, how
):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    name = "train_state/optimizer.safetensors"
    tensors = load_file(checkpoint / name)
    key = next(key for key in tensors if key.endswith("wq.weight/exp_avg"))
    tensor = tensors.pop(key)
    changed = {"cut": {key: tensor[:1]}, "lacking": {}, "unknown": {f"{key}x": tensor}}[how]
    save_file(tensors | changed, checkpoint / name)
    sums = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    write_json(checkpoint / MANIFEST, sums | {name: sha256(checkpoint / name)})
    line = refusal(capsys, data_dir, checkpoint.parent, "--resume")
    assert "attention.wq.weight does not fit its optimizer's" in line


def test_a_checkpoint_of_an_older_version_is_refused_with_what_to_do(
    data_dir, uninterrupted, tmp_path, capsys
):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    state = json.loads((checkpoint / "train_state/state.json").read_text(encoding="utf-8"))
    del state["config"]["chunked_loss"]
    write_json(checkpoint / "train_state/state.json", state)
    line = refusal(capsys, data_dir, checkpoint.parent, "--resume")
    assert "of another version" in line and f"--init_from={checkpoint}" in line
    run_train(data_dir, tmp_path / "out", f"--init_from={checkpoint}", "--max_steps=1")


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


@pytest.mark.parametrize("how", ["not written", "not flushed"])
def test_a_disk_that_is_full_while_saving_is_one_line_and_the_run_goes_on_bit_identically(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch, how
):
    out_dir = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def not_flushed(*any):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fill():
        if how == "not written":
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        else:
            monkeypatch.setattr(checkpoint_module, "flush", not_flushed)

    after_step(7, fill, monkeypatch)
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


def test_a_full_disk_under_the_metrics_is_a_warning_and_the_run_goes_on(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    metrics = tmp_path / "out/metrics.jsonl"

    def fill():
        metrics.unlink()
        metrics.symlink_to("/dev/full")

    after_step(11, fill, monkeypatch)
    run_train(data_dir, tmp_path / "out")
    warnings = [f"warning: {metrics} lacks step {n}: No space left on device" for n in (11, 12, 12)]
    assert capsys.readouterr().err.splitlines() == warnings
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))


def test_a_closed_stdout_saves_and_ends_the_run(data_dir, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    script = "import os, sys\nos.dup2(os.open(os.environ['PIPE'], os.O_WRONLY), 1)\n"
    script += "sys.stdout = open(1, 'w', closefd=False)\n" + SCRIPT
    endless = ["--max_steps=100000", "--decay_fraction=0"]
    worker = begin(data_dir, tmp_path / "out", *endless, script=script, PIPE=tmp_path / "pipe")
    with open(tmp_path / "pipe", encoding="utf-8") as pipe:
        assert any(line.startswith("step      3/") for line in pipe)
    ((code, _, errors),) = finish([worker])
    assert code == 0
    assert errors.count("\n") == 2 and errors.startswith("\nstopping after this step")
    assert 3 < read_state(checkpoints(tmp_path / "out")[-1])["step"] < 100_000


# --- signals and terminals ---


@pytest.mark.parametrize(
    ("environment", "ignored", "numbers", "said"),
    [
        # torchrun repeats signals, so that a second one does not quit.
        ({"LOCAL_WORLD_SIZE": "2"}, [], [signal.SIGINT] * 2, "torchrun itself ends"),
        # nohup ignores what a closed terminal sends.
        ({}, [signal.SIGHUP], [signal.SIGHUP, signal.SIGTERM], "Ctrl-C again quits now"),
        ({}, [signal.SIGHUP], [signal.SIGHUP], ""),
    ],
)
def test_signals_that_are_repeated_or_ignored_end_nothing(
    monkeypatch, capfd, environment, ignored, numbers, said
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    with StopSignal() as stop:
        stop.listen(Path("out"))
        stop.stepping = True
        for number in numbers:
            signal.raise_signal(number)
    for number, handler in before.items():
        signal.signal(number, handler)
    errors = capfd.readouterr().err
    assert stop.came == bool(said) and said in errors
    assert errors.count("stopping after this step") == bool(said)


IN_TERMINAL = """
import os, sys
os.setsid()
terminal = os.open(os.environ["TERMINAL"], os.O_RDWR)  # which Ctrl-C comes from
for number in range(3):
    os.dup2(terminal, number)
os.close(terminal)
sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
"""


class Terminal:
    """A run in the foreground of a terminal of its own, in which keys can be pressed."""

    def __init__(self, *given: object, script: str = SCRIPT, **environment: object) -> None:
        pty = pytest.importorskip("pty")
        self.shown = ""
        self.end, self.held = pty.openpty()
        fcntl.ioctl(self.held, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        environment["TERMINAL"] = os.ttyname(self.held)
        self.worker = begin(*given, script=IN_TERMINAL + script, **environment)

    def read(self, until: str = "") -> None:
        """Read what is shown, up to certain words, or to the end."""
        with suppress(OSError):  # which ends what a terminal shows that nobody has open
            while not until or until not in self.shown:
                self.shown += os.read(self.end, 65536).decode(errors="replace")
                if self.held:
                    os.close(self.held)
                    self.held = 0
        assert until in self.shown, self.shown

    def press_ctrl_c(self) -> None:
        os.write(self.end, b"\x03")

    def finish(self) -> int | None:
        """Return the exit code, minus the signal's number if one ended the process."""
        self.read()
        os.close(self.end)
        ((code, _, _),) = finish([self.worker])
        return code


def test_ctrl_c_in_a_terminal_is_answered_during_a_step_and_a_second_one_quits(data_dir, tmp_path):
    one_long_step = ["--tokens_per_step=6400000", "--max_steps=1"]
    terminal = Terminal(data_dir, tmp_path / "out", *one_long_step)
    terminal.read(until="machine  ")
    time.sleep(0.5)
    terminal.press_ctrl_c()
    terminal.read(until="stopping after this step, then saving; Ctrl-C again quits now")
    terminal.read(until="last checkpoint: none")
    terminal.press_ctrl_c()
    assert terminal.finish() == -signal.SIGINT  # which a shell shows as 130
    assert "Traceback" not in terminal.shown and not checkpoints(tmp_path / "out")


def test_ctrl_c_in_a_terminal_while_compiling_ends_at_once_with_one_line(data_dir, tmp_path):
    where = {"TORCHINDUCTOR_CACHE_DIR": tmp_path / "cache"}
    terminal = Terminal(data_dir, tmp_path / "out", "--compile", **where)
    terminal.read(until="torch.compile\r\n")
    time.sleep(0.5)
    terminal.press_ctrl_c()
    assert terminal.finish() == 130
    end = terminal.shown.partition("torch.compile\r\n")[2].replace("^C", "")
    assert end == "\r\nstopped before the first step, with nothing to save\r\n"


def test_no_line_of_a_run_wraps_on_a_terminal(data_dir, tmp_path):
    stopping = """
from plainllama.run import Run
log = Run.log_training
def log_then_stop(self, step, loss, norm, lr):
    log(self, step, 10 + loss, 100 + norm, lr)
    self.stop.came = step == 4
Run.log_training = log_then_stop
"""
    many = ["--max_steps=600000", "--eval_interval=2", "--checkpoint_interval=0"]
    terminal = Terminal(data_dir, tmp_path / "out", *many, script=stopping + SCRIPT)
    assert terminal.finish() == 0, terminal.shown
    paths = re.compile(r"to go on: |next: |data  |run  |best checkpoint")  # of any length
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", terminal.shown)):
        assert len(line) <= 80 or paths.search(line), line


def test_a_lost_config_is_refused(data_dir, uninterrupted, tmp_path, capsys):
    out_dir = copied(uninterrupted, tmp_path)
    (out_dir / "step_000004/config.json").unlink()
    for flags in ((), ("--resume",), ("--eval_only",)):
        line = refusal(capsys, data_dir, out_dir, *flags)
        assert f"{out_dir / 'step_000004'} is damaged: it has no config.json" in line
