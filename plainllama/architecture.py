"""What model.py computes: a family of Hugging Face, or an architecture of one's own.

A run is called a LLaMA, a GPT-2 and so on only if that family has all of its settings and model.py,
as a toy of a few thousand parameters, gives the family's numbers. toys.json holds these;
tests/test_architecture.py makes them with transformers.
"""

import ast
import json
import re
import zlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import model as own_model
from model import KVCache, LLaMaTransformer, ModelConfig
from plainllama.distributed import fill, materialize
from plainllama.families import FAMILIES, OWN, find_family, read_config
from plainllama.machine import shapes_of
from plainllama.settings import UserError, fits, read_json, say

TOYS = Path(__file__).with_name("toys.json")
SIZES = {  # of a toy; the constants are odd, so that it is seen where model.py uses others
    "vocab_size": 67,
    "n_layers": 4,
    "n_embd": 40,
    "n_heads": 4,
    "hidden_dim": 52,
    "max_seq_len": 96,
    "norm_eps": 0.07,
    "rope_theta": 37.0,
    "rope_low_freq_factor": 1.5,
    "rope_high_freq_factor": 3.5,
    "rope_original_seq_len": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 14,
}
PARTS = (64, 31, 1)  # of the toy's text, which a cache reads one after the other
IDS = range(0, SIZES["vocab_size"], 11)  # whose logits are compared, after each part
TOLERANCE = 1e-4  # of logits; tests/test_architecture.py derives it


class Label(NamedTuple):
    """What a model is saved as: a key of FAMILIES, or OWN and why."""

    family: str
    why: str = ""


def label_of(config: ModelConfig) -> Label:
    """Return what today's model.py makes of a shape."""
    name, why = find_family(config)
    if name == OWN:
        return Label(OWN, why)
    toy = toy_of(config)
    new = [n for n, _ in shapes_of(toy).named_parameters() if not has_place(name, n)]
    if new:
        return Label(OWN, f"model.py no longer computes a {name}: it has {grouped(new)}")
    expected = json.loads(TOYS.read_text(encoding="utf-8"))[variant(name, toy)]
    numbers, failure = toy_numbers(toy)
    apart = failure or f"logits differ by {difference(numbers, expected * 2):.1g}"
    if failure or not difference(numbers, expected * 2) <= TOLERANCE:
        return Label(OWN, f"model.py no longer computes a {name} ({apart})")
    return Label(name)


def toy_of(config: ModelConfig) -> ModelConfig:
    """Return a shape with the switches and own settings of another, and small sizes."""
    values = {each.name: getattr(config, each.name) for each in fields(ModelConfig)}
    has_wide_heads = config.head_width != config.n_embd // config.n_heads
    by_size = {
        "n_kv_heads": 2 if config.kv_heads < config.n_heads else 0,
        "head_dim": 14 if has_wide_heads and not config.use_mla else 0,
        "rope_factor": 7.0 if config.rope_factor else 0.0,
        "q_lora_rank": 20 if config.q_lora_rank else 0,
    }
    return ModelConfig(**values | SIZES | by_size)


def variant(family: str, toy: ModelConfig) -> str:
    """Return what toys.json calls a family's toy."""
    features = {
        "tied": toy.tie_embeddings,
        "grouped": toy.kv_heads < toy.n_heads,
        "wide heads": toy.head_dim > 0,
        "stretched": toy.rope_factor > 0,
        "latent queries": toy.q_lora_rank > 0,
    }
    return ", ".join([family, *(name for name, has in features.items() if has)])


