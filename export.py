"""Write a checkpoint as one .gguf file, which llama.cpp, Ollama and what builds on them run.

Reads what sample.py reads, of the families llama, qwen3 and gpt2: every out/RUN/step_NNNNNN of
train.py, and other Hugging Face directories. The file holds weights, settings and tokenizer.

    python export.py --ckpt=out/tiny --format=gguf
    python export.py --ckpt=out/tiny --format=gguf --dtype=q8_0 --out=tiny.gguf
    echo "FROM ./tiny.gguf" > Modelfile && ollama create tiny && ollama run tiny "ROMEO:"
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from tqdm import tqdm

from model import ModelConfig, rope_frequencies
from plainllama.checkpoint import find_checkpoint
from plainllama.families import ROPE_KEYS, family_of, read_config
from plainllama.huggingface import (
    chat_template,
    end_of_text_ids,
    load_model,
    stored_tensors,
    text_settings,
)
from plainllama.settings import UserError, load, read_json, run_main
from plainllama.tokenizer import PATTERNS, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

EXPORTED = ("llama", "qwen3", "gpt2")  # families, which llama.cpp calls the same
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
SPLITTERS = {  # how text is split into words -> llama.cpp's name for it
    PATTERNS["gpt2"]: "gpt-2",
    PATTERNS["gpt4"]: "llama-bpe",
    PATTERNS["cl100k"]: "llama-bpe",  # but for white space at the end of a text
    PATTERNS["qwen2"]: "qwen2",
    PATTERNS["o200k"]: "gpt-4o",
    PATTERNS["digits"]: "smollm",
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint in another format."""

    ckpt: str = ""  # a Hugging Face directory, or a run; default: the run in out/ written last
    format: Literal["gguf"] = "gguf"  # gguf: one file for llama.cpp and Ollama
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # of the matrices; q8_0: 8
    out: str = ""  # file to write; default: model-DTYPE.gguf beside the weights
    overwrite: bool = False  # replace a file that is there


def main() -> None:
    config = load(ExportConfig)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise UserError("export.py needs the package gguf: pip install gguf==0.19.0") from None
    directory = find_checkpoint(config.ckpt)
    out = Path(config.out or directory / f"model-{config.dtype}.gguf")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists; add --overwrite, or choose another --out")
    aside = out.with_name(out.name + ".partial")
    try:
        write_gguf(directory, aside, DTYPES[config.dtype])
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    print(f"wrote {out}, {out.stat().st_size / 1e6:,.1f} MB, from {directory}")
    print(f'next: llama-cli -m {out} -p "..."')
    place = out if out.is_absolute() else f"./{out}"
    print(f"  or: echo 'FROM {place}' > Modelfile")
    print("      ollama create mine && ollama run mine")


def write_gguf(directory: Path, path: Path, dtype: str) -> None:
    """Write a Hugging Face directory to `path`, its matrices as llama.cpp's `dtype`."""
    import gguf

    config = read_config(directory)
    family = family_of(config)
    if family not in EXPORTED:
        known = ", ".join(EXPORTED)
        raise UserError(f"{directory} is a {family}, and only {known} can be exported")
    writer = gguf.GGUFWriter(path, family, use_temp_file=True)
    writer.add_name(f"{directory.resolve().parent.name}-{directory.resolve().name}")
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if dtype == "F32" else "MOSTLY_") + dtype])
    add_config(writer, config)
    add_tokenizer(writer, directory, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.n_layers)
    stored = stored_tensors(load_model(directory))
    for theirs, tensor in tqdm(stored.items(), unit=" tensors", disable=None, leave=False):
        name = names.get_name(theirs, (".weight", ".bias"))
        values = tensor.read().T if tensor.transposed else tensor.read()
        if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Of each head, llama.cpp rotates rows 2i and 2i + 1 together, and not i and i + D/2.
            halves = values.unflatten(0, (-1, 2, config.head_width // 2))
            values = halves.transpose(1, 2).flatten(0, 2)
        add_tensor(writer, name, values.numpy(), dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tensor(writer: GGUFWriter, name: str, values: np.ndarray, dtype: str) -> None:
    """Add a matrix as `dtype`, if its rows are long enough; what is no matrix stays F32."""
    import gguf

    if values.ndim == 1 or name == "position_embd.weight":
        dtype = "F32"
    elif dtype == "Q8_0" and values.shape[1] % 32 != 0:
        dtype = "F16"
    kind = gguf.GGMLQuantizationType[dtype]
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind)


def add_config(writer: GGUFWriter, config: ModelConfig) -> None:
    """Add the shape of the model, in llama.cpp's words."""
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_width)
    writer.add_head_count(config.n_heads)
    if config.position == "learned":
        writer.add_layer_norm_eps(config.norm_eps)
        return
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    writer.add_rope_dimension_count(config.head_width)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor:
        if config.qk_norm:
            raise UserError("rope_factor of a qwen3 cannot be exported: llama.cpp would ignore it")
        shape = config.head_width, config.rope_theta, "cpu"
        stretch = tuple(getattr(config, key) for key in ROPE_KEYS)
        divisors = rope_frequencies(*shape) / rope_frequencies(*shape, stretch)
        add_tensor(writer, "rope_freqs.weight", divisors.numpy(), "F32")


def add_tokenizer(writer: GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Add tokenizer.json, and the special tokens and chat template of tokenizer_config.json."""
    import gguf

    path = directory / "tokenizer.json"
    tokenizer, content = load_tokenizer(path), read_json(path)
    tokens = {id: (text, gguf.TokenType.NORMAL) for text, id in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        kind = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
        tokens[token["id"]] = token["content"], kind
    if max(tokens) >= vocab_size:
        raise UserError(f"{path}: token {max(tokens)} does not fit the model's {vocab_size} tokens")
    unused = {id: (f"[PAD{id}]", gguf.TokenType.UNUSED) for id in range(vocab_size)}
    texts, kinds = zip(*(unused | tokens).values(), strict=True)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLITTERS[tokenizer.pattern])
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    ends, first = end_of_text_ids(directory, tokenizer), tokenizer.begin_of_text[:1]
    if not all(0 <= id < vocab_size for id in ends):
        raise UserError(f"{directory}: token {ends} does not fit the model's {vocab_size} tokens")
    says = text_settings(directory, "tokenizer_config.json")
    words = {key: says.get(f"{key}_token") for key in ("bos", "eos", "pad")}
    words = {
        key: word["content"] if isinstance(word, dict) else word for key, word in words.items()
    }
    known = tokenizer.special_tokens
    named = {key: known[word] for key, word in words.items() if word in known}
    end = named["eos"] if named.get("eos") in ends else ends[0]
    others = [id for id in ends if id != end]
    writer.add_token_merges(merges or [f"{texts[end]} {texts[end]}"])  # one must be; never applies
    writer.add_bos_token_id(first[0] if first else named.get("bos", end))
    writer.add_add_bos_token(bool(first))
    writer.add_eos_token_id(end)
    if others:  # llama.cpp stops at one more, and at those that it knows by name
        writer.add_eot_token_id(others[0])
    if "pad" in named:
        writer.add_pad_token_id(named["pad"])
    if template := chat_template(directory):
        writer.add_chat_template(template)


if __name__ == "__main__":
    run_main(main)
