"""What the page's engine reads: weights, tokenizers and traces, made small enough for one file.

page/numbers.js unpacks arrays and page/tokenizer.js encodes with what is written here.
"""

import base64
import functools
import gzip
import re
from dataclasses import asdict
from typing import Any

import numpy as np
import tiktoken
import torch
from torch import Tensor

from model import LLaMaTransformer
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
