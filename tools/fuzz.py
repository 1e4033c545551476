"""Damage the files of a small run in many ways, and see that every stage refuses or copes.

Makes a dataset and a run of a few steps, then changes one file of a copy: cut, flipped bytes,
other bytes, and in JSON other values, types, names and sizes. Each copy is read by one stage, in a
process of its own with limits of time and memory. A stage may go on, or end with one line and exit
code 2. Prints how many it refused and accepted; anything else is counted as a traceback, shown with
the seed that repeats it, and makes the exit code 1. `unnoticed` counts damage to what has a
checksum, the checkpoint and the bins, with which a run was resumed all the same.

    python tools/fuzz.py --files=1400 --seed=0
    python tools/fuzz.py --files=1 --seed=17      the one file that seed 17 damages
"""

import argparse
import contextlib
import gc
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
for library in ("OMP", "MKL"):  # a fork, as all that read are, would wait for its threads for ever
    os.environ[f"{library}_NUM_THREADS"] = "1"

import export  # noqa: E402
import prepare  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
import visualize  # noqa: E402
from plainllama.settings import run  # noqa: E402

SECONDS, GIGABYTES = 30, 4  # that a stage may take beyond what this process has
RUN = [
    *("--n_layers=2", "--n_embd=32", "--n_heads=2", "--max_seq_len=16", "--batch_size=4"),
    *("--tokens_per_step=64", "--max_steps=4", "--checkpoint_interval=2", "--eval_interval=2"),
    *("--eval_tokens=64", "--log_interval=1", "--device=cpu", "--no-compile"),
    *("--data_dir=data", "--out_dir=out"),
]
SAMPLE = ["--ckpt=out", "--device=cpu", "--max_new_tokens=4", "--seed=0"]
MORE = ["--out_dir=more", "--max_steps=1"]
STAGES: dict[str, tuple[Callable[[], None], list[str]]] = {
    "resume": (train.main, [*RUN, "--resume", "--max_steps=5"]),
    "verify": (train.main, [*RUN, "--verify"]),
    "evaluate": (train.main, [*RUN, "--eval_only"]),
    "train": (train.main, [*RUN, *MORE]),
    "init_from": (train.main, [*RUN, *MORE, "--init_from=out/step_000004"]),
    "sample": (sample.main, [*SAMPLE, "--prompt=the cat"]),
    "batch": (sample.main, [*SAMPLE, "--prompt_file=prompts.jsonl", "--json"]),
    "lines": (sample.main, [*SAMPLE, "--prompt_file=prompts.txt"]),
    "export": (export.main, ["--ckpt=out", "--out=model.gguf"]),
    "page": (visualize.main, ["--ckpt=out", "--prompt=the cat"]),
    "text": (prepare.main, ["text.txt", "--out=new", "--vocab_size=300"]),
    "records": (prepare.main, ["records.jsonl", "--out=new", "--tokenizer=byte"]),
    "encode": (prepare.main, ["text.txt", "--out=new", "--tokenizer=data/tokenizer.json"]),
}
CHECKPOINT = ("resume", "verify", "evaluate", "init_from", "sample", "export", "page")
READERS = {  # the files that are damaged -> the stages that read them
    "data/meta.json": ("train", "resume", "verify"),
    "data/train.bin": ("train", "resume", "verify"),
    "data/val.bin": ("train", "resume", "evaluate"),
    "data/tokenizer.json": ("train", "resume", "encode"),
    "out/metrics.jsonl": ("resume", "page"),
    "out/step_000004/config.json": CHECKPOINT,
    "out/step_000004/generation_config.json": CHECKPOINT,
    "out/step_000004/tokenizer_config.json": ("resume", "init_from", "export"),
    "out/step_000004/tokenizer.json": CHECKPOINT,
    "out/step_000004/model.safetensors": CHECKPOINT,
    "out/step_000004/model.safetensors.index.json": ("init_from", "sample", "export"),
    "out/step_000004/train_state/state.json": ("resume", "verify", "evaluate", "sample"),
    "out/step_000004/train_state/optimizer.safetensors": ("resume",),
    "out/step_000004/train_state/sha256.json": ("resume", "verify"),
    "prompts.jsonl": ("batch",),
    "prompts.txt": ("lines",),
    "text.txt": ("text",),
    "records.jsonl": ("records",),
}
VALUES = [None, True, False, -1, 0, 1, 1.5, 2.0, -0.0, 1e-300, 1e300, float("nan"), float("inf")]
VALUES += [10**9, 10**12, 2**63, 2**70, 10**400, "", "x", "256", "\ud800", "../../etc/passwd"]
VALUES += [[], [1], ["x"], [[]], {}, {"x": 1}, [None], {"": {}}]


