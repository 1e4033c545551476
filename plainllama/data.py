"""A dataset of token ids: written whole or not at all, opened, checked, and read as windows.

data/NAME/train.bin, val.bin    ids, uint16 or uint32, with end-of-text after each document
data/NAME/tokenizer.json        the tokenizer that made them
data/NAME/meta.json             sizes, checksums and settings
data/NAME.partial/              what prepare.py is writing; its next run removes what a kill left
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from plainllama.settings import UserError, command, fits, read_json, sha256, write_json
from plainllama.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # importing torch takes seconds, and prepare.py needs none of it
    import torch

SPLITS = ("train", "val")
OURS = (  # the names of a dataset's files
    r"meta\.json|tokenizer(_config)?\.json|chat_template\.jinja|(train|val)\.(bin|mask|lengths)"
    r"|\.verified.*"
)
VERIFIED = ".verified"  # beside the bins: which files were compared with their checksums
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
EncodedBatch = tuple[list[tuple[bytes, bool, int]], list[np.ndarray]]  # (text, ends, split), ids


# Write


def is_prepared(out: Path, fingerprint: str, overwrite: bool) -> bool:
    """Tell whether `out` is the dataset of this fingerprint; UserError if it is anything else."""
    undo_kill(out)
    if not out.exists():
        return False
    if not (out / "meta.json").is_file():
        raise UserError(f"{out} exists and is not a dataset; choose another --out")
    if os.path.ismount(out):  # it cannot be renamed
        raise UserError(f"{out} is where a disk is mounted; choose a folder in it")
    if overwrite:
        others = sorted(path.name for path in out.iterdir() if not re.fullmatch(OURS, path.name))
        if others:
            raise UserError(f"{out} also holds {others[0]}, which is none of ours: move it")
        return False
    with suppress(UserError):  # it may be damaged
        load_dataset(out)
        if read_json(out / "meta.json").get("fingerprint") == fingerprint:
            return True
    raise UserError(f"{out} holds another dataset; add --overwrite, or choose another --out")


def undo_kill(out: Path) -> None:
    """Remove what a killed run has left; a dataset that it was about to replace comes back."""
    partial = Path(f"{out}.partial")
    if not partial.is_dir():
        return
    held = lock(partial / "lock", str(out))
    if (partial / "old" / "meta.json").is_file() and not out.exists():
        os.replace(partial / "old", out)
    held.release()
    shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def new_dataset(out: Path) -> Iterator[Path]:
    """Make the folder in which `out` is written, which is removed at the end, whatever happens."""
    partial = Path(f"{out}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    held = lock(partial / "lock", str(out))
    try:
        (partial / "new").mkdir()
        yield partial
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        written = sum(path.stat().st_size for path in (partial / "new").iterdir()) / 1e6
        way_out = "free some, or choose another --out"
        raise UserError(f"no space left for {out} after {written:,.0f} MB; {way_out}") from error
    finally:
        held.release()
        shutil.rmtree(partial, ignore_errors=True)


def write_bins(
    folder: Path, encoded: Iterable[EncodedBatch], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the bins and tokenizer.json, and return what meta.json says of them."""
    tokenizer.save(folder / "tokenizer.json")
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    begin = np.array(tokenizer.begin_of_text, dtype)
    end = np.array([tokenizer.end_of_text], dtype)
    files = [SplitFile(folder / f"{split}.bin") for split in SPLITS]
    for pieces, ids_of_pieces in encoded:
        rows: tuple[list[np.ndarray], ...] = ([], [])
        for (text, ends, split), ids in zip(pieces, ids_of_pieces, strict=True):
            file = files[split]
            if not file.inside:
                rows[split].append(begin)
            rows[split].append(ids)
            if ends:
                rows[split].append(end)
            file.inside = not ends
            file.documents += ends
            file.bytes += len(text)
        for file, row in zip(files, rows, strict=True):
            if row:
                file.write(np.concatenate(row, dtype=dtype, casting="unsafe"))
    for file in files:
        file.file.close()
    counts = {
        key: {split: getattr(file, key) for split, file in zip(SPLITS, files, strict=True)}
        for key in ("tokens", "bytes", "documents")
    }
    if not all(counts["documents"].values()):
        size = sum(counts["bytes"].values())
        raise UserError(f"{size:,} bytes of text are too few for two splits")
    digests = {file.path.name: file.digest.hexdigest() for file in files}
    digests["tokenizer.json"] = sha256(folder / "tokenizer.json")
    vocab_size = tokenizer.vocab_size
    return {"dtype": dtype.name, "vocab_size": vocab_size, **counts, "sha256": digests}


def replace_dataset(out: Path, partial: Path, meta: dict[str, Any]) -> None:
    """Write meta.json and give the dataset its name, in place of an older one.

    A kill at any moment leaves the old one, which undo_kill() may have to fetch, or the new.
    """
    write_json(partial / "new" / "meta.json", meta)
    if out.exists():
        os.replace(out, partial / "old")
    os.replace(partial / "new", out)


