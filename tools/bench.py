"""Compare the stages with how others do the same work, on this machine, in one run.

    python tools/bench.py train config/tiny.py --against=../nanoGPT --json=tiny.json    tokens/s
    python tools/bench.py sample --vocab_size=32000 --llama2c=../llama2.c    one text, tokens/s
    python tools/bench.py prepare                              text files to train.bin, MB/s
    python tools/bench.py prepare --megabytes=1000 --memory_megabytes=3000    and the peak memory
    python tools/bench.py gpu --json=gpu.json     all that only a GPU can show; --rehearse: a CPU

Each measurement is a process of its own; the rows alternate, and the median of the rounds counts.
train and sample take train.py's config files and keys; peers are run at the same shape. prepare
reads Shakespeare's plays, again and again, in a new order and with a new number after each speech.
"""

import gzip
import importlib.util
import itertools
import json
import os
import pickle
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the stages are

from model import ModelConfig  # noqa: E402
from plainllama.checkpoint import write_json  # noqa: E402
from plainllama.data import load_dataset  # noqa: E402
from plainllama.machine import # noqa: E402     Machine, set_up_machine
from model import flops_per_token, n_params, shapes_of
from plainllama.settings import UserError, load, run_main  # noqa: E402
from plainllama.shakespeare import fetch_plays  # noqa: E402
from plainllama.tokenizer import find_tokenizer  # noqa: E402
from tools.bench_gpu import bench_gpu  # noqa: E402
from tools.llama_cpp import llama_cpp_commands  # noqa: E402
from train import TrainConfig, count_micro_steps  # noqa: E402

PYTHON = sys.executable
SLOW_MEGABYTES = 50  # of the text, for the rows that encode some 10 MB/s

TIKTOKEN = """
import pathlib, sys, tiktoken
texts = [pathlib.Path(name).read_text(encoding="utf-8") for name in sys.argv[2:]]
tiktoken.get_encoding("r50k_base").encode_ordinary_batch(texts, num_threads=int(sys.argv[1]))
"""
# The steps of nanoGPT's data/openwebtext/prepare.py, for text files: map with encode_ordinary,
# then copy shard by shard into a memmap.
NANOGPT = """
import datasets, numpy, sys, tiktoken
encoding = tiktoken.get_encoding("r50k_base")
def process(row):
    ids = [*encoding.encode_ordinary(row["text"]), encoding.eot_token]
    return {"ids": ids, "length": len(ids)}
if __name__ == "__main__":
    workers, out, *files = sys.argv[1:]
    rows = datasets.load_dataset("text", data_files=files, sample_by="document", split="train")
    rows = rows.map(process, remove_columns=["text"], num_proc=int(workers))
    total, done = sum(rows["length"]), 0
    bin = numpy.memmap(out, dtype=numpy.uint16, mode="w+", shape=(total,))
    for number in range(16):
        shard = rows.shard(16, number, contiguous=True).with_format("numpy")
        ids = numpy.concatenate(shard["ids"])
        bin[done : done + len(ids)] = ids
        done += len(ids)
    bin.flush()
"""
WITHOUT_GIGATOKEN = """
import runpy, sys
sys.modules["gigatoken"] = None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TRAIN = """
import os, runpy, sys, torch
sys.argv.pop(0)
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
if torch.cuda.is_initialized():
    print("peak", torch.cuda.max_memory_allocated())
"""
DECODE = """
import json, sys, time, torch
folder, shape, device, dtype, n_tokens, how = sys.argv[1:]
sys.path.insert(0, folder)
import model
shape, prompt = json.loads(shape), torch.zeros(1, 1, dtype=torch.long, device=device)
if hasattr(model, "GPT"):
    network = model.GPT(model.GPTConfig(**shape))
    write = lambda n: network.generate(prompt, n, top_k=1).tolist()
else:
    network = model.LLaMaTransformer(model.ModelConfig(**shape))
    from plainllama import generate as engine, inference
    pick = lambda x: x.argmax(-1)
    write = lambda n: [int(t) for t in engine.generate(network, prompt, n, pick, 1, read)]
network.eval().to(device, getattr(torch, dtype))
if "int8" in how:
    inference.quantize_int8(network)
if not hasattr(model, "GPT"):
    read = inference.prepare_decoding(network, 1, "compiled" in how, 1 + int(n_tokens))
write(int(n_tokens))
start = time.perf_counter()
write(int(n_tokens))
print("tok/s:", int(n_tokens) / (time.perf_counter() - start))
if torch.cuda.is_initialized():
    print("peak", torch.cuda.max_memory_allocated())
