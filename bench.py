"""Compare the stages with how others do the same work, on this machine, in one run.

    python bench.py prepare                                    text files to train.bin, MB/s
    python bench.py prepare --megabytes=1000 --memory_megabytes=3000    and the peak memory

Each measurement is a process of its own, start-up included; the rows alternate, and the median
of the rounds counts. The text is Shakespeare's plays, in as many copies as are needed, each with
its speeches in another order and a new number after every speech.
"""

import contextlib
import gzip
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import prepare
from config import load, run

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
TRAINING = """
import pathlib, prepare, sys, time
text = [pathlib.Path(name).read_bytes() for name in sys.argv[2:]]
start = time.perf_counter()
prepare.train_bpe(text, int(sys.argv[1]))
print(time.perf_counter() - start)
"""


@dataclass(frozen=True)
class PrepareBench:
    """Measure prepare.py with GPT-2's tokenizer."""

    megabytes: int = 500
    """Size of the text."""
    memory_megabytes: int = 0
    """Size of the input whose peak memory is measured, once in each format; 0: none is."""
    rounds: int = 3
    """Measurements of each row; the median counts."""


def main() -> None:
    stages = {"prepare": bench_prepare}
    if len(sys.argv) < 2 or sys.argv[1] not in stages:
        raise ValueError(f"python bench.py STAGE ...: STAGE is one of {', '.join(stages)}")
    stages[sys.argv[1]](sys.argv[2:])


def bench_prepare(arguments: list[str]) -> None:
    config = load(PrepareBench, arguments)
    cores = os.cpu_count() or 1
    prepare.find_tokenizer("gpt2")  # a download, if any, is not measured
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plays = prepare.fetch_plays(folder)
        files = make_text(folder / "text", plays, config.megabytes)
        some = files[:SLOW_MEGABYTES]
        script, out = str(Path(prepare.__file__)), str(folder / "out")
        options = [f"--out={out}", "--overwrite", "--tokenizer=gpt2"]
        rows = [
            "tiktoken's encode_ordinary_batch, in memory",
            "nanoGPT's way (datasets.map)",
            "prepare.py with tiktoken",
            "prepare.py with gigatoken",
        ]
        commands = {
            rows[0]: (["-c", TIKTOKEN, cores], some),
            rows[1]: (["-c", NANOGPT, cores, folder / "bin"], some),
            rows[2]: (["-c", WITHOUT_GIGATOKEN, script, *options], some),
            rows[3]: ([script, *options], files),
        }
        for package, row in (("datasets", rows[1]), ("gigatoken", rows[3])):
            if not importlib.util.find_spec(package):
                print(f"{row}: not measured, {package} is not installed")
                del commands[row]
        os.environ |= {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        taken: dict[str, list[tuple[float, float]]] = {row: [] for row in commands}
        for _ in range(config.rounds):
            for row, (command, given) in commands.items():
                taken[row].append(measure([*command, *given])[:2])
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
            output = measure(["-c", TRAINING, size, *given])[3]
            text = sum(Path(file).stat().st_size for file in given) / 1e6
            print(f"training {size:,} tokens on {text:.0f} MB: {float(output.split()[-1]):.2f} s")
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
    spawn = multiprocessing.get_context("spawn")
    for suffix in (".txt", ".jsonl", ".jsonl.gz", ".parquet"):
        path = folder / f"large{suffix}"
        # In a process of its own: a child's peak memory begins with what its parent holds.
        writer = spawn.Process(target=write_large, args=(path, text, megabytes * 1_000_000))
        writer.start()
        writer.join()
        seconds, _, peak, _ = measure([*command, path])
        rate = megabytes / seconds
        print(f"{megabytes:,} MB as {suffix:9s} peak memory {peak:6,.0f} MB, {rate:6.1f} MB/s")
        path.unlink()


def write_large(path: Path, text: str, size: int) -> None:
    """Write `size` bytes: documents of about 3 kB from `text` again and again, numbered."""
    speeches = text.split("\n\n")
    starts = range(0, len(speeches), 20)
    documents = ["\n\n".join(speeches[start : start + 20]) for start in starts]
    numbers = itertools.count()
    written = 0
    with contextlib.ExitStack() as stack:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            schema = pyarrow.schema([("text", pyarrow.string())])
            table = stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema))
        else:
            opener = gzip.open if path.suffix == ".gz" else open
            file = stack.enter_context(opener(path, "wt", encoding="utf-8", newline="\n"))
        while written < size:
            texts = [f"{next(numbers)} {document}\n" for document in documents]
            written += sum(map(len, texts))
            if path.suffix == ".parquet":
                table.write_table(pyarrow.table({"text": texts}))
            elif ".jsonl" in path.suffixes:
                file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
            else:
                file.writelines(texts)


def measure(command: list) -> tuple[float, float, float, str]:
    """Run a Python process; return its seconds, CPU seconds, peak memory in MB, and output."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=output,
            stderr=errors,
            cwd=Path(prepare.__file__).parent,
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        if status:
            raise ValueError(f"a measured process failed: {errors.read().decode()[-500:]}")
        # Linux counts kilobytes, macOS bytes.
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
        return seconds, usage.ru_utime + usage.ru_stime, peak, output.read().decode()


if __name__ == "__main__":
    run(main)