class SplitFile:
    """The bin of a split while it is written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.tokens = self.bytes = self.documents = 0
        self.inside = False  # a document has begun and not ended

    def write(self, ids: np.ndarray) -> None:
        self.file.write(ids)
        self.digest.update(ids)
        self.tokens += len(ids)


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

    def path(self, split: str) -> Path:
        """Return the file of the ids of "train" or "val"."""
        return self.data_dir / f"{split}.bin"

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the ids are of."""
        return load_tokenizer(self.data_dir / "tokenizer.json")

    @cached_property
    def files(self) -> dict[str, IO[bytes]]:
        """The open bins: a run reads on what it opened, whatever prepare.py puts in their place."""
        return {split: self.path(split).open("rb") for split in SPLITS}


def load_dataset(data_dir: Path) -> Dataset:
    """Open a dataset; UserError says what is missing or damaged."""
    data_dir = Path(data_dir)
    path = data_dir / "meta.json"
    if not path.is_file():
        made = ("...", f"--out={data_dir}")
        if data_dir.exists():  # it may be the text itself
            made = (data_dir, f"--out=data/{data_dir.stem}")
        raise UserError(f"no prepared data in {data_dir}; run `{command('prepare.py', *made)}`")
    again = f"run `{command('prepare.py', '...', f'--out={data_dir}', '--overwrite')}`"
    try:
        meta = read_json(path)
    except UserError as error:
        raise UserError(f"{error}; {again}") from error
    values = {field.name: meta.get(field.name) for field in fields(Dataset)[1:]}
    wrong = [key for key, value in values.items() if not is_sound(key, value)]
    if wrong:
        raise UserError(f"{path} is damaged: {wrong[0]}={values[wrong[0]]!r}; {again}")
    if "engine" not in meta:
        raise UserError(f"{data_dir} was prepared by an older version; {again}")
    dataset = Dataset(data_dir, **values)
    for split in SPLITS:
        path = dataset.path(split)
        if not path.is_file():
            raise UserError(f"{path} is missing; {again}")
        expected = dataset.tokens[split] * np.dtype(dataset.dtype).itemsize
        found = path.stat().st_size
        if found != expected:
            raise UserError(f"{path} has {found:,} bytes instead of {expected:,}; {again}")
    return dataset


def is_sound(key: str, value: Any) -> bool:
    """Tell whether a key of meta.json has a value that it may have."""
    if key == "dtype":
        return value in ("uint16", "uint32")
    if key == "vocab_size":
        return fits(value, int) and 0 < value <= 2**32
    if key == "sha256":
        return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return isinstance(value, dict) and all(
        fits(value.get(split), int) and value[split] >= 0 for split in SPLITS
    )


def identity(stat: os.stat_result) -> list[int]:
    """Return what tells a file from any other, and from itself before a change."""
    return [stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def verify_dataset(dataset: Dataset, again: bool = False) -> None:
    """Compare the dataset's files with their checksums in meta.json, at about 1 GB a second.

    For the bins that is noted beside them, and not done for the same files, unless `again`.
    """
    tokenizer = dataset.data_dir / "tokenizer.json"
    expected = dataset.sha256.get(tokenizer.name)
    if expected and tokenizer.is_file() and sha256(tokenizer) != expected:
        raise damaged(tokenizer)
    seen = {s: identity(os.fstat(file.fileno())) for s, file in dataset.files.items()}
    seen["sha256"] = dataset.sha256
    with suppress(UserError):
        if read_json(dataset.data_dir / VERIFIED) == seen and not again:
            return
    for split, file in dataset.files.items():
        file.seek(0)
        expected = dataset.sha256.get(f"{split}.bin")
        if expected and hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise damaged(dataset.path(split))
    aside = dataset.data_dir / f"{VERIFIED}.{os.getpid()}"
    with suppress(OSError):  # where nothing can be written they are compared at each start
        aside.write_text(json.dumps(seen), encoding="utf-8")
        aside.replace(dataset.data_dir / VERIFIED)


def damaged(path: Path) -> UserError:
    """Return the refusal of a file that differs from its checksum."""
    return UserError(
        f"{path} is damaged: it is not what prepare.py wrote; prepare it again with --overwrite"
    )


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
    dataset: Dataset, split: str, starts: np.ndarray, length: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return tokens and targets, int64 (B, T): the windows at `starts`, and one token later."""
    import torch

    # Read and not mapped: some disks cannot be, and what fails while mapped ends the process.
    file, size = dataset.files[split], np.dtype(dataset.dtype).itemsize
    windows = b""
    for start in starts.tolist():
        file.seek(start * size)
        windows += file.read((length + 1) * size)
    if len(windows) != len(starts) * (length + 1) * size:
        raise UserError(f"{dataset.path(split)} was cut short while it was read")
    rows = np.frombuffer(windows, dataset.dtype).reshape(len(starts), length + 1)  # (B, T + 1)
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
    held = FileLock(path, timeout=0)
    try:
        if path.is_file():
            held.acquire()
    except Timeout:
        return True
    except OSError:  # it may not be opened: then nobody can tell
        return False
    held.release()
    return False
