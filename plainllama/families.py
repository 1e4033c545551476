"""The model families: what ModelConfig is called in Hugging Face's config.json, and back.

A family's switches are the keys of ModelConfig that make a model one of it; its tensors are the
names of its weights. An architecture that no family has can be built, but not saved or trained.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from model import ModelConfig
from plainllama.settings import UserError, build, fits, read_json, wanted, write_json

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


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes the models of a model_type."""

    architecture: str
    switches: dict[str, Any]  # the keys of ModelConfig that make a model one of this family
    keys: dict[str, str]  # ModelConfig -> config.json
    tensors: dict[str, str]
    optional: dict[str, Any]  # keys that config.json may lack, and what they are then
    fixed: dict[str, tuple]  # keys that must have one of these values if they are there
    transposed: bool = False  # matrices of linear layers are (in, out)
    interleaved: tuple[str, ...] = ()  # linear layers whose rotated rows alternate between halves


LLAMA = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "qk_norm": False}
LLAMA |= {"use_mla": False}
OPTIONAL = {"tie_word_embeddings": False, "num_key_value_heads": 0, "head_dim": 0}
OPTIONAL |= {"rms_norm_eps": 1e-6}
ALIASES = {  # what config.json may say instead of GPT-2's own names
    "num_hidden_layers": "n_layer",
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
}
FIXED = {"hidden_act": ("silu", "swish"), "attention_bias": (False,)}
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        switches=LLAMA,
        keys=LLAMA_KEYS | {"head_dim": "head_dim"},
        tensors=LLAMA_TENSORS,
        optional=OPTIONAL,
        fixed=FIXED | {"mlp_bias": (False,)},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        switches=LLAMA | {"qk_norm": True},
        keys=LLAMA_KEYS | {"head_dim": "head_dim"},
        tensors=LLAMA_TENSORS,
        optional=OPTIONAL | {"head_dim": 128},
        fixed=FIXED | {"use_sliding_window": (False,)},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        switches=LLAMA | {"use_mla": True},
        keys=LLAMA_KEYS | {key: key for key in LATENT_KEYS},
        tensors=LLAMA_TENSORS | LATENT_TENSORS,
        optional=OPTIONAL,
        fixed=FIXED | {"rope_interleave": (True,)},
        interleaved=("wq", "wq_b", "wkv_a"),
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        switches=LLAMA | {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
        keys={
            "vocab_size": "vocab_size",
            "n_layers": "n_layer",
            "n_embd": "n_embd",
            "n_heads": "n_head",
            "hidden_dim": "n_inner",
            "max_seq_len": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "tie_embeddings": "tie_word_embeddings",
        },
        tensors=GPT2_TENSORS,
        optional={"tie_word_embeddings": True, "n_inner": 0, "layer_norm_epsilon": 1e-5},
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        transposed=True,
    ),
}


def family_of(config: ModelConfig) -> str:
    """Return Hugging Face's model_type for a shape; UserError if it has none."""
    given = {key: getattr(config, key) for key in LLAMA}
    differing = {
        name: {key: value for key, value in family.switches.items() if value != given[key]}
        for name, family in FAMILIES.items()
    }
    nearest = min(differing, key=lambda name: len(differing[name]))
    if differing[nearest]:
        needed = ", ".join(f"{key}={value}" for key, value in differing[nearest].items())
        changed = ", ".join(f"{key}={given[key]}" for key in differing[nearest])
        raise UserError(
            f"no family of models has {changed} beside the other switches; "
            f"the nearest, {nearest}, has {needed}"
        )
    plain = replace(config, n_kv_heads=0, head_dim=0)
    for key, width in (("n_kv_heads", "kv_heads"), ("head_dim", "head_width")):
        if nearest in ("gpt2", "deepseek_v3") and getattr(config, width) != getattr(plain, width):
            raise UserError(
                f"{key}={getattr(config, key)}, but {nearest} has {getattr(plain, width)}, "
                "which follows from the other keys: leave it out"
            )
    return nearest


def resolved(config: ModelConfig) -> ModelConfig:
    """Return the same shape with the widths that follow from other keys written out."""
    widths = {"n_kv_heads": config.kv_heads, "head_dim": config.head_width}
    return replace(config, **widths, hidden_dim=config.hidden_width)


