"""plainllama/huggingface.py and families.py against transformers, in both directions."""

import json
from dataclasses import replace

import helpers
import pytest
import torch
from helpers import (
    close,
    every_family,
    every_shape,
    greedy,
    own_model,
    random_model,
    random_tokens,
    refusal,
)
from safetensors.torch import load_file, save_file

from model import LLaMaTransformer
from plainllama import tensors
from plainllama.families import resolved
from plainllama.generation import generate
from plainllama.huggingface import load_model, save_model
from plainllama.machine import n_params
from plainllama.tensors import load_tensors, save_tensors

LLAMA = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 67,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 3e4},
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LATENT = {k: v for k, v in helpers.LATENT.items() if k != "use_mla"}
LATENT |= {"first_k_dense_replace": 2, "q_lora_rank": 24}
GPT2 = {
    "vocab_size": 131,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "initializer_range": 0.3,
}
THEIRS = {  # family -> the settings of a model that transformers makes
    "llama": ("Llama", LLAMA | {"num_key_value_heads": 2}),
    "llama, tied": ("Llama", LLAMA | {"tie_word_embeddings": True}),
    "llama, head_dim": ("Llama", LLAMA | {"head_dim": 20, "num_key_value_heads": 2}),
    "llama, llama3 RoPE": ("Llama", LLAMA | {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("Mistral", LLAMA | {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral, window of the context": (
        "Mistral",
        LLAMA | {"num_key_value_heads": 4, "sliding_window": 32},
    ),
    "qwen2": ("Qwen2", LLAMA | {"num_key_value_heads": 2}),
    "qwen2, tied": ("Qwen2", LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", LLAMA | {"num_key_value_heads": 2, "head_dim": 20}),
    "qwen3, tied": ("Qwen3", LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "deepseek_v3": ("DeepseekV3", LLAMA | {"num_key_value_heads": 4} | LATENT),
    "deepseek_v3, no query latent": (
        "DeepseekV3",
        LLAMA | {"num_key_value_heads": 4} | LATENT | {"q_lora_rank": None},
    ),
    "gpt2": ("GPT2", GPT2),
    "gpt2, n_inner, untied": ("GPT2", GPT2 | {"n_inner": 67, "tie_word_embeddings": False}),
}
every_one_of_theirs = pytest.mark.parametrize("name", THEIRS)


def their_model(hf, name: str, **changes):
    """A random model of transformers."""
    torch.manual_seed(0)
    prefix, settings = THEIRS[name]
    config = getattr(hf, f"{prefix}Config")(**settings | changes)
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms and biases start as ones and zeros
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
    return model


@torch.no_grad()
def differences(ours: LLaMaTransformer, theirs, count: int = 28) -> tuple[float, float]:
    """Return the largest difference of logits, and the share of equal greedy tokens."""
    tokens = random_tokens()
    largest = (ours(tokens)[0] - theirs(tokens).logits).abs().max().item()
    prompt = tokens[:, : tokens.size(1) - count]
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": count}
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    actual = torch.stack(list(generate(ours, prompt, count, greedy)), dim=1)
    assert len(actual.unique()) > 5  # not one token again and again, which proves little
    return largest, (actual == expected[:, -count:]).float().mean().item()


def edit_config(directory, **settings) -> None:
    """Set keys of config.json, or remove those that are set to `...`."""
    path = directory / "config.json"
    changed = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: v for key, v in changed.items() if v is not ...}))


@pytest.fixture
def saved(tmp_path):
    """A directory that save_model wrote."""
    save_model(random_model(n_kv_heads=2), tmp_path)
    return tmp_path


# --- Both directions --------------------------------------------------------------------------


@every_shape
def test_what_we_save_comes_back_and_gives_transformers_equal_logits_and_text(
    hf, tmp_path, changes
):
    model = random_model(**changes)
    save_model(model, tmp_path)
    theirs, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    largest, agreement = differences(model, theirs)
    assert largest <= 1e-5 and agreement == 1
    assert n_params(model) == theirs.num_parameters()
    again = load_model(tmp_path)
    assert resolved(again.config) == resolved(model.config)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)


@every_one_of_theirs
def test_we_load_what_transformers_saves_with_equal_logits_and_text(hf, tmp_path, name):
    theirs = their_model(hf, name)
    theirs.save_pretrained(tmp_path)
    largest, agreement = differences(load_model(tmp_path), theirs)
    assert largest <= 1e-5 and agreement == 1


@every_one_of_theirs
def test_their_directory_comes_back_bit_exact_from_shards_of_bfloat16(hf, tmp_path, name):
    their_model(hf, name).bfloat16().save_pretrained(tmp_path / "a", max_shard_size="20kB")
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    assert len(shards) > 2
    save_model(load_model(tmp_path / "a"), tmp_path / "b")
    expected = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    actual = load_file(tmp_path / "b" / "model.safetensors")
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        close(actual[key], tensor.float(), atol=0)


def test_a_mistral_is_a_llama_where_nothing_says_what_it_was(hf, tmp_path):
    their_model(hf, "mistral").save_pretrained(tmp_path / "a")
    ours = load_model(tmp_path / "a")
    save_model(ours, tmp_path / "b")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "b").eval()
    assert again.config.model_type == "llama"
    assert differences(ours, again) == (pytest.approx(0, abs=1e-5), 1)


