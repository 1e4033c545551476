"""What model.py computes: a family of Hugging Face, or an architecture of one's own.

A run is called a LLaMA, a GPT-2 and so on only if that family has all of its settings and model.py,
as a toy of some 50,000 parameters, gives the family's numbers. toys.json holds the toy's sizes,
its odd constants and these numbers; tests/test_architecture.py makes them with transformers.
"""

import ast
import json
import re
import zlib
from collections.abc import Iterable, Sequence, Set
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import torch

import model as own_model
from model import KVCache, LLaMaTransformer, ModelConfig
from plainllama.distributed import fill, materialize
from plainllama.families import FAMILIES, OWN, base_of, find_family, read_config
from plainllama.machine import shapes_of
from plainllama.settings import read_json
from plainllama.terminal import UserError, say

TOYS = Path(__file__).with_name("toys.json")
PARTS = (64, 31, 1)  # of the toy's text, which a cache reads one after the other
TOLERANCE = 1e-4  # of logits; tests/test_architecture.py derives it


def label_of(config: ModelConfig) -> tuple[str, str]:
    """Return the family that a shape is in today's model.py, and ""; or OWN, and why."""
    family, why = find_family(config)
    if family == OWN:
        return OWN, why
    toy = toy_of(config)
    names = [name for name, _ in shapes_of(toy).named_parameters()]
    new = [name for name in names if not FAMILIES[family].module(name.rpartition(".")[0])]
    if new:
        return OWN, f"model.py no longer computes a {family}: it has {grouped(new)}"
    numbers, failure = toy_numbers(toy)
    expected = json.loads(TOYS.read_text(encoding="utf-8"))[variant(family, toy)]
    apart = difference(numbers, expected * 2)
    if apart <= TOLERANCE:
        return family, ""
    what = failure or f"logits differ by {apart:.1g}"
    return OWN, f"model.py no longer computes a {family} ({what})"


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
    sizes = json.loads(TOYS.read_text(encoding="utf-8"))["sizes"]
    return ModelConfig(**values | sizes | by_size)


def variant(family: str, toy: ModelConfig) -> str:
    """Return what toys.json calls a family's toy."""
    keys = ("tie_embeddings", "n_kv_heads", "head_dim", "rope_factor", "q_lora_rank")
    return " ".join([family, *(f"{key}={getattr(toy, key)}" for key in keys)])


def toy_weight(name: str, shape: Sequence[int]) -> torch.Tensor:
    """Return a parameter of a toy, float64: large, of full rank, the same on every processor."""
    index = np.arange(np.prod(shape, dtype=np.int64), dtype=np.float64)
    wave = np.sin(zlib.crc32(name.encode()) % 1000 + 0.37 * index**2).reshape(shape)
    if len(shape) > 1:
        return torch.from_numpy(2 / np.sqrt(shape[-1]) * wave)
    return torch.from_numpy(0.5 * wave + (not name.endswith("bias")))


def toy_model(toy: ModelConfig, dtype: torch.dtype) -> LLaMaTransformer:
    """Return the toy of model.py, in eval mode."""
    model = shapes_of(toy).to(dtype)
    materialize(model, "cpu")
    for name, parameter in model.named_parameters():
        rows = toy_weight(name, parameter.shape)
        for latent, rank in (("wq_a", toy.q_lora_rank), ("wkv_a", toy.kv_lora_rank)):
            if name.endswith(f"{latent}.weight"):  # so small that the eps of its norm counts
                rows[:rank] *= 1e-3
        is_padded = name in ("embeddings.weight", "final_linear.weight")
        fill(parameter, rows[: toy.vocab_size] if is_padded else rows)
    return model.eval()


@cache
def toy_numbers(toy: ModelConfig) -> tuple[list[float], str]:
    """Return logits of a toy, and ""; or none, and why it cannot be run.

    They are computed in float64, if model.py can be, so that no processor's rounding matters.
    """
    for dtype in (torch.float64, torch.float32):
        try:
            return run_toy(toy_model(toy, dtype)), ""
        except Exception as error:  # whatever the user's own code raises
            failure = f"a small one fails: {' '.join(str(error).split())[:100]}"
    return [], failure


