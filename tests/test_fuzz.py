"""Files of a dataset, a checkpoint and a user, damaged at random: no stage ends with a traceback.

A file is cut, overwritten or, if it is JSON, given other values and names; then one stage reads it,
in a fork with limits of time and memory. The stage goes on, or ends with one line and exit code 2.
Damage to what has a checksum is noticed by --resume. The number of a case repeats it.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from several import SMALL

import export
import prepare
import runs
import sample
import train
import visualize
from plainllama.terminal import run_main

SECONDS, GIGABYTES = 30, 4  # that a stage may take beyond what this process has
RUN = [*SMALL, "--max_steps=4", "--checkpoint_interval=2", "--eval_interval=2", "--eval_tokens=64"]
RUN += ["--data_dir=data", "--out_dir=out"]
SAMPLE = ["--ckpt=out", "--device=cpu", "--max_new_tokens=4", "--seed=0"]
MORE = [*RUN, "--out_dir=more", "--max_steps=1"]
STAGES = {
    "resume": (train.main, [*RUN, "--resume", "--max_steps=5"]),
    "again": (train.main, ["--out_dir=out", "--resume"]),
    "evaluate": (train.main, [*RUN, "--eval_only"]),
    "runs": (runs.main, []),
    "train": (train.main, MORE),
    "init_from": (train.main, [*MORE, "--init_from=out/step_000004"]),
    "sample": (sample.main, [*SAMPLE, "--prompt=the cat"]),
    "batch": (sample.main, [*SAMPLE, "--prompt_file=prompts.jsonl", "--json"]),
    "lines": (sample.main, [*SAMPLE, "--prompt_file=prompts.txt"]),
    "export": (export.main, ["--ckpt=out", "--out=model.gguf"]),
    "page": (visualize.main, ["--ckpt=out", "--prompt=the cat"]),
    "text": (prepare.main, ["text.txt", "--out=new", "--vocab_size=300"]),
    "records": (prepare.main, ["records.jsonl", "--out=new", "--tokenizer=byte"]),
    "encode": (prepare.main, ["text.txt", "--out=new", "--tokenizer=data/tokenizer.json"]),
}
CHECKPOINT = ("resume", "evaluate", "init_from", "sample", "export", "page")
READERS = {  # the files that are damaged -> the stages that read them
    "data/meta.json": ("train", "resume"),
    "data/train.bin": ("train", "resume"),
    "data/val.bin": ("train", "resume", "evaluate"),
    "data/tokenizer.json": ("train", "resume", "encode"),
    "out/metrics.jsonl": ("resume", "page", "runs"),
    "out/step_000004/config.json": CHECKPOINT,
    "out/step_000004/generation_config.json": CHECKPOINT,
    "out/step_000004/tokenizer_config.json": ("resume", "init_from", "export"),
    "out/step_000004/tokenizer.json": CHECKPOINT,
    "out/step_000004/model.safetensors": CHECKPOINT,
    "out/step_000004/train_state/state.json": ("resume", "evaluate", "sample"),
    "out/step_000004/train_state/optimizer.safetensors": ("resume",),
    "out/step_000004/train_state/sha256.json": ("resume",),
    "prompts.jsonl": ("batch",),
    "prompts.txt": ("lines",),
    "text.txt": ("text",),
    "records.jsonl": ("records",),
}
OTHERS = {  # what may be there or not
    "data/.verified": ("train", "resume"),
    "out/.lock": ("resume", "runs"),
    "out/settings.json": ("again", "resume", "runs"),
    "out/step_000004/chat_template.jinja": ("resume", "init_from", "export"),
    "out/step_000004/special_tokens_map.json": ("resume", "init_from", "export"),
    "out/step_000004/model.safetensors.index.json": ("sample", "export"),
}
VALUES = [None, True, -1, 0, 1.5, 1e300, float("nan"), 10**9, 2**63, 10**400, "", "x", "\ud800"]
VALUES += ["../../etc/passwd", [], [1], ["x"], [[]], {}, {"x": 1}, [None]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """One of each file that is damaged, with which every stage works."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    folder.mkdir()
    words = "the cat sees a dog, and bites the man. "
    (folder / "text.txt").write_text(words * 300, encoding="utf-8")
    records = [json.dumps({"text": f"{words}{n}", "id": n}) for n in range(60)]
    (folder / "records.jsonl").write_text("\n".join(records) + "\n", encoding="utf-8")
    prompts = [json.dumps({"prompt": word, "id": 1}) for word in words.split()[:3]]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(words.split()[:3]), encoding="utf-8")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        # Not in forks, which thus need not import again what these stages import.
        for main, arguments in (
            (prepare.main, ["text.txt", "--out=data", "--vocab_size=300"]),
            (train.main, RUN),
            STAGES["sample"],
        ):
            patch.setattr(sys, "argv", ["stage.py", *arguments])
            main()
    for name in STAGES:
        copy = shutil.copytree(folder, folder.with_name("copy"))
        assert ended(copy, name)[0] == "accepted", name
        shutil.rmtree(copy)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="it forks and limits memory")