def test_a_large_model_is_written_in_files_of_a_limited_size_that_transformers_reads(
    hf, tmp_path, monkeypatch
):
    monkeypatch.setattr(tensors, "LARGEST_FILE", 40_000)
    model = random_model(tie_embeddings=False)
    save_model(model, tmp_path)
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 3 and not (tmp_path / "model.safetensors").exists()
    sizes = [[tensor.nbytes for tensor in load_file(path).values()] for path in shards]
    assert all(sum(size) <= 40_000 or len(size) == 1 for size in sizes)
    torch.testing.assert_close(load_model(tmp_path).state_dict(), model.state_dict())
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert differences(model, theirs) == (pytest.approx(0, abs=1e-5), 1)


@pytest.mark.parametrize("largest", [10, 10_000], ids=["several files", "one"])
def test_tensors_of_any_shape_and_dtype_come_back_and_only_one_process_writes(
    largest, tmp_path, monkeypatch
):
    monkeypatch.setattr(tensors, "LARGEST_FILE", largest)
    given = {"a/step": torch.tensor(3.0), "a/m": torch.randn(3, 2).T, "b": torch.arange(4)}
    orders = []
    for writes in (False, True):
        read = []
        save_tensors(
            tmp_path / "x.safetensors",
            given,
            lambda name, read=read: read.append(name) or given[name],
            writes,
        )
        orders.append(read)
        assert any(tmp_path.iterdir()) is writes
    assert orders[0] == orders[1] and sorted(orders[0]) == sorted(given)
    assert (tmp_path / "x.safetensors.index.json").exists() is (largest == 10)
    torch.testing.assert_close(load_tensors(tmp_path / "x.safetensors"), given)


def test_a_config_json_of_older_transformers_gives_the_same_model(tmp_path):
    model = random_model(tie_embeddings=False, rope_theta=3e4)
    save_model(model, tmp_path)
    newer = ["tie_word_embeddings", "num_key_value_heads", "head_dim", "rope_parameters", "dtype"]
    edit_config(tmp_path, rope_scaling=None, **dict.fromkeys(newer, ...))
    assert resolved(load_model(tmp_path).config) == resolved(model.config)


def test_a_directory_is_fp32_whatever_the_model_in_memory_is(saved):
    save_model(load_model(saved).bfloat16(), saved)
    dtypes = {weight.dtype for weight in load_file(saved / "model.safetensors").values()}
    assert dtypes == {torch.float32}
    assert json.loads((saved / "config.json").read_text())["dtype"] == "float32"


def test_a_directory_names_the_end_of_text_for_transformers_to_stop_at(hf, tmp_path):
    save_model(random_model(), tmp_path, end_of_text=256)
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == 256


@every_family
def test_a_shorter_max_seq_len_keeps_the_logits(tmp_path, changes):
    save_model(random_model(**changes), tmp_path)
    short = load_model(tmp_path, max_seq_len=8)
    assert short.config.max_seq_len == 8
    tokens = random_tokens(length=8)
    close(short(tokens)[0], load_model(tmp_path)(tokens)[0], atol=0)


