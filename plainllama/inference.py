"""The fastest forms of a model that only generates: compiled, 8 bits, weights by columns."""

import math
from collections.abc import Callable
from timeit import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import KVCache, LatentAttention, LLaMaTransformer, attend
from plainllama.architecture import label_of
from plainllama.families import OWN
from plainllama.generation import CompiledDecoder, decode, keep_in_place
from plainllama.machine import vector_options
from plainllama.terminal import note


def quantize_int8(model: LLaMaTransformer) -> None:
    """Make the weights of linear layers 8-bit numbers, in place."""
    swap_linears(model, Int8Linear)


def prepare_decoding(
    model: LLaMaTransformer, batch_size: int, compiled: bool, longest: int = 0
) -> CompiledDecoder | None:
    """Give a model that will only generate its fastest form; return what `generate` takes.

    `compiled` is worth its time for long texts. No text will be longer than `longest` tokens;
    0: it is not known.
    """
    decoder = compile_decoding(model, batch_size, longest) if compiled else None
    if decoder is None:
        store_by_columns(model)
    return decoder


def compile_decoding(
    model: LLaMaTransformer, batch_size: int, longest: int = 0
) -> CompiledDecoder | None:
    """Return what decodes single tokens by compiled code, which on CUDA is CUDA graphs.

    It is tried once, at the shapes that `generate` will have; None, after one warning, where
    compiling fails. Compiled attention reads the whole cache, so that it has few columns: a power
    of two, for the compiler's work to serve other lengths, too.
    """
    S, device = model.config.max_seq_len, model.cos.device
    columns = min(S, max(128, 2 ** math.ceil(math.log2(longest)))) if longest else S
    shares_keys = model.config.use_mla or model.config.kv_heads < model.config.n_heads
    is_own = label_of(model.config)[0] == OWN  # whose attention may be another
    in_sums = device.type == "cpu" and not shares_keys and not is_own
    attend_to_cache = attend_by_sums if in_sums else attend

    def next_logits(tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        return model.unembed(model.hidden_states(tokens, positions, cache, attend_to_cache))

    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
    how: dict[str, Any] = {"mode": "reduce-overhead"}
    if device.type != "cuda":
        options = {
            **vector_options(),
            "cpp.enable_floating_point_contract_flag": "fast",  # multiply-add as one
            "size_asserts": False,  # which would look at every weight for each token
            # The model itself is not looked at again: it stays as it is.
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
        }
        how = {"options": options}
    compiled = torch.compile(next_logits, fullgraph=True, dynamic=False, **how)
    decoder = CompiledDecoder(compiled, columns)
    try:
        with torch.inference_mode():  # in which generate() makes its tensors, too
            like = model.embeddings.weight
            cache = KVCache(model.config, batch_size, like, columns, static=True)
            keep_in_place(cache)
            tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
            decode(model, tokens, cache, decoder)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        reason = " ".join(str(error).split())[:160]
        note(f"warning: decoding without torch.compile, which failed: {reason}")
        return None
    return decoder


def swap_linears(model: LLaMaTransformer, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Put make(linear) in the place of every linear layer of which only products are needed."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            weight_is_read = isinstance(module, LatentAttention) and name == "wkv"
            if isinstance(child, nn.Linear) and not weight_is_read:
                setattr(module, name, make(child))


class Int8Linear(nn.Module):
    """A linear layer whose weights are 8-bit whole numbers times a scale for each row.

    A token then reads a quarter of the memory, which is what bounds the speed of one sample.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp(min=1e-30) / 127  # a row of padding is all zeros
        scale = scale.bfloat16()  # rounded first, so that dividing and multiplying agree
        rounded = (weight / scale.float()[:, None]).round().clamp(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() == x.size(-1) and torch.compiler.is_compiling():
            y = row_product(x, self.weight) * self.scale.type_as(x)
        elif x.device.type == "cpu" and x.size(-1) % 16 == 0:  # others crash it, with AVX-512
            rows = x.flatten(0, -2).bfloat16()
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)  # torch has no other name
            y = y.view(*x.shape[:-1], -1).type_as(x)
        else:
            y = F.linear(x, self.weight.type_as(x)) * self.scale.type_as(x)
        return y if self.bias is None else y + self.bias


def row_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weightᵀ for a single row x, as compilers make it a loop at memory speed.

    Libraries' products are made for many rows; with one they read weights at a third to a half of
    the speed of the loop that a product and a sum are compiled to.
    """
    row = x.flatten().float()
    # A CPU sums four blocks of a large matrix each by itself: one loop would wait for itself.
    blocks = weight.chunk(4 if len(weight) > 4096 and x.device.type == "cpu" else 1)
    y = torch.cat([(block.float() * row).sum(-1) for block in blocks])
    return y.type_as(x).view(*x.shape[:-1], -1)


class RowLinear(nn.Linear):
    """A linear layer that compiled code multiplies by a single row at memory speed."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != x.size(-1) or not torch.compiler.is_compiling():
            return super().forward(x)
        y = row_product(x, self.weight)
        return y if self.bias is None else y + self.bias


def attend_by_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Return what `attend` does for one query a head, (B, H, 1, D), as loops to be compiled.

    A library's call costs a CPU more than the sums of so few numbers do.
    """
    scores = (q.float() * k).sum(-1)[:, :, None] / math.sqrt(q.size(-1))  # (B, H, 1, T')
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1).mT  # (B, H, T', 1)
    return (weights * v).sum(-2, keepdim=True).type_as(v)  # (B, H, 1, D)


@torch.no_grad()
def store_by_columns(model: LLaMaTransformer) -> None:
    """Transpose a CPU's fp32 weights, in place, unless that makes products of one row slower.

    The last layer tells. Libraries read weights at a half of memory's speed by rows, and at nearly
    all of it by columns, on an AMD EPYC. A last layer that is tied to the embedding gets a copy.
    """
    weight = model.final_linear.weight  # of 8 bits after quantize_int8
    if weight.device.type != "cpu" or weight.dtype != torch.float32:
        return
    row, transposed = weight[:1].clone(), weight.t().contiguous().t()
    if best_time(row, transposed) <= 1.2 * best_time(row, weight):
        swap_linears(model, by_columns)


def by_columns(linear: nn.Linear) -> nn.Linear:
    """Return the same layer, its weight stored by columns."""
    linear.weight = nn.Parameter(linear.weight.t().contiguous().t(), requires_grad=False)
    return linear


def best_time(row: Tensor, weight: Tensor) -> float:
    """Return the seconds that a product takes at best."""
    return min(repeat(lambda: F.linear(row, weight), number=1, repeat=4))
