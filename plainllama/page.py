"""All that the page shows of one text: what visualize.py computes for models too large for it.

page/model.js computes the same, in the same form, for any text; this is what it is checked against.

Shapes: T time, C n_embd, H heads, K key/value heads, D head dim, Dv width of a head's values.
"""

import base64
import functools
import gzip
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Context, LLaMaTransformer
from plainllama.tokenizer import Tokenizer

ROUNDING = {
    "fp16": "Each weight is rounded to the nearest 16-bit float, which changes it by at most "
    "0.05% (weights below 0.00006 by at most 0.00000003).",
    "int8": "Each row of a matrix is rounded to whole numbers from -127 to 127 times a scale, "
    "which changes a weight by at most 0.4% of the row's largest; vectors are 16-bit floats.",
    "trace": "Computed by PyTorch from the 32-bit weights; what is shown is rounded to 16-bit "
    "floats, logits after the largest of their position was subtracted.",
}


def pack(arrays: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], str]:
    """Return where each array lies, and all of them as base64 of gzip.

    The first bytes of all numbers of an array come first, then the second ones, and so on: those
    with the exponents are alike, and compress.
    """
    table, parts, offset = [], [], 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        planes = flat.view(np.uint8).reshape(flat.size, flat.itemsize).T
        parts.append(planes.tobytes())
        table.append({"name": name, "dtype": flat.dtype.name, "shape": array.shape})
        table[-1]["offset"] = offset
        offset += flat.nbytes
    data = gzip.compress(b"".join(parts), compresslevel=6, mtime=0)
    return table, base64.b64encode(data).decode()


def weights(model: LLaMaTransformer) -> dict[str, Tensor]:
    """Return the parameters by name, without padding rows and tied twins."""
    V, padded = model.config.vocab_size, ("embeddings.weight", "final_linear.weight")
    return {
        name: parameter.detach()[: V if name in padded else None]
        for name, parameter in model.named_parameters()
    }


def rounded(model: LLaMaTransformer, format: str) -> dict[str, np.ndarray]:
    """Return the weights as they are written: float16, or int8 rows with NAME.scale beside them."""
    arrays = {}
    for name, weight in weights(model).items():
        if format == "int8" and weight.dim() == 2:
            scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (rows)
            arrays[name] = (weight / scale[:, None]).round().to(torch.int8).numpy()
            arrays[f"{name}.scale"] = scale.numpy()
        else:
            arrays[name] = weight.clamp(-65504, 65504).half().numpy()
    return arrays


def describe_tokenizer(tokenizer: Tokenizer, end_of_text: list[int]) -> dict[str, Any]:
    """Return what page/tokenizer.js needs to encode as tiktoken does."""
    ranks = tokenizer.ranks
    tokens: list[str | None] = [None] * (max(ranks.values()) + 1)
    for token, rank in ranks.items():
        tokens[rank] = base64.b64encode(token).decode()
    pattern, classes = to_javascript(tokenizer.pattern)
    return {
        "pattern": pattern,
        "classes": classes,
        "tokens": tokens,
        "added": [asdict(token) for token in tokenizer.vocabulary.added],
        "nfc": tokenizer.nfc,
        "begin_of_text": list(tokenizer.begin_of_text),
        "end_of_text": end_of_text,
    }


def to_javascript(pattern: str) -> tuple[str, dict[str, str]]:
    r"""Return the pattern as a JavaScript regular expression, and its character classes.

    Browsers know other versions of Unicode than tiktoken, so that tiktoken itself is asked which
    characters \p{L}, \p{N} and the like are. \s differs too: \p{White_Space} is what it means.
    """
    names = sorted(set(re.findall(r"\\p\{(\w+)\}", pattern)))
    classes = {name: characters(rf"\p{{{name}}}") for name in names}
    pattern = re.sub(r"\(\?i:([^)]*)\)", lambda match: f"(?:{either_case(match[1])})", pattern)
    # Possessive quantifiers: in these patterns plain ones find the same.
    pattern = pattern.replace("++", "+").replace("*+", "*").replace("?+", "?").replace(r"\z", "$")
    pattern = pattern.replace(r"\s", r"\p{White_Space}").replace(r"\S", r"[^\p{White_Space}]")
    set_or_class = re.compile(r"\[.+?\]|\\p\{\w+\}")
    return set_or_class.sub(lambda m: f"[{m[0]}]" if m[0][0] == "\\" else m[0], pattern), classes


def either_case(pattern: str) -> str:
    """Return a pattern of letters and [sets] of letters that finds them in upper case too."""
    # The only letter of another script that is the same as one of these words': the long s.
    cases = {c: c + c.upper() + ("ſ" if c == "s" else "") for c in "abcdefghijlmnopqrstuvwxyz"}
    return re.sub(
        r"\[(\w+)\]|(\w)",
        lambda match: "[" + "".join(cases[c] for c in match[1] or match[2]) + "]",
        pattern,
    )


