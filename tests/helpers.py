"""What several test files use: calls of a stage, and random models of a few kB."""

import resource
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import LLaMaTransformer, ModelConfig
from plainllama.generation import generate
from plainllama.huggingface import save_model, side_files
from plainllama.terminal import run_main
from plainllama.tokenizer import find_tokenizer

ROOT = Path(__file__).parent.parent


def run_stage(main, *arguments) -> None:
    """Call a stage's main as if from the command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["stage.py", *map(str, arguments)])
        main()


def told(capsys, main, *arguments) -> list[str]:
    """Call a stage with a user's mistake; return the lines that are said, the last about that."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: run_stage(main, *arguments))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    return lines


def refused(capsys, main, *arguments) -> str:
    """Call a stage with a user's mistake; return the one line that is said."""
    (line,) = told(capsys, main, *arguments)
    return line


@contextmanager
def limited(kind: int, size: int):
    """Let this process have no more: of a file with RLIMIT_FSIZE, as if a disk were full."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


TINY = ModelConfig(vocab_size=257, n_layers=2, n_embd=48, n_heads=4, max_seq_len=32)
GPT2 = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
LATENT = {
    "use_mla": True,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}
SHAPES = {  # 257 ids are padded to 320 rows in memory, 128 need no padding
    "multi-head": {},
    "grouped-query": {"n_kv_heads": 2},
    "one key/value head": {"n_kv_heads": 1},
    "untied": {"tie_embeddings": False},
    "untied grouped-query": {"tie_embeddings": False, "n_kv_heads": 2},
    "no padding": {"vocab_size": 128},
    "explicit head_dim": {"head_dim": 20, "n_kv_heads": 2},
    "other constants": {"hidden_dim": 67, "rope_theta": 5e5, "norm_eps": 1e-3},
    "stretched RoPE": {"rope_theta": 1e3, "rope_factor": 8.0, "rope_original_seq_len": 16},
    "Qwen2": {"qkv_bias": True, "n_kv_heads": 2},
    "Qwen3": {"qk_norm": True, "n_kv_heads": 2, "head_dim": 20},
    "latent attention": LATENT,
    "latent queries, untied": LATENT | {"q_lora_rank": 24, "tie_embeddings": False},
    "GPT-2": GPT2,
    "GPT-2 untied": GPT2 | {"tie_embeddings": False},
}
FAMILY_NAMES = (
    "grouped-query",
    "Qwen2",
    "Qwen3",
    "latent attention",
    "latent queries, untied",
    "GPT-2",
)
every_family = pytest.mark.parametrize(
    "changes", [SHAPES[name] for name in FAMILY_NAMES], ids=FAMILY_NAMES
)
every_shape = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


def shape(**changes) -> ModelConfig:
    """TINY with changes."""
    return replace(TINY, **changes)


def random_model(**changes) -> LLaMaTransformer:
    """A model of large random weights, whose logits are far apart and depend on every token."""
    torch.manual_seed(0)
    model = LLaMaTransformer(shape(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gain = weight.dim() == 1 and not name.endswith("bias")
            weight.copy_(0.2 * torch.randn_like(weight) + gain)
        model.embeddings.weight[model.config.vocab_size :] = 0
        model.final_linear.weight[model.config.vocab_size :] = 0
    return model.eval()


BYTES = find_tokenizer("byte")


def save_random(directory: Path, **changes) -> Path:
    """Save a random model with the tokenizer of bytes, as a run does."""
    model = random_model(**changes)
    save_model(model, directory, files=side_files(model.config, BYTES))
    return directory


def own_model(hf, directory, **options):
    """What transformers makes of a directory with code of its own."""
    return hf.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options)


def random_tokens(batch: int = 2, length: int = TINY.max_seq_len, vocab_size: int = 128):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def greedy(logits):
    return logits.argmax(dim=-1)


def generated(model, prompts, count: int, decoder=None) -> list:
    """The (logits, token) of each step of greedy generation."""
    seen = []
    pick = lambda x: seen.append(x) or greedy(x)  # noqa: E731
    tokens = list(generate(model, prompts, count, pick, decoder=decoder))
    return list(zip(seen, tokens, strict=True))


def rounding(expected: torch.Tensor, additions: int = 600) -> float:
    """How far two orders of the same fp32 sums may lie apart.

    A rounding error is at most 2^-24 of a value, and errors add up like a random walk: by the
    square root of the number of additions on the way, of which the models here have about 600
    (two layers of 48 + 12 + 32 + 48 + 128, and the head's 48). Four deviations.
    """
    return 4 * 2**-24 * additions**0.5 * max(1.0, expected.detach().abs().max().item())


def close(actual, expected, atol: float | None = None) -> None:
    """Assert that tensors, or lists of them, are equal but for `atol`, or for rounding."""
    if isinstance(expected, list):
        for a, e in zip(actual, expected, strict=True):
            close(a, e, atol)
        return
    atol = rounding(expected) if atol is None else atol
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0)


@contextmanager
def refusal(*words: str):
    """Expect a ValueError of one line that contains all `words`."""
    with pytest.raises(ValueError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
