"""LoRA: beside frozen matrices, products of low rank are trained, and nothing else.

In training, layers of the blocks are LoRALinear. A checkpoint is a whole model, the products added
to its weights; its adapter/ has the products alone, in peft's format. Such a directory, peft's or
ours, stands for its base with the products added: load_model reads it as a model.

    ADAPTER/adapter_config.json         rank, scale, layers, and the directory of the base
    ADAPTER/adapter_model.safetensors   A, (r, in), and B, (out, r), of each layer
"""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from model import LLaMaTransformer
from plainllama.distributed import fill, to_full
from plainllama.families import read_config
from plainllama.settings import fits, read_json, write_json
from plainllama.tensors import load_tensors
from plainllama.terminal import UserError

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of peft's names
# What adapter_config.json may say without changing the sum W + alpha / r B A, or W itself.
ANY_VALUE = (
    *("r", "rank_pattern", "lora_alpha", "lora_dropout", "base_model_name_or_path", "revision"),
    *("task_type", "inference_mode", "peft_version", "auto_mapping", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("megatron_core", "qalora_group_size"),
)
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


class LoRALinear(nn.Linear):
    """W x + b + scale B A x, where A (r, in) and B (out, r) alone are trained (arXiv:2106.09685).

    An nn.Linear becomes one in place, by its class, so that its parameters keep their names.
    """

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)  # (..., r)
        return super().forward(x) + self.scale * F.linear(low, self.lora_B)

    def merged(self) -> Tensor:
        """Return W + scale B A; all processes that share the layer out must ask for it."""
        A, B, W = (to_full(p.detach()) for p in (self.lora_A, self.lora_B, self.weight))
        return W + self.scale * (B @ A)


def add_adapters(model: LLaMaTransformer, config: Any) -> None:
    """Freeze a model, and add adapters, without values, to the layers that lora_targets names.

    Layers are those of the blocks. UserError for a name that none has.
    """
    model.requires_grad_(False)
    modules = model.decoder_blocks.named_modules()
    layers = [(path.split(".")[-1], m) for path, m in modules if isinstance(m, nn.Linear)]
    names = list(dict.fromkeys(name for name, _ in layers))
    targets = [name.strip() for name in (config.lora_targets or ",".join(names)).split(",")]
    for name in targets:
        if name not in names:
            raise UserError(f"lora_targets={name} is no layer of the blocks: {','.join(names)}")
    for name, layer in layers:
        if name in targets:
            layer.__class__ = LoRALinear
            layer.scale, layer.dropout = config.lora_alpha / config.lora_rank, config.dropout
            shapes = (config.lora_rank, layer.in_features), (layer.out_features, config.lora_rank)
            layer.lora_A, layer.lora_B = (nn.Parameter(layer.weight.new_empty(s)) for s in shapes)


def adapter_parameters(model: LLaMaTransformer) -> dict[str, nn.Parameter]:
    """Return A and B of all adapters, by their names."""
    return {name: p for name, p in model.named_parameters() if ".lora_" in name}


def init_adapters(model: LLaMaTransformer) -> None:
    """Draw A as nn.Linear draws its weight; B is 0, so that the model computes what it did."""
    for name, parameter in adapter_parameters(model).items():
        drawn = torch.zeros(parameter.shape)
        if name.endswith("lora_A"):
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        fill(parameter, drawn)


def peft_lacks(stored: dict[str, Any], config: Any) -> str:
    """Return why peft could not read adapters that stored_tensors describes; "" if it could."""
    joined = [layer_of(name) for name, tensor in stored.items() if len(tensor.parameters) > 1]
    if joined:
        return f"peft knows the layers that are trained as one, {joined[0]}"
    if config.use_mla and any(".mlp." in name for name in stored):
        return "peft takes the feed-forward layers of a DeepSeek-V3 for experts"
    if read_config(Path(config.init_from)).vocab_size < config.vocab_size:
        return "the words of turns have rows that the base lacks"
    is_adapter = (Path(config.init_from) / "adapter_config.json").is_file()
    return f"peft has no adapters of an adapter, {config.init_from}" if is_adapter else ""


def layer_of(name: str) -> str:
    """Return "self_attn.q_proj", for example, of the name of its A or B."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[1].rpartition(".")[0]


def save_adapter(stored: dict[str, Any], config: Any, directory: Path, writes: bool) -> None:
    """Write adapters that stored_tensors describes as peft does, unless it could not read them.

    Processes that share the model out all call this; one `writes`.
    """
    if peft_lacks(stored, config):
        return
    names = {name: name.replace("decoder_blocks", "plain.decoder_blocks") for name in stored}
    tensors = {f"{PREFIX}{names[name]}.weight": s.read().cpu() for name, s in stored.items()}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.init_from,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted({layer_of(name) for name in stored}),
    }
    if writes:
        directory.mkdir()
        write_json(directory / "adapter_config.json", settings)
        save_file(tensors, directory / FILE, metadata={"format": "pt"})


class Adapter(NamedTuple):
    """What an adapter directory adds to its base: alpha / r B A, to each weight in `pairs`."""

    directory: Path
    alpha: float
    pairs: dict[str, tuple[Tensor, Tensor]]  # a weight's name -> B (out, r), A (r, in)

    def check(self, stored: dict[str, Any]) -> None:
        """Raise a UserError unless what the base has stored has these names and shapes."""
        for name, (B, A) in self.pairs.items():
            shape = stored[name].shape() if name in stored else ()
            if name in stored and stored[name].transposed:
                shape = shape[::-1]
            if B.shape[1:] != A.shape[:1] or (*B.shape[:1], *A.shape[1:]) != shape:
                raise UserError(f"{self.directory} is an adapter of another base, by its {name}")

    def added_to(self, name: str, weight: Tensor, transposed: bool) -> Tensor:
        """Return a weight of the base with its product added."""
        if name not in self.pairs:
            return weight
        B, A = self.pairs[name]
        product = self.alpha / len(A) * (B.float() @ A.float())
        return weight.float() + (product.T if transposed else product)


def read_adapter(directory: Path) -> Adapter:
    """Read a directory's adapter; without one it has no pairs. UserError for one of other kinds."""
    path, file = directory / "adapter_config.json", directory / FILE
    if not path.is_file():
        return Adapter(directory, 0, {})
    settings = read_json(path)
    for key, value in settings.items():
        if value and key not in ANY_VALUE and value not in PLAIN.get(key, ()):
            raise UserError(f"{path}: {key}={value!r} is not supported, only plain LoRA is")
    if not fits(alpha := settings.get("lora_alpha"), float):
        raise UserError(f"{path}: lora_alpha={alpha!r} is no number")
    tensors = load_tensors(file)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, A in tensors.items():
        name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        keys = [f"{PREFIX}{name}.lora_{letter}.weight" for letter in "BA"]
        if key == keys[1] and keys[0] in tensors and A.dim() == 2 and len(A) > 0:
            pairs[f"{name.removeprefix('plain.')}.weight"] = tensors[keys[0]], A
    if 2 * len(pairs) != len(tensors):
        raise UserError(f"{file} has other tensors than lora_A (r, in) and lora_B (out, r)")
    return Adapter(directory, alpha, pairs)
