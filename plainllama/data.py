"""A prepared dataset as train.py reads it: flat files of token ids, described by meta.json."""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from plainllama.settings import UserError, fits, read_json, sha256
from plainllama.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

SPLITS = ("train", "val")
SplitBlock = tuple[bytes, bool, int]  # text, whether its document ends with it, and its split
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def already_prepared(out: Path, identity: str, overwrite: bool) -> bool:
    """Say whether `out` is this very dataset; refuse to touch anything else that is there."""
    if out.exists() and not (out / "meta.json").is_file():
        raise UserError(f"{out} exists and is not a dataset; choose another --out")
    undo_kill(out, overwrite)
    if overwrite or not out.exists():
        return False
    from plainllama.data import load_dataset  # it imports torch, which takes seconds

    try:
        load_dataset(out)
        same = read_json(out / "meta.json").get("fingerprint") == identity
    except UserError:  # damaged: another run replaces it, if told to
        same = False
    if not same:
        raise UserError(f"{out} holds another dataset; add --overwrite, or choose another --out")
    return True


def undo_kill(out: Path, overwrite: bool) -> None:
    """Put things right after a run that was killed while it replaced `out`."""
    partial, old = beside(out, ".partial"), beside(out, ".old")
    killed = partial.is_dir()
    if killed:
        lock(partial / "lock", str(out)).release()  # it is no live one
    if (old / "meta.json").is_file() and not out.exists():
        print(f"note: {old}, which was not replaced, is {out} again", file=sys.stderr)
        os.replace(old, out)
    elif old.exists() and out.exists() and killed:
        shutil.rmtree(old)
    elif old.exists() and overwrite:
        raise UserError(f"{old} is in the way; rename or delete it")


def beside(out: Path, ending: str) -> Path:
    """Return the path next to `out` that ends like this."""
    return out.with_name(out.name + ending)


@dataclass
class Workplace:
    """Where a dataset is written before it has its name, and how many bytes it will need."""

    path: Path
    needed: float = 0.0


@contextmanager
def workplace(out: Path, preview: bool) -> Iterator[Workplace]:
    """Make the folder for what is not complete yet, and remove it in the end."""
    if preview:
        with tempfile.TemporaryDirectory() as folder:
            yield Workplace(Path(folder))
        return
    work = Workplace(beside(out, ".partial"))
    work.path.mkdir(parents=True, exist_ok=True)
    held = lock(work.path / "lock", str(out))
    try:
        shutil.rmtree(work.path / "new", ignore_errors=True)  # of a run that was killed
        (work.path / "new").mkdir()
        yield work
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        needs = f", which needs about {work.needed / 1e6:,.0f} MB" if work.needed else ""
        way_out = "free some, or choose another --out"
        raise UserError(f"no space left for {out}{needs}; {way_out}") from error
    finally:
        held.release()
        shutil.rmtree(work.path, ignore_errors=True)


def replace_dataset(new: Path, out: Path) -> None:
    """Give the new dataset its name; a kill at any moment leaves the old one or the new one."""
    old = beside(out, ".old")
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)


class SplitFile:
    """The file of a split, as it is written: the ids, how many, and where each document ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open(path, "wb")  # noqa: SIM115
        self.digest = hashlib.sha256()
        self.bytes = self.tokens = 0
        self.ends = array("q")
        self.inside = False  # a document has begun and not ended

    def write(self, ids: np.ndarray) -> None:
        self.file.write(ids)
        self.digest.update(ids)

    def shuffle(self, seed: int) -> None:
        """Put the documents in random order, one in memory."""
        self.file.close()
        itemsize = self.path.stat().st_size // self.tokens
        starts = np.append(0, self.ends)
        shuffled = SplitFile(self.path.with_suffix(".shuffled"))
        with open(self.path, "rb") as old, shuffled.file:
            for document in np.random.default_rng(seed).permutation(len(self.ends)):
                old.seek(starts[document] * itemsize)
                shuffled.write(old.read((self.ends[document] - starts[document]) * itemsize))
        os.replace(shuffled.path, self.path)
        self.digest = shuffled.digest


def copy_documents(
    source: Path, target: Path, dtype: np.dtype, eot: int, kept: np.ndarray
) -> tuple[int, str]:
    """Copy a bin's documents that are `kept`, (documents); return their tokens and sha256."""
    ids = np.memmap(source, dtype, mode="r")
    blocks = range(0, len(ids), 1 << 24)
    ends = [first + np.flatnonzero(ids[first : first + (1 << 24)] == eot) + 1 for first in blocks]
    ends = np.concatenate(ends)
    if len(ends) != len(kept):
        raise UserError(f"{source} is damaged: {len(ends):,} documents instead of {len(kept):,}")
    copy = SplitFile(target)
    with copy.file:
        for start, end in zip(np.append(0, ends)[:-1][kept], ends[kept], strict=True):
            copy.write(ids[start:end])
            copy.tokens += int(end - start)
    return copy.tokens, copy.digest.hexdigest()


def dtype_of(tokenizer: Tokenizer) -> np.dtype:
    """Return the type of the ids in the bins."""
    return np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")


def write_bins(
    encoded: Iterable[tuple[list[SplitBlock], list[np.ndarray]]],
    tokenizer: Tokenizer,
    folder: Path,
    shuffle_seed: int | None,
    may_lack_a_split: bool = False,
) -> dict[str, Any]:
    """Write train.bin, val.bin and tokenizer.json, and return what meta.json says of them."""
    save_tokenizer(tokenizer, folder / "tokenizer.json")
    dtype = dtype_of(tokenizer)
    begin, end = np.array(tokenizer.begin_of_text, dtype), np.array([tokenizer.eot_token], dtype)
    files = [SplitFile(folder / f"{split}.bin") for split in SPLITS]
    for batch, encoded_batch in encoded:
        rows: tuple[list[np.ndarray], ...] = ([], [])
        for (text, last, split), ids in zip(batch, encoded_batch, strict=True):
            file, row = files[split], rows[split]
            row += [ids] if file.inside else [begin, ids]
            file.tokens += len(ids) if file.inside else len(begin) + len(ids)
            file.bytes += len(text)
            file.inside = not last
            if last:
                row.append(end)
                file.tokens += 1
                file.ends.append(file.tokens)
        for file, row in zip(files, rows, strict=True):
            if row:
                file.write(np.concatenate(row, dtype=dtype, casting="unsafe"))
    if not all(file.ends for file in files) and not may_lack_a_split:
        size = sum(file.bytes for file in files)
        raise UserError(f"{size:,} bytes of text are too few for two splits")
    for file in files:
        file.file.close()
        if shuffle_seed is not None:
            file.shuffle(shuffle_seed)
    digests = {file.path.name: file.digest.hexdigest() for file in files}
    return {
        "dtype": dtype.name,
        "vocab_size": tokenizer.n_vocab,
        "tokens": {split: file.tokens for split, file in zip(SPLITS, files, strict=True)},
        "bytes": {split: file.bytes for split, file in zip(SPLITS, files, strict=True)},
        "documents": {split: len(file.ends) for split, file in zip(SPLITS, files, strict=True)},
        "sha256": digests | {"tokenizer.json": sha256(folder / "tokenizer.json")},
    }


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

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the ids are of."""
        return load_tokenizer(self.data_dir / "tokenizer.json")

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


def lock(path: Path, what: str) -> FileLock:
    """Lock a file until the lock is released or the process ends; UserError if another has it."""
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
