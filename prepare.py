"""Turn text into a dataset of tokens: data/NAME/{train.bin, val.bin, meta.json, tokenizer.json}.

    python prepare.py                                      Shakespeare's plays, 5 MB
    python prepare.py book.txt notes/ 'web/*.jsonl.gz'     your own files, folders and globs
    ... | python prepare.py - --out=data/mine --tokenizer=gpt2
    python prepare.py web/ --tokenizer=gpt2 --part=3/64 --out=parts/3     one of 64 machines' share
    python prepare.py --join parts/* --out=data/web                       their shares as a dataset

It reads what plainllama/text.py knows: text, source code, HTML, .jsonl, .json, .csv, .parquet, and
hf://owner/name. Everything is read twice in constant memory: first to count, to find duplicates
and to sample text for the tokenizer, then to encode. The bins are flat arrays of ids, with
`<|endoftext|>` after every document.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import time
import zlib
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from plainllama.data import (
    SPLITS,
    already_prepared,
    dtype_of,
    replace_dataset,
    workplace,
    write_bins,
)
from plainllama.parts import Part, check_part, find_parts, join, listing, share, write_documents
from plainllama.preview import preview
from plainllama.settings import UserError, load, run_main, write_json
from plainllama.shakespeare import PLAYS, fetch_plays
from plainllama.text import (
    Block,
    Format,
    Notes,
    Reading,
    Source,
    check_encoding,
    find_sources,
    local_files,
    progress,
    read_file,
)
from plainllama.tokenizer import (
    Tokenizer,
    encode_blocks,
    find_tokenizer,
    tokenizer_file,
    train_bpe,
)

TRAIN, VAL, DROPPED = 0, 1, 2
TRAINING_BYTES = 100_000_000  # of text that a tokenizer is trained on, at most
CHECKING_BYTES = 4_000_000  # of text that encoders are compared on, at most
SplitBlock = tuple[bytes, bool, int]  # text, whether its document ends with it, and its split


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a dataset of tokens. INPUT: files, folders, globs, hf://owner/name, or - for
    standard input; without any, Shakespeare's plays."""

    inputs: tuple[str, ...] = ()
    # input
    text_key: str = "text"  # key (.jsonl, .json) or column (.csv, .parquet) that holds the text
    text_column: str = ""  # another name of text_key
    format: Format = "auto"  # of all inputs; auto: by the ending of a file's name
    encoding: str = ""  # of inputs that are not UTF-8 and do not say so, cp1252 for example
    # output
    out: str = ""  # directory to write; by default data/ and the name of the first input
    overwrite: bool = False  # replace an existing dataset
    preview: bool = False  # show the first documents as tokens, and the counts; write nothing
    part: str = ""  # read only this part of the files, 3/64 for example; --join joins the parts
    join: bool = False  # INPUT are the directories of all parts: make one dataset of them
    # tokenizer
    tokenizer: str = "bpe"  # bpe (trained here), byte, gpt2 or another of tiktoken's, or a file
    vocab_size: int = 4096  # tokens of a trained bpe vocabulary: 256 bytes, merges, end-of-text
    # split
    val_fraction: float = 0.1  # share of the text that is kept for validation
    shuffle: bool = False  # put the documents of each split in random order
    seed: int = 0  # chooses the documents kept for validation, and the order of shuffle
    # advanced
    workers: int = 0  # cores to encode with; 0: all. The result does not depend on it

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.tokenizer == "bpe" and not 257 <= self.vocab_size <= 1_000_000:
            raise UserError(f"vocab_size={self.vocab_size} must be 257 to 1,000,000")
        if not 0 <= self.workers <= 1024:
            raise UserError(f"workers={self.workers} must be 0 to 1,024")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed} must not be negative, and less than 2**64")
        if self.text_column and self.text_key not in ("text", self.text_column):
            raise UserError(f"text_key={self.text_key} and text_column={self.text_column} differ")
        check_encoding(self.encoding or "utf-8")
        check_part(self)

    @property
    def reading(self) -> Reading:
        return Reading(self.text_column or self.text_key, self.format, self.encoding)