@functools.cache
def characters(pattern: str) -> str:
    """Return all characters that tiktoken finds `pattern` in, as ranges for a JavaScript class."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    finder = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
    found = np.array([ord(c) for c in bytes(finder.encode_ordinary(everything)).decode()])
    ends = np.flatnonzero(np.diff(found, append=2**24) > 1)
    starts = [0, *(ends[:-1] + 1)]
    return "".join(
        f"\\u{{{found[a]:x}}}" + (f"-\\u{{{found[b]:x}}}" if b > a else "")
        for a, b in zip(starts, ends, strict=True)
    )


TOP = 5  # how many tokens the lens names


@torch.inference_mode()
def make_trace(
    model: LLaMaTransformer, ids: list[int], interventions: Sequence[dict[str, Any]] = ()
) -> dict[str, np.ndarray]:
    """Return what the page shows of a text, by name, as `trace` of page/model.js does.

    blocks.0.q is (H, T, D), blocks.0.attention (H, T, T), logits (T, V), and so on. Interventions
    multiply by `scale` the output of a part: of one head, before wo, or of `attention`, of the
    feed-forward network `ffwd` or of both (`block`), before it is added to the residual stream.
    """
    c, T = model.config, len(ids)
    tokens, positions = torch.tensor([ids]), torch.arange(T)
    rope = model.cos[:T], model.sin[:T]
    unturned = torch.ones_like(rope[0]), torch.zeros_like(rope[1])
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    scales = torch.ones(c.n_layers, 2 + c.n_heads)  # attention, ffwd, each head
    for change in interventions:
        parts = {"attention": [0], "ffwd": [1], "block": [0, 1]}
        columns = parts.get(change["part"]) or [2 + change["head"]]
        scales[change["layer"], columns] *= change["scale"]
    x = model.embeddings(tokens)  # (1, T, C)
    if c.position == "learned":
        x = x + model.positions(positions)
    streams, trace = [x], {"embed": x}
    for layer, block in enumerate(model.decoder_blocks):
        attention, ffwd, scale = block.attention, block.ffwd, scales[layer]
        norm1 = block.norm1(x)
        before = attention.project(norm1, Context(positions, unturned, None, None))
        q, k, v = attention.project(norm1, Context(positions, rope, None, None))
        group = q.size(1) // k.size(1)
        scores = q @ k.repeat_interleave(group, dim=1).mT / math.sqrt(q.size(-1))
        weights = scores.masked_fill(future, -math.inf).softmax(-1)  # (1, H, T, T)
        heads = weights @ v.repeat_interleave(group, dim=1) * scale[2:, None, None]
        heads = heads.transpose(1, 2).flatten(2)  # (1, T, H Dv)
        attention_out = attention.wo(heads) * scale[0]
        middle = x + attention_out
        norm2 = block.norm2(middle)
        up, gate = ffwd.up(norm2), ffwd.gate(norm2) if c.mlp == "swiglu" else None
        hidden = F.gelu(up, approximate="tanh") if gate is None else F.silu(gate) * up
        ffwd_out = ffwd.down(hidden) * scale[1]
        x = middle + ffwd_out
        streams.append(x)
        values = {"norm1": norm1, "q": q, "k": k, "v": v, "q_before": before[0]}
        values |= {"k_before": before[1], "attention": weights, "heads": heads}
        values |= {"attention_out": attention_out, "middle": middle, "norm2": norm2, "up": up}
        values |= {"hidden": hidden, "ffwd_out": ffwd_out, "out": x}
        values |= {} if gate is None else {"gate": gate}
        trace |= {f"blocks.{layer}.{name}": value for name, value in values.items()}
    trace["final"] = model.norm(x)
    for depth, stream in enumerate(streams):
        logits = model.unembed(stream)  # (1, T, V)
        p, top = logits.softmax(-1).topk(min(TOP, c.vocab_size))
        follows = logits[:, :-1].gather(-1, tokens[:, 1:, None])  # (1, T - 1, 1)
        rank = F.pad((logits[:, :-1] > follows).sum(-1), (0, 1), value=-1)  # of the last: -1
        reached = logits[:, :-1].softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        lens = {"ids": top.int(), "p": p, "rank": rank.int()}
        lens |= {"follows": F.pad(reached, (0, 1))}  # probability of the token that follows
        trace |= {f"lens.{depth}.{name}": value for name, value in lens.items()}
    trace |= {"logits": logits, "ids": tokens.int()}
    return {name: value[0].numpy() for name, value in trace.items()}


def rounded_trace(trace: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a trace as it is written: float16, logits relative to their position's largest."""
    largest = trace["logits"].max(axis=1, keepdims=True)
    trace = trace | {"logits": trace["logits"] - largest, "logits_max": largest}
    return {
        name: array.clip(-65504, 65504).astype(np.float16)
        if array.dtype == np.float32 and name != "logits_max"
        else array
        for name, array in trace.items()
    }
