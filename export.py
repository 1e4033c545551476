"""Write a checkpoint as one .gguf file, which llama.cpp, Ollama and what builds on them run.

Reads what sample.py reads, of the families in EXPORTED: every out/RUN/step_NNNNNN of train.py,
and other Hugging Face directories. The file holds weights, settings and tokenizer.

    python export.py --ckpt=out/tiny
    python export.py --ckpt=out/tiny --dtype=q8_0 --out=tiny.gguf
    echo "FROM ./tiny.gguf" > Modelfile && ollama create tiny && ollama run tiny "ROMEO:"
"""

from __future__ import annotations

import plainllama.startup  # noqa: F401 isort: skip (first: see there)

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

try:
    import gguf
except ImportError:
    gguf = None

from model import ModelConfig, rope_frequencies
from plainllama.architecture import require_family
from plainllama.checkpoint import find_checkpoint
from plainllama.families import ROPE_KEYS, read_config
from plainllama.huggingface import load_model, tokenizer_of
from plainllama.settings import HALF, load, write_aside
from plainllama.tensors import stored_tensors
from plainllama.terminal import UserError, command, run_main, say
from plainllama.tokenizer import Tokenizer

EXPORTED = ("llama", "qwen2", "qwen3", "gpt2")  # families, which llama.cpp calls the same
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
PROBE = "it's CAN'T McCoy 12345 ½,/\n\n  é_a\r\n\t x"
SPLITTERS = {  # how PROBE is split into words -> llama.cpp's name for this way
    "it|'s| CAN|'|T| McCoy| 12345| ½|,/|\n\n | é|_|a|\r\n\t| x": "gpt-2",
    "it|'s| CAN|'T| McCoy| |123|45| |½|,/\n\n| | é|_a|\r\n|\t| x": "llama-bpe",
    "it|'s| CAN|'T| McCoy| |1|2|3|4|5| |½|,/\n\n| | é|_a|\r\n|\t| x": "qwen2",
    "it's| CAN'T| Mc|Coy| |123|45| |½|,/\n\n| | é|_a|\r\n|\t| x": "gpt-4o",
    "it|'s| CAN|'|T| McCoy| |1|2|3|4|5| |½|,/|\n\n | é|_|a|\r\n\t| x": "smollm",
}


@dataclass(frozen=True)
class ExportConfig:
    """Write a checkpoint as one .gguf file, for llama.cpp and Ollama."""

    ckpt: str = ""  # a Hugging Face directory, or a run; default: the run in out/ written last
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # matrices; q8_0: 8 bits
    out: str = ""  # file to write; default: model-DTYPE.gguf beside the weights
    overwrite: bool = False  # replace a file that is there


def main() -> None:
    run(load(ExportConfig))


def run(config: ExportConfig) -> None:
    """Write the file, and say how llama.cpp and Ollama run it."""
    if gguf is None:
        install = command("-m", "pip", "install", "gguf==0.19.0")
        raise UserError(f"export.py needs the package gguf: {install}")
    directory = find_checkpoint(config.ckpt)
    out = Path(config.out or directory / f"model-{config.dtype}.gguf")
    if out.exists() and not config.overwrite:
        raise UserError(f"{out} exists; add --overwrite, or choose another --out")
    with write_aside(out) as aside:
        write_gguf(directory, aside, DTYPES[config.dtype])
    say(f"wrote {out}, {out.stat().st_size / 1e6:,.1f} MB, from {directory}")
    say(f"next: {shlex.join(['llama-cli', '-m', str(out), '-p', '...'])}")
    source = shlex.quote(f"FROM {out.resolve()}")
    say(f"  or: echo {source} > Modelfile && ollama create mine && ollama run mine")