def main() -> None:
    config = load(PrepareConfig)
    started = time.perf_counter()
    if config.workers:
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.workers))  # to train with
    notes = Notes()
    out = find_out(config)
    parts = find_parts(config.inputs) if config.join else []
    sources = [] if config.join else find_sources(config.inputs, notes)
    all_files = listing(sources)
    sources = share(sources, config.part) if config.part else sources
    identity = fingerprint(config, sources, parts)
    if not config.preview and already_prepared(out, identity, config.overwrite):
        print(f"{out} is already prepared from this text with these settings")
        return

    with workplace(out, config.preview) as work:
        folder = work.path
        if config.join:
            meta = join(parts, folder / "new") | {"fingerprint": identity}
            write_json(folder / "new" / "meta.json", meta)
            replace_dataset(folder / "new", out)
            report(meta, out, time.perf_counter() - started)
            return
        tokenizer = None if config.tokenizer == "bpe" else find_tokenizer(config.tokenizer)
        files = local_files(sources, folder, config.reading)
        files = files or [Source(path.name, path) for path in fetch_plays(folder)]
        files, documents, sample = read_documents(files, config, notes)
        for line in notes:
            print(f"note: {line}", file=sys.stderr)
        splits = assign_splits(documents, config.val_fraction, bool(config.part))
        tokenizer = tokenizer or train_bpe(sample, config.vocab_size)
        blocks = split_blocks(read_blocks(files, config.reading), splits)
        if config.preview:
            kept = np.array(documents.sizes)[splits.of_document != DROPPED]
            preview(tokenizer, ((text, last) for text, last, _ in blocks), kept)
            return
        work.needed = check_space(tokenizer, sample, documents, out)
        encoded = encode_blocks(blocks, tokenizer, sample, folder / "ranks", config.workers)
        shuffle_seed = config.seed if config.shuffle else None
        is_part = bool(config.part)
        meta = write_bins(encoded, tokenizer, folder / "new", shuffle_seed, is_part)
        if is_part:
            known = documents.digests, documents.sizes, splits.of_document
            meta["sha256"] |= write_documents(folder / "new", *known)
            meta |= {"part": config.part, "listing": all_files}
        meta |= {
            "tokenizer": config.tokenizer,
            "trained_on_bytes": sum(map(len, sample)) if config.tokenizer == "bpe" else 0,
            "split": "hash of the document" if splits.cut is None else "tail of the text",
            "dropped": splits.dropped(documents),
            "notes": dict(notes.counts + notes.skipped),
            "inputs": config.inputs or [PLAYS],
            "files": len(files),
            "settings": asdict(config),
            "fingerprint": identity,
        }
        write_json(folder / "new" / "meta.json", meta)
        replace_dataset(folder / "new", out)
    report(meta, out, time.perf_counter() - started)


# Find


def find_out(config: PrepareConfig) -> Path:
    """Return the directory to write: by default, data/ and the name of the first input."""
    name = "shakespeare"
    if config.inputs:
        name = os.path.basename(os.path.abspath(config.inputs[0])).split(".")[0]
        name = re.sub(r"\W+", "-", name).strip("-") or "text"
    name += f"-{config.part.replace('/', '-of-')}" if config.part else ""
    out = Path(config.out or f"data/{name}")
    return Path(os.path.realpath(out)) if out.is_symlink() or out.name in ("", "..") else out


