"""Tensors in safetensors files of limited size, written and read one tensor at a time."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from plainllama.files import read_json, write_json
from plainllama.settings import UserError

LARGEST_FILE = 5_000_000_000  # bytes of tensors in a file, as transformers has it
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.int64: "I64"}


def index_of(path: Path) -> Path:
    """Return the file that says which of several files each tensor is in."""
    return path.with_name(f"{path.name}.index.json")


def save_tensors(
    path: Path, like: dict[str, Tensor], read: Callable[[str], Tensor], writes: bool = True
) -> None:
    """Write the tensors that `read` returns, of shapes and dtypes as in `like`, to `path`.

    More than LARGEST_FILE bytes go to NAME-00001-of-0000N.safetensors and an index. One tensor at a
    time is in memory. All processes that share the tensors out call this, and read all tensors in
    this order; the one with `writes` writes.
    """
    files: list[list[str]] = [[]]
    room = LARGEST_FILE
    for name, tensor in like.items():
        if tensor.nbytes > room and files[-1]:
            files.append([])
            room = LARGEST_FILE
        files[-1].append(name)
        room -= tensor.nbytes
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = path.name if len(files) == 1 else numbered(path, number, len(files))
        weight_map |= dict.fromkeys(names, file)
        if writes:
            write_file(path.with_name(file), {name: like[name] for name in names}, read)
        else:
            for name in names:
                read(name)
    if writes and len(files) > 1:
        total = {"total_size": sum(tensor.nbytes for tensor in like.values())}
        write_json(index_of(path), {"metadata": total, "weight_map": weight_map})


def write_file(path: Path, like: dict[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """Write one safetensors file: the length of a JSON header, the header, and the numbers.

    safetensors' own save_file wants all tensors in memory at once.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        place = [end, end := end + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, expected in like.items():
            tensor = read(name)
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}")
            file.write(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())


def numbered(path: Path, number: int, count: int) -> str:
    """Return the name of one of several files, as Hugging Face writes it."""
    return f"{path.stem}-{number:05d}-of-{count:05d}{path.suffix}"


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors that save_tensors wrote, mapped: what is not used is not read."""
    index = index_of(path)
    if path.is_file() or not index.is_file():
        return load_file(path)
    names = sorted(set(read_json(index).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise UserError(f"{index} is damaged: {json.dumps(names)[:80]}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= load_file(path.with_name(name))
    return tensors