"""
# Between this process and the measured one: a child's peak memory begins with its parent's.
RUN = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], env=os.environ | {"PYTHONUNBUFFERED": "1"})
_, status, usage = os.wait4(process.pid, 0)
unit = 1 if sys.platform == "darwin" else 1024
status and sys.exit(1)
print("usage", usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)
"""
TRAINING = """
import pathlib, sys, time
from plainllama import tokenizer
text = [pathlib.Path(name).read_bytes() for name in sys.argv[2:]]
start = time.perf_counter()
tokenizer.train_bpe(text, int(sys.argv[1]))
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class PrepareBench:
    """Measure prepare.py with GPT-2's tokenizer."""

    # bench
    megabytes: int = 500  # size of the text
    memory_megabytes: int = 0  # size of an input whose peak memory is measured; 0: none
    rounds: int = 3  # measurements of each row; the median counts


@dataclass(frozen=True)
class SpeedBench(TrainConfig):
    """Measure training or sampling with the shape and settings of train.py's keys."""

    # bench
    against: str = ""  # a clone of nanoGPT to measure beside
    llama2c: str = ""  # for sample: a llama2.c folder with `run` built in it
    llama_bench: str = ""  # for sample: llama.cpp's program of this name
    rounds: int = 3  # measurements of each row; the median counts
    steps: int = 20  # steps of a measurement, after as many to warm up
    n_tokens: int = 240  # for sample: tokens written in a measurement
    quick: bool = False  # one round, of 5 steps or 64 tokens
    json: str = ""  # a file for all figures


def main() -> None:
    stages = {"train": bench_train, "sample": bench_sample, "prepare": bench_prepare}
    stages["gpu"] = bench_gpu
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        raise UserError(f"python tools/bench.py STAGE ...: STAGE is one of {', '.join(stages)}")
    stages[sys.argv[1]](sys.argv[2:])


def bench_train(arguments: list[str]) -> None:
    """Run train.py and nanoGPT's train.py, and take the time at which their lines come."""
    config, machine, dtype, theirs = read_settings(arguments)
    dataset = load_dataset(Path(config.data_dir))
    config = replace(config, vocab_size=dataset.vocab_size)
    n, micro_steps = config.steps, count_micro_steps(config, 1)
    with tempfile.TemporaryDirectory() as folder:
        ours = {f.name: getattr(config, f.name) for f in fields(TrainConfig)}
        ours |= {"data_dir": Path(config.data_dir).resolve(), "out_dir": f"{folder}/out"}
        ours |= {"max_steps": 2 * n, "log_interval": n, "checkpoint_interval": 0}
        ours |= {"eval_interval": 0, "eval_tokens": 1, "sample_interval": 0}
        theirs |= {"dataset": "bench", "batch_size": config.batch_size, "compile": config.compile}
        theirs |= {"gradient_accumulation_steps": micro_steps, "device": machine.device}
        theirs |= {"dtype": dtype, "max_iters": 2 * n, "log_interval": n, "eval_iters": 1}
        commands = {f"train.py, {dtype}": [PYTHON, "-c", TRAIN, ROOT / "train.py", *flags(ours)]}
        if config.against:
            data, script = Path(folder, "data/bench"), Path(config.against, "train.py").resolve()
            if dataset.dtype != "uint16":
                raise UserError(f"nanoGPT reads uint16, but {config.data_dir} is {dataset.dtype}")
            shutil.copytree(config.data_dir, data)
            shutil.copy(script.with_name("configurator.py"), folder)
            data.joinpath("meta.pkl").write_bytes(pickle.dumps({"vocab_size": config.vocab_size}))
            used = dtype if machine.device.type == "cuda" else "float32"  # always, elsewhere
            commands[f"nanoGPT, {used}"] = [PYTHON, "-c", TRAIN, script, *flags(theirs)]
        compare(config, machine, commands, folder)


