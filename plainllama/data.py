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
import hashlib
import itertools
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

from plainllama.chat import Encoded, Template, find_template
from plainllama.settings import UserError, command, fits, read_json, sha256, write_json
from plainllama.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:  # importing torch takes seconds, and prepare.py needs none of it
    import torch

    from plainllama.text import Notes

SPLITS = ("train", "val")
OURS = (  # the names of a dataset's files
    r"meta\.json|tokenizer(_config)?\.json|chat_template\.jinja|(train|val)\.(bin|mask|lengths)"
    r"|\.verified.*"
)
VERIFIED = ".verified"  # beside the bins: which files were compared with their checksums
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Pieces = list[tuple[bytes, bool, int]]  # text, whether its document ends with it, and the split
EncodedBatch = tuple[Pieces, list[np.ndarray]]
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


def write_bins(
    folder: Path, encoded: Iterable[EncodedBatch], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Write the bins and tokenizer.json, and return what meta.json says of them."""
    tokenizer.save(folder / "tokenizer.json")
    dtype = id_type(tokenizer)
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
    return finish_bins(folder, files, tokenizer)


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
    bins, masks, lengths = (
        [SplitFile(folder / f"{split}.{kind}") for split in SPLITS]
        for kind in ("bin", "mask", "lengths")
    )
    dtype, count, first = id_type(tokenizer), 0, ""
    learned = dict.fromkeys(SPLITS, 0)
    for pieces, chats in encoded:
        for (text, _, split), chat in zip(pieces, chats, strict=True):
            count += 1
            place = text[:80].decode(errors="ignore")
            if not chat.learned.any():
                reason = chat.reason or "there is no answer"
                first = first or f"{reason}: {place}"
                notes.add(f"conversations left out: {reason}", place)
                continue
            if chat.edges:
                notes.add("conversations with white space at the edge of a message", place)
            bins[split].write(chat.ids.astype(dtype))
            bins[split].documents += 1
            bins[split].bytes += int(tokenizer.token_lengths[chat.ids].sum())
            masks[split].write(chat.learned.astype(np.uint8))
            lengths[split].write(np.array([len(chat.ids)], "<u4"))
            learned[SPLITS[split]] += int(chat.learned.sum())
    left_out = count - sum(file.documents for file in bins)
    if 2 * left_out > count:
        raise UserError(f"{left_out:,} of {count:,} conversations are left out; the first: {first}")
    meta = finish_bins(folder, bins, tokenizer)
    for file in (*masks, *lengths):
        file.file.close()
        meta["sha256"][file.path.name] = file.digest.hexdigest()
    meta["sha256"]["chat_template.jinja"] = sha256(folder / "chat_template.jinja")
    date = template.date.strftime("%Y-%m-%d") if template.is_dated else ""
    return meta | {"conversations": {"learned": learned, "date": date}}


def id_type(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest of two types that hold all ids."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")


def finish_bins(folder: Path, files: list["SplitFile"], tokenizer: Tokenizer) -> dict[str, Any]:
    """Close the bins and return what meta.json says of them; UserError if one is empty."""
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
    vocab_size, dtype = tokenizer.vocab_size, id_type(tokenizer).name
    return {"dtype": dtype, "vocab_size": vocab_size, **counts, "sha256": digests}


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
    def packed(self) -> dict[tuple[str, int], "Rows"]:
        """The rows of conversations that were packed, by split and length."""
        return {}

    def rows(self, split: str, length: int) -> "Rows":
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
    values = {field.name: meta.get(field.name) for field in fields(Dataset)[1:]}
    wrong = [key for key, value in values.items() if not is_sound(key, value)]
    if wrong:
        raise UserError(f"{path} is damaged: {wrong[0]}={values[wrong[0]]!r}; {again}")
    if "engine" not in meta:
        raise UserError(f"{data_dir} was prepared by an older version; {again}")
    dataset = Dataset(data_dir, **values)
    for name, expected in dataset.sizes().items():
        path = data_dir / name
        if not path.is_file():
            raise UserError(f"{path} is missing; {again}")
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
    if key == "conversations" and value is None:
        return True
    if key == "conversations":
        value = value.get("learned") if isinstance(value, dict) else None
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
    for name in ("tokenizer.json", "chat_template.jinja"):
        path, expected = dataset.data_dir / name, dataset.sha256.get(name)
        if expected and path.is_file() and sha256(path) != expected:
            raise damaged(path)
    seen = {name: identity(os.fstat(file.fileno())) for name, file in dataset.files.items()}
    seen["sha256"] = dataset.sha256
    with suppress(UserError):
        if read_json(dataset.data_dir / VERIFIED) == seen and not again:
            return
    for name, file in dataset.files.items():
        file.seek(0)
        expected = dataset.sha256.get(name)
        if expected and hashlib.file_digest(file, "sha256").hexdigest() != expected:
            raise damaged(dataset.data_dir / name)
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

    `places` are starts of windows of text, or numbers of rows of conversations.
    """
    if dataset.conversations:
        return dataset.rows(split, length).read(places, device)
    return read_windows(dataset, split, places, length, device)


def read_windows(
    dataset: Dataset, split: str, starts: np.ndarray, length: int, device: "torch.device"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return tokens and targets, int64 (B, T): the windows at `starts`, and one token later."""
    import torch

    rows = [dataset.span(split, "bin", start, start + length + 1) for start in starts.tolist()]
    rows = np.stack(rows)  # (B, T + 1)
    check_ids(rows, dataset, split)
    windows = on_device(rows, device)
    # Apart, so that evaluation can mark targets, with the strides that training is compiled for.
    # (contiguous() would copy neither of a single row.)
    apart = torch.contiguous_format
    return windows[:, :-1].clone(memory_format=apart), windows[:, 1:].clone(memory_format=apart)


def check_ids(rows: np.ndarray, dataset: Dataset, split: str) -> None:
    """Raise a UserError unless the vocabulary has all ids."""
    if rows.max() >= dataset.vocab_size:
        raise UserError(
            f"{dataset.data_dir} is damaged: id {rows.max()} of {split} in a vocabulary of "
            f"{dataset.vocab_size:,}"
        )


def on_device(rows: np.ndarray, device: "torch.device") -> "torch.Tensor":
    """Return whole numbers as an int64 tensor of a device."""
    import torch

    tensor = torch.from_numpy(rows.astype(np.int64))
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


# Read conversations


class Rows:
    """The conversations of a split in rows of `length` + 1 ids; len() counts the rows.

    What is in which row is a function of the data and the length. A conversation that is longer is
    cut where the user speaks, and each part begins as it does, with the system's message; an
    exchange that does not fit is left out, so that no answer is learned without its end.
    """

    def __init__(self, dataset: Dataset, split: str, length: int) -> None:
        self.dataset, self.split, self.length = dataset, split, length
        self.n_cut = self.n_left_out = 0
        lengths = dataset.read(split, "lengths").astype(np.int64)
        ends = lengths.cumsum()
        starts = ends - lengths
        learned = np.add.reduceat(dataset.read(split, "mask"), starts, dtype=np.int64)
        # Two spans of the bin, what is before the exchanges and these; and how many are learned.
        parts = np.stack((starts, starts, starts, ends, learned), axis=1)
        fits = lengths <= length + 1
        cut = [part for span in parts[~fits, 2:4].tolist() for part in self.cut(*span)]
        parts = np.concatenate((parts[fits], np.array(cut, np.int64).reshape(-1, 5)))
        if not len(parts):
            raise UserError(
                f"max_seq_len={length} is too short for any exchange in {dataset.path(split)}"
            )
        sizes = parts[:, 1] - parts[:, 0] + parts[:, 3] - parts[:, 2]
        row = pack(sizes, length + 1)
        self.parts = parts[row.argsort(kind="stable")]
        self.bounds = np.concatenate(([0], np.bincount(row).cumsum()))
        self.learned = np.bincount(row, parts[:, 4]).astype(np.int64)  # (rows,)
        self.filled = sizes.sum() / (len(self) * (length + 1))  # share of the ids

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def described(self) -> str:
        """Return lines that say how much the rows hold."""
        share = self.learned.sum() / self.dataset.tokens[self.split]
        text = f"rows     {len(self):,} of whole conversations, {self.filled:.1%} filled, "
        text += f"{share:.1%} of the tokens learned\n"
        if self.n_cut:
            text += f"         {self.n_cut:,} longer than {self.length:,} tokens are cut, "
            text += f"{self.n_left_out:,} of their exchanges left out\n"
        return text

    def cut(self, start: int, end: int) -> list[list[int]]:
        """Return the parts of a long conversation, and count it and what does not fit."""
        opening = self.dataset.template.opening
        begins = []
        if opening:
            ids = self.dataset.span(self.split, "bin", start, end)
            found = np.lib.stride_tricks.sliding_window_view(ids, len(opening))
            begins = (start + np.flatnonzero((found == opening).all(axis=1))).tolist()
        begins = begins or [start]
        head = begins[0] - start
        parts: list[list[int]] = []
        for begin, stop in itertools.pairwise([*begins, end]):
            if parts and parts[-1][3] == begin and head + stop - parts[-1][2] <= self.length + 1:
                parts[-1][3] = stop
            elif head + stop - begin <= self.length + 1:
                parts.append([start, begins[0], begin, stop])
            else:
                self.n_left_out += 1
        self.n_cut += 1
        learned = [int(self.joined("mask", part)[1:].sum()) for part in parts]
        return [[*part, n] for part, n in zip(parts, learned, strict=True) if n]

    def read(self, numbers: np.ndarray, device: "torch.device") -> "tuple[torch.Tensor, ...]":
        """Return tokens, targets and positions, int64 (B, T), of rows.

        Positions begin at 0 in each conversation, and in what fills a row up. Targets that are not
        learned are -100.
        """
        ids, learned, positions = np.zeros((3, len(numbers), self.length + 1), np.int64)
        for row, number in enumerate(numbers):
            place = 0
            for part in self.parts[self.bounds[number] : self.bounds[number + 1]].tolist():
                found = self.joined("bin", part)
                here = row, slice(place, place + len(found))
                ids[here], learned[here] = found, self.joined("mask", part)
                positions[here] = np.arange(len(found))
                place += len(found)
            positions[row, place:] = np.arange(self.length + 1 - place)
        check_ids(ids, self.dataset, self.split)
        targets = np.where((learned > 0) & (positions > 0), ids, -100)[:, 1:]
        return tuple(on_device(x, device) for x in (ids[:, :-1], targets, positions[:, :-1]))

    def joined(self, kind: str, part: list[int]) -> np.ndarray:
        """Return the ids, or the mask, of the two spans of a part."""
        spans = (part[:2], part[2:4])
        return np.concatenate([self.dataset.span(self.split, kind, *span) for span in spans])


def pack(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each size, so that no row has more than `capacity`: best-fit decreasing.

    The largest comes first, and goes where the least room stays.
    """
    row, count = np.empty(len(sizes), np.int64), 0
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n is set where a row has room for n
    values = sizes.tolist()
    for item in np.argsort(-sizes, kind="stable").tolist():
        if fitting := rooms >> values[item]:
            room = values[item] + (fitting & -fitting).bit_length() - 1
            row[item] = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row[item] = capacity, count
            count += 1
        room -= values[item]
        rows_by_room[room].append(row[item])
        rooms |= 1 << room
    return row


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
