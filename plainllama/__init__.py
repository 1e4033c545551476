"""What the stages share; from Python, `load` and `generate` (docs/PYTHON.md). Torch comes later."""

import sys
from collections.abc import Sequence
from os import PathLike
from typing import Any

if sys.hexversion < 0x30B0000:
    raise ImportError("Python 3.11 or newer is needed")


def load(ckpt: str | PathLike = "", device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """Return a model in evaluation mode, an LLaMaTransformer, and its Tokenizer.

    `ckpt` is a run, of which the newest checkpoint is taken, a step of one, or any Hugging Face
    directory of a known family; by default the newest run. UserError for what cannot be read.
    """
    from plainllama.checkpoint import find_checkpoint
    from plainllama.huggingface import load_with_tokenizer

    return load_with_tokenizer(find_checkpoint(str(ckpt)), device, dtype)


def generate(
    model: Any, tokenizer: Any, text: str = "", stop: Sequence[str] = (), **settings: Any
) -> str | list[str]:
    """Return what follows a text; see continue_text."""
    from plainllama.generation import continue_text

    return continue_text(model, tokenizer, text, stop, **settings)
