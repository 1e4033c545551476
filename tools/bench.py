"""Compare the stages with how others do the same work, on this machine, in one run.

    python tools/bench.py train config/tiny.py --against=../nanoGPT          tokens/s
    python tools/bench.py sample --vocab_size=32000 --llama2c=../llama2.c    one text, tokens/s
    python tools/bench.py gpu --data_dir=data/gpt2 --rows=tools/gpu_1.txt      what a file lists

Each measurement is a process of its own; the rows alternate, and the median of the rounds counts.
All stages take train.py's config files and keys; peers are run at the same shape. What a row has
measured is added to bench.jsonl at once.
"""

import json
import os
import pickle
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from typing import Any, NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the stages are

import export
from model import LLaMaTransformer
from plainllama.data import load_dataset
from plainllama.distributed import materialize
from plainllama.generation import generate, one_ahead
from plainllama.huggingface import save_model, side_files
from plainllama.inference import prepare_decoding, quantize_int8
from plainllama.machine import find_device, flops_per_token, n_params, set_up_machine, shapes_of
from plainllama.settings import load
from plainllama.start import count_micro_steps, least_memory
from plainllama.terminal import UserError, run_main
from plainllama.tokenizer import find_tokenizer
from train import TrainConfig

PYTHON, PEERS = sys.executable, ROOT / "tools" / "peers"
RUN_SCRIPT = [PYTHON, PEERS / "run_script.py"]


@dataclass(frozen=True)
class BenchConfig(TrainConfig):
    """Measure a stage, or a GPU."""

    # bench
    against: str = ""  # for train: a clone of nanoGPT to measure beside
    llama2c: str = ""  # for sample: a llama2.c folder with `run` built in it
    llama_bench: str = ""  # for sample: llama.cpp's program of this name
    rows: str = "tools/gpu_1.txt"  # for gpu: a file of rows, which are measured once each
    seconds: int = 300  # for gpu: what is not measured by then is left; a row may take half
    rounds: int = 3  # for train and sample: measurements of each row; the median counts
    steps: int = 20  # of a measurement of training, after as many to warm up; for gpu: 4
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
    with tempfile.TemporaryDirectory() as folder:
        stages[sys.argv[1]](load(BenchConfig, sys.argv[2:]), Path(folder))


def bench_train(config: BenchConfig, folder: Path) -> None:
    """Run train.py and nanoGPT's train.py on the same data."""
    config = replace(config, vocab_size=load_dataset(Path(config.data_dir)).vocab_size)
    rows = [train_row(f"train.py, {dtype_name(config)}", config)]
    if config.against:
        rows.append(nanogpt_row(config, folder))
    measure_rows(rows, config, folder)


def train_row(name: str, config: BenchConfig) -> Row:
    settings = {field.name: getattr(config, field.name) for field in fields(TrainConfig)}
    settings |= {"max_steps": 2 * config.steps, "log_interval": config.steps, "out_dir": "out"}
    settings |= {"checkpoint_interval": 0, "eval_interval": 0, "eval_tokens": 1}
    settings |= {"data_dir": Path(config.data_dir).resolve()}  # the process has another folder
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
    settings |= {"block_size": config.max_seq_len, "bias": False, "dropout": 0.0, "device": device}
    settings |= {"dataset": "bench", "batch_size": config.batch_size, "compile": config.compile}
    settings |= {"gradient_accumulation_steps": count_micro_steps(config, 1), "eval_iters": 1}
    settings |= {"max_iters": 2 * config.steps, "log_interval": config.steps, "dtype": dtype}
    command = [*RUN_SCRIPT, script, *flags(settings)]
    return Row(f"nanoGPT, {dtype}", command, partial(read_steps, config))


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def dtype_name(config: BenchConfig) -> str:
    return str(set_up_machine(config).dtype).removeprefix("torch.")