def read_config(directory: Path) -> ModelConfig:
    """Read a config.json; UserError, on one line, for any setting that model.py lacks."""
    path = directory / "config.json"
    settings = {key: value for key, value in read_json(path).items() if value is not None}
    name = check_model_type(path, settings)
    family = FAMILIES[name]
    for key, allowed in family.fixed.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(
                f"{path}: {key}={settings[key]!r} is not supported, only {allowed[0]!r}"
            )
    for alias, key in ALIASES.items() if name == "gpt2" else ():
        if alias in settings and settings.setdefault(key, settings[alias]) != settings[alias]:
            both = f"{key}={settings[key]!r}, {alias}={settings[alias]!r}"
            raise UserError(f"{path} contradicts itself: {both}")
    rope = read_rope(path, settings)
    given = {"rope_theta": 10000.0, "q_lora_rank": 0} | family.optional | settings | rope
    values = dict(family.switches)
    for field in fields(ModelConfig):
        theirs = (family.keys | (ROPE_KEYS if "factor" in rope else {})).get(field.name)
        if theirs is None:
            continue
        if theirs not in given:
            raise UserError(f"{path} is incomplete: no {theirs}")
        value = given[theirs]
        if not fits(value, field.type):
            raise UserError(f"{path}: {theirs}={value!r}: it takes {wanted(field.type)}")
        values[field.name] = value
    try:
        return build(ModelConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def check_model_type(path: Path, settings: dict[str, Any]) -> str:
    """Return the model_type of a config.json; UserError if it is none of FAMILIES."""
    model_type, layers = settings.get("model_type"), settings.get("num_hidden_layers", 1)
    if quantised := settings.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise UserError(f"{path}: weights quantised by {method} are not read")
    experts = {"num_local_experts", "num_experts"} & settings.keys()
    if model_type == "deepseek_v3":
        dense = settings.get("first_k_dense_replace", 0)
        experts = not (fits(dense, int) and fits(layers, int)) or dense < layers
    if experts:
        raise UserError(f"{path}: a {model_type} with a mixture of experts is not supported")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"{path}: unknown model_type {model_type!r}; known: {known}")
    return model_type


def read_rope(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE settings of transformers 4 (rope_scaling) and 5 (rope_parameters)."""
    rope: dict[str, Any] = {}
    for place in ("rope_scaling", "rope_parameters"):
        if place not in settings:
            continue
        given = settings[place]
        if not isinstance(given, dict):
            raise UserError(f"{path}: {place}={given!r} is no JSON object")
        given = {key: value for key, value in given.items() if value is not None}
        kind = given.pop("rope_type", given.pop("type", rope.get("rope_type", "default")))
        given.pop("type", None)
        if kind not in ("default", "llama3"):
            raise UserError(f"{path}: RoPE scaling {kind!r} is not supported, only 'llama3'")
        for key, value in {"rope_type": kind, **given}.items():
            if key in rope and rope[key] != value:
                both = f"rope_scaling has {key}={rope[key]!r}, rope_parameters {value!r}"
                raise UserError(f"{path} contradicts itself: {both}")
            rope[key] = value
    for key in ("rope_theta", "original_max_position_embeddings"):
        if key in settings and key in rope and rope[key] != settings[key]:
            both = f"{key}={settings[key]!r}, in rope_parameters {rope[key]!r}"
            raise UserError(f"{path} contradicts itself: {both}")
    longest = settings.get("max_position_embeddings")
    rope.setdefault("original_max_position_embeddings", longest)  # as transformers does
    llama3 = list(ROPE_KEYS.values()) if rope.get("rope_type") == "llama3" else []
    missing = [key for key in llama3 if key not in rope]
    if missing:
        raise UserError(f"{path} is incomplete: no {missing[0]} for RoPE scaling 'llama3'")
    return {key: rope[key] for key in ("rope_theta", *llama3) if key in rope}


def write_config(config: ModelConfig, directory: Path, ids: dict[str, Any]) -> None:
    """Write config.json, with the begin- and end-of-text ids that generation_config.json has."""
    name = family_of(config)
    family, config = FAMILIES[name], resolved(config)
    settings = {
        "architectures": [family.architecture],
        "model_type": name,
        "dtype": "float32",
        "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, theirs in family.keys.items()},
        **{key: allowed[0] for key, allowed in family.fixed.items()},
        **{key: ids.get(key) for key in ("bos_token_id", "eos_token_id")},
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
