"""A prepared dataset as train.py reads it: flat files of token ids, described by meta.json."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plainllama.settings import UserError
from plainllama.tokenizer import Tokenizer

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Dataset:
    """What the meta.json of data/NAME says."""

    data_dir: Path
    dtype: str
    vocab_size: int
    tokens: dict[str, int]
    bytes: dict[str, int]
    documents: dict[str, int]
    sha256: dict[str, str]

    def path(self, split: str) -> Path:
        """Return the flat file of the ids of "train" or "val"."""
        return self.data_dir / f"{split}.bin"


def load_dataset(data_dir: Path) -> Dataset:
    """Read what is known of a dataset; UserError says what is missing or damaged."""
    data_dir = Path(data_dir)
    path, command = data_dir / "meta.json", f"python prepare.py ... --out={data_dir}"
    if not path.is_file():
        raise UserError(f"no prepared data in {data_dir}; run `{command}`")
    again = f"run `{command} --overwrite`"
    try:
        meta = json.loads(path.read_bytes())
        dataset = Dataset(data_dir, *(meta[field.name] for field in fields(Dataset)[1:]))
        sizes = {s: dataset.tokens[s] * np.dtype(dataset.dtype).itemsize for s in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__} {error}); {again}") from error
    for split, expected in sizes.items():
        path = dataset.path(split)
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise UserError(f"{path} has {found:,} bytes instead of {expected:,}; {again}")
    return dataset


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """Return how many bytes of text each token id stands for, (V,); special tokens have none."""
    special = {*tokenizer.special_tokens.values()} - {
        tokenizer.special_tokens[word] for word in tokenizer.words
    }
    ids = range(tokenizer.n_vocab)
    return np.array([0 if id in special else len(tokenizer.token_bytes(id)) for id in ids])


def shuffled(index: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Return where each index, below `size`, comes to stand when range(size) is shuffled.

    A Feistel network (Luby and Rackoff 1988) of four rounds, which is a permutation of the numbers
    of so many bits, walked until it is inside the range: no table, whatever the size. `key` chooses
    the permutation, of each index its own.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)

    def permute(x: np.ndarray, key: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for number in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + np.uint64(number))) & mask)
        return (left << half) | right

    place = permute(index.astype(np.uint64), key)
    while (outside := place >= np.uint64(size)).any():
        place[outside] = permute(place[outside], key[outside])
    return place.astype(np.int64)


def mix(x: np.ndarray) -> np.ndarray:
    """Scramble the bits of uint64 numbers (the finalizer of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):  # modulo 2^64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def read_windows(
    dataset: Dataset, split: str, starts: np.ndarray, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, int64 (B, T): the windows at `starts`, and one token later."""
    # Opened anew each time, because the pages of a long-lived map count as this process's memory.
    data = np.memmap(dataset.path(split), dtype=dataset.dtype, mode="r")
    rows = np.stack([data[start : start + length + 1] for start in starts])  # (B, T + 1)
    if rows.max() >= dataset.vocab_size:
        raise UserError(
            f"{dataset.path(split)} is damaged: id {rows.max()} in a vocabulary of "
            f"{dataset.vocab_size:,}"
        )
    windows = torch.from_numpy(rows.astype(np.int64))
    if device.type == "cuda":
        windows = windows.pin_memory()
    windows = windows.to(device, non_blocking=True)
    # Apart, so that evaluation can mark targets, with the strides that training is compiled for.
    # (contiguous() would copy neither of a single row.)
    apart = torch.contiguous_format
    return windows[:, :-1].clone(memory_format=apart), windows[:, 1:].clone(memory_format=apart)
