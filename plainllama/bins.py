"""A dataset while prepare.py writes it: whole or not at all.

data/NAME.partial/    what is being written; the next run removes what a kill left, or puts back
                      the older dataset that was about to be replaced
"""

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from plainllama.chat import Encoded, Template
from plainllama.data import SPLITS, load_dataset, lock
from plainllama.settings import read_json, sha256, write_json
from plainllama.terminal import UserError
from plainllama.text import Notes
from plainllama.tokenizer import Tokenizer

OURS = (  # the names of a dataset's files
    r"meta\.json|tokenizer(_config)?\.json|chat_template\.jinja|(train|val)\.(bin|mask|lengths)"
    r"|(\.tmp-)?\.verified"
)
DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Pieces = list[tuple[bytes, bool, int]]  # text, whether its document ends with it, and the split
EncodedText = tuple[Pieces, list[np.ndarray]]
EncodedChats = tuple[Pieces, list[Encoded]]


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
        raise UserError(f"no space left for {out}: free some, or choose another --out") from error
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


def write_chats(
    folder: Path, encoded: Iterable[EncodedChats], template: Template, notes: Notes
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
    conversations = {"learned": dict(zip(SPLITS, learned, strict=True))}
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
