"""Compare the stages with how others do the same work, on this machine, in one run.

    python tools/bench.py train config/tiny.py --against=../nanoGPT --json=tiny.json    tokens/s
    python tools/bench.py sample --vocab_size=32000 --llama2c=../llama2.c    one text, tokens/s
    python tools/bench.py prepare                         text files to train.bin, MB/s and memory
    python tools/bench.py prepare --text=large.jsonl.gz   the same for a file of yours
    python tools/bench.py gpu --json=gpu.json             what only a GPU can show, in nine minutes
    python tools/bench.py gpu --rehearse                  its rows on the CPU, with small models

Each measurement is a process of its own; the rows alternate, and the median of the rounds counts.
All stages take train.py's config files and keys; peers are run at the same shape. prepare reads
Shakespeare's speeches again and again, in a new order and with a new number after each. gpu trains
on random words, and names the rows that its minutes have no room for.
"""

import importlib.util
import json
import os
import pickle
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the stages are

from model import LLaMaTransformer, ModelConfig  # noqa: E402
from plainllama.data import load_dataset  # noqa: E402
from plainllama.huggingface import save_model, side_files  # noqa: E402
from plainllama.machine import find_device, flops_per_token, n_params, set_up_machine, shapes_of  # noqa: E402
from plainllama.settings import UserError, load, run_main, write_json  # noqa: E402
from plainllama.shakespeare import fetch_plays  # noqa: E402
from plainllama.tokenizer import find_tokenizer  # noqa: E402
from train import TrainConfig, count_micro_steps  # noqa: E402

PYTHON, PEERS = sys.executable, ROOT / "tools" / "peers"
RUN_SCRIPT = [PYTHON, PEERS / "run_script.py"]
SLOW_MEGABYTES = 50  # of the text, for the rows that encode some 10 MB/s
SHAPES: dict[str, dict[str, Any]] = {
    "124M": {"n_layers": 12, "n_embd": 768, "n_heads": 12, "max_seq_len": 1024, "batch_size": 32},
    "350M": {"n_layers": 24, "n_embd": 1024, "n_heads": 16, "max_seq_len": 2048, "batch_size": 8},
    "1.1B": {"n_layers": 22, "n_embd": 2048, "n_heads": 16, "max_seq_len": 2048, "batch_size": 4}
    | {"n_kv_heads": 4, "multiple_of": 256},
}
SMALL = {"n_layers": 1, "n_embd": 32, "n_heads": 2, "n_kv_heads": 0, "max_seq_len": 32}
GPU_ROWS: list[tuple[str, str, dict[str, Any]]] = [  # what is measured, shape, changed keys
    ("train", "124M", {}),
    ("decode", "124M", {"batch_size": 1}),
    ("decode", "124M", {"batch_size": 64}),
    ("nanoGPT", "124M", {}),
    ("train", "350M", {}),
    ("train", "1.1B", {"chunked_loss": True}),
    ("train", "124M", {"optimizer": "muon"}),
    ("train", "124M", {"compile": False}),
    ("decode", "124M", {"batch_size": 1, "compile": False}),
    ("decode", "124M", {"batch_size": 64, "compile": False}),
    ("decode", "1.1B", {"batch_size": 1}),
    ("decode", "1.1B", {"batch_size": 64}),
]


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure a stage, or a GPU."""

    # bench
    against: str = ""  # a clone of nanoGPT to measure beside
    llama2c: str = ""  # for sample: a llama2.c folder with `run` built in it
    llama_bench: str = ""  # for sample: llama.cpp's program of this name
    rounds: int = 3  # measurements of each row; the median counts
    steps: int = 20  # for train and gpu: steps of a measurement, after as many to warm up
    n_tokens: int = 240  # for sample and gpu: tokens written in a measurement
    megabytes: int = 500  # for prepare: size of the text
    text: str = ""  # for prepare: a file of yours in place of the plays
    minutes: float = 9.0  # for gpu: what finds no time is not measured
    rehearse: bool = False  # for gpu: run each row on the CPU, with small models
    json: str = ""  # a file for all figures


class Measured(NamedTuple):
    """What a process took and printed; the memory is the GPU's where it used one."""

    seconds: float
    cpu_seconds: float
    peak_megabytes: float
    lines: list[tuple[float, str]]  # each with the second at which it came


