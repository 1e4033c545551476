"""Write a checkpoint as one .gguf file, which llama.cpp, Ollama and what builds on them run.

Reads what sample.py reads, of the families llama, qwen3 and gpt2: every out/RUN/step_NNNNNN of
train.py, and other Hugging Face directories. The file holds weights, settings and tokenizer.

    python export.py --ckpt=out/tiny --format=gguf
    python export.py --ckpt=out/tiny --format=gguf --dtype=q8_0 --out=tiny.gguf
    echo "FROM ./tiny.gguf" > Modelfile && ollama create tiny && ollama run tiny "ROMEO:"
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from checkpoint import load_model, read_config, read_json, stored_tensors
from config import load, run
from model import ModelConfig
from sample import find_checkpoint
from tokenizer import PATTERNS, load_tokenizer

try:
    import gguf
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, LlamaFileType, TokenType
except ImportError:
    print("error: export.py needs the package gguf: pip install gguf==0.19.0", file=sys.stderr)
    sys.exit(2)

FAMILIES = {"llama": MODEL_ARCH.LLAMA, "qwen3": MODEL_ARCH.QWEN3, "gpt2": MODEL_ARCH.GPT2}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
SPLITTERS = {  # how text is split into words -> llama.cpp's name for it
    PATTERNS["gpt2"]: "gpt-2",
    PATTERNS["gpt4"]: "llama-bpe",
    PATTERNS["qwen2"]: "qwen2",
    PATTERNS["o200k"]: "gpt-4o",
    PATTERNS["digits"]: "smollm",
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint in another format: python export.py [--key=value ...]."""

    ckpt: str = ""
    """A Hugging Face directory, or a run (its newest step); default: the newest run in out/."""
    format: Literal["gguf"] = "gguf"
    """gguf: one file for llama.cpp and Ollama."""
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"
    """Format of the matrices; q8_0: 8 bits a weight, and a scale for every 32."""
    out: str = ""
    """File to write; default: model-DTYPE.gguf beside the weights."""


def main() -> None:
    config = load(ExportConfig)
    directory = find_checkpoint(config.ckpt)
    out = Path(config.out or directory / f"model-{config.dtype}.gguf")
    aside = out.with_name(out.name + ".partial")
    try:
        write_gguf(directory, aside, DTYPES[config.dtype])
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    print(f"wrote {out}, {out.stat().st_size / 1e6:,.1f} MB, from {directory}")


def write_gguf(directory: Path, path: Path, dtype: str) -> None:
    """Write a Hugging Face directory to `path`, its matrices as llama.cpp's `dtype`."""
    config = read_config(directory)
    if config.family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"{directory} is a {config.family}, and only {known} can be exported")
    writer = GGUFWriter(path, config.family, use_temp_file=True)
    writer.add_file_type(LlamaFileType[("ALL_" if dtype == "F32" else "MOSTLY_") + dtype])
    add_config(writer, config)
    add_tokenizer(writer, directory, config.vocab_size)
    names = gguf.get_tensor_name_map(FAMILIES[config.family], config.n_layers)
    stored = stored_tensors(load_model(directory))
    for theirs, tensor in tqdm(stored.items(), unit=" tensors", disable=None, leave=False):
        name = names.get_name(theirs, (".weight", ".bias"))
        values = tensor.read().T if tensor.transposed else tensor.read()
        if config.family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Of each head, llama.cpp rotates rows 2i and 2i + 1 together, and not i and i + D/2.
            halves = values.unflatten(0, (-1, 2, config.head_dim // 2))
            values = halves.transpose(1, 2).flatten(0, 2)
        add_tensor(writer, name, values.numpy(), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    """Add a matrix as `dtype`, if its rows are long enough; what is no matrix stays F32."""
    if values.ndim == 1 or name == "position_embd.weight":
        dtype = "F32"
    elif dtype == "Q8_0" and values.shape[1] % 32 != 0:
        dtype = "F16"
    kind = GGMLQuantizationType[dtype]
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def add_config(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add the shape of the model, in llama.cpp's words."""
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    if config.family == "gpt2":
        return writer.add_layer_norm_eps(config.norm_eps)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor:
        if config.family == "qwen3":
            raise ValueError("rope_factor of a qwen3 cannot be exported: llama.cpp would ignore it")
        exponents = np.arange(0, config.head_dim, 2) / config.head_dim
        turns = config.rope_original_seq_len / (2 * np.pi * config.rope_theta**exponents)
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        kept = ((turns - low) / (high - low)).clip(0, 1)
        stretch = 1 / (kept + (1 - kept) / config.rope_factor)
        add_tensor(writer, "rope_freqs.weight", stretch, "F32")


def add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Add tokenizer.json, and the special tokens and chat template of tokenizer_config.json."""
    path = directory / "tokenizer.json"
    tokenizer, content = load_tokenizer(path), read_json(path)
    tokens = {id: (text, TokenType.NORMAL) for text, id in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        kind = TokenType.CONTROL if token.get("special") else TokenType.USER_DEFINED
        tokens[token["id"]] = token["content"], kind
    if max(tokens) >= vocab_size:
        raise ValueError(
            f"{path}: token {max(tokens)} does not fit the model's {vocab_size} tokens"
        )
    unused = {id: (f"[PAD{id}]", TokenType.UNUSED) for id in range(vocab_size)}
    texts, kinds = zip(*(unused | tokens).values(), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITTERS[tokenizer._pat_str])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    special = gguf.SpecialVocab(directory, load_merges=True, n_vocab=vocab_size)
    end, first = tokenizer.eot_token, tokenizer.begin_of_text[:1]
    special.merges = special.merges or [f"{texts[end]} {texts[end]}"]  # one must be; never applies
    special.add_special_token = {"bos": bool(first)}
    special.special_token_ids = {"bos": end, "eos": end} | special.special_token_ids
    if first:
        special.special_token_ids["bos"] = first[0]
    special.add_to_gguf(writer, quiet=True)


if __name__ == "__main__":
    run(main)
