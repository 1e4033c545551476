"""For tools/bench.py: llama.cpp's llama-bench decodes a model of ours, from export.py's files."""

import os
import subprocess
import sys
from pathlib import Path

from model import LLaMaTransformer, ModelConfig
from plainllama.huggingface import save_model, side_files
from plainllama.settings import UserError
from plainllama.tokenizer import find_tokenizer, save_tokenizer

EXPORT = Path(__file__).resolve().parents[1] / "export.py"
DTYPES = ("float32", "bfloat16", "q8_0")
DECODE = """
import json, subprocess, sys
result = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, check=True)
print("tok/s:", json.loads(result.stdout)[0]["avg_ts"])
"""


def llama_cpp_commands(
    program: Path, folder: Path, shape: ModelConfig, n_tokens: int
) -> dict[str, list[str | Path | int]]:
    """Return the command of each format; its random weights are written to `folder`.

    `program` is llama-bench, which decodes `n_tokens` on all cores after one to warm up.
    """
    tokenizer = find_tokenizer("byte")  # with ids that stand for nothing up to vocab_size
    if not program.is_file():
        raise UserError(f"llama_bench={program} is no file; llama.cpp's build/bin/ has it")
    if shape.vocab_size < tokenizer.n_vocab:
        least = f"at least vocab_size={tokenizer.n_vocab}"
        raise UserError(f"vocab_size={shape.vocab_size}: llama_bench needs {least}")
    save_model(LLaMaTransformer(shape), folder, files=side_files(shape, tokenizer))
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    commands = {}
    for dtype in DTYPES:
        path = folder / f"{dtype}.gguf"
        export = [EXPORT, f"--ckpt={folder}", f"--dtype={dtype}", f"--out={path}"]
        if subprocess.run([sys.executable, *export], stdout=subprocess.DEVNULL).returncode:
            raise UserError("llama_bench is given what export.py writes, which failed")
        given = ["-m", path, "-p", 0, "-n", n_tokens, "-t", os.cpu_count(), "-r", 1, "-o", "json"]
        commands[f"llama.cpp, {dtype}"] = [sys.executable, "-c", DECODE, program, *given]
    return commands