class Row(NamedTuple):
    """A line of the table: a command, and how its figures are read."""

    name: str
    command: list[Any]
    read: Callable[[Measured], dict[str, float]]


def main() -> None:
    stages = {"train": bench_train, "sample": bench_sample, "prepare": bench_prepare}
    stages["gpu"] = bench_gpu
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        raise UserError(f"python tools/bench.py STAGE ...: STAGE is one of {', '.join(stages)}")
    config = load(BenchConfig, sys.argv[2:])
    if min(config.rounds, config.steps, config.n_tokens) < 1:
        raise UserError("rounds, steps and n_tokens must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        stages[sys.argv[1]](config, Path(folder))


def bench_train(config: BenchConfig, folder: Path) -> None:
    """Run train.py and nanoGPT's train.py on the same data."""
    dataset = load_dataset(Path(config.data_dir))
    data_dir = str(Path(config.data_dir).resolve())
    config = replace(config, vocab_size=dataset.vocab_size, data_dir=data_dir)
    rows = [train_row("train.py", config)]
    if config.against:
        rows.append(nanogpt_row(config, folder))
    measure_rows(rows, config, folder)


def train_row(name: str, config: BenchConfig) -> Row:
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    settings.update(max_steps=2 * config.steps, log_interval=config.steps, out_dir="out")
    settings.update(checkpoint_interval=0, eval_interval=0, eval_tokens=1, sample_interval=0)
    command = [*RUN_SCRIPT, ROOT / "train.py", *flags(settings)]
    return Row(f"{name}, {dtype_name(config)}", command, partial(read_steps, config))


def nanogpt_row(config: BenchConfig, folder: Path) -> Row:
    """Return the row of nanoGPT's train.py at config's shape, on a copy of its data."""
    if load_dataset(Path(config.data_dir)).dtype != "uint16":
        raise UserError(f"nanoGPT reads uint16, which {config.data_dir} is not")
    script, data = Path(config.against, "train.py").resolve(), folder / "data" / "bench"
    shutil.copytree(config.data_dir, data)
    shutil.copy(script.with_name("configurator.py"), folder)
    data.joinpath("meta.pkl").write_bytes(pickle.dumps({"vocab_size": config.vocab_size}))
    device, dtype = find_device(config.device), dtype_name(config)
    if device.type != "cuda":
        dtype = "float32"  # whatever it is told
    settings = {**nanogpt_shape(config), "dataset": "bench", "device": device, "dtype": dtype}
    settings.update(batch_size=config.batch_size, compile=config.compile, eval_iters=1)
    settings.update(gradient_accumulation_steps=count_micro_steps(config, 1))
    settings.update(max_iters=2 * config.steps, log_interval=config.steps)
    command = [*RUN_SCRIPT, script, *flags(settings)]
    return Row(f"nanoGPT, {dtype}", command, partial(read_steps, config))


def nanogpt_shape(config: ModelConfig) -> dict[str, Any]:
    shape = {"n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.n_embd}
    return {**shape, "block_size": config.max_seq_len, "bias": False, "dropout": 0.0}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def dtype_name(config: BenchConfig) -> str:
    return str(set_up_machine(config).dtype).removeprefix("torch.")


def read_steps(config: BenchConfig, measured: Measured) -> dict[str, float]:
    """Read the speed from the times at which the lines of `steps` and of 2 `steps` steps came."""
    times: dict[int, float] = {}
    for second, line in measured.lines:
        match = re.match(r"(?:step +(?=\d+/)|iter )(\d+)", line)
        if match:
            times.setdefault(int(match[1]), second)
    seconds = times[2 * config.steps] - times[config.steps]
    speed = config.steps * config.tokens_per_step / seconds
    figures = {"tokens/s": speed, "peak MB": measured.peak_megabytes}
    figures["first step s"] = min(times.values())
    peak = set_up_machine(config).peak_flops()
    if peak:
        figures["MFU %"] = 100 * speed * flops_per_token(shapes_of(config)) / peak
    return figures


def bench_sample(config: BenchConfig, folder: Path) -> None:
    """Let random weights continue one token greedily, without sample.py's start-up and text."""
    config = replace(config, vocab_size=config.vocab_size or 32000, batch_size=1)
    config = replace(config, n_tokens=min(config.n_tokens, config.max_seq_len - 1))
    shape, dtype = model_config(config), dtype_name(config)
    ways = [["compiled"], ["int8", "compiled"]] if config.compile else [["int8"]]
    rows = [decode_row(f"model.py, {dtype}", ROOT, asdict(shape), config)]
    for way in ways:
        rows.append(decode_row(f"model.py, {' '.join(way)}", ROOT, asdict(shape), config, way))
    if config.against:
        theirs = {**nanogpt_shape(config), "vocab_size": config.vocab_size}
        clone = Path(config.against).resolve()
        rows.append(decode_row(f"nanoGPT, {dtype}", clone, theirs, config))
    if config.llama2c:
        rows.append(llama2c_row(config, folder))
    if config.llama_bench:
        rows.extend(llama_cpp_rows(config, folder))
    measure_rows(rows, config, folder)


def model_config(config: BenchConfig) -> ModelConfig:
    return ModelConfig(**{key.name: getattr(config, key.name) for key in fields(ModelConfig)})


def decode_row(
    name: str,
    clone: Path,
    shape: dict[str, Any],
    config: BenchConfig,
    ways: list[str] | None = None,
) -> Row:
    where = [clone, json.dumps(shape), find_device(config.device), dtype_name(config)]
    how = [config.batch_size, config.n_tokens, *(ways or [])]
    return Row(name, [*RUN_SCRIPT, PEERS / "decode.py", *where, *how], read_speed)


def llama2c_row(config: BenchConfig, folder: Path) -> Row:
    """Return the row of llama2.c's program on random weights, written to `folder`."""
    skipped = config.max_seq_len * config.head_width  # RoPE's tables
    count = n_params(shapes_of(config)) + skipped
    weights = np.random.default_rng(0).standard_normal(count, dtype=np.float32) * 0.02
    keys = ("n_embd", "hidden_width", "n_layers", "n_heads", "kv_heads", "vocab_size")
    sizes = [*(getattr(config, key) for key in keys), config.max_seq_len]
    content = np.array(sizes, dtype=np.int32).tobytes() + weights.tobytes()
    Path(folder, "model.bin").write_bytes(content)
    peer = Path(config.llama2c).resolve()
    options = ["-t", 0, "-n", config.n_tokens + 1, "-z", peer / "tokenizer.bin"]
    return Row("llama2.c, float32", [peer / "run", "model.bin", *options], read_speed)


def llama_cpp_rows(config: BenchConfig, folder: Path) -> Iterator[Row]:
    """Yield the row of llama-bench on each file that export.py makes of random weights."""
    program, tokenizer = Path(config.llama_bench).resolve(), find_tokenizer("byte")
    if not program.is_file():
        raise UserError(f"llama_bench={program} is no file; llama.cpp's build/bin/ has it")
    if config.vocab_size < tokenizer.vocab_size:
        least = f"at least vocab_size={tokenizer.vocab_size}"
        raise UserError(f"vocab_size={config.vocab_size}: llama_bench needs {least}")
    shape, checkpoint = model_config(config), folder / "checkpoint"
    checkpoint.mkdir()
    save_model(LLaMaTransformer(shape), checkpoint, files=side_files(shape, tokenizer))
    tokenizer.save(checkpoint / "tokenizer.json")
    for dtype in ("float32", "bfloat16", "q8_0"):
        path = folder / f"{dtype}.gguf"
        export = [ROOT / "export.py", f"--ckpt={checkpoint}", f"--dtype={dtype}", f"--out={path}"]
        subprocess.run([PYTHON, *export], stdout=subprocess.DEVNULL, check=True)
        options = ["-p", 0, "-n", config.n_tokens, "-t", os.cpu_count(), "-r", 1, "-o", "json"]
        yield Row(f"llama.cpp, {dtype}", [program, "-m", path, *options], read_speed)


def read_speed(measured: Measured) -> dict[str, float]:
    """Read the tokens a second that a decoder says it wrote."""
    text = "".join(line for _, line in measured.lines)
    speed = re.findall(r'(?:tok/s:|"avg_ts":) *([\d.e+]+)', text)[-1]
    return {"tokens/s": float(speed), "peak MB": measured.peak_megabytes}


def bench_prepare(config: BenchConfig, folder: Path) -> None:
    """Encode the same text with GPT-2's tokenizer by prepare.py and by others."""
    find_tokenizer("gpt2")  # a download, if any, is not measured
    os.environ.update(HF_DATASETS_CACHE=str(folder / "out"), HF_HUB_OFFLINE="1")
    cores, files = os.cpu_count(), [Path(config.text).resolve()]
    if not config.text:
        files = write_texts(folder, config.megabytes)
    some = files[:SLOW_MEGABYTES]
    ours = [ROOT / "prepare.py", "--out=out", "--overwrite"]
    gpt2 = [*ours, "--tokenizer=gpt2"]
    nanogpt = [PYTHON, PEERS / "nanogpt_prepare.py", cores, "ids.bin"]
    rows = [
        prepare_row("tiktoken's batch call", [PYTHON, PEERS / "tiktoken_batch.py", cores], some),
        prepare_row("nanoGPT's way (datasets.map)", nanogpt, some),
        prepare_row("prepare.py, tiktoken", [*RUN_SCRIPT, "--without=gigatoken", *gpt2], some),
        prepare_row("prepare.py, gigatoken", [PYTHON, *gpt2], files),
        prepare_row("and training 4,096 ids", [PYTHON, *ours, "--vocab_size=4096"], files[:4]),
        prepare_row("and training 32,768", [PYTHON, *ours, "--vocab_size=32768"], files[:100]),
    ]
    for number, package in ((3, "gigatoken"), (1, "datasets")):
        if not importlib.util.find_spec(package):
            print(f"{rows.pop(number).name}: not measured, {package} is not installed")
    if config.text:  # of any format, which the others do not read
        rows = [row for row in rows if row.name.startswith("prepare.py")]
    measure_rows(rows, config, folder)


def prepare_row(name: str, command: list[Any], files: list[Path]) -> Row:
    size = sum(path.stat().st_size for path in files) / 1e6

    def read(measured: Measured) -> dict[str, float]:
        figures = {"MB/s": size / measured.seconds, "MB per CPU s": size / measured.cpu_seconds}
        return {**figures, "peak MB": measured.peak_megabytes, "text MB": size}

    return Row(name, [*command, *files], read)


def write_texts(folder: Path, megabytes: int) -> list[Path]:
    """Write files of about 1 MB each, of speeches in random order with a number after each."""
    plays = [path.read_text(encoding="utf-8") for path in fetch_plays(folder)]
    speeches = "\n\n".join(plays).split("\n\n")
    draw = random.Random(0)
    files: list[Path] = []
    while len(files) < megabytes:
        draw.shuffle(speeches)
        text = "\n\n".join(f"{speech}\n{draw.randrange(10**6)}" for speech in speeches)
        for piece in re.findall(r"(?s).{1000000}", text)[: megabytes - len(files)]:
            files.append(folder / f"{len(files):05d}.txt")
            files[-1].write_text(piece, encoding="utf-8")
    return files


def bench_gpu(config: BenchConfig, folder: Path) -> None:
    """Measure GPU_ROWS on random words, of which a tokenizer of GPT-2's size is trained."""
    vocab_size, small = 50_304, {}
    if config.rehearse:
        vocab_size, small = 512, {**SMALL, "device": "cpu", "steps": 2, "n_tokens": 20}
    elif find_device(config.device).type != "cuda":
        raise UserError("there is no CUDA device here; --rehearse runs all rows on the CPU")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(60_000)]
    text = " ".join(draw.choices(words, k=1_000_000))
    Path(folder, "words.txt").write_text(text, encoding="ascii")
    prepare = [ROOT / "prepare.py", "words.txt", "--out=words", f"--vocab_size={vocab_size}"]
    subprocess.run([PYTHON, *prepare], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")  # which is cold at first
    rows = []
    for what, shape, changes in GPU_ROWS:
        keys = {**asdict(config), **SHAPES[shape], **changes, **small}
        keys.update(vocab_size=vocab_size, data_dir=str(folder / "words"), rounds=1)
        keys["tokens_per_step"] = keys["batch_size"] * keys["max_seq_len"]
        row_config = BenchConfig(**keys)
        name = " ".join([what, shape, *(f"{key}={value}" for key, value in changes.items())])
        if what == "train":
            rows.append(train_row(name, row_config))
        elif what == "decode":
            ways = ["compiled"] if row_config.compile else []
            model_shape = asdict(model_config(row_config))
            rows.append(decode_row(name, ROOT, model_shape, row_config, ways))
        elif config.against:
            rows.append(nanogpt_row(row_config, folder))
    measure_rows(rows, replace(config, rounds=1), folder, 60 * config.minutes)


def measure_rows(rows: list[Row], config: BenchConfig, folder: Path, seconds: float = 0) -> None:
    """Measure the rows in turn; at its last turn print a row's medians; write all figures.

    All rows together have `seconds` (0: any time), and each of them a quarter of that.
    """
    machine = f"{device_name(config)}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, median of {config.rounds} rounds (least-greatest)", flush=True)
    start = time.monotonic()
    taken: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for turn in range(config.rounds):
        for row in rows:
            shutil.rmtree(folder / "out", ignore_errors=True)
            left = seconds - (time.monotonic() - start)
            figures: dict[str, Any] = {"failed": "the time was up"}
            if not seconds or left > 5:
                try:
                    figures = row.read(measure(row.command, folder, min(left, seconds / 4)))
                except UserError as error:
                    figures = {"failed": str(error)}
            taken[row.name].append(figures)
            if turn == config.rounds - 1:
                compared = taken[rows[0].name] if seconds == 0 else []  # a GPU's rows differ
                print(line_of(row.name, taken[row.name], compared), flush=True)
            if config.json:  # at once, because what follows may be cut off
                content = {"machine": machine, "settings": asdict(config), "rows": taken}
                write_json(Path(config.json), content)
    failed = [name for name, results in taken.items() if any("failed" in r for r in results)]
    if failed:
        raise UserError(f"these rows failed: {', '.join(failed)}")


def device_name(config: BenchConfig) -> str:
    """Return the name of the GPU, or of the processor and its vector instructions."""
    device = find_device(config.device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    with suppress(OSError, IndexError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = re.findall(r"model name\s*: (.*)", lines)[0]
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def line_of(name: str, results: list[dict[str, Any]], first: list[dict[str, Any]]) -> str:
    """Return medians as text, the first also as a multiple of the `first` row's, if any."""
    cells = [f"failed: {result['failed']}" for result in results if "failed" in result][:1]
    for key in [] if cells else results[0]:
        values = sorted(result[key] for result in results)
        middle = statistics.median(values)
        form = ",.0f" if middle > 99 else ",.3g"
        cell = f"{key} {middle:{form}} ({values[0]:{form}}-{values[-1]:{form}})"
        if not cells and first and key in first[0]:
            cell += f" {middle / statistics.median(result[key] for result in first):.2f}x"
        cells.append(cell)
    return f"{name:32s} {' | '.join(cells)}"


def measure(command: list[Any], folder: Path, limit: float = 0) -> Measured:
    """Run a process for at most `limit` seconds (0: any time); UserError with its last words."""
    start = time.perf_counter()
    with subprocess.Popen(
        [PYTHON, PEERS / "usage.py", str(max(0, limit)), *map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    if process.returncode:
        last_words = " ".join(" ".join(line for _, line in lines).split())[-500:]
        raise UserError(f"{last_words} (limit: {limit:.0f} s)" if limit > 0 else last_words)
    seconds = time.perf_counter() - start
    _, cpu_seconds, peak = lines.pop()[1].split()
    for _, line in lines:
        if line.startswith("peak "):
            peak = line.split()[1]
    return Measured(seconds, float(cpu_seconds), float(peak) / 1e6, lines)


if __name__ == "__main__":
    run_main(main)
