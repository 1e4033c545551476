"""A dataset of token ids: written whole or not at all, opened, checked, and read as windows.

data/NAME/train.bin, val.bin    ids, uint16 or uint32, with end-of-text after each document
data/NAME/tokenizer.json        the tokenizer that made them
data/NAME/meta.json             sizes, checksums and settings
data/NAME/train.mask, ...       of conversations: for each id a byte, which is 1 if it is learned
data/NAME/train.lengths, ...    and how many ids each conversation has, uint32; no end-of-text
data/NAME/chat_template.jinja   what writes them
data/NAME.partial/              what prepare.py is writing; its next run removes what a kill left
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock, Timeout

from plainllama.chat import Encoded, Template, find_template
from plainllama.packing import Rows
from plainllama.settings import UserError, command, fits, read_json, sha256, write_json
from plainllama.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # importing torch takes seconds, and prepare.py needs none of it
    import torch

    from plainllama.text import Notes

SPLITS = ("train", "val")
OURS = (  # the names of a dataset's files
    r"meta\.json|tokenizer(_config)?\.json|chat_template\.jinja|(train|val)\.(bin|mask|lengths)"
    r"|(\.tmp-)?\.verified"
)
VERIFIED = ".verified"  # beside the bins: which files were compared with their checksums
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Pieces = list[tuple[bytes, bool, int]]  # text, whether its document ends with it, and the split
EncodedText = tuple[Pieces, list[np.ndarray]]
EncodedChats = tuple[Pieces, list[Encoded]]


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


def write_text(
    folder: Path, encoded: Iterable[EncodedText], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the bins and tokenizer.json, and return what meta.json says of them."""
    tokenizer.save(folder / "tokenizer.json")
    dtype = id_type(tokenizer)
    begin = np.array(tokenizer.begin_of_text, dtype)
    end = np.array([tokenizer.end_of_text], dtype)
    documents, sizes, inside = [0, 0], [0, 0], [False, False]  # of each split
    with open_splits(folder, "bin") as bins:
        for pieces, ids_of_pieces in encoded:
            for (text, ends, split), ids in zip(pieces, ids_of_pieces, strict=True):
                if not inside[split]:
                    bins[split].write(begin)
                bins[split].write(ids.astype(dtype))
                if ends:
                    bins[split].write(end)
                inside[split] = not ends
                documents[split] += ends
                sizes[split] += len(text)
    return describe(folder, tokenizer, documents, sizes)


def write_conversations(
    folder: Path, encoded: Iterable[EncodedChats], template: Template, notes: "Notes"
) -> dict[str, Any]:
    """Write bins, masks, lengths, template and tokenizer; return what meta.json says of them.

    Conversations of which nothing is learned are left out, and noted; UserError if they are most.
    """
    tokenizer = template.tokenizer
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", template.settings)
    (folder / "chat_template.jinja").write_text(template.source, encoding="utf-8")
    documents, sizes, learned, left_out = [0, 0], [0, 0], [0, 0], 0
    with (
        open_splits(folder, "bin") as bins,
        open_splits(folder, "mask") as masks,
        open_splits(folder, "lengths") as lengths,
    ):
        for pieces, chats in encoded:
            for (text, _, split), chat in zip(pieces, chats, strict=True):
                place = text[:80].decode(errors="ignore")
                if not chat.learned.any():
                    reason = chat.reason or "there is no answer"
                    notes.add(f"conversations left out: {reason}", place)
                    left_out += 1
                    continue
                if chat.edges:
                    notes.add("conversations with white space at the edge of a message", place)
                bins[split].write(chat.ids.astype(id_type(tokenizer)))
                masks[split].write(chat.learned.astype(np.uint8))
                lengths[split].write(np.array([len(chat.ids)], "<u4"))
                documents[split] += 1
                sizes[split] += int(tokenizer.token_lengths[chat.ids].sum())
                learned[split] += int(chat.learned.sum())
    count = left_out + sum(documents)
    if 2 * left_out > count:
        raise UserError(f"{left_out:,} of {count:,} conversations are left out; {'; '.join(notes)}")
    date = template.date.strftime("%Y-%m-%d") if template.is_dated else ""
    conversations = {"learned": dict(zip(SPLITS, learned, strict=True)), "date": date}
    return describe(folder, tokenizer, documents, sizes) | {"conversations": conversations}


