"""A dataset's directory as prepare.py writes it: the old one or the new one, never a part.

data/NAME.partial/   what is not complete yet; removed in the end, or by the next run
data/NAME.old/       what the new dataset replaces, for a moment
"""

import errno
import hashlib
import os
import shutil
import sys
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plainllama.files import lock, read_json, sha256
from plainllama.settings import UserError
from plainllama.tokenizer import Tokenizer, save_tokenizer

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
        lock(partial / "lock", str(out)).close()  # it is no live one
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
        held.close()
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
