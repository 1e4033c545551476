"""What the page of visualize.py reads: weights, the tokenizer and traces, small enough for a file.

page/unpack.js unpacks what is packed here. The page computes what `make_trace` computes, in
the same form, for any text; tests compare the two.

Shapes: T time, C n_embd, H heads, K key/value heads, D head dim, Dv width of a head's values.
"""

import gzip
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from model import Context, DecoderBlock, LLaMaTransformer

ROUNDING = {
    "fp16": "Each weight is rounded to the nearest 16-bit float, which changes it by at most "
    "0.05% (weights below 0.00006 by at most 0.00000003).",
    "int8": "Each row of a matrix is rounded to whole numbers from -127 to 127 times a scale, "
    "which changes a weight by at most 0.4% of the row's largest; vectors are 16-bit floats.",
    "trace": "Computed by PyTorch from the 32-bit weights; what is shown is rounded to 16-bit "
    "floats, logits after the largest of their position was subtracted.",
}
LARGEST_HALF = 65504  # of 16-bit floats
TOP = 5  # how many tokens the lens names


def pack_bytes(data: bytes) -> str:
    """Return the gzip of `data` as text of 85 signs, the same for the same data.

    Four bytes, the first of them the highest, are five digits from "#" on, the highest first, with
    "x" for "<", which would end a script. Less than four bytes are one digit more than bytes.
    """
    zipped = gzip.compress(data, compresslevel=6, mtime=0)
    missing = -len(zipped) % 4
    numbers = np.frombuffer(zipped + bytes(missing), ">u4").astype(np.uint32)
    signs = np.empty((numbers.size, 5), np.uint8)
    for place in reversed(range(5)):
        signs[:, place] = numbers % 85 + ord("#")
        numbers //= 85
    signs[signs == ord("<")] = ord("x")
    return signs.tobytes().decode()[: signs.size - missing]


def pack(arrays: dict[str, np.ndarray]) -> tuple[list[dict[str, Any]], str]:
    """Return where each array lies, and all of them as one packed text.

    The first bytes of all numbers of an array come first, then the second ones, and so on: those
    with the exponents are alike, and compress.
    """
    table, planes, offset = [], [], 0
    for name, array in arrays.items():
        flat = np.ascontiguousarray(array).reshape(-1)
        planes.append(flat.view(np.uint8).reshape(flat.size, flat.itemsize).T.tobytes())
        table.append(
            {"name": name, "dtype": flat.dtype.name, "shape": array.shape, "offset": offset}
        )
        offset += flat.nbytes
    return table, pack_bytes(b"".join(planes))


def unpadded_weights(model: LLaMaTransformer) -> dict[str, Tensor]:
    """Return the parameters by name, without padding rows and tied twins."""
    V, padded = model.config.vocab_size, ("embeddings.weight", "final_linear.weight")
    return {
        name: parameter.detach()[: V if name in padded else None]
        for name, parameter in model.named_parameters()
    }


def rounded_weights(model: LLaMaTransformer, format: str) -> dict[str, np.ndarray]:
    """Return the weights as they are written: float16, or int8 rows with NAME.scale beside them."""
    arrays = {}
    for name, weight in unpadded_weights(model).items():
        if format == "int8" and weight.dim() == 2:
            scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # (rows)
            arrays[name] = (weight / scale[:, None]).round().to(torch.int8).numpy()
            arrays[f"{name}.scale"] = scale.numpy()
        else:
            arrays[name] = weight.clamp(-LARGEST_HALF, LARGEST_HALF).half().numpy()
    return arrays


@torch.inference_mode()
def make_trace(model: LLaMaTransformer, ids: list[int]) -> dict[str, np.ndarray]:
    """Return what the page shows of a text, by name, as page/trace.js has it.

    blocks.0.q is (T, H, D), blocks.0.attention (H, T, T), logits (T, V), and so on.
    """
    tokens = torch.tensor([ids])
    x = model.embeddings(tokens)  # (1, T, C)
    if model.config.position == "learned":
        x = x + model.positions(torch.arange(len(ids)))
    streams, trace = [x], {"embed": x, "ids": tokens.int()}
    for layer, block in enumerate(model.decoder_blocks):
        values = trace_block(model, block, streams[-1])
        trace.update({f"blocks.{layer}.{name}": value for name, value in values.items()})
        streams.append(values["out"])
    trace["final"] = model.norm(streams[-1])
    for depth, stream in enumerate(streams):
        trace["logits"] = model.unembed(stream)  # (1, T, V); those of the last stream stay
        lens = read_lens(trace["logits"], tokens)
        trace.update({f"lens.{depth}.{name}": value for name, value in lens.items()})
    return {name: value[0].numpy() for name, value in trace.items()}


def trace_block(model: LLaMaTransformer, block: DecoderBlock, x: Tensor) -> dict[str, Tensor]:
    """Return what a block computes of the residual stream x (1, T, C), by name."""
    attention, ffwd, T = block.attention, block.ffwd, x.size(1)
    positions = torch.arange(T)
    rope = model.cos[:T], model.sin[:T]
    unturned = torch.ones_like(rope[0]), torch.zeros_like(rope[1])
    norm1 = block.norm1(x)
    q_before, k_before, _ = attention.project(norm1, Context(positions, unturned, None, None))
    q, k, v = attention.project(norm1, Context(positions, rope, None, None))
    group = q.size(1) // k.size(1)
    scores = q @ k.repeat_interleave(group, dim=1).mT / math.sqrt(q.size(-1))
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -math.inf).softmax(-1)  # (1, H, T, T)
    heads = weights @ v.repeat_interleave(group, dim=1)  # (1, H, T, Dv)
    heads = heads.transpose(1, 2).flatten(2)  # (1, T, H Dv)
    attention_out = attention.wo(heads)
    middle = x + attention_out
    norm2 = block.norm2(middle)
    up = ffwd.up(norm2)
    by_head = {"q": q, "k": k, "v": v, "q_before": q_before, "k_before": k_before}
    values = {name: value.transpose(1, 2) for name, value in by_head.items()}  # (1, T, H, D)
    values["norm1"] = norm1
    if model.config.mlp == "swiglu":
        values["gate"] = ffwd.gate(norm2)
        hidden = F.silu(values["gate"]) * up
    else:
        hidden = F.gelu(up, approximate="tanh")
    ffwd_out = ffwd.down(hidden)
    values.update(attention=weights, heads=heads, attention_out=attention_out, middle=middle)
    values.update(norm2=norm2, up=up, hidden=hidden, ffwd_out=ffwd_out, out=middle + ffwd_out)
    return values


def read_lens(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Return the likeliest tokens after each position, and how likely the one is that follows."""
    p, top = logits.softmax(-1).topk(min(TOP, logits.size(-1)))
    following = tokens[:, 1:, None]
    known = logits[:, :-1]  # the last position is followed by nothing: 0, and rank -1
    reached = known.softmax(-1).gather(-1, following)[..., 0]
    rank = (known > known.gather(-1, following)).sum(-1).int()
    return {
        "ids": top.int(),
        "p": p,
        "rank": F.pad(rank, (0, 1), value=-1),
        "follows": F.pad(reached, (0, 1)),
    }


def rounded_trace(trace: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a trace as it is written: float16, logits relative to their position's largest."""
    largest = trace["logits"].max(axis=1, keepdims=True)
    arrays = trace | {"logits": trace["logits"] - largest}
    for name, array in arrays.items():
        if array.dtype == np.float32:
            arrays[name] = array.clip(-LARGEST_HALF, LARGEST_HALF).astype(np.float16)
    return arrays | {"logits_max": largest}
