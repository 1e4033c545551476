"""The model families: what ModelConfig is called in Hugging Face's config.json, and back.

A family's switches are the keys of ModelConfig that make a model one of it; its tensors are the
names of its weights. What no family has is written as `plainllama`: all of ModelConfig beside
Hugging Face's own keys, and the names of model.py.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from model import ModelConfig
from plainllama.settings import build, fits, read_json, wanted, write_json
from plainllama.terminal import UserError

ROPE_KEYS = {  # ModelConfig -> rope_parameters, or rope_scaling before transformers 5
    "rope_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_seq_len": "original_max_position_embeddings",
}
OWN = "plainllama"  # the model_type of an architecture that is no family's
OFF = dict.fromkeys(("bias", "qkv_bias", "qk_norm", "use_mla"), False)
LLAMA_SWITCHES = {"position": "rope", "norm": "rmsnorm", "mlp": "swiglu", **OFF}
# ModelConfig -> its key in config.json, and its value where config.json may lack the key.
LLAMA_KEYS = {
    "vocab_size": ("vocab_size",),
    "n_layers": ("num_hidden_layers",),
    "n_embd": ("hidden_size",),
    "n_heads": ("num_attention_heads",),
    "n_kv_heads": ("num_key_value_heads", 0),
    "head_dim": ("head_dim", 0),
    "hidden_dim": ("intermediate_size",),
    "max_seq_len": ("max_position_embeddings",),
    "norm_eps": ("rms_norm_eps", 1e-6),
    "rope_theta": ("rope_theta",),
    "tie_embeddings": ("tie_word_embeddings", False),
}
LATENT_WIDTHS = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
DEEPSEEK_KEYS = {  # whose heads have keys and values of their own, of one width
    **{key: LLAMA_KEYS[key] for key in LLAMA_KEYS if key not in ("n_kv_heads", "head_dim")},
    "q_lora_rank": ("q_lora_rank", 0),
    **{key: (key,) for key in LATENT_WIDTHS},
}
GPT2_KEYS = {
    "vocab_size": ("vocab_size",),
    "n_layers": ("n_layer",),
    "n_embd": ("n_embd",),
    "n_heads": ("n_head",),
    "hidden_dim": ("n_inner", 0),
    "max_seq_len": ("n_positions",),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "tie_embeddings": ("tie_word_embeddings", True),
}
# Our modules, those in a block without its name -> LLaMA's and its kin's, GPT-2's. Where several of
# ours share a name, theirs holds them one below the other.
TENSORS = {
    "embeddings": ("model.embed_tokens", "transformer.wte"),
    "positions": ("", "transformer.wpe"),
    "decoder_blocks": ("model.layers", "transformer.h"),
    "norm1": ("input_layernorm", "ln_1"),
    "attention.wq": ("self_attn.q_proj", "attn.c_attn"),
    "attention.wk": ("self_attn.k_proj", "attn.c_attn"),
    "attention.wv": ("self_attn.v_proj", "attn.c_attn"),
    "attention.wo": ("self_attn.o_proj", "attn.c_proj"),
    "attention.q_norm": ("self_attn.q_norm", ""),
    "attention.k_norm": ("self_attn.k_norm", ""),
    "attention.wq_a": ("self_attn.q_a_proj", ""),
    "attention.wq_b": ("self_attn.q_b_proj", ""),
    "attention.wkv_a": ("self_attn.kv_a_proj_with_mqa", ""),
    "attention.kv_norm": ("self_attn.kv_a_layernorm", ""),
    "attention.wkv": ("self_attn.kv_b_proj", ""),
    "norm2": ("post_attention_layernorm", "ln_2"),
    "ffwd.gate": ("mlp.gate_proj", ""),
    "ffwd.up": ("mlp.up_proj", "mlp.c_fc"),
    "ffwd.down": ("mlp.down_proj", "mlp.c_proj"),
    "norm": ("model.norm", "transformer.ln_f"),
    "final_linear": ("lm_head", "lm_head"),
}
LLAMA_TENSORS = {ours: llama for ours, (llama, _) in TENSORS.items()}
DEEPSEEK_TENSORS = {**LLAMA_TENSORS, "attention.q_norm": "self_attn.q_a_layernorm"}
GPT2_TENSORS = {ours: gpt2 for ours, (_, gpt2) in TENSORS.items()}


@dataclass(frozen=True)
class Family:
    """How Hugging Face writes the models of a model_type; these are LLaMA's ways."""

    architecture: str = "LlamaForCausalLM"
    switches: dict[str, Any] = field(default_factory=lambda: LLAMA_SWITCHES)
    keys: dict[str, tuple] = field(default_factory=lambda: LLAMA_KEYS)
    tensors: dict[str, str] = field(default_factory=lambda: LLAMA_TENSORS)
    fixed: dict[str, tuple] = field(default_factory=dict)  # values that config.json may have
    transposed: bool = False  # matrices of linear layers are (in, out)
    interleaved: tuple[str, ...] = ()  # linear layers whose rotated rows alternate between halves

    def module(self, ours: str) -> str:
        """Return their name of a module of ours; "" if they have none."""
        if not ours.startswith("decoder_blocks."):
            return self.tensors.get(ours, "")
        blocks, layer, inside = ours.split(".", 2)
        theirs = self.tensors.get(inside, "")
        return theirs and f"{self.tensors[blocks]}.{layer}.{theirs}"


