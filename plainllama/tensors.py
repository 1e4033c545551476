"""Tensors as files have them: how each is made of our parameters, and files of a limited size."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model import LLaMaTransformer
from plainllama.architecture import label_of
from plainllama.distributed import fill, to_full
from plainllama.families import FAMILIES
from plainllama.settings import read_json, write_json
from plainllama.terminal import UserError

LARGEST_FILE = 1_000_000_000  # bytes of tensors in a file: as many are in memory at once


class Stored(NamedTuple):
    """How one tensor of a file is made of our parameters, and they of it."""

    parts: list[tuple[nn.Module, str]]  # modules and names of parameters, one below the other
    length: int | None  # how many rows are stored, where there is padding
    order: Tensor | None  # which of our rows each of theirs is; None: the same
    transposed: bool

    @property
    def parameters(self) -> list[Tensor]:
        """Our parameters, each whole or shared out between processes."""
        return [getattr(module, kind).detach() for module, kind in self.parts]

    def shape(self) -> tuple[int, ...]:
        """Return the shape of `read()` without making it."""
        shape = self.length or sum(map(len, self.parameters)), *self.parameters[0].shape[1:]
        return shape[::-1] if self.transposed else shape

    def read(self) -> Tensor:
        """Return the tensor, adapters added; all processes that share it out must ask for it."""
        blocks = []
        for module, kind in self.parts:
            adapted = hasattr(module, "merged") and kind == "weight"  # a LoRALinear
            block = module.merged() if adapted else to_full(getattr(module, kind).detach())
            blocks.append(block)
        tensor = (blocks[0] if len(blocks) == 1 else torch.cat(blocks))[: self.length]
        tensor = tensor if self.order is None else tensor[self.order.to(tensor.device)]
        return tensor.T if self.transposed else tensor

    def write(self, tensor: Tensor) -> None:
        """Set the parameters, and padding to zero."""
        tensor = tensor.T if self.transposed else tensor
        tensor = tensor if self.order is None else tensor[self.order.argsort()]
        for parameter in self.parameters:
            fill(parameter, tensor[: len(parameter)])
            tensor = tensor[len(parameter) :]


def stored_tensors(
    model: LLaMaTransformer, model_type: str = "", adapters: bool = False
) -> dict[str, Stored]:
    """Return how each tensor of a file is stored, without padding rows and tied twins.

    By default in the form that save_model writes. What a family has no name for keeps model.py's.
    They are the weights, with adapters added, or A and B of the adapters themselves.
    """
    config = model.config
    family = FAMILIES[model_type or label_of(config)[0]]
    stored: dict[str, Stored] = {}
    for name, parameter in model.named_parameters():
        place, _, kind = name.rpartition(".")  # decoder_blocks.0.attention.wq, weight
        if kind.startswith("lora_") != adapters:
            continue
        theirs = f"{family.module(place)}.{kind}" if family.module(place) else name
        module, layer = model.get_submodule(place), place.rpartition(".")[2]
        order = None
        if layer in family.interleaved and kind != "lora_A":
            heads = 1 if layer == "wkv_a" else config.n_heads
            order = interleaved_rows(len(parameter), heads, config.rope_width)
        is_linear = isinstance(module, nn.Linear) and module is not model.final_linear
        transposed = family.transposed and is_linear and kind == "weight"
        is_padded = module in (model.embeddings, model.final_linear)
        length = config.vocab_size if is_padded else None
        one = stored.setdefault(theirs, Stored([], length, order, transposed))
        one.parts.append((module, kind))
    return stored


def interleaved_rows(count: int, heads: int, rope_width: int) -> Tensor:
    """Return DeepSeek-V3's order of our rows: where a head is rotated, pairs are neighbours."""
    rows = torch.arange(count).view(heads, -1)
    rotated = rows[:, -rope_width:].view(heads, 2, -1).mT  # (heads, rope_width / 2, 2)
    return torch.cat((rows[:, :-rope_width], rotated.flatten(1)), dim=1).flatten()


def save_tensors(
    path: Path, like: dict[str, Tensor], read: Callable[[str], Tensor], writes: bool = True
) -> None:
    """Write the tensors that `read` returns, of shapes and dtypes as in `like`, to `path`.

    More than LARGEST_FILE bytes go to NAME-00001-of-0000N.safetensors and so on, and an index. All
    processes that share the tensors out call this and read all tensors in the same order; the one
    with `writes` writes. OSError where the disk refuses, but only after all tensors were read.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        like,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=f"{path.stem}{{suffix}}{path.suffix}",
        max_shard_size=LARGEST_FILE,
    )
    failure = None
    for file, names in split.filename_to_tensors.items():
        shard = {}
        for name in names:
            tensor = read(name)
            if writes:
                shard[name] = tensor.cpu().contiguous()
        if writes and not failure:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                save_file(shard, path.with_name(file), metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                failure = error
    if failure:
        raise OSError(str(failure)) from failure
    if writes and split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(path.with_name(f"{path.name}.index.json"), index)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that save_tensors wrote, mapped: what is not used is not read."""
    tensors: dict[str, Tensor] = {}
    for file in files_of(path):
        if not file.is_file():
            where = f"no {file.name} in {file.parent}"
            raise UserError(f"{where}; pickles (.bin, .pt) are never read")
        try:
            tensors |= load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is damaged or no safetensors file: {error}") from error
    return tensors


def files_of(path: Path) -> list[Path]:
    """Return the files that hold a file's tensors: itself, or those that its index names."""
    index = path.with_name(f"{path.name}.index.json")
    if path.is_file() or not index.is_file():
        return [path]
    weight_map = read_json(index).get("weight_map")
    names = sorted(map(str, weight_map.values())) if isinstance(weight_map, dict) else []
    if not all(names or [""]) or any(Path(name).name != name for name in names):
        raise UserError(f"{index} is damaged: its weight_map names no files beside it")
    return [path.with_name(name) for name in dict.fromkeys(names)]
