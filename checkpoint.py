"""Models as Hugging Face directories, read and written: config.json and safetensors weights.

What `save_model` writes, transformers loads with equal logits, and `load_model` reads what
transformers writes: LlamaForCausalLM, Qwen3ForCausalLM, DeepseekV3ForCausalLM without experts and
GPT2LMHeadModel, in fp32, bf16 or fp16, in one file or in shards. Nothing is ever unpickled.
"""

import json
import re
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import FAMILIES, SWITCHES, LLaMaTransformer, ModelConfig

INDEX = "model.safetensors.index.json"
ROPE_KEYS = {  # ModelConfig -> rope_parameters, or rope_scaling before transformers 5
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_seq_len": "original_max_position_embeddings",
}
LLAMA_KEYS = {  # ModelConfig -> config.json
    "vocab_size": "vocab_size",
    "n_layers": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "hidden_dim": "intermediate_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tie_embeddings": "tie_word_embeddings",
}
LATENT_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LLAMA_TENSORS = {  # our modules -> theirs; {} is the layer
    "embeddings": "model.embed_tokens",
    "decoder_blocks.{}.norm1": "model.layers.{}.input_layernorm",
    "decoder_blocks.{}.attention.wq": "model.layers.{}.self_attn.q_proj",
    "decoder_blocks.{}.attention.wk": "model.layers.{}.self_attn.k_proj",
    "decoder_blocks.{}.attention.wv": "model.layers.{}.self_attn.v_proj",
    "decoder_blocks.{}.attention.wo": "model.layers.{}.self_attn.o_proj",
    "decoder_blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
    "decoder_blocks.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    "decoder_blocks.{}.norm2": "model.layers.{}.post_attention_layernorm",
    "decoder_blocks.{}.ffwd.gate": "model.layers.{}.mlp.gate_proj",
    "decoder_blocks.{}.ffwd.up": "model.layers.{}.mlp.up_proj",
    "decoder_blocks.{}.ffwd.down": "model.layers.{}.mlp.down_proj",
    "norm": "model.norm",
    "final_linear": "lm_head",
}
LATENT_TENSORS = {
    "decoder_blocks.{}.attention.wq_a": "model.layers.{}.self_attn.q_a_proj",
    "decoder_blocks.{}.attention.q_norm": "model.layers.{}.self_attn.q_a_layernorm",
    "decoder_blocks.{}.attention.wq_b": "model.layers.{}.self_attn.q_b_proj",
    "decoder_blocks.{}.attention.wkv_a": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "decoder_blocks.{}.attention.kv_norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "decoder_blocks.{}.attention.wkv": "model.layers.{}.self_attn.kv_b_proj",
}
GPT2_TENSORS = {  # where several of ours share a name, theirs holds them one below the other
    "embeddings": "transformer.wte",
    "positions": "transformer.wpe",
    "decoder_blocks.{}.norm1": "transformer.h.{}.ln_1",
    "decoder_blocks.{}.attention.wq": "transformer.h.{}.attn.c_attn",
    "decoder_blocks.{}.attention.wk": "transformer.h.{}.attn.c_attn",
    "decoder_blocks.{}.attention.wv": "transformer.h.{}.attn.c_attn",
    "decoder_blocks.{}.attention.wo": "transformer.h.{}.attn.c_proj",
    "decoder_blocks.{}.norm2": "transformer.h.{}.ln_2",
    "decoder_blocks.{}.ffwd.up": "transformer.h.{}.mlp.c_fc",
    "decoder_blocks.{}.ffwd.down": "transformer.h.{}.mlp.c_proj",
    "norm": "transformer.ln_f",
    "final_linear": "lm_head",
}
# What old files hold beside the weights: tables that are computed.
COMPUTED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


class Family(NamedTuple):
    """How Hugging Face writes the models of a model_type."""

    architecture: str
    keys: dict[str, str]  # ModelConfig -> config.json
    tensors: dict[str, str]
    optional: dict[str, Any]  # keys that config.json may lack, and what they are then
    fixed: dict[str, Any]  # keys that must have this value if they are there