# --- An architecture of one's own -------------------------------------------------------------

OWN_SHAPES = {
    "layernorm": {"norm": "layernorm"},
    "untied, 1,000 ids": {"norm": "layernorm", "tie_embeddings": False, "vocab_size": 1000},
    "learned positions": {"position": "learned"},
    "GPT-2 without biases": helpers.GPT2 | {"bias": False, "n_kv_heads": 2},
    "GPT-2 of narrow heads": helpers.GPT2 | {"head_dim": 8, "tie_embeddings": False},
    "latent queries, qk_norm": helpers.LATENT | {"q_lora_rank": 24, "mlp": "gelu"},
}
every_own = pytest.mark.parametrize("changes", OWN_SHAPES.values(), ids=OWN_SHAPES)


@every_own
@torch.no_grad()
def test_what_no_family_computes_comes_back_and_loads_in_transformers(hf, tmp_path, changes):
    model = random_model(**changes)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert resolved(again.config) == resolved(model.config)
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=0, rtol=0)
    theirs, report = own_model(hf, tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert differences(model, theirs.eval()) == (pytest.approx(0, abs=1e-5), 1)
    assert n_params(model) == theirs.num_parameters()
    tied = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    assert tied is model.config.tie_embeddings
    narrow = own_model(hf, tmp_path, dtype=torch.bfloat16)
    expected = load_model(tmp_path, dtype=torch.bfloat16)(random_tokens())[0]
    close(narrow(random_tokens()).logits, expected, atol=1e-5)


@torch.no_grad()
def test_in_transformers_it_pads_at_the_left_has_a_loss_and_refuses_what_it_cannot(hf, tmp_path):
    model = random_model(norm="layernorm")
    save_model(model, tmp_path)
    theirs, tokens = own_model(hf, tmp_path).eval(), random_tokens()
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    mask[1, 30:] = 0  # padding at the right needs nothing: no token sees what follows
    found = theirs(tokens, attention_mask=mask).logits
    close(found[0], model(tokens[:1])[0][0])
    close(found[1, 7:30], model(tokens[1:, 7:30])[0][0])
    options = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
    both = theirs.generate(tokens[:, :20], attention_mask=mask[:, :20], **options)
    alone = theirs.generate(tokens[1:, 7:20], attention_mask=mask[1:, 7:20], **options)
    assert both[1, 20:].tolist() == alone[0, 13:].tolist()
    labels = tokens.clone()
    labels[:, :5] = -100
    loss = theirs(tokens, labels=labels).loss
    close(loss, model(tokens[:, :-1].contiguous(), labels[:, 1:].contiguous())[1])
    with pytest.raises(ValueError, match="33 tokens do not fit max_seq_len=32"):
        theirs(random_tokens(length=33))
    mask[1, 10] = 0
    with pytest.raises(ValueError, match="ends of rows alone"):
        theirs(tokens, attention_mask=mask)


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_saves_of_it_is_read_again(hf, tmp_path, tied):
    model = random_model(norm="layernorm", tie_embeddings=tied)
    save_model(model, tmp_path / "a")
    own_model(hf, tmp_path / "a").save_pretrained(tmp_path / "b")
    again = load_model(tmp_path / "b").state_dict()
    torch.testing.assert_close(again, model.state_dict(), atol=0, rtol=0)


@pytest.fixture
def own(tmp_path):
    """A directory of an architecture of one's own."""
    save_model(random_model(norm="layernorm"), tmp_path)
    return tmp_path


def test_a_model_py_beside_weights_is_never_run(own):
    (own / "model.py").write_text("raise SystemExit('run')")
    (own / "modeling_plainllama.py").write_text("raise SystemExit('run')")
    assert load_model(own).config.norm == "layernorm"


def test_a_field_that_is_newer_than_its_config_json_has_its_default(own):
    edit_config(own, qk_norm=..., v_head_dim=...)
    assert load_model(own).config.v_head_dim == 128


def rename_tensors(directory, change) -> None:
    path = directory / "model.safetensors"
    weights = {change(name): tensor.clone() for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def test_an_own_model_of_another_model_py_is_refused_by_what_differs(own):
    edit_config(own, toy=[1.5] * 42)
    with refusal(str(own), "the parameters of today's model.py", "other numbers", "--init_from"):
        load_model(own)
    edit_config(own, toy=[])  # of a model.py whose toy could not be run
    with refusal("other numbers", "inf"):
        load_model(own)
    edit_config(own, toy=["a"])
    with refusal("other numbers", "inf"):
        load_model(own)
    rename_tensors(own, lambda name: name.replace("norm2", "norm3"))
    with refusal(str(own), "lacks 4 tensors", "decoder_blocks.*.norm2.bias", "--init_from"):
        load_model(own)


def test_training_on_it_draws_new_parameters_and_says_so(own, capsys):
    rename_tensors(own, lambda name: name.replace("norm2", "norm3"))
    expected = random_model(norm="layernorm")
    model = load_model(own, shape=expected.config)
    assert model.decoder_blocks[0].norm2.weight.equal(torch.ones(48))
    assert model.decoder_blocks[0].norm1.weight.equal(expected.decoder_blocks[0].norm1.weight)
    lacks, has = capsys.readouterr().out.splitlines()
    assert lacks.startswith("warning: ") and "decoder_blocks.*.norm2.weight" in lacks
    assert has.startswith("warning: ") and "decoder_blocks.*.norm3.weight" in has
    with refusal("embeddings.weight", "(257, 48)", "(257, 56)"):
        load_model(own, shape=replace(expected.config, n_embd=56))


def test_a_family_that_lacks_tensors_is_refused_even_to_train_on(saved):
    rename_tensors(saved, lambda name: name.replace("mlp", "other"))
    with refusal("lacks 6 tensors"):
        load_model(saved, shape=random_model(n_kv_heads=2).config)


# --- Refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        (
            {"model_type": "mamba"},
            ["'mamba'", "known: llama, mistral, qwen2, qwen3, deepseek_v3, gpt2, plainllama"],
        ),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias=True"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["RoPE scaling", "dynamic"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ["RoPE scaling", "linear"]),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, ["low_freq_factor=None"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantised"]),
        ({"model_type": "mistral", "sliding_window": 16}, ["sliding_window=16", "embeddings=32"]),
        ({"model_type": "qwen2", "use_sliding_window": True}, ["use_sliding_window=True"]),
        (
            LATENT | {"model_type": "deepseek_v3", "first_k_dense_replace": 1},
            ["deepseek_v3", "mixture of experts"],
        ),
        ({"num_hidden_layers": 3}, ["lacks 9 tensors", "model.layers.*.input_layernorm.weight"]),
        ({"num_hidden_layers": 1}, ["has 9 tensors", "model.layers.*.input_layernorm"]),
        ({"num_hidden_layers": "two"}, ["num_hidden_layers='two'", "whole number"]),
        ({"intermediate_size": 64}, ["mlp.gate_proj.weight", "(128, 48)", "(64, 48)"]),
        ({"vocab_size": 256}, ["embed_tokens.weight", "(257, 48)", "(256, 48)"]),
        ({"intermediate_size": ...}, ["incomplete", "intermediate_size"]),
        ({"tie_word_embeddings": False}, ["lacks 1 tensor", "lm_head.weight"]),
    ],
    ids=str,
)
def test_an_unsupported_or_wrong_config_json_is_refused(saved, settings, words):
    edit_config(saved, **settings)
    with refusal(str(saved), *words):
        load_model(saved)


