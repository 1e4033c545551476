"""A dataset of token ids: opened, checked, and read as windows.

data/NAME/train.bin, val.bin    ids, uint16 or uint32, with end-of-text after each document
data/NAME/tokenizer.json        the tokenizer that made them
data/NAME/meta.json             sizes, checksums and settings
data/NAME/train.mask, ...       of conversations: for each id a byte, which is 1 if it is learned
data/NAME/train.lengths, ...    and how many ids each conversation has, uint32; no end-of-text
data/NAME/chat_template.jinja   what writes them
"""

import os
from contextlib import nullcontext, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from plainllama.chat import Template, find_template
from plainllama.packing import Rows
from plainllama.settings import fits, read_json, sha256, write_json
from plainllama.terminal import UserError, command
from plainllama.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # importing torch takes seconds, and prepare.py needs none of it
    import torch

SPLITS = ("train", "val")
VERIFIED = ".verified"  # beside the bins: which files were compared with their checksums


# Open


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
    conversations: dict[str, Any] | None = None  # None: text

    def path(self, split: str) -> Path:
        """Return the file of the ids of "train" or "val"."""
        return self.data_dir / f"{split}.bin"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the ids are of."""
        return load_tokenizer(self.data_dir / "tokenizer.json")

    @cached_property
    def template(self) -> Template | None:
        """The chat template that wrote the ids, if they are of conversations."""
        return find_template(self.data_dir, self.tokenizer) if self.conversations else None

    def sizes(self) -> dict[str, int]:
        """Return the files of ids, masks and lengths, and the bytes that each has."""
        width = np.dtype(self.dtype).itemsize
        sizes = {f"{split}.bin": self.tokens[split] * width for split in SPLITS}
        if self.conversations:
            sizes |= {f"{split}.mask": self.tokens[split] for split in SPLITS}
            sizes |= {f"{split}.lengths": 4 * self.documents[split] for split in SPLITS}
        return sizes

    @cached_property
    def files(self) -> dict[str, IO[bytes]]:
        """The open files: a run reads on what it opened, whatever prepare.py puts there."""
        return {name: (self.data_dir / name).open("rb") for name in self.sizes()}

    def parts(self) -> "list[Dataset]":
        """Return the prepared directories that this is of: itself, if it is not Joined."""
        return [self]

    def sources(self) -> "tuple[Dataset, ...]":
        """Return what takes turns in giving a run its windows."""
        return (self,)

    def shares(self) -> list[float]:
        """Return each source's share of the windows, 1 together."""
        return [1.0]

    def turns(self, source: int, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of a run's windows are a source's, and of these how many it had before."""
        return np.full(len(windows), True), windows

    def first_prompt(self) -> list[int]:
        """Return the ids of the first conversation for validation up to its answer.

        [] of text, and of conversations whose questions are learned, too.
        """
        if not self.conversations:
            return []
        (length,) = self.span("val", "lengths", 0, 1)
        ids, mask = (self.span("val", kind, 0, int(length)) for kind in ("bin", "mask"))
        prompt = ids[: mask.argmax()].tolist()
        return prompt if len(prompt) > 1 else []

    def epoch_tokens(self, length: int) -> int:
        """Return how many tokens reading all of "train" once takes, in windows of a length."""
        in_rows = self.conversations is not None
        return len(self.rows("train", length)) * length if in_rows else self.tokens["train"]

    @cached_property
    def packed(self) -> dict[tuple[str, int], Rows]:
        """The rows of conversations that were packed, by split and length."""
        return {}

    def rows(self, split: str, length: int) -> Rows:
        """Return the conversations of a split in rows of `length` + 1 ids, packed once."""
        if (split, length) not in self.packed:
            self.packed[split, length] = Rows(self, split, length)
        return self.packed[split, length]

    def span(self, split: str, kind: str, start: int, end: int) -> np.ndarray:
        """Return some of a split's ids, "bin", of their "mask", or of the "lengths".

        Read and not mapped: some disks cannot be, and what fails while mapped ends the process.
        """
        dtype = np.dtype({"bin": self.dtype, "mask": "u1", "lengths": "<u4"}[kind])
        file, size = self.files[f"{split}.{kind}"], (end - start) * dtype.itemsize
        file.seek(start * dtype.itemsize)
        found = file.read(size)
        if len(found) != size:
            raise UserError(f"{self.data_dir}/{split}.{kind} was cut short while it was read")
        return np.frombuffer(found, dtype)

    def read(self, split: str, kind: str = "bin") -> np.ndarray:
        """Return all of a split's ids, of their mask, or of the lengths."""
        count = self.documents if kind == "lengths" else self.tokens
        return self.span(split, kind, 0, count[split])


def load_dataset(data_dir: Path) -> Dataset:
    """Open a dataset; UserError says what is missing or damaged."""
    data_dir = Path(data_dir)
    path = data_dir / "meta.json"
    if not path.is_file():
        made = command("prepare.py", "...", f"--out={data_dir}")
        raise UserError(f"no prepared data in {data_dir}; run `{made}`")
    again = f"run `{command('prepare.py', '...', f'--out={data_dir}', '--overwrite')}`"
    try:
        meta = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    if not is_sound(meta):
        raise UserError(f"{path} is damaged: it is not what prepare.py writes; {again}")
    dataset = Dataset(
        data_dir, **{field.name: meta.get(field.name) for field in fields(Dataset)[1:]}
    )
    for name, expected in dataset.sizes().items():
        path = data_dir / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {again}")
        found = path.stat().st_size
        if found != expected:
            raise UserError(f"{path} has {found:,} bytes instead of {expected:,}; {again}")
    return dataset


def is_sound(meta: dict[str, Any]) -> bool:
    """Tell whether what a Dataset takes from meta.json is of its types."""
    counts = [meta.get(key) for key in ("tokens", "bytes", "documents")]
    return (
        meta.get("dtype") in ("uint16", "uint32")
        and fits(meta.get("vocab_size"), int)
        and 0 < meta["vocab_size"] <= 2**32
        and isinstance(meta.get("sha256"), dict)
        and isinstance(meta.get("conversations", {}), dict)
        and all(isinstance(count, dict) for count in counts)
        and all(fits(count.get(split), int) for count in counts for split in SPLITS)
    )


def identity(stat: os.stat_result) -> list[int]:
    """Return what tells a file from any other, and from itself before a change."""
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def verify_dataset(dataset: Dataset, again: bool = False) -> None:
    """Compare the dataset's files with their checksums in meta.json, at about 1 GB a second.

    For the bins that is noted beside them, and not done for the same files, unless `again`.
    """
    stats = {name: identity(os.fstat(file.fileno())) for name, file in dataset.files.items()}
    seen, is_known = {**stats, "sha256": dataset.sha256}, False
    with suppress(UserError):
        is_known = not again and read_json(dataset.data_dir / VERIFIED) == seen
    for name, expected in dataset.sha256.items():
        path = dataset.data_dir / name
        is_read = path.is_file() and not (is_known and name in stats)
        if is_read and sha256(path) != expected:
            wrong = "it is not what prepare.py wrote; prepare it again with --overwrite"
            raise UserError(f"{path} is damaged: {wrong}")
    if not is_known:
        with suppress(OSError):  # where nothing can be written they are compared at each start
            write_json(dataset.data_dir / VERIFIED, seen)


# Read


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
            left, right = right, left ^ (scramble(right ^ scramble(key + np.uint64(number))) & mask)
        return (left << half) | right

    place = permute(index.astype(np.uint64), key)
    while (outside := place >= np.uint64(size)).any():
        place[outside] = permute(place[outside], key[outside])
    return place.astype(np.int64)


def draw(seed: int, before: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `size` things each one is that has so many `before` it, and its epoch's key.

    An epoch takes each of them once, in a random order of its own.
    """
    epoch, index = np.divmod(before.astype(np.uint64), np.uint64(size))
    key = scramble(scramble(np.array(seed, dtype=np.uint64)) ^ epoch)
    return shuffled(index, size, key), key


def scramble(x: np.ndarray) -> np.ndarray:
    """Scramble the bits of uint64 numbers (the finalizer of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):  # modulo 2^64 is meant
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def read_batch(
    dataset: Dataset, split: str, places: np.ndarray, length: int, device: "torch.device"
) -> "tuple[torch.Tensor, ...]":
    """Return tokens, targets and, of conversations, positions, int64 (B, T).

    `places` are starts of windows of text, or numbers of rows of conversations: see Rows.read.
    """
    import torch

    if dataset.conversations:
        ids, targets, positions = dataset.rows(split, length).read(places)
        parts = [ids[:, :-1], targets[:, 1:], positions[:, :-1]]
    else:
        spans = ((start, start + length + 1) for start in places.tolist())
        ids = np.stack([dataset.span(split, "bin", *span) for span in spans])  # (B, T + 1)
        parts = [ids[:, :-1], ids[:, 1:]]
    if ids.max() >= dataset.vocab_size:
        raise UserError(
            f"{dataset.data_dir} is damaged: id {ids.max()} of {split} in a vocabulary of "
            f"{dataset.vocab_size:,}"
        )
    tensors = [torch.from_numpy(part.astype(np.int64)) for part in parts]
    if device.type != "cuda":  # MPS may read memory that is free by then (pytorch/pytorch#189690)
        return tuple(tensor.to(device) for tensor in tensors)
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)


# Lock


def lock(path: Path, what: str) -> FileLock:
    """Lock a file until the lock is released or the process ends; UserError if another has it."""
    if path.is_symlink():  # no lock of ours: what it leads to is left alone
        path.unlink()
    held = FileLock(path, timeout=0.3)  # is_locked() may hold it for an instant
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"another process is writing {what}; wait for it or stop it") from None
    return held


def is_locked(path: Path) -> bool:
    """Tell whether a process holds the lock of a file."""
    try:
        with FileLock(path, timeout=0) if path.is_file() else nullcontext():
            return False
    except Timeout:
        return True
    except OSError:  # it may not be opened: then nobody can tell
        return False
