"""What befalls a run: signals, full disks, closed streams, damaged files, and two at once."""

import errno
import fcntl
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
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import torch
from helpers import limited, refused, run_stage, told
from safetensors.torch import load_file, save_file
from several import SCRIPT, SMALL, finish
from training import OPTIMIZER, begin, final_weights, refusal, run_train, same

import export
import prepare
import runs
import sample
import train
import visualize
from plainllama import tensors
from plainllama.checkpoint import MANIFEST, checkpoints, read_state
from plainllama.data import load_dataset, lock
from plainllama.huggingface import load_model
from plainllama.metrics import read_metrics
from plainllama.run import Run
from plainllama.settings import read_json, sha256, write_json
from plainllama.terminal import StopSignal


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


class Killed(BaseException):
    """Ends a run where it is, as a kill does."""


def kill() -> None:
    raise Killed


def killed_at(number: int, data_dir: Path, out_dir: Path, *more: str) -> None:
    """Begin a run that is killed at a step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        after_step(number, kill, patch)
        run_train(data_dir, out_dir, *more)


def readers(checkpoint: Path, data_dir: Path, out_dir: Path) -> list[tuple]:
    """Calls of all stages that read weights, on a checkpoint."""
    from_there = [*SMALL, f"--data_dir={data_dir}", f"--init_from={checkpoint}"]
    return [
        (sample.main, f"--ckpt={checkpoint}", "--prompt=a", "--device=cpu", "--max_new_tokens=2"),
        (export.main, f"--ckpt={checkpoint}", f"--out={out_dir}.gguf"),
        (visualize.main, f"--ckpt={checkpoint}", f"--out={out_dir}.html"),
        (train.main, *from_there, f"--out_dir={out_dir}", "--max_steps=1"),
        (train.main, *from_there, "--eval_only"),
    ]


def flip(path: Path) -> bytes:
    """Flip a bit near the end of a file; return what it held."""
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    return whole


def reseal(checkpoint: Path) -> None:
    """Make checksums fit again what was changed, as a stranger could."""
    names = read_json(checkpoint / MANIFEST)
    write_json(checkpoint / MANIFEST, {name: sha256(checkpoint / name) for name in names})


# --- another run, another model ---


def test_a_run_killed_before_its_first_checkpoint_begins_again_with_its_own_settings(
    data_dir, uninterrupted, tmp_path, capsys
):
    killed_at(3, data_dir, tmp_path / "killed")
    (tmp_path / "killed").rename(tmp_path / "out")
    run_stage(train.main, f"--out_dir={tmp_path / 'out'}", "--resume")
    assert "has no checkpoint yet: its run begins again" in capsys.readouterr().out
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))
    began, again = (read_json(path / "settings.json") for path in (uninterrupted, tmp_path / "out"))
    assert {key for key in began if began[key] != again[key]} == {"keep_last", "out_dir"}


def test_a_fine_tuning_killed_before_its_first_checkpoint_begins_with_its_weights_again(
    data_dir, uninterrupted, tmp_path
):
    source = uninterrupted / "step_000012"
    killed_at(3, data_dir, tmp_path / "out", f"--init_from={source}", "--max_seq_len=8")
    run_stage(train.main, f"--out_dir={tmp_path / 'out'}", "--resume")
    run_train(data_dir, tmp_path / "whole", f"--init_from={uninterrupted}", "--max_seq_len=8")
    assert same(final_weights(tmp_path / "out"), final_weights(tmp_path / "whole"))


def test_flags_change_a_run_killed_before_its_first_checkpoint_as_they_do_any_other(
    data_dir, tmp_path
):
    killed_at(3, data_dir, tmp_path / "out", "--epochs=900")
    run_stage(train.main, f"--out_dir={tmp_path / 'out'}", "--resume", "--max_steps=5")
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step_000004", "step_000005"]


def test_no_snapshot_of_a_run_that_was_there_before_stays(data_dir, uninterrupted, tmp_path):
    out_dir = tmp_path / "out"
    killed_at(2, data_dir, out_dir, "--snapshots=3", "--n_embd=48", "--seed=1")
    assert read_json(out_dir / "snapshots/step_000001/config.json")["hidden_size"] == 48
    run_train(data_dir, out_dir, "--snapshots=3")  # another, in its place
    taken = sorted(out_dir.glob("snapshots/step_*"))
    assert [path.name for path in taken] == ["step_000000", "step_000001", "step_000012"]
    assert {read_json(path / "config.json")["hidden_size"] for path in taken} == {32}
    shutil.rmtree(out_dir / "step_000012")
    run_train(data_dir, out_dir, "--resume", "--lr=1e-3")
    assert same(load_file(taken[2] / "model.safetensors"), final_weights(out_dir))
    assert not same(final_weights(out_dir), final_weights(uninterrupted))


def test_resuming_where_nothing_is_is_refused_unless_torchrun_may_restart(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    line = refusal(capsys, data_dir, tmp_path / "rum", "--resume")
    assert f"holds no run to resume; did you mean {tmp_path / 'run'}?" in line
    assert not (tmp_path / "rum").exists()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")  # with the same command line
    run_train(data_dir, tmp_path / "rum", "--resume")
    assert same(final_weights(tmp_path / "rum"), final_weights(uninterrupted))
    write_json(tmp_path / "run/settings.json", {"lr": 1})
    for path in checkpoints(tmp_path / "run"):
        shutil.rmtree(path)
    line = refusal(capsys, data_dir, tmp_path / "run", "--resume")
    assert "of another version" in line and "train anew" in line


def test_shorter_windows_leave_a_rotary_models_context_as_it_was(data_dir, uninterrupted, tmp_path):
    import gguf
    from transformers import AutoModelForCausalLM

    more = [f"--init_from={uninterrupted / 'step_000012'}", "--max_seq_len=8"]
    run_train(data_dir, tmp_path / "whole", *more)
    killed_at(6, data_dir, tmp_path / "out", *more)
    run_train(data_dir, tmp_path / "out", "--resume", "--max_seq_len=8")
    assert same(final_weights(tmp_path / "out"), final_weights(tmp_path / "whole"))
    trained = [record["tokens"] for record in read_metrics(tmp_path / "out") if "loss" in record]
    assert trained[-1] == 12 * 64
    checkpoint = checkpoints(tmp_path / "out")[-1]
    assert read_state(checkpoint)["config"]["max_seq_len"] == 8
    tokens = torch.arange(16)[None]
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        assert (load_model(checkpoint)(tokens)[0] - theirs(tokens).logits).abs().max() <= 1e-5
    assert theirs.config.max_position_embeddings == 16
    run_stage(export.main, f"--ckpt={checkpoint}", f"--out={tmp_path / 'a.gguf'}")
    field = gguf.GGUFReader(tmp_path / "a.gguf").fields["llama.context_length"]
    assert field.contents() == 16


def test_weights_with_a_flipped_bit_are_refused_by_every_stage_where_checksums_are_there(
    data_dir, uninterrupted, tmp_path, capsys
):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    path = checkpoint / "model.safetensors"
    flip(path)
    calls = readers(checkpoint, data_dir, tmp_path / "out")
    calls.append((visualize.main, f"--ckpt={uninterrupted}", f"--compare={checkpoint.parent}"))
    for call in calls:
        assert f"{path} is damaged: it is not what was written" in told(capsys, *call)[-1]
    shutil.rmtree(checkpoint / "train_state")
    run_stage(*calls[0])  # where they are not, nobody can tell


def test_an_adapter_beside_weights_is_never_ignored(data_dir, uninterrupted, tmp_path, capsys):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    write_json(checkpoint / "adapter_config.json", {"peft_type": "LORA"})
    for call in readers(checkpoint, data_dir, tmp_path / "out"):
        assert "adapter_config.json: lora_alpha=None is no number" in told(capsys, *call)[-1]


def test_an_evaluation_that_is_not_a_number_ends_with_an_error(
    data_dir, uninterrupted, tmp_path, capsys
):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)  # finite, but logits are not
    weights["model.embed_tokens.weight"] *= 1e3
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    reseal(checkpoint)
    line = told(capsys, *readers(checkpoint, data_dir, tmp_path / "out")[-1])[-1]
    assert "validation loss nan" in line and str(checkpoint) in line


# --- two at once ---


def test_a_second_run_in_one_directory_is_refused_and_writes_nothing(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = copied(uninterrupted, tmp_path)
    (out_dir / "step_000002").mkdir()  # half there, as when the first is about to delete it
    with lock(out_dir / ".lock", str(out_dir)):
        before = {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
        for flags in ((), ("--resume",)):
            line = refusal(capsys, data_dir, out_dir, *flags)
            assert "another process is writing" in line and str(out_dir) in line
        assert before == {path: path.stat().st_mtime_ns for path in out_dir.rglob("*")}
    (out_dir / "step_000002").rmdir()
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
    names = read_json(out_dir / "step_000004" / MANIFEST)
    assert {"model.safetensors", OPTIMIZER} < set(names)
    for name in [*names, MANIFEST]:
        path = out_dir / "step_000004" / name
        whole = flip(path)
        line = refusal(capsys, data_dir, out_dir, "--resume")
        assert str(path.parent) in line
        path.write_bytes(whole)
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_a_changed_state_is_refused(data_dir, uninterrupted, tmp_path, capsys):
    path = copied(uninterrupted, tmp_path) / "step_000004/train_state/state.json"
    state = read_json(path)
    odd = [("step", "4"), ("step", -4), ("step", 5), ("seconds", None), ("seconds", 10**400)]
    for key, value in [*odd, ("config", []), ("data", 1), ("config", {"lr": "x"})]:
        path.write_text(json.dumps(state | {key: value}))
        line = refusal(capsys, data_dir, tmp_path / "copied", "--resume")
        assert "state.json is damaged" in line, (key, value)
        assert f"delete {path.parents[1]} to go on" in line or "--init_from" in line


def test_a_checkpoint_of_an_older_version_is_refused_with_what_to_do(
    data_dir, uninterrupted, tmp_path, capsys
):
    checkpoint = copied(uninterrupted, tmp_path) / "step_000004"
    state = read_json(checkpoint / "train_state/state.json")
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
    assert f"warning: no better than chance, {math.log(257):.2f}" in printed
    assert "perplexity > 1e9" in printed


# --- full disks and closed streams ---


@pytest.mark.parametrize("how", ["not written", "not flushed"])
def test_a_disk_that_is_full_while_saving_is_one_line_and_the_run_goes_on_bit_identically(
    data_dir, uninterrupted, tmp_path, capsys, how
):
    out_dir = tmp_path / "out"

    def not_flushed(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with ExitStack() as full, pytest.MonkeyPatch.context() as patch:

        def fill():
            if how == "not written":
                full.enter_context(limited(resource.RLIMIT_FSIZE, 50_000))
            else:
                patch.setattr(os, "fsync", not_flushed)

        after_step(7, fill, patch)
        line = refusal(capsys, data_dir, out_dir)
    assert "step_000008 cannot be written" in line
    assert f"last checkpoint: {out_dir / 'step_000004'}" in line and "--resume" in line
    assert not list(out_dir.glob(".tmp-*"))
    run_train(data_dir, out_dir, "--resume")
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_a_full_disk_under_the_metrics_is_a_warning_and_the_run_goes_on(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    metrics = tmp_path / "out/metrics.jsonl"

    def fill():
        full = os.open("/dev/full", os.O_WRONLY)
        monkeypatch.setattr("plainllama.metrics.open_no_link", lambda *opened: os.dup(full))

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


REFUSED = {  # what disks and systems of files refuse
    "not empty": (shutil, "rmtree", errno.ENOTEMPTY),  # NFS, of files that are still open
    "not renamed": (Path, "rename", errno.EACCES),  # another user's
}


@pytest.mark.parametrize(("owner", "name", "number"), REFUSED.values(), ids=REFUSED)
def test_old_checkpoints_that_cannot_be_deleted_are_warnings(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch, owner, name, number
):
    call = getattr(owner, name)

    def refuse(path, *more, **options):
        if ".tmp-" in f"{path} {more}" and "step_000012" not in f"{path}" and not options:
            raise OSError(number, os.strerror(number), str(path))
        return call(path, *more, **options)

    def from_now_on():
        monkeypatch.setattr(owner, name, refuse)

    after_step(9, from_now_on, monkeypatch)
    run_train(data_dir, tmp_path / "out", "--keep_last=1")
    monkeypatch.undo()
    errors = capsys.readouterr().err
    assert f"step_000008 cannot be deleted: {os.strerror(number)}" in errors
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))
    run_train(data_dir, tmp_path / "out", "--keep_last=1", "--resume", "--max_steps=13")
    assert not list(tmp_path.glob("out/.tmp-*"))
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["step_000013"]


@pytest.mark.parametrize("what", ["model.safetensors", "tokenizer.json"])
def test_snapshots_that_cannot_be_written_are_warnings_and_leave_nothing(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch, what
):
    save_file, write_bytes = tensors.save_file, Path.write_bytes

    def refuse(call, path, *given, **options):
        if "out/snapshots" in str(path) and path.name == what:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*given, **options)

    monkeypatch.setattr(
        tensors,
        "save_file",
        lambda given, path, **options: refuse(save_file, path, given, path, **options),
    )
    monkeypatch.setattr(
        Path, "write_bytes", lambda path, data: refuse(write_bytes, path, path, data)
    )
    run_train(data_dir, tmp_path / "out", "--snapshots=3")
    warnings = capsys.readouterr().err.splitlines()
    names = [re.search(r"snapshots/(\w+) cannot be written: .*No space", w)[1] for w in warnings]
    assert names == ["step_000000", "step_000001", "step_000012"]
    assert not [*tmp_path.glob("out/snapshots/*")]
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))


def test_reports_that_cannot_be_read_back_delete_nothing(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "metrics.jsonl":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    run_train(data_dir, tmp_path / "out", "--keep_last=1")
    assert "no checkpoint of" in capsys.readouterr().err
    assert len(checkpoints(tmp_path / "out")) == 3  # the best may be any of them
    assert same(final_weights(tmp_path / "out"), final_weights(uninterrupted))


def test_a_run_whose_folder_is_renamed_saves_at_its_place_again(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir, more = tmp_path / "out", ["--eval_interval=4"]
    with pytest.MonkeyPatch.context() as patch:
        after_step(5, lambda: out_dir.rename(tmp_path / "moved"), patch)
        run_train(data_dir, out_dir, *more)
    assert "metrics.jsonl lacks step 5: No such file" in capsys.readouterr().err
    assert same(final_weights(out_dir), final_weights(uninterrupted))
    run_train(data_dir, tmp_path / "moved", "--resume", *more)
    assert same(final_weights(tmp_path / "moved"), final_weights(uninterrupted))


def test_reports_that_cannot_be_begun_are_warnings(
    data_dir, uninterrupted, tmp_path, capsys, monkeypatch
):
    out_dir = copied(uninterrupted, tmp_path)
    for name in ("settings.json", "metrics.jsonl"):
        (out_dir / name).unlink(missing_ok=True)
        (out_dir / name).mkdir()  # where no file can be
    run_train(data_dir, out_dir, "--resume")
    errors = capsys.readouterr().err
    assert "settings.json is left as it was: Is a directory" in errors
    assert "metrics.jsonl lacks step 12: Is a directory" in errors
    assert same(final_weights(out_dir), final_weights(uninterrupted))


def test_what_a_kill_in_the_last_prune_has_left_goes_at_the_next_start(
    data_dir, uninterrupted, tmp_path, capsys
):
    out_dir = tmp_path / "out"
    shutil.copytree(uninterrupted, out_dir)
    (out_dir / "step_000004").rename(out_dir / ".tmp-step_000004")
    run_train(data_dir, out_dir, "--resume")
    assert "is the end of the run" in capsys.readouterr().out
    assert not list(out_dir.glob(".tmp-*"))


# --- links, and what strangers write ---

PRECIOUS = ["settings.json", "metrics.jsonl", ".lock", ".tmp-settings.json", ".tmp-metrics.jsonl"]
FOLDERS = [".tmp-step_000008", ".tmp-step_000003", "snapshots/.tmp-step_000012", "step_000012"]


@pytest.mark.parametrize("name", PRECIOUS + FOLDERS)
def test_nothing_is_written_through_a_link_in_a_runs_directory(
    data_dir, uninterrupted, tmp_path, capsys, name
):
    out_dir, precious = copied(uninterrupted, tmp_path), tmp_path / "precious"
    target = precious / "mine" if name in FOLDERS else precious
    target.parent.mkdir(exist_ok=True)
    target.write_text("precious")
    (out_dir / name).parent.mkdir(exist_ok=True)
    (out_dir / name).unlink(missing_ok=True)
    (out_dir / name).symlink_to(precious)
    if name == "step_000012":  # a folder that is no checkpoint
        assert "is damaged: it has no config.json" in refusal(capsys, data_dir, out_dir, "--resume")
    else:
        run_train(data_dir, out_dir, "--resume", "--snapshots=3")
        assert same(final_weights(out_dir), final_weights(uninterrupted))
        assert not (out_dir / name).is_symlink()
    assert target.read_text() == "precious"
    assert len([*tmp_path.glob("precious/*")]) == (name in FOLDERS)


def test_a_folder_of_snapshots_that_is_a_link_is_refused(data_dir, uninterrupted, tmp_path, capsys):
    out_dir, precious = copied(uninterrupted, tmp_path), tmp_path / "precious"
    (precious / ".tmp-mine").mkdir(parents=True)
    (out_dir / "snapshots").symlink_to(precious)
    line = refusal(capsys, data_dir, out_dir, "--resume", "--snapshots=3")
    assert f"{out_dir / 'snapshots'} is a link" in line
    assert [path.name for path in precious.iterdir()] == [".tmp-mine"]
    run_train(data_dir, out_dir, "--eval_only")


def test_no_stage_writes_through_a_link(data_dir, uninterrupted, tmp_path, monkeypatch):
    shutil.copytree(uninterrupted, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "precious").write_text("precious")
    calls = {
        "run/page.html": (visualize.main, "--ckpt=run"),
        "run/.tmp-page.html": (visualize.main, "--ckpt=run"),
        "a.gguf": (export.main, "--ckpt=run", "--out=a.gguf", "--overwrite"),
        ".tmp-a.gguf": (export.main, "--ckpt=run", "--out=a.gguf", "--overwrite"),
        "curves.png": (runs.main, "run", "--plot=curves.png"),
        "run/.lock": (runs.main, "run"),
    }
    for name, call in calls.items():
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "precious")
        run_stage(*call)
        assert (tmp_path / "precious").read_text() == "precious", name


def test_what_a_stranger_writes_into_a_checkpoint_is_refused_in_a_line(
    data_dir, uninterrupted, tmp_path, capsys
):
    shutil.copytree(uninterrupted / "step_000004", tmp_path / "whole")
    checkpoint = tmp_path / "out/step_000004"

    def changed(name: str, key: str, value: object) -> None:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", checkpoint)
        content = read_json(checkpoint / name)
        place = content.get("config", content)
        place[key] = value
        write_json(checkpoint / name, content)
        reseal(checkpoint)

    changed("train_state/state.json", "device", "meta")
    line = refused(capsys, train.main, f"--out_dir={tmp_path / 'out'}", "--resume")
    assert "device=meta cannot be used" in line
    claims = {"num_hidden_layers": 10**5, "vocab_size": 10**8, "hidden_size": 10**6}
    for key, value in claims.items():
        changed("config.json", key, value)
        for call in readers(checkpoint, data_dir, tmp_path / "new"):
            line = told(capsys, *call)[-1]
            assert str(checkpoint) in line or "needs" in line and "GB" in line, line


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
        stop.listen(lambda: "none")
        stop.stepping = True
        for number in numbers:
            signal.raise_signal(number)
    for number, handler in before.items():
        signal.signal(number, handler)
    errors = capfd.readouterr().err
    assert stop.came == bool(said) and said in errors
    assert errors.count("stopping after this step") == bool(said)


@pytest.mark.skipif(not shutil.which("unshare") or os.geteuid() != 0, reason="needs its own pids")
def test_the_first_process_of_a_container_ends_on_term_while_it_imports(tmp_path):
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-X", "importtime"]
    train_py = str(Path(train.__file__))
    with subprocess.Popen([*command, train_py], cwd=tmp_path, stderr=subprocess.PIPE) as outside:
        for line in outside.stderr:
            if b"plainllama.startup" in line:  # the first of its imports; torch takes seconds
                break
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text()
        os.kill(int(children), signal.SIGTERM)
        outside.stderr.close()
        assert outside.wait(timeout=60) == 128 + signal.SIGTERM


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
def log_then_stop(self, step, parts, wholes, lr):
    parts = {name: 10 + part for name, part in parts.items()}
    log(self, step, parts, {name: 100 + whole for name, whole in wholes.items()}, lr)
    self.stop.came = step == 4
Run.log_training = log_then_stop
"""
    many = ["--max_steps=600000", "--eval_interval=2", "--checkpoint_interval=0"]
    terminal = Terminal(data_dir, tmp_path / "out", *many, script=stopping + SCRIPT)
    assert terminal.finish() == 0, terminal.shown
    paths = re.compile(r"to go on: |next: |data  |run  |best checkpoint|--max_steps=")  # any length
    for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", terminal.shown)):
        assert len(line) <= 80 or paths.search(line), line


def test_a_lost_config_is_refused(data_dir, uninterrupted, tmp_path, capsys):
    out_dir = copied(uninterrupted, tmp_path)
    (out_dir / "step_000004/config.json").unlink()
    for flags in ((), ("--resume",), ("--eval_only",)):
        line = refusal(capsys, data_dir, out_dir, *flags)
        assert f"{out_dir / 'step_000004'} is damaged: it has no config.json" in line