def toy_weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return a parameter of a toy, float64: large, of full rank, the same on every processor."""
    index = np.arange(np.prod(shape, dtype=np.int64), dtype=np.float64)
    wave = np.sin(zlib.crc32(name.encode()) % 1000 + 0.37 * index**2)
    if len(shape) > 1:
        wave *= 2.0 / np.sqrt(shape[-1])
    else:
        wave = 0.5 * wave + (not name.endswith("bias"))
    return torch.from_numpy(wave.reshape(shape))


def toy_model(toy: ModelConfig, dtype: torch.dtype) -> LLaMaTransformer:
    """Return the toy of model.py, in eval mode."""
    model = shapes_of(toy).to(dtype)
    materialize(model, "cpu")
    for name, parameter in model.named_parameters():
        rows = toy_weight(name, parameter.shape)
        is_padded = name in ("embeddings.weight", "final_linear.weight")
        fill(parameter, rows[: toy.vocab_size] if is_padded else rows)
    return model.eval()


@cache
def toy_numbers(toy: ModelConfig) -> tuple[tuple[float, ...], str]:
    """Return logits of a toy, read whole and then by a cache; or none, and why it cannot be run.

    They are computed in float64, if model.py can be, so that no processor's rounding matters.
    """
    for dtype in (torch.float64, torch.float32):
        try:
            return tuple(run_toy(toy_model(toy, dtype))), ""
        except Exception as error:  # whatever the user's own code raises
            failure = f"a small one fails: {' '.join(str(error).split())[:100]}"
    return (), failure


@torch.no_grad()
def run_toy(model: LLaMaTransformer) -> Iterable[float]:
    """Return the logits of IDS after each of PARTS: of the whole text, then by a cache."""
    tokens = toy_tokens()
    cached = KVCache(model.config, 1, model.embeddings.weight)
    parts = [model(part, cache=cached)[0][0, -1] for part in tokens.split(PARTS, dim=1)]
    whole = model(tokens)[0][0, np.cumsum(PARTS) - 1]
    return torch.stack([*whole, *parts])[:, IDS].double().flatten().tolist()


def toy_tokens() -> torch.Tensor:
    """Return the text that a toy reads, (1, 96)."""
    n = torch.arange(sum(PARTS))[None]
    return (7 * n * n + n // 5) % SIZES["vocab_size"]


def difference(numbers: Sequence[float], expected: Sequence[float]) -> float:
    """Return how far logits lie apart at most; inf for other counts."""
    if len(numbers) != len(expected):
        return np.inf
    return float(np.abs(np.subtract(numbers, expected)).max(initial=0.0))


def has_place(family: str, parameter: str) -> bool:
    """Tell whether a family has a name for a parameter of model.py."""
    return FAMILIES[family].module(parameter.rpartition(".")[0]) != ""


def grouped(names: Iterable[str]) -> str:
    """Return names in one text: those of all blocks as one, and five at most."""
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    return ", ".join(kinds[:5] + ["..."] * (len(kinds) > 5))


def check_architecture(config: ModelConfig) -> None:
    """Say, before training, if checkpoints will be OWN; UserError for what they could not keep."""
    label = label_of(config)
    if label.family != OWN:
        return
    buffers = [n for n, buffer in shapes_of(toy_of(config)).named_buffers() if buffer.is_meta]
    if buffers:
        raise UserError(
            f"model.py has the buffers {grouped(buffers)}, which no checkpoint keeps: make them in "
            "init_rope(), as cos and sin are, or in forward()"
        )
    path = Path(own_model.__file__)
    beside = {file.stem for file in path.parent.iterdir()}
    if ours := imports(path) & beside:
        raise UserError(
            f"model.py imports {min(ours)}, which lies beside it: checkpoints have a copy of "
            "model.py alone, so that it may import installed packages alone"
        )
    say(f"{label.why}: checkpoints are plainllama's own")
    numbers, failure = toy_numbers(toy_of(config))
    half = len(numbers) // 2
    apart = difference(numbers[:half], numbers[half:])
    if failure or not apart <= TOLERANCE:
        what = failure or f"logits differ by {apart:.1g} with a cache"
        say(f"warning: sample.py will not compute what is trained: {what}")


def imports(path: Path) -> set[str]:
    """Return the first name of each module that a file imports, of relative imports as well."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            names += [node.module] if node.module else [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def own_files(config: ModelConfig) -> dict[str, bytes]:
    """Return what transformers needs of a model that will be OWN, by name: model.py as it is now.

    Nothing of ours runs that copy.
    """
    if label_of(config).family != OWN:
        return {}
    paths = Path(own_model.__file__), Path(__file__).with_name("modeling_plainllama.py")
    return {path.name: path.read_bytes() for path in paths}


def require_family(directory: Path, lacking: str) -> str:
    """Return the family of a directory; UserError, with what the stage lacks for others, if OWN."""
    config = read_config(directory)
    if read_json(directory / "config.json")["model_type"] == OWN:
        why = label_of(config).why or "by another model.py than today's"
        raise UserError(f"{directory} is an architecture of its own ({why}): {lacking}")
    return find_family(config)[0]


def differences(
    directory: Path, model_type: str, config: ModelConfig, found: Set[str], expected: Set[str]
) -> list[str]:
    """Return in what a directory is not of today's model.py, whose tensors are `expected`."""
    texts, label = [], label_of(config)
    if model_type != OWN and label.family == OWN:
        texts.append(f"{directory} is a {model_type}, but {label.why}")
    new, gone = expected - found, found - expected - {"lm_head.weight"}
    if new:
        texts.append(f"{directory} lacks {len(new)} tensors that model.py has: {grouped(new)}")
    if gone:
        texts.append(f"{directory} has {len(gone)} tensors that model.py lacks: {grouped(gone)}")
    if model_type == OWN and not texts:
        numbers = read_json(directory / "config.json").get("toy")
        if not fits(numbers, list) or not all(fits(number, float) for number in numbers):
            raise UserError(f"{directory / 'config.json'} is damaged: toy={str(numbers)[:40]}")
        apart = difference(toy_numbers(toy_of(config))[0], numbers)
        if not apart <= TOLERANCE:
            texts.append(
                f"{directory} has the parameters that model.py has, but today's computes other "
                f"numbers with them (logits differ by {apart:.1g})"
            )
    return texts