@pytest.mark.parametrize("content", [b"", b'{"model_type": "lla', b"[]", b"\xff\xfe"], ids=str)
def test_a_damaged_config_json_is_refused(saved, content):
    (saved / "config.json").write_bytes(content)
    with refusal(str(saved / "config.json"), "damaged"):
        load_model(saved)


def test_a_missing_directory_or_config_json_is_refused(tmp_path):
    with refusal("no config.json", str(tmp_path)):
        load_model(tmp_path)
    with refusal("no config.json", str(tmp_path / "nowhere")):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 100, -1, None], ids=str)
def test_a_truncated_safetensors_file_or_a_pickle_of_its_name_is_refused(saved, kept):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    if kept is None:
        torch.save({"weights": torch.zeros(3)}, path)
    with refusal(str(path), "damaged"):
        load_model(saved)


def test_a_directory_with_only_a_pickle_is_refused_because_a_pickle_is_never_read(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with refusal("no model.safetensors", str(saved), "pickles (.bin, .pt) are never read"):
        load_model(saved)


@pytest.mark.parametrize(
    "index, words",
    [
        ({"weight_map": {"a": "../other/model.safetensors"}}, ["damaged", "weight_map"]),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, ["no model-00001-of-00002"]),
        ({"weight_map": {}}, ["damaged", "weight_map"]),
        ({"weight_map": {"a": ""}}, ["damaged", "weight_map"]),
        ({"weight_map": {"a": [1], "b": None}}, ["no None in"]),
    ],
    ids=str,
)
def test_an_index_that_points_outside_the_directory_or_nowhere_is_refused(saved, index, words):
    (saved / "model.safetensors").unlink()
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    with refusal(str(saved), *words):
        load_model(saved)


