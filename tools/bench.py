"""Compare the stages with how others do the same work, on this machine, in one run.

    python tools/bench.py train config/tiny.py --against=../nanoGPT          tokens/s
    python tools/bench.py sample --vocab_size=32000 --llama2c=../llama2.c    one text, tokens/s
    python tools/bench.py gpu --data_dir=data/gpt2      training and decoding at three sizes

Each measurement is a process of its own; the rows alternate, and the median of the rounds counts.
All stages take train.py's config files and keys; peers are run at the same shape.
"""

import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the stages are

import export  # noqa: E402
from model import LLaMaTransformer  # noqa: E402
from plainllama.data import load_dataset  # noqa: E402
from plainllama.generation import generate  # noqa: E402
from plainllama.huggingface import save_model, side_files  # noqa: E402
from plainllama.inference import prepare_decoding, quantize_int8  # noqa: E402
from plainllama.machine import find_device, n_params, set_up_machine, shapes_of  # noqa: E402
from plainllama.settings import load  # noqa: E402
from plainllama.start import count_micro_steps  # noqa: E402
from plainllama.terminal import UserError, run_main  # noqa: E402
from plainllama.tokenizer import find_tokenizer  # noqa: E402
from train import TrainConfig  # noqa: E402

PYTHON, PEERS = sys.executable, ROOT / "tools" / "peers"
RUN_SCRIPT = [PYTHON, PEERS / "run_script.py"]
GPU_ROWS = [  # what is measured, and of which model
    "train config/medium.py --batch_size=32",
    "decode config/medium.py --batch_size=1",
    "decode config/medium.py --batch_size=64",
    "train config/large.py --batch_size=8",
    "train config/xl.py --batch_size=4 --chunked_loss",
    "train config/medium.py --batch_size=32 --optimizer=muon",
    "decode config/xl.py --batch_size=1",
    "decode config/xl.py --batch_size=64",
]


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure a stage, or a GPU."""

    # bench
    against: str = ""  # for train: a clone of nanoGPT to measure beside
    llama2c: str = ""  # for sample: a llama2.c folder with `run` built in it
    llama_bench: str = ""  # for sample: llama.cpp's program of this name
    rounds: int = 3  # measurements of each row, but one on a GPU; the median counts
    steps: int = 20  # for train and gpu: steps of a measurement, after as many to warm up
    n_tokens: int = 240  # for sample and gpu: tokens written in a measurement
    int8: bool = False  # for decode: round the weights


Lines = list[tuple[float, str]]  # what a process prints, each line with the second at which it came


class Row(NamedTuple):
    """A line of the table: a command, and how its figures are read from what it prints."""

    name: str
    command: list[Any]
    read: Callable[[Lines], dict[str, float]]


def main() -> None:
    stages = {"train": bench_train, "sample": bench_sample, "gpu": bench_gpu, "decode": decode}
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        raise UserError(f"python tools/bench.py STAGE ...: STAGE is one of {', '.join(stages)}")
    config = load(BenchConfig, sys.argv[2:])
    with tempfile.TemporaryDirectory() as folder:
        stages[sys.argv[1]](config, Path(folder))


def bench_train(config: BenchConfig, folder: Path) -> None:
    """Run train.py and nanoGPT's train.py on the same data."""
    dataset = load_dataset(Path(config.data_dir))
    data_dir = str(Path(config.data_dir).resolve())
    config = replace(config, vocab_size=dataset.vocab_size, data_dir=data_dir)
    rows = [train_row(f"train.py, {dtype_name(config)}", config)]
    if config.against:
        rows.append(nanogpt_row(config, folder))
    measure_rows(rows, config, folder)


def train_row(name: str, config: BenchConfig) -> Row:
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    settings |= {"max_steps": 2 * config.steps, "log_interval": config.steps, "out_dir": "out"}
    settings |= {"checkpoint_interval": 0, "eval_interval": 0, "eval_tokens": 1}
    command = [*RUN_SCRIPT, ROOT / "train.py", *flags(settings)]
    return Row(name, command, partial(read_steps, config))