@contextmanager
def open_splits(folder: Path, kind: str) -> Iterator[list[IO[bytes]]]:
    """Open the files of a kind that are written, one of each split."""
    with ExitStack() as stack:
        paths = [folder / f"{split}.{kind}" for split in SPLITS]
        yield [stack.enter_context(path.open("wb", buffering=1 << 20)) for path in paths]


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest of two types that hold all ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def describe(
    folder: Path, tokenizer: Tokenizer, documents: list[int], sizes: list[int]
) -> dict[str, Any]:
    """Return what meta.json says of the files in a folder; UserError if a bin is empty."""
    if not all(documents):
        raise UserError(f"{sum(sizes):,} bytes of text are too few for two splits")
    dtype = id_type(tokenizer)
    bins = [folder / f"{split}.bin" for split in SPLITS]
    tokens = [path.stat().st_size // dtype.itemsize for path in bins]
    counts = {"tokens": tokens, "bytes": sizes, "documents": documents}
    return {
        "dtype": dtype.name,
        "vocab_size": tokenizer.vocab_size,
        **{key: dict(zip(SPLITS, count, strict=True)) for key, count in counts.items()},
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir())},
    }


def replace_dataset(out: Path, partial: Path, meta: dict[str, Any]) -> None:
    """Write meta.json and give the dataset its name, in place of an older one.

    A kill at any moment leaves the old one, which undo_kill() may have to fetch, or the new.
    """
    write_json(partial / "new" / "meta.json", meta)
    if out.exists():
        os.replace(out, partial / "old")
    os.replace(partial / "new", out)


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

    def first_prompt(self) -> list[int]:
        """Return the ids of the first conversation for validation up to its answer; [] of text."""
        if not self.conversations:
            return []
        (length,) = self.span("val", "lengths", 0, 1)
        ids, mask = (self.span("val", kind, 0, int(length)) for kind in ("bin", "mask"))
        return ids[: mask.argmax()].tolist()

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
        made = ("...", f"--out={data_dir}")
        if data_dir.exists():  # it may be the text itself
            made = (data_dir, f"--out=data/{data_dir.stem}")
        raise UserError(f"no prepared data in {data_dir}; run `{command('prepare.py', *made)}`")
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
    seen: dict[str, Any] = {
        name: identity(os.fstat(file.fileno())) for name, file in dataset.files.items()
    }
    seen["sha256"] = dataset.sha256
    is_known = False
    with suppress(UserError):
        is_known = read_json(dataset.data_dir / VERIFIED) == seen and not again
    for name, expected in dataset.sha256.items():
        path = dataset.data_dir / name
        is_read = path.is_file() and not (is_known and name in dataset.files)
        if is_read and sha256(path) != expected:
            raise UserError(
                f"{path} is damaged: it is not what prepare.py wrote; prepare it again with "
                "--overwrite"
            )
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
            left, right = right, left ^ (mix(right ^ mix(key + np.uint64(number))) & mask)
        return (left << half) | right

    place = permute(index.astype(np.uint64), key)
    while (outside := place >= np.uint64(size)).any():
        place[outside] = permute(place[outside], key[outside])
    return place.astype(np.int64)


def draw(seed: int, step: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `size` things a step takes `count` of, and the key of each one's epoch.

    An epoch takes each of them once, in a random order of its own.
    """
    n = np.arange(step * count, (step + 1) * count, dtype=np.uint64)  # things since the beginning
    epoch, index = n // np.uint64(size), n % np.uint64(size)
    key = mix(mix(np.array(seed, dtype=np.uint64)) ^ epoch)
    return shuffled(index, size, key), key


def mix(x: np.ndarray) -> np.ndarray:
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
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)


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