def test_weights_that_are_no_floating_point_numbers_are_refused(saved):
    path = saved / "model.safetensors"
    save_file({key: v.to(torch.int8) for key, v in load_file(path).items()}, path)
    with refusal(str(saved), "is int8", "quantised"):
        load_model(saved)


def test_a_longer_context_than_the_checkpoint_has_is_refused(saved):
    with refusal("max_seq_len=33", "32", str(saved)):
        load_model(saved, max_seq_len=33)


def renamed(weights: dict, change) -> dict:
    return {change(name): tensor for name, tensor in weights.items()}


OTHER_HEAD = {"lm_head.weight": 0.3 * torch.ones(131, 48).cumsum(0).sin()}
MASK = torch.ones(1, 1, 32, 32).tril()
ODD_DIRECTORIES = {  # what transformers reads -> its family, other weights, other settings
    "tied, but another head": ("llama, tied", lambda w: w | OTHER_HEAD, {}),
    "tied, but another head, gpt2": ("gpt2", lambda w: w | OTHER_HEAD, {}),
    "tied, the head alone": (
        "llama, tied",
        lambda w: renamed(w, lambda n: n.replace("model.embed_tokens", "lm_head")),
        {},
    ),
    "names of the base model": (
        "llama, tied",
        lambda w: renamed(w, lambda n: n.removeprefix("model.")),
        {},
    ),
    "the first gpt2 files": (  # without the prefix, with tables
        "gpt2",
        lambda w: renamed(w, lambda n: n.removeprefix("transformer.")) | {"h.0.attn.bias": MASK},
        {"n_ctx": 32, "tie_word_embeddings": ...},
    ),
    "float64": ("llama", lambda w: {n: t.double() for n, t in w.items()}, {}),
    "swish": ("llama", None, {"hidden_act": "swish"}),
    "gelu_pytorch_tanh": ("gpt2", None, {"activation_function": "gelu_pytorch_tanh"}),
    "RoPE before transformers 5": (
        "llama",
        None,
        {
            "rope_scaling": LLAMA3_ROPE | {"type": "llama3"},
            "rope_theta": 1e3,
            "rope_parameters": ...,
        },
    ),
}


@pytest.mark.parametrize("name", ODD_DIRECTORIES)
def test_what_transformers_reads_is_read_with_equal_logits(name, hf, tmp_path):
    base, change, edits = ODD_DIRECTORIES[name]
    their_model(hf, base).save_pretrained(tmp_path)
    edit_config(tmp_path, **edits)
    if change:
        path = tmp_path / "model.safetensors"
        weights = {n: t.clone() for n, t in change(load_file(path)).items()}
        save_file(weights, path, metadata={"format": "pt"})
    theirs = hf.AutoModelForCausalLM.from_pretrained(tmp_path).float().eval()
    ours = load_model(tmp_path)
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs(tokens).logits
        close(ours(tokens)[0], expected)
        save_model(ours, tmp_path / "again")
        again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
        close(again(tokens).logits, expected)


def test_a_config_of_sizes_that_the_file_does_not_have_asks_for_no_memory(saved):
    for key in ("vocab_size", "num_hidden_layers", "intermediate_size"):
        before = json.loads((saved / "config.json").read_text())[key]
        edit_config(saved, **{key: 10**9})
        with refusal(str(saved)):
            load_model(saved)
        edit_config(saved, **{key: before})
