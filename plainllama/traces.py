"""All that the page shows of one text: what visualize.py computes for models too large for it.

page/model.js computes the same, in the same form, for any text; this is what it is checked against.

Shapes: T time, C n_embd, H heads, K key/value heads, D head dim, Dv width of a head's values.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from model import Context, LLaMaTransformer

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