SILU = {"hidden_act": ("silu", "swish")}
NO_BIAS = {"attention_bias": (False,)}
FAMILIES = {
    "llama": Family(fixed={**SILU, **NO_BIAS, "mlp_bias": (False,)}),
    "mistral": Family("MistralForCausalLM", fixed=SILU),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        switches=LLAMA_SWITCHES | {"qkv_bias": True},
        fixed={**SILU, "use_sliding_window": (False,)},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        switches=LLAMA_SWITCHES | {"qk_norm": True},
        fixed={**SILU, **NO_BIAS, "use_sliding_window": (False,)},
    ),
    "deepseek_v3": Family(
        architecture="DeepseekV3ForCausalLM",
        switches=LLAMA_SWITCHES | {"use_mla": True},
        keys=DEEPSEEK_KEYS,
        tensors=DEEPSEEK_TENSORS,
        fixed={**SILU, **NO_BIAS, "rope_interleave": (True,)},
        interleaved=("wq", "wq_b", "wkv_a"),
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        switches=LLAMA_SWITCHES
        | {"position": "learned", "norm": "layernorm", "mlp": "gelu", "bias": True},
        keys=GPT2_KEYS,
        tensors=GPT2_TENSORS,
        fixed={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
        transposed=True,
    ),
    OWN: Family(  # all of ModelConfig, and parameters of model.py's names
        architecture="PlainllamaForCausalLM",
        keys={each.name: (each.name, each.default) for each in fields(ModelConfig)},
        tensors={},
    ),
}


def told_keys(directory: Path) -> set[str]:
    """Return the keys of ModelConfig that a directory's config.json tells."""
    settings = read_json(directory / "config.json")
    name = settings.get("model_type")
    return {*settings} if name == OWN else known_keys(name)


def known_keys(name: str) -> set[str]:
    """Return the keys of ModelConfig that a family has."""
    family = FAMILIES[name]
    rope = ROPE_KEYS if family.switches["position"] == "rope" else ()
    return {*LLAMA_SWITCHES, *family.keys, *rope, "multiple_of"}


def find_family(config: ModelConfig) -> tuple[str, str]:
    """Return the model_type that has all settings of a shape, and ""; or OWN, and what is odd.

    A Mistral is a llama by its shape, and is called one.
    """
    given = {key: getattr(config, key) for key in LLAMA_SWITCHES}
    family = next((name for name in FAMILIES if FAMILIES[name].switches == given), "")
    defaults = {each.name: each.default for each in fields(ModelConfig)}
    known = known_keys(family) if family else defaults.keys() - LLAMA_SWITCHES.keys()
    rest = {key: default for key, default in defaults.items() if key not in known}
    asked = asdict(resolved(config))
    plain = asdict(resolved(replace(resolved(config), **rest)))  # with what the family lacks unset
    odd = ", ".join(f"{key}={asked[key]}" for key in asked if asked[key] != plain[key])
    return (OWN, f"no {family or 'family'} has {odd}") if odd else (family, "")


def resolved(config: ModelConfig) -> ModelConfig:
    """Return the same shape with the widths that follow from other keys written out."""
    widths = {"n_kv_heads": config.kv_heads, "head_dim": config.head_width}
    return replace(config, **widths, hidden_dim=config.hidden_width)


def base_of(directory: Path) -> Path:
    """Return the directory of the model that an adapter belongs to; of any other model, its own.

    adapter_config.json names it, unless a config.json is beside it: so does transformers read both.
    """
    path = directory / "adapter_config.json"
    if (directory / "config.json").is_file() or not path.is_file():
        return directory
    base = Path(str(read_json(path).get("base_model_name_or_path")))
    if not (base / "config.json").is_file() or (base / path.name).is_file():
        raise UserError(
            f"{directory} is an adapter of {base}, which is no model's directory here: write where "
            f"its base is into {path}, as base_model_name_or_path"
        )
    return base