@torch.no_grad()
def run_toy(model: LLaMaTransformer) -> list[float]:
    """Return every 11th logit after each of PARTS: of the whole text, then by a cache."""
    cache, tokens = KVCache(model.config, 1, model.embeddings.weight), toy_tokens(model.config)
    parts = [model(part, cache=cache)[0][0, -1] for part in tokens.split(PARTS, dim=1)]
    whole = model(tokens)[0][0, np.cumsum(PARTS) - 1]
    return torch.stack([*whole, *parts])[:, ::11].double().flatten().tolist()


def toy_tokens(toy: ModelConfig) -> torch.Tensor:
    """Return the text that a toy reads, (1, T)."""
    n = torch.arange(sum(PARTS))[None]
    return (7 * n * n + n // 5) % toy.vocab_size


def difference(numbers: Sequence[float], expected: Sequence[float]) -> float:
    """Return how far logits lie apart at most; inf if they cannot be compared."""
    try:
        return float(np.abs(np.subtract(numbers, expected)).max(initial=0.0))
    except (TypeError, ValueError):
        return np.inf


def grouped(names: Iterable[str]) -> str:
    """Return names in one text: those of all blocks as one, and five at most."""
    kinds = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
    return ", ".join(kinds[:5] + ["..."] * (len(kinds) > 5))


def check_architecture(config: ModelConfig) -> None:
    """Say, before training, if checkpoints will be OWN; UserError for what they could not keep."""
    family, why = label_of(config)
    if family != OWN:
        return
    toy, path = toy_of(config), Path(own_model.__file__)
    buffers = [name for name, buffer in shapes_of(toy).named_buffers() if buffer.is_meta]
    if buffers:
        raise UserError(
            f"model.py has the buffers {grouped(buffers)}, which no checkpoint keeps: make them in "
            "init_rope(), as cos and sin are, or in forward()"
        )
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or each.name for node in imports for each in node.names}
    beside = {file.stem for file in path.parent.iterdir()}
    if ours := {name.partition(".")[0] for name in names} & beside:
        raise UserError(
            f"model.py imports {min(ours)}, which lies beside it: a checkpoint has a copy of "
            "model.py, which may import installed packages alone"
        )
    say(f"{why}: checkpoints are plainllama's own")
    numbers, failure = toy_numbers(toy)
    apart = difference(*np.split(np.array(numbers), 2))
    if failure or not apart <= TOLERANCE:
        what = failure or f"logits differ by {apart:.1g} with a cache"
        say(f"warning: sample.py will not compute what is trained: {what}")


def own_files(config: ModelConfig) -> dict[str, bytes]:
    """Return what transformers needs to run a model that is OWN, by name: model.py as it is now."""
    if label_of(config)[0] != OWN:
        return {}
    paths = Path(own_model.__file__), Path(__file__).with_name("modeling_plainllama.py")
    return {path.name: path.read_bytes() for path in paths}


def require_family(directory: Path, lacking: str) -> str:
    """Return the family of a directory; UserError, with what the stage lacks for others, if OWN."""
    config = read_config(directory)
    if read_json(base_of(directory) / "config.json")["model_type"] == OWN:
        why = label_of(config)[1] or "by another model.py than today's"
        raise UserError(f"{directory} is an architecture of its own ({why}): {lacking}")
    return find_family(config)[0]


def differences(
    directory: Path, model_type: str, config: ModelConfig, found: Set[str], expected: Set[str]
) -> list[str]:
    """Return in what a directory is not of today's model.py, whose tensors are `expected`."""
    texts, (family, why) = [], label_of(config)
    if model_type != OWN and family == OWN:
        texts.append(f"is a {model_type}, but {why}")
    new, gone = expected - found, found - expected - {"lm_head.weight"}
    if new:
        texts.append(f"lacks {len(new)} tensors that model.py has: {grouped(new)}")
    if gone:
        texts.append(f"has {len(gone)} tensors that model.py lacks: {grouped(gone)}")
    if model_type == OWN and not texts:
        numbers = read_json(directory / "config.json").get("toy")
        apart = difference(toy_numbers(toy_of(config))[0], numbers)
        if not apart <= TOLERANCE:
            texts.append(
                "has the parameters of today's model.py, which computes other numbers with them "
                f"(logits differ by {apart:.1g})"
            )
    return [f"{directory} {text}" for text in texts]
