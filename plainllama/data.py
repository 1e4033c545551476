"""A prepared dataset as train.py reads it: flat files of token ids, described by meta.json."""

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from plainllama.files import read_json
from plainllama.settings import UserError, fits
from plainllama.tokenizer import Tokenizer

SPLITS = ("train", "val")
NOTE = ".verified"  # beside the bins: which files were compared with their checksums


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
    parts: dict[str, dict[str, int]] = field(default_factory=dict)  # tokens of each of several bins

    def path(self, split: str) -> Path:
        """Return the flat file of the ids of "train" or "val", of several the first."""
        return self.paths(split)[0]

    def paths(self, split: str) -> list[Path]:
        """Return the flat files of the ids of "train" or "val", in their order."""
        return [self.data_dir / name for name in self.parts.get(split, [f"{split}.bin"])]

    def ends(self, split: str) -> list[int]:
        """Return after how many tokens of the split each of its files ends."""
        return [*accumulate(self.parts.get(split, {"": self.tokens[split]}).values())]

    @cached_property
    def files(self) -> dict[str, list[IO[bytes]]]:
        """The open bins: a run reads on what it opened, whatever prepare.py puts in their place."""
        return {split: [path.open("rb") for path in self.paths(split)] for split in SPLITS}


def load_dataset(data_dir: Path) -> Dataset:
    """Open a dataset; UserError says what is missing or damaged."""
    data_dir = Path(data_dir)
    path, command = data_dir / "meta.json", f"python prepare.py ... --out={data_dir}"
    if not path.is_file():
        raise UserError(f"no prepared data in {data_dir}; run `{command}`")
    again = f"run `{command} --overwrite`"
    try:
        meta = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    values = {"parts": {}} | meta
    values = {field.name: values.get(field.name) for field in fields(Dataset)[1:]}
    wrong = [key for key, value in values.items() if not is_sound(key, value)]
    if wrong:
        raise UserError(f"{path} is damaged: {wrong[0]}={values[wrong[0]]!r}; {again}")
    dataset = Dataset(data_dir, **values)
    there = all(path.is_file() for split in SPLITS for path in dataset.paths(split))
    for split in SPLITS:
        if dataset.ends(split)[-1] != dataset.tokens[split]:
            raise UserError(f"{path} is damaged: the parts are not all of {split}; {again}")
        counts = np.diff(dataset.ends(split), prepend=0)
        for number, (path, count) in enumerate(zip(dataset.paths(split), counts, strict=True)):
            found = path.stat().st_size if path.is_file() else 0
            if there:  # what is open, and not what may be put in its place
                found = os.fstat(dataset.files[split][number].fileno()).st_size
            expected = int(count) * np.dtype(dataset.dtype).itemsize
            if found != expected:
                raise UserError(f"{path} has {found:,} bytes instead of {expected:,}; {again}")
    return dataset


def is_sound(key: str, value: Any) -> bool:
    """Tell whether a key of meta.json has a value that it may have."""
    if key == "dtype":
        return value in ("uint16", "uint32")
    if key == "vocab_size":
        return fits(value, int) and 0 < value <= 2**32
    if key == "parts":
        return isinstance(value, dict) and all(map(are_bins, value.values()))
    if key == "sha256":
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return isinstance(value, dict) and all(
        fits(value.get(split), int) and value[split] >= 0 for split in SPLITS
    )


def are_bins(value: Any) -> bool:
    """Tell whether a split's value in `parts` names files of the dataset and their tokens."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            Path(name).name == name and fits(count, int) and count > 0
            for name, count in value.items()
        )
    )


def verify_dataset(dataset: Dataset, again: bool = False, note: bool = True) -> None:
    """Compare the bins with their checksums in meta.json, at about 1 GB a second.

    That is noted beside them, by inode, size and time, and not done `again` for the same files.
    Without `note` nothing is written.
    """
    files = {}
    for split, opened in dataset.files.items():
        files |= dict(zip(dataset.paths(split), opened, strict=True))
    stats = {path.name: os.fstat(file.fileno()) for path, file in files.items()}
    seen = {s: [st.st_ino, st.st_size, st.st_mtime_ns] for s, st in stats.items()}
    seen |= {"sha256": dataset.sha256}
    with suppress(UserError):
        if not again and read_json(dataset.data_dir / NOTE) == seen:
            return
    for path, file in files.items():
        expected = dataset.sha256.get(path.name)
        file.seek(0)
        if expected and hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise UserError(
                f"{path} is damaged: it is not what prepare.py wrote; "
                "prepare it again with --overwrite"
            )
    if not note:
        return
    aside = dataset.data_dir / f"{NOTE}.{os.getpid()}"
    with suppress(OSError):  # where nothing can be written they are compared at each start
        aside.write_text(json.dumps(seen), encoding="utf-8")
        aside.replace(dataset.data_dir / NOTE)


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


def read_ids(dataset: Dataset, split: str, starts: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """Yield the `count` ids of a split from each of `starts`, across the ends of its files."""
    # Mapped anew each time, because the pages of a long-lived map count as this process's memory.
    mapped: dict[int, np.memmap] = {}
    ends = dataset.ends(split)
    for start in starts:
        pieces, place = [], int(start)
        while place < start + count:
            number = bisect_right(ends, place)
            if number not in mapped:
                mapped[number] = np.memmap(dataset.files[split][number], dataset.dtype, mode="r")
            left = ends[number] - place  # of this file
            pieces.append(mapped[number][len(mapped[number]) - left :][: start + count - place])
            place += left
        yield pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def read_windows(
    dataset: Dataset, split: str, starts: np.ndarray, length: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return tokens and targets, int64 (B, T): the windows at `starts`, and one token later."""
    rows = np.stack([*read_ids(dataset, split, starts, length + 1)])  # (B, T + 1)
    if rows.max() >= dataset.vocab_size:
        raise UserError(
            f"{dataset.data_dir} is damaged: id {rows.max()} of {split} in a vocabulary of "
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