def bench_sample(arguments: list[str]) -> None:
    """Let random weights continue one token greedily, without sample.py's start-up and text."""
    config, machine, dtype, theirs = read_settings(arguments)
    config = replace(config, vocab_size=config.vocab_size or 32000)
    shape = ModelConfig(**{f.name: getattr(config, f.name) for f in fields(ModelConfig)})
    S = config.max_seq_len
    n = min(config.n_tokens, S - 1)  # all within the context
    ours = ROOT, asdict(shape)
    ways = (dtype, "compiled", "int8 compiled") if config.compile else (dtype, "int8")
    rows = {f"model.py, {how}": (*ours, how) for how in ways}
    if config.against:
        theirs["vocab_size"] = shape.vocab_size
        rows[f"nanoGPT, {dtype}"] = Path(config.against).resolve(), theirs, dtype
    commands = {
        row: [PYTHON, "-c", DECODE, path, json.dumps(keys), machine.device, dtype, n, how]
        for row, (path, keys, how) in rows.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        if config.llama2c:
            count = n_params(shapes_of(shape)) + S * shape.head_width  # and two tables
            weights = np.random.default_rng(0).standard_normal(count, dtype=np.float32) * 0.02
            keys = ("n_embd", "hidden_width", "n_layers", "n_heads", "kv_heads", "vocab_size")
            sizes = np.array([*(getattr(shape, key) for key in keys), S], dtype=np.int32)
            Path(folder, "model.bin").write_bytes(sizes.tobytes() + weights.tobytes())
            peer, given = Path(config.llama2c).resolve(), ["model.bin", "-t", 0, "-n", n + 1]
            commands["llama2.c, float32"] = [peer / "run", *given, "-z", peer / "tokenizer.bin"]
        if config.llama_bench:
            program, files = Path(config.llama_bench).resolve(), Path(folder, "files")
            files.mkdir()
            commands |= llama_cpp_commands(program, files, shape, n)
        compare(config, machine, commands, folder)


def read_settings(arguments: list[str]) -> tuple[SpeedBench, Machine, str, dict]:
    """Return the settings, the machine, train.py's dtype on it, and the shape for nanoGPT."""
    config = load(SpeedBench, arguments)
    config = replace(config, rounds=1, steps=5, n_tokens=64) if config.quick else config
    if min(config.rounds, config.steps, config.n_tokens) < 1:
        raise UserError("rounds, steps and n_tokens must be at least 1")
    where = config.device, config.dtype
    machine = set_up_machine(*where, config.n_embd, config.compile)
    shape = {"n_layer": config.n_layers, "n_head": config.n_heads, "n_embd": config.n_embd}
    shape |= {"block_size": config.max_seq_len, "bias": False, "dropout": 0.0}
    return config, machine, str(machine.dtype)[6:], shape


def flags(settings: dict) -> list[str]:
    return [f"--{key}={value}" for key, value in settings.items()]


def compare(config: SpeedBench, machine: Machine, commands: dict, folder: str) -> None:
    """Run the commands in turn; print medians with the least and the greatest; write the JSON."""
    name = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    name += f", {os.cpu_count()} cores, torch {torch.__version__}"
    print(f"{name}, median of {config.rounds} rounds (least-greatest)")
    flops = flops_per_token(shapes_of(config))
    first, n, peak = 0.0, config.steps, machine.peak_flops()
    taken: dict[str, list[dict[str, float]]] = {row: [] for row in commands}
    for _, (row, command) in itertools.product(range(config.rounds), commands.items()):
        shutil.rmtree(f"{folder}/out", ignore_errors=True)
        _, _, megabytes, lines = measure(command, folder)
        steps = [(re.match(r"(?:step +(?=\d+/)|iter )(\d+)", line), t) for t, line in lines[::-1]]
        at = {int(match[1]): seconds for match, seconds in steps if match}
        said = [float(line.split()[-1]) for _, line in lines if "tok/s:" in line]
        speed = said[0] if said else n * config.tokens_per_step / (at[2 * n] - at[n])
        result = {"tokens/s": speed, "peak MB": megabytes}
        result |= {"first step s": min(at.values())} if at else {}
        result |= {"MFU %": 100 * speed * flops / peak} if at and peak else {}
        taken[row].append(result)
    for row, results in taken.items():
        middle = {key: statistics.median(r[key] for r in results) for key in results[0]}
        first = first or middle["tokens/s"]
        cells = [f"{row:27s} {middle['tokens/s'] / first:5.2f}x"]
        for key, value in middle.items():
            values, form = sorted(r[key] for r in results), ",.0f" if value > 99 else ",.1f"
            cells.append(f"{key} {value:{form}} ({values[0]:{form}}-{values[-1]:{form}})")
        print(" | ".join(cells))
    if config.json:
        write_json(Path(config.json), {"machine": name, "settings": asdict(config), "rows": taken})


def bench_prepare(arguments: list[str]) -> None:
    config = load(PrepareBench, arguments)
    cores = os.cpu_count() or 1
    find_tokenizer("gpt2")  # a download, if any, is not measured
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plays = fetch_plays(folder)
        files = make_text(folder / "text", plays, config.megabytes)
        some = files[:SLOW_MEGABYTES]
        script, out = str(ROOT / "prepare.py"), str(folder / "out")
        options = [f"--out={out}", "--overwrite", "--tokenizer=gpt2"]
        commands = {
            "tiktoken's encode_ordinary_batch, in memory": (["-c", TIKTOKEN, cores], some),
            "nanoGPT's way (datasets.map)": (["-c", NANOGPT, cores, folder / "bin"], some),
            "prepare.py with tiktoken": (["-c", WITHOUT_GIGATOKEN, script, *options], some),
            "prepare.py with gigatoken": ([script, *options], files),
        }
        for row, package in zip(list(commands)[1::2], ("datasets", "gigatoken"), strict=True):
            if not importlib.util.find_spec(package):
                print(f"{row}: not measured, {package} is not installed")
                del commands[row]
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        taken: dict[str, list[tuple[float, float]]] = {row: [] for row in commands}
        for _ in range(config.rounds):
            for row, (command, given) in commands.items():
                taken[row].append(measure([PYTHON, *command, *given])[:2])
                shutil.rmtree(folder / "cache", ignore_errors=True)
        print(f"{cores} cores, median of {config.rounds} rounds, start-up included")
        first = None
        for row, (_, given) in commands.items():
            size = sum(Path(file).stat().st_size for file in given) / 1e6
            rates = [size / statistics.median(seconds) for seconds in zip(*taken[row], strict=True)]
            first = first or rates
            wall, cpu = (f"{r:7.1f} ({r / f:5.1f}x)" for r, f in zip(rates, first, strict=True))
            print(f"{row:44s} {size:5,.0f} MB {wall} MB/s {cpu} MB per CPU second")
        for size, given in ((4096, plays), (32768, files[:100])):
            lines = measure([PYTHON, "-c", TRAINING, size, *given])[3]
            text = sum(Path(file).stat().st_size for file in given) / 1e6
            print(f"training {size:,} tokens on {text:.0f} MB: {float(lines[-1][1]):.2f} s")
        if config.memory_megabytes:
            text = files[0].read_text(encoding="utf-8")
            bench_memory(folder, text, config.memory_megabytes, [script, *options])


def make_text(folder: Path, plays: list[Path], megabytes: int) -> list[Path]:
    """Write `megabytes` files of about 1 MB each."""
    folder.mkdir()
    paragraphs = "\n\n".join(path.read_text(encoding="utf-8") for path in plays).split("\n\n")
    numbers = random.Random(0)
    files: list[Path] = []
    while True:
        numbers.shuffle(paragraphs)
        pieces, size = [], 0
        for paragraph in paragraphs:
            pieces.append(f"{paragraph}\n{numbers.randrange(10**6)}\n\n")
            size += len(pieces[-1])
            if size >= 1_000_000:
                if len(files) == megabytes:
                    return files
                files.append(folder / f"{len(files):05d}.txt")
                files[-1].write_text("".join(pieces), encoding="utf-8")
                pieces, size = [], 0


def bench_memory(folder: Path, text: str, megabytes: int, command: list[str]) -> None:
    """Print the peak memory of prepare.py on one large file in each format."""
    for suffix in (".txt", ".jsonl", ".jsonl.gz", ".parquet"):
        path = folder / f"large{suffix}"
        write_large(path, text, megabytes * 1_000_000)
        seconds, _, peak, _ = measure([PYTHON, *command, path])
        speed = f"{megabytes / seconds:6.1f} MB/s"
        print(f"{megabytes:,} MB as {suffix:9s} peak memory {peak:6,.0f} MB, {speed}")
        path.unlink()


def write_large(path: Path, text: str, size: int) -> None:
    """Write `size` bytes: documents of about 3 kB from `text` again and again, numbered."""
    speeches = text.split("\n\n")
    starts = range(0, len(speeches), 20)
    documents = itertools.cycle("\n\n".join(speeches[i : i + 20]) for i in starts)
    numbered = enumerate(itertools.islice(documents, size * len(starts) // len(text)))
    texts = (f"{number} {document}\n" for number, document in numbered)
    if path.suffix == ".parquet":
        import pyarrow.parquet

        schema = pyarrow.schema([("text", pyarrow.string())])
        with pyarrow.parquet.ParquetWriter(path, schema) as table:
            while rows := list(itertools.islice(texts, 1000)):
                table.write_table(pyarrow.table({"text": rows}))
        return
    as_json = ".jsonl" in path.suffixes
    how = {"compresslevel": 1} if path.suffix == ".gz" else {}
    opener = gzip.open if how else open
    with opener(path, "wt", encoding="utf-8", **how) as file:
        file.writelines(json.dumps({"text": text}) + "\n" if as_json else text for text in texts)


def measure(command: list, folder: str | Path = ROOT) -> tuple:
    """Run a process; return its seconds, CPU seconds, peak memory in MB, and (second, line)s.

    The memory is the GPU's where the process says so. ValueError with its last words if it fails.
    """
    start = time.perf_counter()
    call, pipe = [PYTHON, "-c", RUN, *map(str, command)], subprocess.PIPE
    how = {"stdout": pipe, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    with subprocess.Popen(call, cwd=folder, **how) as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    if process.returncode:
        raise UserError(f"a measured process failed: {''.join(t for _, t in lines)[-500:]}")
    _, cpu, memory = lines.pop()[1].split()
    memory = [memory, *(line[5:] for _, line in lines if line.startswith("peak "))][-1]
    return time.perf_counter() - start, float(cpu), float(memory) / 1e6, lines


if __name__ == "__main__":
    run(main)