@pytest.mark.parametrize(
    "cases",
    [pytest.param(range(20)), pytest.param(range(20, 1400), marks=pytest.mark.slow)],
    ids=["20 cases", "1380 cases"],
)
def test_no_damaged_file_ends_in_a_traceback_or_goes_unnoticed(whole, cases):
    for case in cases:
        draw = random.Random(case)
        path = draw.choice(list(READERS))
        stage = draw.choice(READERS[path])
        copy = shutil.copytree(whole, whole.with_name("copy"))
        before = (copy / path).read_bytes()
        after = damaged(draw, path, before)
        (copy / path).unlink()
        if after is not None:
            (copy / path).write_bytes(after)
        end, printed = ended(copy, stage)
        shutil.rmtree(copy)
        assert end != "traceback", f"case {case}: {stage} reads {path}\n{printed[-3000:]}"
        has_checksum = path.startswith("out/step") or path.endswith(".bin")
        if stage == "resume" and has_checksum and after != before and "sha256" not in path:
            assert end == "refused", f"case {case}: {stage} does not notice damage to {path}"


@pytest.mark.skipif(sys.platform != "linux", reason="it forks and limits memory")
@pytest.mark.parametrize("most", [pytest.param(1), pytest.param(9, marks=pytest.mark.slow)])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_not_read(whole, most):
    for path, stages in (READERS | OTHERS).items():
        for stage in stages[:most] if "/" in path else ():  # others are named by the user
            copy = shutil.copytree(whole, whole.with_name("copy"))
            (copy / path).unlink(missing_ok=True)
            if "index" in path:  # which is read where there are several files of weights
                (copy / path).with_name("model.safetensors").unlink()
            if stage == "again":  # which is what a run without a checkpoint does
                for checkpoint in copy.glob("out/step_*"):
                    shutil.rmtree(checkpoint)
            if len(path) % 2:
                os.mkfifo(copy / path)
            else:
                (copy / path).symlink_to("/dev/zero")
            end, printed = ended(copy, stage)
            shutil.rmtree(copy)
            assert end != "traceback", f"{stage} reads {path}\n{printed[-3000:]}"


def damaged(draw: random.Random, path: str, data: bytes) -> bytes | None:
    """Return what a file holds after damage; None: it is gone."""
    if ".json" in path and draw.random() < 0.75:
        lines = data.decode().splitlines() if path.endswith(".jsonl") else [data.decode()]
        number = draw.randrange(len(lines))
        lines[number] = damaged_json(draw, lines[number])
        return ("\n".join(lines) + "\n").encode(errors="surrogatepass")
    if path.endswith(".safetensors") and draw.random() < 0.6:
        size = int.from_bytes(data[:8], "little")
        if draw.random() < 0.3:
            wrong = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
            return wrong.to_bytes(8, "little") + data[8:]
        header = damaged_json(draw, data[8 : 8 + size].decode()).encode(errors="surrogatepass")
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    place = draw.randrange(len(data))
    other = draw.randbytes(draw.randint(1, 64))
    flipped = bytes([data[place] ^ 1 << draw.randrange(8)])
    return draw.choice(
        [
            data[:place],
            data[:place] + flipped + data[place + 1 :],
            data[:place] + other + data[place + len(other) :],
            data[:place] + b"\x00\x00\xc0\x7f" + data[place + 4 :],  # nan
            data + data,
            b"",
            bytes(len(data)),
            None,
        ]
    )


def damaged_json(draw: random.Random, text: str) -> str:
    """Return JSON with another value, name or form."""
    how = draw.choice(["value"] * 6 + ["gone", "renamed", "added", "whole", "deep", "no JSON"])
    if how == "deep":
        return "[" * 100_000 + "]" * draw.choice([0, 100_000])
    if how == "no JSON":
        return draw.choice(["", "null", "{", "NaN", "\ufeff{}", "'x'", "{}{}", "\x00"])
    if how == "whole":
        return json.dumps(draw.choice(VALUES))
    content = json.loads(text)
    place, key = draw.choice(list(places(content)))
    if how == "value":
        place[key] = draw.choice(VALUES)
    elif isinstance(place, list):
        place.append(draw.choice(VALUES))
    elif how == "gone":
        del place[key]
    elif how == "renamed":
        place[f"{key}x"] = place.pop(key)
    else:
        place["unknown"] = draw.choice(VALUES)
    return json.dumps(content)


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each place in JSON as its list or object, and its index or key."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from places(content[key])


def ended(folder: Path, stage: str) -> tuple[str, str]:
    """Run a stage in a fork; return whether it accepted, refused or failed, and what it printed."""
    printed = folder / "printed"
    child = os.fork()
    if child == 0:
        run_in_fork(folder, *STAGES[stage])
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = printed.read_text(encoding="utf-8", errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status == 0 and not errors:
        return "accepted", text
    if status == 2 and len(errors) == 1 and text.rstrip("\n").endswith(errors[0]):
        return "refused", text
    return "traceback", f"exit code {status}\n{text}"


def run_in_fork(folder: Path, main: Any, arguments: list[str]) -> None:
    """Run a stage with limits, its output in folder/printed, and end the process."""
    code = 1
    try:
        os.chdir(folder)
        output = os.open("printed", os.O_WRONLY | os.O_CREAT)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")  # in place of what pytest reads
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")
        torch.set_num_threads(1)  # those of the parent do not exist here
        sys.argv = ["stage.py", *arguments]
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + GIGABYTES * 10**9,) * 2)
        signal.alarm(SECONDS)
        if main is prepare.main:  # the threads of its compiled code do not exist in a fork
            script = str(Path(prepare.__file__))
            os.execv(sys.executable, [sys.executable, script, *arguments])
        run_main(main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
