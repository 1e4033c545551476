"""plainllama/architecture.py: what is called a LLaMA is one, and what is not has a form of its own.

    python tests/test_architecture.py      makes plainllama/toys.json with transformers
"""

import itertools
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import pytest
import torch
from helpers import FAMILY_NAMES, GPT2, LATENT, SHAPES, shape

from plainllama import architecture
from plainllama.architecture import TOLERANCE, TOYS, difference, toy_model, toy_of, variant
from plainllama.families import find_family, write_config
from plainllama.huggingface import stored_tensors

SWITCHES = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}
FEATURES = {
    "tie_embeddings": (True, False),
    "n_kv_heads": (0, 2),
    "head_dim": (0, 20),
    "rope_factor": (0.0, 8.0),
}
LATENT_FEATURES = FEATURES | {"n_kv_heads": (0,), "head_dim": (0,), "q_lora_rank": (0, 24)}
FAMILY_TOYS = [  # all that toys.json holds
    *((switches, FEATURES) for switches in SWITCHES.values()),
    (LATENT, LATENT_FEATURES),
    (GPT2, {"tie_embeddings": (True, False)}),
]


def every_toy() -> dict:
    """The toy of every variant, by name, and its family."""
    toys = {}
    for switches, features in FAMILY_TOYS:
        for values in itertools.product(*features.values()):
            config = shape(**switches | dict(zip(features, values, strict=True)))
            family, toy = find_family(config)[0], toy_of(config)
            toys[variant(family, toy)] = family, toy
    return toys


def transformers_numbers(family: str, toy, folder: Path) -> list[float]:
    """The logits that toys.json holds of a toy, computed by transformers in float64."""
    import transformers

    write_config(toy, folder, {}, family)
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    tensors = stored_tensors(toy_model(toy, torch.float64), family)
    state = {name: stored.read() for name, stored in tensors.items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= ({"lm_head.weight"} if toy.tie_embeddings else set())
    theirs.tie_weights()
    ends = torch.tensor(architecture.PARTS).cumsum(0) - 1
    with torch.no_grad():
        logits = theirs(architecture.toy_tokens()).logits[0, ends]
    return logits[:, architecture.IDS].flatten().tolist()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = {n: transformers_numbers(*toy, Path(folder)) for n, toy in every_toy().items()}
    rows = [f"{json.dumps(n)}: {[round(x, 5) for x in numbers]}" for n, numbers in made.items()]
    TOYS.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