OPTIONAL = {"tie_word_embeddings": False, "num_key_value_heads": 0, "head_dim": 0}
FIXED = {"hidden_act": "silu", "attention_bias": False}
FORMATS = {
    "llama": Family(
        "LlamaForCausalLM",
        LLAMA_KEYS | {"head_dim": "head_dim"},
        LLAMA_TENSORS,
        OPTIONAL,
        FIXED | {"mlp_bias": False},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        LLAMA_KEYS | {"head_dim": "head_dim"},
        LLAMA_TENSORS,
        OPTIONAL | {"head_dim": 128},
        FIXED | {"use_sliding_window": False},
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        LLAMA_KEYS | {key: key for key in LATENT_KEYS},
        LLAMA_TENSORS | LATENT_TENSORS,
        OPTIONAL,
        FIXED | {"rope_interleave": True},
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        {
            "vocab_size": "vocab_size",
            "n_layers": "n_layer",
            "n_embd": "n_embd",
            "n_heads": "n_head",
            "hidden_dim": "n_inner",
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        GPT2_TENSORS,
        {"tie_word_embeddings": True, "n_inner": 0},
        {
            "activation_function": "gelu_new",
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
    ),
}


def read_config(directory: Path) -> ModelConfig:
    """Read a config.json; ValueError, on one line, for any setting that model.py lacks."""
    path = directory / "config.json"
    settings = read_json(path)
    model_type = settings.get("model_type")
    quantised = settings.get("quantization_config")
    if quantised:
        raise ValueError(
            f"{path}: weights quantised by {quantised.get('quant_method')} are not read"
        )
    experts = {"num_local_experts", "num_experts"} & settings.keys()
    dense = settings.get("first_k_dense_replace", 0), settings.get("num_hidden_layers", 1)
    if experts or (model_type == "deepseek_v3" and dense[0] < dense[1]):
        raise ValueError(f"{path}: a {model_type} with a mixture of experts is not supported")
    if model_type not in FORMATS:
        raise ValueError(f"{path}: unknown model_type {model_type!r}; known: {', '.join(FORMATS)}")
    family = FORMATS[model_type]
    for key, value in family.fixed.items():
        if settings.get(key, value) != value:
            raise ValueError(f"{path}: {key}={settings[key]!r} is not supported, only {value!r}")
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # transformers 4 and 5
        rope |= settings.get(key) or {}
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ("default", "llama3"):
            raise ValueError(f"{path}: RoPE scaling {rope_type!r} is not supported, only 'llama3'")
    given = {key: value for key, value in settings.items() if value is not None}
    given = (
        {"rope_theta": rope.get("rope_theta", 10000.0), "q_lora_rank": 0} | family.optional | given
    )
    try:
        values = {ours: given[theirs] for ours, theirs in family.keys.items()}
        if rope_type == "llama3":
            values |= {ours: rope[theirs] for ours, theirs in ROPE_KEYS.items()}
        return ModelConfig(**dict(zip(SWITCHES, FAMILIES[model_type], strict=True)), **values)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is incomplete: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_config(config: ModelConfig, directory: Path, end_of_text: int | None) -> None:
    """Write config.json and generation_config.json."""
    family = FORMATS[config.family]
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text}
    settings = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "dtype": "float32",
        "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in family.keys.items()},
        **family.fixed,
        **ends,
    }
    if config.position == "rope":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_factor:
            rope |= {theirs: getattr(config, ours) for ours, theirs in ROPE_KEYS.items()}
            rope["rope_type"] = "llama3"
            settings["rope_scaling"] = rope
        settings["rope_parameters"] = rope
    if config.use_mla:
        settings["q_lora_rank"] = config.q_lora_rank or None
        settings |= {"first_k_dense_replace": config.n_layers, "num_nextn_predict_layers": 0}
    write_json(directory / "config.json", settings)
    write_json(directory / "generation_config.json", ends)


class Stored(NamedTuple):
    """How one tensor of a file is made of our parameters, and they of it."""

    parts: list[Tensor]  # views of parameters, one below the other
    rows: Tensor | None  # which of our rows each of theirs is; None: the same
    transposed: bool

    def shape(self) -> tuple[int, ...]:
        """Return the shape of `read()` without making it."""
        shape = sum(map(len, self.parts)), *self.parts[0].shape[1:]
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        tensor = self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)
        tensor = tensor if self.rows is None else tensor[self.rows]
        return tensor.T if self.transposed else tensor

    def write(self, tensor: Tensor) -> None:
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor if self.rows is None else tensor[self.rows.argsort()]
        for part, rows in zip(self.parts, tensor.split([len(p) for p in self.parts]), strict=True):
            part.copy_(rows)


