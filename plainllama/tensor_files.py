"""Tensors in safetensors files of limited size, written and read one tensor at a time."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from plainllama.files import read_json, write_json
from plainllama.settings import UserError

LARGEST_FILE = 5_000_000_000  # bytes of tensors in a file, as transformers has it


def index_of(path: Path) -> Path:
    """Return the file that says which of several files each tensor is in."""
    return path.with_name(f"{path.name}.index.json")


def save_tensors(
    path: Path, sizes: dict[str, int], read: Callable[[str], Tensor], writes: bool = True
) -> None:
    """Write the tensors that `read` returns, of so many bytes each, to `path`.

    More than LARGEST_FILE of them go to NAME-00001-of-0000N.safetensors and an index, and no more
    than a file is in memory at a time. All processes that share the tensors out call this, and
    read all tensors in this order; those with `writes` keep them and write.
    """
    files: list[list[str]] = [[]]
    room = LARGEST_FILE
    for name, size in sizes.items():
        if size > room and files[-1]:
            files.append([])
            room = LARGEST_FILE
        files[-1].append(name)
        room -= size
    weight_map = {}
    for number, names in enumerate(files, 1):
        file = path.name if len(files) == 1 else numbered(path, number, len(files))
        tensors = {}
        for name in names:
            tensor = read(name)
            if writes:
                tensors[name] = tensor.cpu().contiguous()
            weight_map[name] = file
        if writes:
            save_file(tensors, path.with_name(file), metadata={"format": "pt"})
    if writes and len(files) > 1:
        total = {"total_size": sum(sizes.values())}
        write_json(index_of(path), {"metadata": total, "weight_map": weight_map})


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
