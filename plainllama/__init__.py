"""What the stages share; from Python, `load` and `generate` (docs/PYTHON.md). Torch comes later."""

from collections.abc import Sequence
from os import PathLike
from typing import Any


def load(ckpt: str | PathLike = "", device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Return a model in evaluation mode, an LLaMaTransformer, and its Tokenizer.

    `ckpt` is a run, of which the newest checkpoint is taken, a step of one, or any Hugging Face
    directory of a known family; by default the newest run. UserError for what cannot be read.
    """
    from plainllama.checkpoint import find_checkpoint
    from plainllama.families import base_of, read_config
    from plainllama.huggingface import end_of_text_ids, load_model
    from plainllama.machine import choose_dtype, find_device
    from plainllama.tokenizer import load_tokenizer

    directory, place = find_checkpoint(str(ckpt)), find_device(device)
    tokenizer = load_tokenizer(base_of(directory) / "tokenizer.json")
    tokenizer.ends = end_of_text_ids(directory, tokenizer)
    number_format = choose_dtype(dtype, place, read_config(base_of(directory)).n_embd)
    return load_model(directory, device=place, dtype=number_format), tokenizer


def generate(
    model: Any, tokenizer: Any, text: str = "", stop: Sequence[str] = (), **settings: Any
) -> str | list[str]:
    """Return what follows a text; see continue_text."""
    from plainllama.generation import continue_text

    return continue_text(model, tokenizer, text, stop, **settings)