def fingerprint(config: PrepareConfig, sources: list[Source], parts: list[Part]) -> str:
    """Hash the settings and the files' names, sizes and times; text from stdin is always new."""
    keys = ("tokenizer", "vocab_size", "val_fraction", "text_key", "shuffle", "seed")
    settings = {key: getattr(config, key) for key in keys} | {"text_key": config.reading.text_key}
    # Those that came later are left out where they change nothing: older datasets stay known.
    settings |= {"format": config.format} if config.format != "auto" else {}
    settings |= {"encoding": config.encoding} if config.encoding else {}
    settings |= {"part": config.part} if config.part else {}
    settings |= {"parts": [part.meta["fingerprint"] for part in parts]} if parts else {}
    named = [(source.name, source.path) for source in sources or [Source(PLAYS)]]
    named.append((str(Path(config.tokenizer)), tokenizer_file(config.tokenizer)))
    files = []
    for name, path in named:
        stat = path.stat() if path and path.exists() else None
        files.append([name, stat and [stat.st_size, stat.st_mtime_ns]])
    now = time.time_ns() if "-" in config.inputs else 0
    return hashlib.sha256(json.dumps([settings, files, now]).encode()).hexdigest()


# Read for the first time


class Documents:
    """What the first reading learns of every document: its digest, its split's key, its size."""

    def __init__(self, seed: int) -> None:
        self.digests, self.keys, self.sizes = array("q"), array("q"), array("q")
        self.seed = seed & 0xFFFFFFFF
        self.begin()

    def begin(self) -> None:
        # Tells repeated documents; of the standard library's digests the fastest.
        self.digest = hashlib.sha1(usedforsecurity=False)
        self.key = self.seed  # chooses the split, the same in every run
        self.size = 0
        self.blank = True

    def add(self, block: bytes, last: bool) -> None:
        """Take in the next block, with which a document may end."""
        self.digest.update(block)
        self.key = zlib.crc32(block, self.key)
        self.size += len(block)
        self.blank = self.blank and not block.strip()
        if last:
            self.digests.append(int.from_bytes(self.digest.digest()[:8], "little", signed=True))
            self.keys.append(self.key)
            self.sizes.append(0 if self.blank else self.size)
            self.begin()

    def keep(self, count: int) -> None:
        """Forget all but the first `count` documents."""
        for values in (self.digests, self.keys, self.sizes):
            del values[count:]
        self.begin()