def stored_tensors(model: LLaMaTransformer) -> dict[str, Stored]:
    """Return how each tensor of a file is stored, without padding rows and tied twins."""
    config, names = model.config, FORMATS[model.config.family].tensors
    parts: dict[str, list[Tensor]] = defaultdict(list)
    rows: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        layer = "".join(re.findall(r"\.(\d+)\.", module))
        theirs = names[re.sub(r"\.\d+\.", ".{}.", module)].format(layer) + "." + kind
        padded = module in ("embeddings", "final_linear")
        parts[theirs].append(parameter.detach()[: config.vocab_size if padded else None])
        if config.use_mla and module.endswith((".wq", ".wq_b", ".wkv_a")):
            rows[theirs] = interleaved_rows(
                len(parameter), 1 if module.endswith(".wkv_a") else config.n_heads, config.rope_dim
            )
    linear = re.compile(r"c_(attn|proj|fc)\.weight$")  # GPT-2's are (in, out)
    return {
        name: Stored(tensors, rows.get(name), bool(linear.search(name)))
        for name, tensors in parts.items()
    }


def interleaved_rows(count: int, heads: int, rope_dim: int) -> Tensor:
    """Return DeepSeek-V3's order of our rows: where a head is rotated, pairs are neighbours."""
    rows = torch.arange(count).view(heads, -1)
    rotated = rows[:, -rope_dim:].view(heads, 2, -1).mT  # (heads, rope_dim / 2, 2)
    return torch.cat((rows[:, :-rope_dim], rotated.flatten(1)), dim=1).flatten()


def save_model(model: LLaMaTransformer, directory: Path, end_of_text: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors (fp32) to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    write_config(model.config, directory, end_of_text)
    weights = {
        name: stored.read().cpu().float().contiguous()
        for name, stored in stored_tensors(model).items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def load_model(directory: Path, max_seq_len: int = 0) -> LLaMaTransformer:
    """Read a directory into fp32 on the CPU; max_seq_len > 0 shortens the context.

    ValueError, on one line, for whatever is missing, damaged or of another architecture.
    """
    config = read_config(directory)
    if max_seq_len > config.max_seq_len:
        raise ValueError(
            f"max_seq_len={max_seq_len} is more than the {config.max_seq_len} of {directory}"
        )
    model = LLaMaTransformer(replace(config, max_seq_len=max_seq_len or config.max_seq_len))
    expected = stored_tensors(model)
    with ExitStack() as stack:
        found = open_tensors(directory, stack)
        unknown = found.keys() - expected.keys() - {"lm_head.weight"}
        wrong = expected.keys() - found.keys() or unknown
        if wrong:
            what = "has more than config.json says:" if wrong is unknown else "lacks"
            raise ValueError(f"{directory} {what} {len(wrong)} tensors, one {min(wrong)}")
        for name, stored in expected.items():
            file, their_name = found[name]
            tensor, shape = file.get_tensor(their_name), stored.shape()
            if name == "transformer.wpe.weight":
                tensor = tensor[: model.config.max_seq_len]
            if tensor.shape != shape:
                raise ValueError(
                    f"{directory}: {their_name} is {tuple(tensor.shape)}, "
                    f"config.json makes it {shape}"
                )
            if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"{directory}: {their_name} is {tensor.dtype}; quantised weights are not read"
                )
            stored.write(tensor)
    return model


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, tuple[Any, str]]:
    """Return, for each tensor of a directory, the open file that holds it and its name there."""
    found: dict[str, tuple[Any, str]] = {}
    for path in weight_files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            if re.match(r"(wte|wpe|h|ln_f)\.", name):  # GPT-2's own, without a head
                found[f"transformer.{name}"] = file, name
            else:
                found[name] = file, name
    return {name: where for name, where in found.items() if not COMPUTED.search(name)}


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory: one, or those that its index names."""
    path = directory / INDEX
    names = ["model.safetensors"]
    if path.is_file():
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} is damaged: no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{path} points outside its directory: {outside[0]!r}")
    for name in names:
        if not (directory / name).is_file():
            pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt"))
            reasons = [f"; {p} is a pickle, which can run code and is never read" for p in pickles]
            raise ValueError(f"no {name} in {directory}{''.join(reasons[:1])}")
    return [directory / name for name in names]


def read_json(path: Path) -> dict:
    """Read a JSON object; ValueError names the file when it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no {path.name} in {path.parent}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: no JSON object")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object, indented, UTF-8."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