class Result(NamedTuple):
    """How a stage ended: refused, accepted, or with a traceback, and what it printed."""

    kind: str
    printed: str


def main() -> None:
    parser = argparse.ArgumentParser(usage="python tools/fuzz.py [--files=N] [--seed=N]")
    parser.add_argument("--files", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts: Counter[str] = Counter()
    by_file: dict[str, Counter[str]] = {path: Counter() for path in READERS}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_run(folder / "whole")
        for seed in range(options.seed, options.seed + options.files):
            path, stage, how, damaged, result = try_one(folder, seed)
            counts[result.kind] += 1
            by_file[path][result.kind] += 1
            has_checksum = path.startswith("out/step") or path.endswith(".bin")
            has_checksum = has_checksum and "sha256" not in path and "index" not in path
            if result.kind == "accepted" and stage in ("resume", "verify") and has_checksum:
                counts["unnoticed"] += damaged
                if damaged:
                    print(f"unnoticed, seed {seed}: {path}, {how}, {stage}")
            if result.kind == "traceback":
                print(f"--- seed {seed}: {path}, {how}, {stage}\n{result.printed[-3000:]}")
    for path, kinds in by_file.items():
        print(f"{path:52s} {kinds['refused']:5d} refused {kinds['accepted']:5d} accepted")
    kinds = ("refused", "accepted", "unnoticed", "traceback")
    shown = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
    print(f"{options.files} files: {shown}, in {time.perf_counter() - start:.0f} s")
    sys.exit(counts["traceback"] + counts["unnoticed"] > 0)


def make_run(folder: Path) -> None:
    """Write one of each file that is damaged."""
    folder.mkdir()
    with contextlib.chdir(folder):
        words = "the cat sees a dog, and bites the man. "
        Path("text.txt").write_text(words * 300, encoding="utf-8")
        records = [{"text": f"{words}{n}", "id": n} for n in range(60)]
        Path("records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        prompts = [{"prompt": word, "id": 1} for word in words.split()[:3]]
        Path("prompts.jsonl").write_text("".join(json.dumps(p) + "\n" for p in prompts))
        Path("prompts.txt").write_text("\n".join(words.split()[:3]), encoding="utf-8")
        call(prepare.main, ["text.txt", "--out=data", "--vocab_size=300"])
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            for stage, arguments in ((train.main, RUN), STAGES["sample"]):  # here, not in a fork:
                sys.argv = ["stage.py", *arguments]  # what they import need not be imported again
                stage()
        gc.collect()  # which lets go of the run's lock
        for name, (stage, arguments) in STAGES.items():
            result = call(stage, arguments)
            if result.kind != "accepted":
                sys.exit(f"{name} does not work even undamaged: {result.printed}")
            for made in ("new", "more", "model.gguf", "out/step_000005"):
                path = Path(made)
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        index = Path("out/step_000004/model.safetensors.index.json")
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model.safetensors"}}))


def try_one(folder: Path, seed: int) -> tuple[str, str, str, bool, Result]:
    """Damage a file of a fresh copy by the seed, and let a stage read it."""
    draw = random.Random(seed)
    path = draw.choice(list(READERS))
    stage = draw.choice(READERS[path])
    copy = folder / "copy"
    shutil.copytree(folder / "whole", copy)
    file = copy / path
    before = file.read_bytes()
    if path.endswith("index.json"):
        (file.parent / "model.safetensors").rename(file.parent / "model-1.safetensors")
        before = before.replace(b"model.safetensors", b"model-1.safetensors")
    how, after = damage(draw, file.suffix, before)
    if after is None:
        file.unlink()
        if draw.random() < 0.5:
            file.mkdir()
    else:
        file.write_bytes(after)
    with contextlib.chdir(copy):
        result = call(*STAGES[stage])
    shutil.rmtree(copy)
    return path, stage, how, after != before, result


def damage(draw: random.Random, suffix: str, data: bytes) -> tuple[str, bytes | None]:
    """Return how a file was damaged, and what it holds then; None: it is gone."""
    if suffix in (".json", ".jsonl") and draw.random() < 0.75:
        return damage_json(draw, suffix, data)
    if suffix == ".safetensors" and draw.random() < 0.6:
        return damage_tensors(draw, data)
    how = draw.choice(["cut", "flipped", "other bytes", "twice", "empty", "zeros", "gone"])
    place = draw.randrange(max(1, len(data)))
    if how == "flipped":
        changed = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return how, bytes(changed)
    other = draw.randbytes(draw.randint(1, 64))
    made = {"cut": data[:place], "twice": data + data, "empty": b"", "zeros": bytes(len(data))}
    made |= {"other bytes": data[:place] + other + data[place + len(other) :]}
    return how, made.get(how)


def damage_json(draw: random.Random, suffix: str, data: bytes) -> tuple[str, bytes]:
    """Change one value, name or line of a JSON file."""
    lines = data.decode().splitlines() if suffix == ".jsonl" else [data.decode()]
    number = draw.randrange(len(lines))
    content = json.loads(lines[number])
    how = draw.choice(["value"] * 6 + ["gone", "renamed", "added", "whole", "deep", "no JSON"])
    if how == "deep":
        lines[number] = "[" * 100_000 + "]" * draw.choice([0, 100_000])
    elif how == "no JSON":
        lines[number] = draw.choice(["", "null", "{", "NaN", "\ufeff{}", "'x'", "{}{}", "\x00"])
    elif how == "whole":
        lines[number] = json.dumps(draw.choice(VALUES))
    else:
        place, key = draw.choice(list(places(content)))
        value = draw.choice(VALUES)
        shown = f"{key} {how} {str(value)[:40] if how == 'value' else ''}"
        how = shown.encode(errors="replace").decode()
        if "value" in shown:
            place[key] = value
        elif isinstance(place, list):
            place.append(value)
        elif "gone" in shown:
            del place[key]
        elif "renamed" in shown:
            place[f"{key}x"] = place.pop(key)
        else:
            place["unknown"] = value
        lines[number] = json.dumps(content)
    return how, ("\n".join(lines) + "\n" * (suffix == ".jsonl")).encode(errors="surrogatepass")


def places(content: Any) -> Any:
    """Yield each place in JSON as its list or object, and its index or key."""
    if isinstance(content, dict | list):
        keys = list(content) if isinstance(content, dict) else range(len(content))
        for key in keys:
            yield content, key
            yield from places(content[key])


def damage_tensors(draw: random.Random, data: bytes) -> tuple[str, bytes]:
    """Change the header of a .safetensors, or make some numbers nan."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    how = draw.choice(["nan", "header", "header", "header", "size"])
    if how == "size":
        wrong = draw.choice([0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])
        return f"header size {wrong}", wrong.to_bytes(8, "little") + data[8:]
    if how == "nan":
        place = draw.randrange(len(body) // 4) * 4
        odd = draw.choice([b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\x00\x00\x80\xff"])
        return how, data[: 8 + size] + body[:place] + odd + body[place + 4 :]
    how, changed = damage_json(draw, ".json", json.dumps(header).encode())
    return f"header: {how}", len(changed).to_bytes(8, "little") + changed + body


def call(main: Callable[[], None], arguments: list[str]) -> Result:
    """Run a stage in a fork of this process, with limits."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(printed, descriptor)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["stage.py", *arguments]
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            limit = used + GIGABYTES * 10**9
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            signal.alarm(SECONDS)
            run(main)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = Path("printed").read_text(encoding="utf-8", errors="replace")
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    if status == 0 and not errors:
        return Result("accepted", text)
    if status == 2 and len(errors) == 1 and text.rstrip("\n").endswith(errors[0]):
        return Result("refused", text)
    return Result("traceback", f"exit code {status}\n{text}")


if __name__ == "__main__":
    main()