class Sample:
    """Blocks spread evenly over all text, of at most `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        self.blocks: list[bytes] = []
        self.limit, self.size, self.step, self.seen = limit, 0, 1, 0

    def add(self, block: bytes) -> None:
        if self.seen % self.step == 0:
            self.blocks.append(block)
            self.size += len(block)
        self.seen += 1
        if self.size > self.limit:
            self.blocks = self.blocks[::2]
            self.step *= 2
            self.size = sum(map(len, self.blocks))


def read_documents(
    files: list[Source], config: PrepareConfig, notes: Notes
) -> tuple[list[Source], Documents, list[bytes]]:
    """Read everything once: return the files that could be read, their documents, and a sample."""
    documents = Documents(config.seed)
    sample = Sample(TRAINING_BYTES if config.tokenizer == "bpe" else CHECKING_BYTES)
    good: list[Source] = []
    damaged: list[str] = []
    with progress(files, "reading") as bar:
        for file in files:
            before, odd = len(documents.sizes), Notes()
            try:
                for block, last in read_file(file, config.reading, odd, bar):
                    documents.add(block, last)
                    sample.add(block)
                good.append(file)
                notes.include(odd)
            except UserError as error:
                if not file.in_folder:
                    raise
                documents.keep(before)
                damaged.append(str(error))
    in_folders = sum(file.in_folder for file in files)
    if len(damaged) * 100 > in_folders:
        share = f"{len(damaged):,} of {in_folders:,} files"
        raise UserError(f"{share} cannot be read, over 1%; the first: {damaged[0]}")
    if damaged:
        notes.add("damaged files skipped", damaged[0], len(damaged))
    return good, documents, sample.blocks


# Split


@dataclass(frozen=True)
class Splits:
    """The split of each document; or all text from the byte `cut` goes to validation."""

    of_document: np.ndarray  # TRAIN, VAL, or DROPPED: empty, or seen before
    cut: int | None

    def dropped(self, documents: Documents) -> dict[str, int]:
        """Count the documents that are left out, by reason."""
        empty = documents.sizes.count(0)
        return {"empty": empty, "repeated": int((self.of_document == DROPPED).sum()) - empty}


def assign_splits(documents: Documents, val_fraction: float, by_hash: bool = False) -> Splits:
    """Choose the split of each document by its key; few documents are cut at one place instead."""
    sizes, keys = np.array(documents.sizes), np.array(documents.keys)
    # 64 bits: among 10 million different documents two are alike with probability 3e-6.
    first = np.unique(np.array(documents.digests), return_index=True)[1]
    kept = first[sizes[first] > 0]
    of_document = np.full(len(sizes), DROPPED, np.uint8)
    of_document[kept] = np.where(keys[kept] < val_fraction * 2.0**32, VAL, TRAIN)
    if by_hash or len(kept) * min(val_fraction, 1 - val_fraction) >= 100:
        return Splits(of_document, None)
    of_document[kept] = TRAIN
    return Splits(of_document, int(int(sizes[kept].sum()) * (1 - val_fraction)))


def read_blocks(files: list[Source], reading: Reading) -> Iterator[Block]:
    """Read everything for the second time."""
    with progress(files, "encoding") as bar:
        for file in files:
            yield from read_file(file, reading, Notes(), bar)


def split_blocks(blocks: Iterable[Block], splits: Splits) -> Iterator[SplitBlock]:
    """Yield the kept blocks with their split; the document at the cut becomes two."""
    cut = splits.cut
    document = position = 0
    for block, last in blocks:
        if document == len(splits.of_document):
            raise UserError("a file grew while it was read; prepare it when it is complete")
        split = int(splits.of_document[document])
        document += last
        if split == DROPPED:
            continue
        if cut is not None:
            if position < cut < position + len(block):
                head = len(block[: cut - position].decode(errors="ignore").encode())
                if head:
                    yield block[:head], True, TRAIN
                block, position, cut = block[head:], position + head, position + head
            split = VAL if position >= cut else TRAIN
            position += len(block)
            last = last or position == cut
        yield block, last, split
    if document < len(splits.of_document):
        raise UserError("a file shrank while it was read; prepare it when it is complete")


# Encode


def check_space(
    tokenizer: Tokenizer, sample: list[bytes], documents: Documents, out: Path
) -> float:
    """Return how many bytes the ids will need, by a part of the sample, if the disk has them."""
    text = b"".join(sample[:: len(sample) // 4 + 1]).decode(errors="ignore")
    tokens_per_byte = len(tokenizer.encode_text(text)) / max(len(text.encode()), 1)
    needed = sum(documents.sizes) * tokens_per_byte * dtype_of(tokenizer).itemsize
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        sizes = f"{needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free"
        raise UserError(f"{out} needs about {sizes}; free some, or choose another --out")
    return needed


# Report


def report(meta: dict[str, Any], out: Path, seconds: float) -> None:
    """Print what was written, and what to run next."""
    for split in SPLITS:
        documents, size, tokens = (meta[key][split] for key in ("documents", "bytes", "tokens"))
        print(f"{split:5s} {documents:10,} documents {size:15,} bytes {tokens:14,} tokens")
    print("dropped: {empty:,} empty and {repeated:,} repeated documents".format(**meta["dropped"]))
    print(f"validation: {meta['split']}, {size / max(tokens, 1):.3f} bytes per token")
    print(f"vocabulary: {meta['tokenizer']}, {meta['vocab_size']:,} tokens, {meta['dtype']}")
    rate = sum(meta["bytes"].values()) / seconds / 1e6
    print(f"wrote {out} in {seconds:.1f} s ({rate:.1f} MB/s of text)")
    if meta.get("part"):
        print("next: the other parts, then python prepare.py --join PARTS --out=data/NAME")
        return
    demo = out == Path("data/shakespeare")
    places = [] if demo else [f"--data_dir={out}", f"--out_dir={Path('out', out.name)}"]
    print("next:", shlex.join(["python", "train.py", "config/tiny.py", *places]))


if __name__ == "__main__":
    run_main(main)