def write_gguf(directory: Path, path: Path, dtype: str) -> None:
    """Write a Hugging Face directory to `path`, its matrices as llama.cpp's `dtype`."""
    known = ", ".join(EXPORTED)
    config = read_config(directory)
    family = require_family(directory, f"llama.cpp can run {known}, and not this one")
    if family not in EXPORTED:
        raise UserError(f"{directory} is a {family}, and only {known} can be exported")
    tensors = stored_tensors(load_model(directory))  # first: they say if config.json is true
    writer = gguf.GGUFWriter(path, family)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    place = directory.resolve()
    writer.add_name(HALF.sub("?", f"{place.parent.name}-{place.name}"))
    writer.add_file_type(gguf.LlamaFileType[("ALL_" if dtype == "F32" else "MOSTLY_") + dtype])
    add_config(writer, config)
    add_tokenizer(writer, directory, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.n_layers)
    for theirs, stored in tensors.items():
        name = names.get_name(theirs, (".weight", ".bias"))
        tensor = stored.read().T if stored.transposed else stored.read()
        if family == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
            # Of each head, llama.cpp rotates rows 2i and 2i + 1, and not i and i + D/2.
            halves = tensor.unflatten(0, (-1, 2, config.head_width // 2))
            tensor = halves.transpose(1, 2).flatten(0, 2)
        add_tensor(writer, name, tensor, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    except OSError as error:
        if error.filename:
            raise
        # It is NumPy's, which names no file.
        raise UserError(f"{path} cannot be written ({error}): is the disk full?") from error


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, dtype: str) -> None:
    """Add a matrix as `dtype`, or as F16 if Q8_0's blocks do not fill its rows; others as F32."""
    kind = gguf.GGMLQuantizationType[dtype]
    if tensor.dim() == 1 or name == "position_embd.weight":
        kind = gguf.GGMLQuantizationType.F32
    elif tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] != 0:
        kind = gguf.GGMLQuantizationType.F16
    with np.errstate(over="ignore"):  # it is told in a line
        values = gguf.quantize(tensor.contiguous().numpy(), kind)
    if not np.isfinite(gguf.dequantize(values, kind)).all():
        raise UserError(f"{name} has numbers beyond {kind.name}: --dtype=bfloat16")
    writer.add_tensor(name, values, raw_dtype=kind)


def add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
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
        shape = config.head_width, config.rope_theta, "cpu"
        stretch = tuple(getattr(config, key) for key in ROPE_KEYS)
        divisors = rope_frequencies(*shape) / rope_frequencies(*shape, stretch)
        writer.add_tensor("rope_freqs.weight", divisors.numpy())


def add_tokenizer(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Add tokenizer.json, and the special tokens and chat template of the files beside it."""
    tokenizer = tokenizer_of(directory)
    special = special_vocab(directory, tokenizer)
    last = max(tokenizer.vocab_size - 1, *special.special_token_ids.values())
    if last >= vocab_size:
        raise UserError(f"{directory}: token {last} does not fit the model's {vocab_size} tokens")
    tokens = [f"[PAD{id}]" for id in range(vocab_size)]
    types = [gguf.TokenType.UNUSED] * vocab_size
    for text, id in tokenizer.vocabulary.items():
        is_byte = not tokenizer.byte_level and re.fullmatch("<0x[0-9A-F]{2}>", text)
        tokens[id] = text
        types[id] = gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL
    for id, token in tokenizer.added.items():
        types[id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    if tokenizer.byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter_name(tokenizer, directory))
        end = tokens[tokenizer.end_of_text]
        special.merges = special.merges or [f"{end} {end}"]  # one must be; this one never applies
    else:
        scores = sentencepiece_scores(tokenizer, special.merges, directory)
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([scores.get(text, 0.0) for text in tokens])
        first = tokens[tokenizer.encode("a")[0]]
        writer.add_add_space_prefix(first.startswith("\u2581"))
        special.load_merges = False
        special.merges = []
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special.add_to_gguf(writer, quiet=True)


def special_vocab(directory: Path, tokenizer: Tokenizer) -> gguf.SpecialVocab:
    """Return merges, chat template and the ids that begin, end and pad a text."""
    ends = tokenizer.ends
    special = gguf.SpecialVocab(directory, True, ("bos", "eos", "unk", "pad"))
    ids = special.special_token_ids
    if ids.get("eos") not in ends:
        ids["eos"] = ends[0]
    others = [id for id in ends if id != ids["eos"]]
    if others:  # llama.cpp stops at one more, and at those that it knows by name
        ids["eot"] = others[0]
    ids["bos"] = (*tokenizer.begin_of_text, ids.get("bos", ids["eos"]))[0]
    special.add_special_token = {"bos": bool(tokenizer.begin_of_text)}
    template = directory / "chat_template.jinja"
    if template.is_file():  # which transformers prefers to the one in tokenizer_config.json
        special.chat_template = template.read_text(encoding="utf-8")
    return special


def splitter_name(tokenizer: Tokenizer, directory: Path) -> str:
    """Return llama.cpp's name for the way in which a byte-level tokenizer splits text."""
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(PROBE)
    split = "|".join(PROBE[start:end] for _, (start, end) in words)
    if split not in SPLITTERS:
        where = f"{directory}/tokenizer.json"
        raise UserError(f"{where} splits text in a way that llama.cpp has no name for: {split!r}")
    return SPLITTERS[split]


def sentencepiece_scores(
    tokenizer: Tokenizer, merges: list[str], directory: Path
) -> dict[str, float]:
    """Return the rank of each piece, negative: llama.cpp merges the highest score first.

    It merges any two neighbours that make a piece, so that the file must list all of these.
    """
    vocabulary = tokenizer.settings["model"]["vocab"].keys()
    pieces = vocabulary - {token.content for token in tokenizer.added.values()}
    merged = [piece for merge in merges if (piece := merge.replace(" ", "")) in pieces]
    halves = (
        piece[:cut] in vocabulary and piece[cut:] in vocabulary
        for piece in pieces
        for cut in range(1, len(piece))
    )
    if sum(halves) != len(merged):
        where = f"{directory}/tokenizer.json"
        raise UserError(f"{where}: llama.cpp would merge other tokens: it is not SentencePiece's")
    return {piece: -float(rank) for rank, piece in enumerate(merged)}


if __name__ == "__main__":
    run_main(main)