def read_steps(config: BenchConfig, lines: Lines) -> dict[str, float]:
    """Read the speed from the times at which the lines of `steps` and of 2 `steps` steps came."""
    matches = [(re.match(r"(?:step +(?=\d+/)|iter )(\d+)", line), second) for second, line in lines]
    # From the end, so that a step's first line counts: its evaluation comes later.
    times = {int(match[1]): second for match, second in reversed(matches) if match}
    speed = config.steps * config.tokens_per_step / (times[2 * config.steps] - times[config.steps])
    model, machine = shapes_of(config), set_up_machine(config)
    figures = {"tokens/s": speed, "peak MB": peak(lines), "first step s": min(times.values())}
    figures["computed MB"] = least_memory(config, n_params(model), machine) / 1e6
    if peak_flops := machine.peak_flops():
        figures["MFU %"] = 100 * speed * flops_per_token(model) / peak_flops
    return figures


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
    model = shapes_of(config).to(getattr(torch, config.dtype)).eval()
    materialize(model, find_device(config.device))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    if config.int8:
        quantize_int8(model)
    decoder = prepare_decoding(model, config.batch_size, config.compile, 1 + config.n_tokens)
    prompts, most_likely = [[0]] * config.batch_size, partial(torch.argmax, dim=-1)
    for _ in range(2):
        start = time.perf_counter()
        steps = generate(model, prompts, config.n_tokens, most_likely, decoder=decoder)
        for ids in one_ahead(steps, find_device(config.device)):
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
    """Measure the rows of a file, with the vocabulary of data_dir; flags change all rows."""
    given = [f"--vocab_size={load_dataset(Path(config.data_dir)).vocab_size}", *sys.argv[2:]]
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache")  # which is cold at first
    rows, make_row = [], {"train": train_row, "decode": decode_row}
    text = Path(config.rows).read_text(encoding="utf-8")
    found = re.findall(r"^(((?:\w+=\S+ )*)(train|decode) (.+))", text, re.MULTILINE)
    for name, environment, what, arguments in found:
        shape = load(BenchConfig, ["--steps=4", *arguments.split(), *given])
        tokens = 4 * shape.batch_size * shape.max_seq_len  # an update for 4 micro-steps, as in runs
        row = make_row[what](name, replace(shape, tokens_per_step=tokens))
        rows.append(row._replace(command=["env", *environment.split(), *row.command]))
    measure_rows(rows, replace(config, rounds=1), folder, config.seconds)


def measure_rows(rows: list[Row], config: BenchConfig, folder: Path, seconds: int = 0) -> None:
    """Measure the rows in turn; at its last turn print a row's medians, and write its figures.

    Where all have so many seconds, a row is ended that takes more than half, or than are left.
    """
    machine = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    if find_device(config.device).type == "cuda":
        machine = torch.cuda.get_device_name()
    machine = f"{machine}, {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{machine}, median of {config.rounds} rounds (least-greatest)", flush=True)
    records = [{"row": row.name, "machine": machine, "rounds": [], "failed": ""} for row in rows]
    begin = time.monotonic()
    for turn in range(1, config.rounds + 1):
        for row, record in zip(rows, records, strict=True):
            shutil.rmtree(folder / "out", ignore_errors=True)
            limit = min(seconds / 2, max(1, begin + seconds - time.monotonic()))  # 0: there is none
            try:
                record["rounds"].append(row.read(measure(row.command, folder, limit)))
            except (UserError, LookupError) as error:  # LookupError: it does not say its speed
                record["failed"] = f"failed: {error}"
            if turn == config.rounds:
                line = record["failed"] or medians(record["rounds"])
                print(f"{row.name:<32}  {line}", flush=True)
                with open("bench.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
    if failed := [record["row"] for record in records if record["failed"]]:
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


def measure(command: list[Any], folder: Path, limit: float = 0) -> Lines:
    """Run a process, for `limit` seconds at most (0: any); UserError with its last words."""
    start = time.perf_counter()
    words = [PYTHON, PEERS / "usage.py", f"{limit:.1f}", *map(str, command)]
    with Popen(
        words, cwd=folder, stdout=PIPE, stderr=STDOUT, encoding="utf-8", errors="replace"
    ) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    if process.returncode:
        raise UserError(" ".join(" ".join(line for _, line in lines).split())[-500:])
    return lines


if __name__ == "__main__":
    run_main(main)