def nanogpt_row(config: BenchConfig, folder: Path) -> Row:
    """Return the row of nanoGPT's train.py at config's shape, on a copy of its data."""
    script, data = Path(config.against, "train.py").resolve(), folder / "data" / "bench"
    shutil.copytree(config.data_dir, data)
    shutil.copy(script.with_name("configurator.py"), folder)
    data.joinpath("meta.pkl").write_bytes(pickle.dumps({"vocab_size": config.vocab_size}))
    device = find_device(config.device)  # on a CPU it is float32, whatever it is told
    dtype = dtype_name(config) if device.type == "cuda" else "float32"
    settings = {"n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.n_embd}
    settings |= {"block_size": config.max_seq_len, "bias": False, "dropout": 0.0}
    settings |= {"dataset": "bench", "batch_size": config.batch_size, "compile": config.compile}
    settings |= {"gradient_accumulation_steps": count_micro_steps(config, 1), "eval_iters": 1}
    settings |= {"max_iters": 2 * config.steps, "log_interval": config.steps}
    settings |= {"device": device, "dtype": dtype}
    command = [*RUN_SCRIPT, script, *flags(settings)]
    return Row(f"nanoGPT, {dtype}", command, partial(read_steps, config))


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def dtype_name(config: BenchConfig) -> str:
    return str(set_up_machine(config).dtype).removeprefix("torch.")


def read_steps(config: BenchConfig, lines: Lines) -> dict[str, float]:
    """Read the speed from the times at which the lines of `steps` and of 2 `steps` steps came."""
    times: dict[int, float] = {}
    for second, line in lines:
        match = re.match(r"(?:step +(?=\d+/)|iter )(\d+)", line)
        if match:
            times.setdefault(int(match[1]), second)
    seconds = times[2 * config.steps] - times[config.steps]
    speed = config.steps * config.tokens_per_step / seconds
    return {"tokens/s": speed, "peak MB": peak(lines), "first step s": min(times.values())}


def bench_sample(config: BenchConfig, folder: Path) -> None:
    """Let random weights continue one token greedily, without sample.py's start-up and text."""
    n_tokens, dtype = min(config.n_tokens, config.max_seq_len - 1), dtype_name(config)
    vocab_size = config.vocab_size or 32000
    config = replace(config, n_tokens=n_tokens, dtype=dtype, vocab_size=vocab_size, batch_size=1)
    rows = [decode_row(f"model.py, {dtype}", replace(config, compile=False))]
    if config.compile:
        rows.append(decode_row(f"model.py, {dtype}, compiled", config))
    rows.append(decode_row("model.py, int8", replace(config, int8=True)))
    if config.llama2c:
        rows.append(llama2c_row(config, folder))
    if config.llama_bench:
        rows.extend(llama_cpp_rows(config, folder))
    measure_rows(rows, config, folder)


def decode_row(name: str, config: BenchConfig) -> Row:
    settings = asdict(replace(config, dtype=dtype_name(config)))
    return Row(name, [*RUN_SCRIPT, __file__, "decode", *flags(settings)], read_speed)


def decode(config: BenchConfig, folder: Path) -> None:
    """Write batch_size texts from random weights, twice, and print the second's tokens/s."""
    model = LLaMaTransformer(config).eval()
    model.to(find_device(config.device), getattr(torch, config.dtype))
    if config.int8:
        quantize_int8(model)
    longest = 1 + config.n_tokens
    decoder = prepare_decoding(model, config.batch_size, config.compile, longest)
    prompts, most_likely = [[0]] * config.batch_size, partial(torch.argmax, dim=-1)
    for _ in range(2):
        start = time.perf_counter()
        for ids in generate(model, prompts, config.n_tokens, most_likely, decoder=decoder):
            ids.tolist()
    print("tok/s:", config.batch_size * config.n_tokens / (time.perf_counter() - start))


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
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    save_model(LLaMaTransformer(config), checkpoint, files=side_files(config, tokenizer))
    tokenizer.save(checkpoint / "tokenizer.json")
    for dtype in ("float32", "bfloat16", "q8_0"):
        path = folder / f"{dtype}.gguf"
        export.run(export.ExportConfig(ckpt=str(checkpoint), dtype=dtype, out=str(path)))
        options = ["-p", 0, "-n", config.n_tokens, "-t", os.cpu_count(), "-r", 1, "-o", "json"]
        yield Row(f"llama.cpp, {dtype}", [program, "-m", path, *options], read_speed)


def read_speed(lines: Lines) -> dict[str, float]:
    """Read the tokens a second that a decoder says it wrote."""
    text = "".join(line for _, line in lines)
    speed = re.findall(r'(?:tok/s:|"avg_ts":) *([\d.e+]+)', text)[-1]
    return {"tokens/s": float(speed), "peak MB": peak(lines)}


def peak(lines: Lines) -> float:
    """Read the MB of memory that a process has had at most: the GPU's, where it used one."""
    return next(float(line.split()[1]) for _, line in lines if line.startswith("peak ")) / 1e6


def bench_gpu(config: BenchConfig, folder: Path) -> None:
    """Measure GPU_ROWS once each, with the vocabulary of data_dir; flags change all rows."""
    vocab_size = load_dataset(Path(config.data_dir)).vocab_size
    given = [*sys.argv[2:], f"--data_dir={Path(config.data_dir).resolve()}"]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")  # which is cold at first
    rows, make_row = [], {"train": train_row, "decode": decode_row}
    for name in GPU_ROWS:
        what, file, *changes = name.split()
        row_config = load(BenchConfig, [str(ROOT / file), *changes, *given])
        one_batch = row_config.batch_size * row_config.max_seq_len
        row_config = replace(row_config, vocab_size=vocab_size, tokens_per_step=one_batch)
        rows.append(make_row[what](name, row_config))
    measure_rows(rows, replace(config, rounds=1), folder)


def measure_rows(rows: list[Row], config: BenchConfig, folder: Path) -> None:
    """Measure the rows in turn; at its last turn print a row's medians."""
    machine = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    if find_device(config.device).type == "cuda":
        machine = torch.cuda.get_device_name()
    machine = f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, median of {config.rounds} rounds (least-greatest)", flush=True)
    taken: dict[str, list[dict[str, float]]] = {row.name: [] for row in rows}
    failed: dict[str, str] = {}
    for turn in range(1, config.rounds + 1):
        for row in rows:
            shutil.rmtree(folder / "out", ignore_errors=True)
            try:
                taken[row.name].append(row.read(measure(row.command, folder)))
            except UserError as error:
                failed[row.name] = f"failed: {error}"
            if turn == config.rounds:
                line = failed.get(row.name) or medians(taken[row.name])
                print(f"{row.name:<32}  {line}", flush=True)
    if failed:
        raise UserError(f"these rows failed: {', '.join(failed)}")


def medians(results: list[dict[str, float]]) -> str:
    """Return the median, least and greatest of each figure as text."""
    cells = []
    for key in results[0]:
        values = sorted(result[key] for result in results)
        middle = statistics.median(values)
        form = ",.0f" if middle > 99 else ",.3g"
        cells.append(f"{key} {middle:{form}} ({values[0]:{form}}-{values[-1]:{form}})")
    return " | ".join(cells)


def measure(command: list[Any], folder: Path) -> Lines:
    """Run a process; UserError with its last words if it fails."""
    start = time.perf_counter()
    with subprocess.Popen(
        [PYTHON, PEERS / "usage.py", *map(str, command)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    if process.returncode:
        raise UserError(" ".join(" ".join(line for _, line in lines).split())[-500:])
    return lines


if __name__ == "__main__":
    run_main(main)
