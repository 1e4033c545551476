"""LoRA: what a run with adapters changes and keeps, and its adapters and peft's, both ways."""

import contextlib
import shutil
from pathlib import Path

import pytest
import several
import torch
from helpers import (
    FAMILY_NAMES,
    GPT2,
    SHAPES,
    close,
    every_family,
    random_model,
    random_tokens,
    run_stage,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from several import launch
from test_train import SMALL, data_dir, refusal, run_train, same  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

import sample
import train
from plainllama.checkpoint import checkpoints
from plainllama.huggingface import load_model, save_model, side_files, stored_tensors
from plainllama.lora import add_adapters, init_adapters
from plainllama.settings import read_json, run_main, write_json
from plainllama.tokenizer import find_tokenizer

RANK = [*SMALL[3:], "--lora_rank=4", "--lora_alpha=8"]  # without the shape
CONFIG = train.TrainConfig(lora_rank=4, lora_alpha=8)


def save_base(directory: Path, **changes) -> Path:
    """A random model with the tokenizer of the tests' data."""
    model, tokenizer = random_model(**changes), find_tokenizer("byte")
    save_model(model, directory, files=side_files(model.config, tokenizer))
    return directory


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), n_kv_heads=2)


def tune(data_dir: Path, out_dir: Path, base: Path, *more: str) -> Path:
    """Run with adapters; return the newest checkpoint."""
    places = [f"--init_from={base}", f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    run_stage(train.main, *RANK, *places, *more)
    return checkpoints(out_dir)[-1]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        found = model.eval()(random_tokens(length=16))
    return found[0] if isinstance(found, tuple) else found.logits


def theirs(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


@every_family
def test_new_adapters_change_no_logit(changes):
    model = random_model(**changes)
    before = logits(model)
    add_adapters(model, CONFIG)
    init_adapters(model)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_a_run_saves_is_its_base_and_adapter_in_peft_and_here(name, data_dir, tmp_path):
    changes = SHAPES[name]
    base = save_base(tmp_path / "base", **changes)
    # What peft has no layers for is another test's.
    targets = {"GPT-2": ["--lora_targets=wo,up"]}
    targets["latent attention"] = ["--lora_targets=wq, wkv_a, wkv, wo"]
    targets["latent queries, untied"] = ["--lora_targets=wq_a,wq_b,wkv_a,wkv,wo"]
    saved = tune(data_dir, tmp_path / "out", base, *targets.get(name, []), "--sample_interval=6")
    merged = logits(load_model(saved))
    assert not torch.equal(merged, logits(load_model(base)))
    close(logits(theirs(saved)), merged, atol=1e-5)
    close(logits(load_model(saved / "adapter")), merged, atol=1e-5)
    close(logits(PeftModel.from_pretrained(theirs(base), saved / "adapter")), merged, atol=1e-5)
    close(logits(theirs(saved / "adapter")), merged, atol=1e-5)


@every_family
def test_an_adapter_of_peft_is_read_and_never_ignored_beside_weights(changes, tmp_path):
    base = save_base(tmp_path / "base", **changes)
    torch.manual_seed(1)
    targets = ["q_proj", "q_b_proj", "o_proj"] if "kv_lora_rank" in changes else "all-linear"
    config = LoraConfig(r=3, lora_alpha=1, target_modules=targets, init_lora_weights=False)
    tuned = get_peft_model(theirs(base), config)
    tuned.save_pretrained(tmp_path / "adapter")
    expected = logits(tuned)
    assert (expected - logits(load_model(base))).abs().max() > 0.1
    close(logits(load_model(tmp_path / "adapter")), expected)
    shutil.copytree(tmp_path / "adapter", base, dirs_exist_ok=True)
    close(logits(load_model(base)), expected)
    close(logits(theirs(base)), expected)
