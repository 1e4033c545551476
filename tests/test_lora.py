"""LoRA: what a run with adapters changes and keeps, and its adapters and peft's, both ways."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import (
    FAMILY_NAMES,
    SHAPES,
    close,
    every_family,
    own_model,
    random_model,
    random_tokens,
    refused,
    run_stage,
    save_random,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from several import SMALL, launch
from training import OPTIMIZER, distance
from transformers import AutoModelForCausalLM

import prepare
import sample
import train
from plainllama.checkpoint import checkpoints
from plainllama.huggingface import load_model
from plainllama.lora import add_adapters, init_adapters
from plainllama.settings import read_arguments, read_json, write_json
from plainllama.start import choose_start

RANK = [*SMALL[3:], "--lora_rank=4", "--lora_alpha=8"]  # without the shape
CONFIG = train.TrainConfig(lora_rank=4, lora_alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("base"), n_kv_heads=2)


def tune(data: Path, out_dir: Path, base: Path, *more: str) -> Path:
    """Run with adapters; return the newest checkpoint."""
    places = [f"--init_from={base}", f"--data_dir={data}", f"--out_dir={out_dir}"]
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
    base = save_random(tmp_path / "base", **changes)
    # What peft has no layers for is another test's.
    targets = {"GPT-2": ["--lora_targets=wo,up"]}
    targets["latent attention"] = ["--lora_targets=wq, wkv_a, wkv, wo"]
    targets["latent queries, untied"] = ["--lora_targets=wq_a,wq_b,wkv_a,wkv,wo"]
    more = [*targets.get(name, []), "--max_steps=3", "--sample_interval=3"]
    saved = tune(data_dir, tmp_path / "out", base, *more)
    merged = logits(load_model(saved))
    assert not torch.equal(merged, logits(load_model(base)))
    close(logits(theirs(saved)), merged, atol=1e-5)
    close(logits(load_model(saved / "adapter")), merged, atol=1e-5)
    close(logits(PeftModel.from_pretrained(theirs(base), saved / "adapter")), merged, atol=1e-5)
    close(logits(theirs(saved / "adapter")), merged, atol=1e-5)


def test_an_architecture_of_ones_own_has_an_adapter_that_peft_reads(hf, data_dir, tmp_path):
    base = save_random(tmp_path / "base", norm="layernorm", n_kv_heads=2)
    saved = tune(data_dir, tmp_path / "out", base, "--max_steps=3")
    merged = logits(load_model(saved))
    close(logits(load_model(saved / "adapter")), merged, atol=1e-5)
    own = own_model(hf, base)
    close(logits(PeftModel.from_pretrained(own, saved / "adapter")), merged, atol=1e-5)


@every_family
def test_an_adapter_of_peft_is_read_and_never_ignored_beside_weights(changes, tmp_path):
    base = save_random(tmp_path / "base", **changes)
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


def test_the_base_stays_as_it_was_to_the_bit_and_only_what_is_named_is_tuned(
    base, data_dir, tmp_path
):
    saved = tune(data_dir, tmp_path / "out", base, "--lora_targets=wq,down", "--max_steps=3")
    before, after = (load_file(path / "model.safetensors") for path in (base, saved))
    products = load_file(saved / "adapter" / "adapter_model.safetensors")
    assert len(products) == 2 * 2 * 2  # A and B of two layers of two blocks
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in products:
            assert not torch.equal(after[name], weight)
            weight = weight + 8 / 4 * (products[f"{key}B.weight"] @ products[f"{key}A.weight"])
        assert torch.equal(after[name], weight)


def assert_same(run: Path, other: Path, atol: float = 0) -> None:
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", OPTIMIZER):
        assert distance(run, other, file) <= atol


def test_a_resumed_run_ends_bit_for_bit_as_the_uninterrupted_one(base, data_dir, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tune(data_dir, whole, base)
    tune(data_dir, cut, base)
    shutil.rmtree(cut / "step_000012")
    moved = shutil.copytree(base, tmp_path / "moved")
    run_stage(train.main, f"--out_dir={cut}", "--resume", f"--init_from={moved}")
    assert_same(whole, cut)
    (config,) = cut.glob("step_000012/adapter/adapter_config.json")
    assert read_json(config)["base_model_name_or_path"] == str(moved)
    shutil.rmtree(moved)
    run_stage(train.main, f"--out_dir={cut}", "--eval_only")


def test_two_processes_shared_or_not_tune_what_one_does(base, data_dir, tmp_path):
    def arguments(name: str, *more: str) -> list[str]:
        places = [f"--init_from={base}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / name}"]
        return [*RANK, *places, "--batch_size=2", "--max_steps=4", "--grad_clip=0", *more]

    more = ["--resume", "--max_steps=5"]
    again = "--activation_checkpointing"
    for words in ([again], more):
        run_stage(train.main, *arguments("one", *words))
    runs = [arguments("two"), arguments("two", *more)]
    launch(2, *runs, arguments("shared", "--shard=all"), arguments("shared", *more))
    assert_same(tmp_path / "two", tmp_path / "shared")
    assert_same(tmp_path / "one", tmp_path / "two", atol=1e-5)


def test_a_tuned_model_has_gradients_and_moments_of_its_adapters_alone(base, data_dir):
    places = [f"--data_dir={data_dir}", f"--init_from={base}"]
    files, flags = read_arguments(train.TrainConfig, [*RANK, *places])
    config, start = choose_start(train.TrainConfig, files, flags)
    machine = train.set_up_machine(config)
    config, data = train.fit_to_data(config, start, machine)
    model = train.build_model(config, start, machine)
    (adamw,) = train.make_optimizers(model, config)
    train.take_step(0, model, [adamw], data, config, machine)
    adapters = {p for name, p in model.named_parameters() if ".lora_" in name}
    assert {p for p in model.parameters() if p.requires_grad} == {*adamw.state} == adapters
    assert len(adapters) == 2 * 2 * 7  # A and B of seven layers in two blocks


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--lora_targets=wq,w_q"], "lora_targets=w_q is no layer of the blocks: wq,wk,wv,wo"),
        (["--lora_rank=0"], "lora_rank=0"),
        (["--lora_rank=-1"], "lora_rank=-1 must be at least 0"),
        (["--optimizer=muon"], "lora_rank=4: adapters are trained by optimizer=adamw"),
        (["--init_from="], "--init_from=DIR"),
    ],
)
def test_settings_of_adapters_that_cannot_be_are_refused(
    more, words, base, data_dir, tmp_path, capsys
):
    places = [f"--init_from={base}", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}"]
    assert words in refused(capsys, train.main, *RANK, *places, *more)
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_with_the_adapters_and_the_base_that_it_began_with(
    base, data_dir, tmp_path, capsys
):
    full, tuned = tmp_path / "full", tmp_path / "tuned"
    own = shutil.copytree(base, tmp_path / "base")
    places = [f"--init_from={own}", f"--data_dir={data_dir}"]
    run_stage(train.main, *SMALL[3:], *places, f"--out_dir={full}", "--max_steps=2")
    tune(data_dir, tuned, own, "--max_steps=2")
    resume = ["--resume", "--max_steps=4"]
    line = refused(capsys, train.main, f"--out_dir={full}", *resume, "--lora_rank=4")
    assert "lora_rank=4 cannot continue" in line
    line = refused(capsys, train.main, f"--out_dir={tuned}", *resume, "--lora_alpha=9")
    assert "lora_alpha=9 cannot continue" in line
    weights = load_file(own / "model.safetensors")
    save_file({k: v + 1e-7 for k, v in weights.items()}, own / "model.safetensors")
    line = refused(capsys, train.main, f"--out_dir={tuned}", *resume)
    assert f"init_from={own}" in line and "--init_from=DIR says where" in line
    shutil.rmtree(own)
    line = refused(capsys, train.main, f"--out_dir={tuned}", *resume)
    assert f"init_from={own}" in line and "--init_from=DIR says where" in line
    run_stage(train.main, f"--out_dir={tuned}", *resume, f"--init_from={base}")


def adapter_of(base: Path, directory: Path, **changes) -> Path:
    """What peft would write for a base, with changed settings."""
    directory.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base)}
    write_json(directory / "adapter_config.json", settings | changes)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    tensors = {f"{key}A.weight": torch.ones(2, 48), f"{key}B.weight": torch.ones(128, 2)}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


ODD = {
    "use_dora": True,
    "use_rslora": True,
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "init_lora_weights": "pissa",
    "alpha_pattern": {"up_proj": 3},
    "peft_type": "IA3",
    "lora_alpha": None,
    "of_next_year": {"a": 1},
}


@pytest.mark.parametrize(("key", "value"), ODD.items(), ids=ODD)
def test_an_adapter_of_another_kind_is_refused_by_the_key_that_says_so(
    key, value, base, tmp_path, capsys
):
    adapter = adapter_of(base, tmp_path / "adapter", **{key: value})
    assert f"{key}={value!r}" in refused(capsys, sample.main, f"--ckpt={adapter}", "--prompt=a")


def test_sampling_and_training_take_an_adapter_whose_base_is_there(
    base, data_dir, tmp_path, capsys
):
    adapter = adapter_of(base, tmp_path / "adapter", task_type="CAUSAL_LM", inference_mode=True)
    expected = load_file(base / "model.safetensors")
    expected["model.layers.1.mlp.up_proj.weight"] += 4 / 2 * 2
    run_stage(sample.main, f"--ckpt={adapter}", "--prompt=the cat", "--max_new_tokens=4")
    saved = tune(data_dir, tmp_path / "out", adapter, "--lora_targets=wq", "--max_steps=1")
    assert "without adapter/" in capsys.readouterr().out and not (saved / "adapter").exists()
    found = load_file(saved / "model.safetensors")
    assert [k for k in found if not found[k].equal(expected[k])] == [
        f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)
    ]
    (adapter / "adapter_model.safetensors").unlink()
    ask = [f"--ckpt={adapter}", "--prompt=a"]
    assert "no adapter_model.safetensors" in refused(capsys, sample.main, *ask)
    (adapter / "adapter_model.safetensors").write_bytes(b"{}")
    assert "is damaged" in refused(capsys, sample.main, *ask)


def test_rows_of_new_words_are_in_the_whole_model_alone(base, tmp_path, capsys):
    turns = [("user", "cat {}?"), ("assistant", "dog {}.")]
    talks = [[{"role": who, "content": text.format(n)} for who, text in turns] for n in range(60)]
    (tmp_path / "talks.jsonl").write_text(
        "".join(json.dumps({"messages": t}) + "\n" for t in talks)
    )
    data = [f"--out={tmp_path / 'data'}", f"--tokenizer={base / 'tokenizer.json'}"]
    run_stage(prepare.main, tmp_path / "talks.jsonl", *data)
    short = ["--max_steps=1", "--max_seq_len=32", "--batch_size=2"]
    saved = tune(tmp_path / "data", tmp_path / "out", base, *short)
    assert "without adapter/: the words of turns" in capsys.readouterr().out
    assert not (saved / "adapter").exists() and load_model(saved).config.vocab_size > 257


def test_an_adapter_of_another_base_or_of_none_is_refused(base, tmp_path, capsys):
    adapter = adapter_of(base, tmp_path / "adapter")
    ask = [f"--ckpt={adapter}", "--prompt=a"]
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    (first, A), (second, B) = sorted(tensors.items())
    for odd in (
        {first: A[:, 1:], second: B},
        {first: A, second: B[1:]},
        {first: A, second: B[:, :1].contiguous()},
        {key.replace("layers.1", "layers.2"): tensor for key, tensor in tensors.items()},
    ):
        save_file({key: tensor.contiguous() for key, tensor in odd.items()}, file)
        line = refused(capsys, sample.main, *ask)
        assert "is an adapter of another base, by its model.layers." in line
    more = {**tensors, f"{second}_vector": torch.ones(2)}
    for odd in ({first: A}, {first: A[:0], second: B[:, :0]}, more):
        save_file({key: tensor.contiguous() for key, tensor in odd.items()}, file)
        assert "has other tensors than lora_A" in refused(capsys, sample.main, *ask)
    for gone in ("HuggingFaceTB/SmolLM2-135M", str(adapter)):
        settings = read_json(adapter / "adapter_config.json") | {"base_model_name_or_path": gone}
        write_json(adapter / "adapter_config.json", settings)
        line = refused(capsys, sample.main, *ask)
        assert f"is an adapter of {gone}" in line and "base_model_name_or_path" in line
