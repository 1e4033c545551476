"""The config of every family, made small, through all stages."""

import shutil
from pathlib import Path

import pytest
import torch
from helpers import run_stage
from several import SMALL
from test_huggingface import their_model
from training import distance

import sample
import train
from model import LLaMaTransformer, ModelConfig
from plainllama.checkpoint import checkpoints
from plainllama.huggingface import load_model, save_model
from plainllama.machine import n_params
from plainllama.settings import load, read_json
from plainllama.tokenizer import find_tokenizer

FROM = [*SMALL[3:], "--warmup_steps=1", "--eval_tokens=64", "--checkpoint_interval=2"]
FROM += ["--eval_interval=2", "--sample_interval=2", "--max_steps=4"]  # what fits any shape
SMALLER = [*FROM, "--n_layers=2", "--n_embd=48", "--n_heads=4"]
LIKE = {
    "gpt2": "GPT2LMHeadModel",
    "mla": "DeepseekV3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "tiny --norm=layernorm": "PlainllamaForCausalLM",
}
every_config = pytest.mark.parametrize("name", LIKE)


def run_train(words: list[str], data_dir: Path, out_dir: Path, *more: str) -> Path:
    """Train; return the last checkpoint."""
    run_stage(train.main, *words, f"--data_dir={data_dir}", f"--out_dir={out_dir}", *more)
    return checkpoints(out_dir)[-1]


def assert_writes(checkpoint: Path, capsys) -> None:
    capsys.readouterr()
    flags = ["--prompt=the cat", "--max_new_tokens=20", "--seed=1"]
    run_stage(sample.main, f"--ckpt={checkpoint}", *flags)
    assert capsys.readouterr().out.startswith("the cat")


@every_config
def test_each_config_trains_resumes_bit_identical_samples_and_is_trained_on(
    name, data_dir, tmp_path, capsys
):
    config, *flags = name.split()
    words = [f"config/{config}.py", *SMALLER, *flags]
    whole = run_train(words, data_dir, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole/step_000002", tmp_path / "parts/step_000002")
    resumed = run_train([], data_dir, tmp_path / "parts", "--resume")
    assert distance(whole.parent, resumed.parent) == 0
    assert read_json(whole / "config.json")["architectures"] == [LIKE[name]]
    assert_writes(whole, capsys)
    more = f"--init_from={whole}", "--max_steps=1"
    before, after = load_model(whole), load_model(run_train(FROM, data_dir, tmp_path / "b", *more))
    assert after.config == before.config
    assert not after.embeddings.weight.equal(before.embeddings.weight)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_model_of_transformers_is_trained_on_saved_as_what_it_was_and_sampled(
    family, hf, data_dir, tmp_path, capsys
):
    source = tmp_path / "theirs"
    before = their_model(hf, family, vocab_size=257)
    before.save_pretrained(source)
    find_tokenizer("byte").save(source / "tokenizer.json")
    more = f"--init_from={source}", "--max_steps=2"
    newest = run_train(FROM, data_dir, tmp_path / "out", *more)
    after = hf.AutoModelForCausalLM.from_pretrained(newest)
    assert type(after) is type(before)
    tokens = torch.arange(16)[None]
    ours = load_model(newest)
    torch.testing.assert_close(ours(tokens)[0], after(tokens).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(after(tokens).logits, before(tokens).logits)
    assert_writes(newest, capsys)


def test_a_model_with_more_ids_than_its_tokenizer_has_tokens_can_be_trained_on(data_dir, tmp_path):
    shape = ModelConfig(vocab_size=300, n_layers=1, n_embd=16, n_heads=2, max_seq_len=16)
    save_model(LLaMaTransformer(shape), tmp_path / "wide")
    more = f"--init_from={tmp_path / 'wide'}", "--max_steps=1"
    saved = run_train(FROM, data_dir, tmp_path / "out", *more)
    assert load_model(saved).config.vocab_size == 300


def test_nano_gpt_has_the_85584_parameters_of_its_drawing():
    flags = ["config/nano_gpt.py", "--vocab_size=3", "--max_seq_len=11", "--tokens_per_step=176"]
    config = load(train.TrainConfig, flags)
    assert n_params(LLaMaTransformer(config)) == 85_584
