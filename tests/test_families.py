"""The config of every family, made small, through all stages."""

from pathlib import Path

import pytest
import torch
from helpers import run_stage
from safetensors.torch import load_file

import prepare
import sample
import train
from model import LLaMaTransformer, ModelConfig
from plainllama.checkpoint import checkpoints
from plainllama.huggingface import load_model, save_model
from plainllama.machine import n_params
from plainllama.settings import load, read_json
from plainllama.tokenizer import find_tokenizer

SMALLER = [
    "n_layers=2",
    "n_embd=48",
    "n_heads=4",
    "max_seq_len=16",
    "batch_size=4",
    "tokens_per_step=64",
    "warmup_steps=1",
    "eval_tokens=64",
    "device=cpu",
    "no_compile",
    "checkpoint_interval=2",
    "eval_interval=2",
    "sample_interval=2",
    "log_interval=1",
]
LIKE = {
    "gpt2": "GPT2LMHeadModel",
    "nano_gpt": "GPT2LMHeadModel",
    "mla": "DeepseekV3ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "tiny --norm=layernorm": "PlainllamaForCausalLM",
}
every_config = pytest.mark.parametrize("name", LIKE)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"{n} plus {n + 1} is {2 * n + 1}. " for n in range(300))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    run_stage(prepare.main, folder / "text.txt", f"--out={folder / 'bytes'}", "--tokenizer=byte")
    return folder / "bytes"


def run_train(name: str, data_dir: Path, out_dir: Path, *more: str) -> dict:
    """Train with a config made smaller; return the last checkpoint's weights."""
    options = [f"--{option}" for option in SMALLER]
    directories = [f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    config, *flags = name.split()
    run_stage(train.main, f"config/{config}.py", *options, *directories, *flags, *more)
    return load_file(checkpoints(out_dir)[-1] / "model.safetensors")


@every_config
def test_each_config_trains_resumes_bit_identical_samples_and_is_trained_on(
    name, data_dir, tmp_path, capsys
):
    whole = run_train(name, data_dir, tmp_path / "whole", "--max_steps=4")
    run_train(name, data_dir, tmp_path / "parts", "--max_steps=4")
    (tmp_path / "parts" / "step_000004").rename(tmp_path / "gone")  # as if killed after step 2
    resumed = run_train(name, data_dir, tmp_path / "parts", "--resume")
    assert whole.keys() == resumed.keys()
    assert all(whole[key].equal(resumed[key]) for key in whole)

    newest = tmp_path / "whole" / "step_000004"
    assert read_json(newest / "config.json")["architectures"] == [LIKE[name]]
    capsys.readouterr()
    run_stage(sample.main, f"--ckpt={newest}", "--prompt=7 plus", "--max_new_tokens=20", "--seed=1")
    assert capsys.readouterr().out.startswith("7 plus")

    options = [f"--{option}" for option in SMALLER if not option.startswith("n_")]
    directories = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'second'}"]
    run_stage(train.main, *options, *directories, f"--init_from={newest}", "--max_steps=1")
    before, after = load_model(newest), load_model(tmp_path / "second" / "step_000001")
    assert after.config == before.config
    assert not after.embeddings.weight.equal(before.embeddings.weight)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2"])
def test_a_model_of_transformers_is_trained_on_saved_as_what_it_was_and_sampled(
    family, data_dir, tmp_path, capsys
):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(
        vocab_size=257,
        hidden_size=48,
        intermediate_size=67,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        sliding_window=None,
    )
    source = tmp_path / "theirs"
    before = transformers.AutoModelForCausalLM.from_config(config)
    before.save_pretrained(source)
    find_tokenizer("byte").save(source / "tokenizer.json")
    options = [f"--{option}" for option in SMALLER if not option.startswith("n_")]
    directories = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}"]
    run_stage(train.main, *options, *directories, f"--init_from={source}", "--max_steps=2")
    newest = tmp_path / "out" / "step_000002"
    after = transformers.AutoModelForCausalLM.from_pretrained(newest)
    assert type(after) is type(before)
    tokens = torch.arange(16)[None]
    ours = load_model(newest)
    torch.testing.assert_close(ours(tokens)[0], after(tokens).logits, atol=1e-5, rtol=0)
    assert not torch.allclose(after(tokens).logits, before(tokens).logits)
    capsys.readouterr()
    run_stage(sample.main, f"--ckpt={newest}", "--prompt=7 plus", "--max_new_tokens=9", "--seed=1")
    assert capsys.readouterr().out.startswith("7 plus")


def test_a_model_with_more_ids_than_its_tokenizer_has_tokens_can_be_trained_on(data_dir, tmp_path):
    shape = ModelConfig(vocab_size=300, n_layers=1, n_embd=16, n_heads=2, max_seq_len=16)
    save_model(LLaMaTransformer(shape), tmp_path / "wide")
    directories = [f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}"]
    options = [f"--{option}" for option in SMALLER if not option.startswith("n_")]
    source = f"--init_from={tmp_path / 'wide'}"
    run_stage(train.main, *options, *directories, source, "--max_steps=1")
    assert load_model(tmp_path / "out" / "step_000001").config.vocab_size == 300


def test_nano_gpt_has_the_85584_parameters_of_its_drawing():
    flags = ["config/nano_gpt.py", "--vocab_size=3", "--max_seq_len=11", "--tokens_per_step=176"]
    config = load(train.TrainConfig, flags)
    assert n_params(LLaMaTransformer(config)) == 85_584


def test_how_to_predict_is_what_the_pipeline_says_it_is(gpt2_vocabulary):
    assert find_tokenizer("gpt2").encode("How to predict") == [2437, 284, 4331]