def read_config(directory: Path) -> ModelConfig:
    """Read a config.json; UserError, on one line, for any setting that model.py lacks."""
    path = base_of(directory) / "config.json"
    settings = read_json(path)
    name = str(settings.get("model_type"))
    if name not in FAMILIES:
        raise UserError(f"{path}: unknown model_type {name!r}; known: {', '.join(FAMILIES)}")
    if settings.get("quantization_config"):
        raise UserError(f"{path}: quantised weights are not read")
    given = {key: value for key, value in settings.items() if value is not None}
    family = FAMILIES[name]
    for key, allowed in family.fixed.items():
        if given.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key}={given[key]!r} is not supported, only {allowed[0]!r}")
    keys = family.keys
    if name != OWN:
        rope = read_rope(path, given)
        keys = keys | {ours: (key,) for ours, key in ROPE_KEYS.items() if key in rope}
        given |= rope
    types = {each.name: each.type for each in fields(ModelConfig)}
    values = dict(family.switches)
    for ours, (theirs, *default) in keys.items():
        if theirs not in given and not default:
            raise UserError(f"{path} is incomplete: no {theirs}")
        value = given.get(theirs, *default)
        if not fits(value, types[ours]):
            raise UserError(f"{path}: {theirs}={value!r}: it takes {wanted(types[ours])}")
        values[ours] = value
    context, window = values["max_seq_len"], settings.get("sliding_window", 4096)
    fitting = window is None or (fits(window, int) and window >= context)
    if name == "mistral" and not fitting:
        raise UserError(
            f"{path}: sliding_window={window} is not supported where the context is longer: "
            f"set max_position_embeddings={context} to it"
        )
    dense = given.get("first_k_dense_replace", 0)
    if name == "deepseek_v3" and not (fits(dense, int) and dense >= values["n_layers"]):
        raise UserError(f"{path}: a {name} with a mixture of experts is not supported")
    try:
        return build(ModelConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_rope(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of RoPE: rope_scaling's or, since transformers 5, rope_parameters'."""
    rope = given.get("rope_scaling") or given.get("rope_parameters", {})
    kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if kind not in ("default", "llama3"):
        raise UserError(f"{path}: RoPE scaling {kind!r} is not supported, only 'llama3'")
    found = {"rope_theta": rope.get("rope_theta", given.get("rope_theta", 10000.0))}
    if kind == "llama3":
        found |= {key: rope.get(key) for key in ROPE_KEYS.values()}
    return found


def write_config(
    config: ModelConfig,
    directory: Path,
    ids: dict[str, Any],
    name: str,
    numbers: Sequence[float] = (),
) -> None:
    """Write the config.json of a model_type, with the ids that generation_config.json has.

    OWN's has what transformers and its like look for, all of ModelConfig, and the toy's numbers.
    """
    config = resolved(config)
    family = FAMILIES[name]
    settings = {
        "architectures": [family.architecture],
        "model_type": name,
        "dtype": "float32",
        "torch_dtype": "float32",
        **{theirs: getattr(config, ours) for ours, (theirs, *_) in family.keys.items()},
        **{key: allowed[0] for key, allowed in family.fixed.items()},
        **{key: ids.get(key) for key in ("bos_token_id", "eos_token_id")},
    }
    if name == OWN:
        settings |= {theirs: getattr(config, ours) for ours, (theirs, *_) in LLAMA_KEYS.items()}
        parts = {"AutoConfig": "PlainllamaConfig", "AutoModelForCausalLM": family.architecture}
        auto_map = {key: f"modeling_plainllama.{part}" for key, part in parts.items()}
        settings |= {"auto_map": auto_map, "toy": list(numbers)}
    elif config.position == "rope":
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        if config.rope_factor:
            rope |= {theirs: getattr(config, ours) for ours, theirs in ROPE_KEYS.items()}
            rope["rope_type"] = "llama3"
            settings["rope_scaling"] = rope
        settings["rope_parameters"] = rope
    if name == "deepseek_v3":
        settings |= {"num_key_value_heads": config.n_heads, "num_nextn_predict_layers": 0}
        settings["q_lora_rank"] = config.q_lora_rank or None
        settings["first_k_dense_replace"] = config.n_layers  # no experts
    if name == "mistral":
        settings["sliding_window"] = None
    write_json(directory / "config.json", settings)
