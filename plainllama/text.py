"""Text from files, folders, globs, standard input and URLs, as documents of UTF-8.

    find_sources(inputs, notes)               the files that the inputs of prepare.py stand for
    local_files(sources, folder)              the same as files of this machine, to be read twice
    found_in(files, reading)                  whether their records are texts or conversations
    read_file(source, reading, notes, bar)    the documents of a file, in constant memory

A text file is one document, source code and Markdown too, and so is each record of a .jsonl,
.ndjson, .json, .csv, .tsv or .parquet. HTML is reduced to its text. All but .parquet may be
compressed (.gz, .bz2, .xz, .zst) and have another encoding than UTF-8. fsspec opens URLs.
A conversation is a document, too: its text is the JSON of its messages, in one piece.
"""

import codecs
import csv
import functools
import glob
import io
import json
import os
import re
import shlex
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import fsspec
from fsspec.compression import compr
from tqdm import tqdm

from plainllama.chat import CONVERSATION_KEYS, conversation_text, is_conversation
from plainllama.settings import UserError, command

CHUNK = 1 << 16  # bytes that are read at a time
PIECE = 1 << 20  # bytes; a document longer than that is yielded in several pieces
LONGEST_PIECE = 1 << 24  # bytes; where no line ends in so many, a piece ends inside a line
HEAD = 1 << 13  # bytes at the beginning of a file that show what it is
FORMATS = {  # by the ending of a file's name; all others are text
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
}
Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "html", "chat"]
OUTPUTS = ({"train.bin", "val.bin"}, {"settings.json", "metrics.jsonl"})  # are in a dataset, a run
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
MARKS = {  # byte-order marks
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
CONTROL = [chr(c) for c in range(32) if chr(c) not in "\b\t\n\v\f\r\x1b"]  # rare in text
# The last newline between two characters that are no white space, and whole. Not before a slash,
# which some patterns (o200k's) put into the token of the newline.
LINE_END = re.compile(r"(?s).*[^\s\udc80-\udcff]\n(?=[^\s/\udc80-\udcff])")
REPLACEMENT = "\ufffd".encode()  # stands for bytes that cannot be decoded
Piece = tuple[bytes, bool]  # valid UTF-8, and whether its document ends with it
Document = tuple[str, Iterable[bytes]]  # the place of a document, and its text in chunks


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_key: str = "text"
    format: Format = "auto"
    encoding: str = ""
    holds: Literal["text", "conversations", "keys"] = "text"  # what becomes of a record

    def __post_init__(self) -> None:
        try:
            "text".encode(self.encoding or "utf-8")
            b"\xff".decode(self.encoding or "utf-8", "replace")  # idna and punycode cannot
        except (LookupError, UnicodeError) as error:
            raise UserError(f"encoding={self.encoding!r}: {error}; cp1252, for example") from None


@dataclass(frozen=True)
class Source:
    """A file, or what will be copied to one: standard input, or the file that a URL names."""

    name: str
    path: Path | None = None
    in_folder: bool = False  # found, not named: it may turn out to hold no text


class NotText(UserError):
    """A file holds something else than text."""


class Notes:
    """What was odd in the input: how often, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, object] = {}

    def add(self, kind: str, place: object, count: int = 1) -> None:
        self.counts[kind] += count
        self.first.setdefault(kind, place)

    def __iter__(self) -> Iterator[str]:
        """Yield a line for each kind."""
        for kind, count in self.counts.items():
            place = str(self.first[kind]).replace("\n", r"\n")  # names may have line ends
            yield f"{count:,} {kind}; the first: {place}"


# Files


def find_sources(inputs: Iterable[str], notes: Notes) -> list[Source]:
    """Return each file once that the inputs stand for, in an order that is the same everywhere."""
    sources: dict[str, Source] = {}
    for name in inputs:
        if name == "-" or "://" in name:
            found = [Source(name)]
        elif os.path.isdir(name):
            found = find_in_folder(name, notes)
        elif os.path.isfile(name):
            found = [Source(name, Path(name))]
        elif os.path.exists(name):
            pipe = command("prepare.py", "-")
            raise UserError(f"{name} is no regular file; pipe it in: ... | {pipe}")
        else:
            matches = sorted(glob.glob(name, recursive=True))
            found = find_sources(filter(os.path.exists, matches), notes)
        if not found:
            skipped = f" ({'; '.join(notes)})" if notes.counts else ""
            raise UserError(f"no file{'s in' if os.path.isdir(name) else ''} {name}{skipped}")
        for source in found:
            sources.setdefault(source.name, source)
    return list(sources.values())


def find_in_folder(folder: str, notes: Notes) -> list[Source]:
    """Return the files in a folder and in its folders, but hidden ones and links to folders."""
    paths = []
    for parent, folders, names in os.walk(folder):
        if parent.endswith(".partial") or any(files <= {*names} for files in OUTPUTS):
            notes.add("folders that prepare.py or train.py wrote skipped", parent)
            folders[:] = names[:] = []
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(parent, name) for name in folders):
            if path.is_symlink():
                notes.add("links to folders skipped", path)
        paths += [Path(parent, name) for name in names if not name.startswith(".")]
    return [Source(str(path), path, in_folder=True) for path in sorted(paths) if path.is_file()]


def local_files(sources: Iterable[Source], folder: Path) -> list[Source]:
    """Return files that can be read twice: standard input and remote files are copied first."""
    files: list[Source] = []
    for source in sources:
        if source.path:
            files.append(source)
        elif source.name == "-":
            path = folder / "stdin.txt"
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            files.append(Source("standard input", path))
        else:
            files += download(source.name, folder / str(len(files)))
    return files


def download(url: str, folder: Path) -> list[Source]:
    """Copy the file that a URL names, or the files if it has a `*`, to a new folder."""
    folder.mkdir()
    files = []
    try:
        system, path = fsspec.url_to_fs(url)
        paths = sorted(system.glob(path)) if "*" in path else [path]
        for number, path in enumerate(path for path in paths if system.isfile(path)):
            local = folder / f"{number}-{os.path.basename(path.partition('?')[0])}"
            system.get_file(path, str(local))
            files.append(Source(str(system.unstrip_protocol(path)), local))
    except ImportError as error:
        raise missing(error, url) from error
    except Exception as error:  # the package of each protocol has its own
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
    if not files:
        raise UserError(f"no file {url}; a folder is named with its files, FOLDER/*.parquet")
    return files


def missing(error: ImportError, name: str) -> UserError:
    """Return the refusal of an input that needs a package which is not installed."""
    while not error.name and error.__cause__:  # so fsspec raises it
        error = error.__cause__
    package = str(error.name).partition(".")[0]
    install = command("-m", "pip", "install", package)
    return UserError(f"{name} is not read without a further package: {install}")


# Documents


def found_in(files: Iterable[Source], reading: Reading) -> Literal["text", "conversations"]:
    """Return what files hold, by the keys of the first record in them, or by the format asked for.

    A record with the text key is a text, whatever else it has.
    """
    if reading.format == "chat":
        return "conversations"
    for source in files:
        # What is wrong with a file is said when it is read.
        with suppress(Exception), open(source.path, "rb") as raw:
            for _, chunks in read_documents(source, raw, replace(reading, holds="keys"), Notes()):
                keys = set(b"".join(chunks).decode().split("\n"))
                is_text = reading.text_key in keys or not is_conversation(keys)
                return "text" if is_text else "conversations"
    return "text"


def read_file(source: Source, reading: Reading, notes: Notes, bar: tqdm) -> Iterator[Piece]:
    """Yield the documents of a file, those over 1 MB in several pieces.

    A UserError names a file that is damaged, and NotText one that holds no text.
    """
    start, size, invalid = bar.n, 0, 0
    try:
        with open(source.path, "rb") as raw:
            for place, chunks in read_documents(source, raw, reading, notes):
                for text, ends in in_pieces(chunks, place, notes):
                    text = make_valid(text)
                    size += len(text)
                    if REPLACEMENT[:1] in text:  # one byte is found many times as fast
                        invalid += text.count(REPLACEMENT)
                    yield text, ends
                    bar.update(start + raw.tell() - bar.n)
    except ImportError as error:
        raise missing(error, source.name) from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each format and compression has its own
        if "too much memory for decoding" in str(error):
            unpack = f"zstd -dc --long=31 {shlex.quote(source.name)}"
            way_out = command("prepare.py", "-", f"--format={reading.format}")
            raise UserError(f"{source.name} is of `zstd --long`: {unpack} | {way_out}") from error
        raise UserError(f"{source.name} is damaged, or cannot be read: {error}") from error
    if invalid * 100 > size:
        encoding = f"{reading.encoding or 'UTF-8'}: {invalid:,} characters in {size:,} bytes"
        way_out = "say what it is, with --encoding=cp1252 for example"
        raise UserError(f"{source.name} is not {encoding} are invalid, over 1%; {way_out}")
    if invalid:
        notes.add("invalid characters, now U+FFFD", source.name, invalid)


def in_pieces(chunks: Iterable[bytes], place: str, notes: Notes) -> Iterator[Piece]:
    """Yield one document, cut after line ends where it is long."""
    held: list[bytes] = []
    size = 0
    for chunk in chunks:
        if size >= PIECE:
            last = held[-1]
            end = last_cut(last)
            if not end and size >= LONGEST_PIECE:
                notes.add("pieces cut inside a line, which may change a token", place)
                end = len(last) - 1
                while end > len(last) - 4 and 0x80 <= last[end] < 0xC0:  # inside a character
                    end -= 1
            if end:
                held[-1] = last[:end]
                yield b"".join(held), False
                held = [last[end:]]
                size = len(held[0])
        held.append(chunk)
        size += len(chunk)
    yield b"".join(held), True


def last_cut(text: bytes) -> int:
    """Return the last place where byte-level tokenizers split any text, or 0 if there is none."""
    match = LINE_END.match(text.decode(errors="surrogateescape"))
    return len(match[0].encode(errors="surrogateescape")) if match else 0


def make_valid(text: bytes) -> bytes:
    """Return a text as valid UTF-8, with U+FFFD for what is invalid."""
    view, start = memoryview(text), 0
    try:
        while start < len(view):  # in chunks, which stay in the cache
            chunk = view[start : start + CHUNK]
            start += codecs.utf_8_decode(chunk, "strict", start + len(chunk) == len(view))[1]
    except UnicodeDecodeError:
        return text.decode(errors="replace").encode()
    return text


def read_documents(
    source: Source, raw: BinaryIO, reading: Reading, notes: Notes
) -> Iterator[Document]:
    """Yield the documents of an open file, not yet valid UTF-8."""
    name = source.name
    stream, suffix = decompressed(raw, source.path)
    by_name = reading.format in ("auto", "chat")
    format = FORMATS.get(suffix, "text") if by_name else reading.format
    if format == "parquet":
        yield from read_parquet(stream, name, reading, notes)
        return

    head = stream.peek(HEAD)[:HEAD]
    marked = (encoding for mark, encoding in MARKS.items() if head.startswith(mark))
    encoding = next(marked, reading.encoding or "utf-8")
    beginning = head.decode(encoding, errors="ignore")
    refuse_binary(head, beginning, name)
    if format == "text" and by_name and is_json_lines(beginning):
        format = "jsonl"
    if format in ("text", "html") and reading.holds != "text":
        raise UserError(f"{name} is text, and other files hold conversations: prepare them apart")
    if format == "text" and encoding == "utf-8":
        yield name, iter(functools.partial(stream.read, CHUNK), b"")
        return

    text = io.TextIOWrapper(stream, encoding, "replace", newline="")
    if format == "text":
        yield name, map(str.encode, iter(functools.partial(text.read, CHUNK), ""))
    elif format == "html":
        from resiliparse.extract.html2text import extract_plain_text

        yield name, in_chunks(to_utf8(extract_plain_text(text.read()), name, notes))
    else:
        records: Iterable[Any]
        csv.field_size_limit(2**31 - 1)
        if format == "csv":
            records = csv.DictReader(text, restval=(), strict=True)
        elif format == "tsv":  # it has no quotes
            records = csv.DictReader(text, restval=(), delimiter="\t", quoting=csv.QUOTE_NONE)
        elif format == "json" and not is_json_lines(beginning):
            records = read_json_file(text.read(), name)
        else:  # JSON lines; lines of bytes are faster than those of TextIOWrapper
            lines = stream if encoding == "utf-8" else map(str.encode, text)
            records = (line for line in lines if not line.isspace())
        yield from texts_of(records, name, reading, notes)


def decompressed(raw: BinaryIO, path: Path) -> tuple[BinaryIO, str]:
    """Return the stream of what a file holds, and the suffix that says its format."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get("".join(suffixes[-1:]))
    if not compression:
        return raw, "".join(suffixes[-1:])
    if compression == "zstd":
        import pyarrow  # fsspec's zstandard takes a file that was cut short for a whole one

        stream = pyarrow.CompressedInputStream(raw, "zstd")
    else:
        stream = compr[compression](raw, mode="rb")
    return io.BufferedReader(stream), "".join(suffixes[-2:-1])


def refuse_binary(head: bytes, beginning: str, name: str) -> None:
    """Raise NotText for a file that begins with what is no text."""
    with suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "replace")
        raise NotText(f"{name} is a tar archive: unpack it in a new folder, and name that")
    if beginning.startswith("%PDF-"):
        raise NotText(f"{name} is a PDF; `pdftotext FILE` makes text of it")
    if beginning.startswith("PK\3\4"):
        raise NotText(f"{name} is a ZIP archive, as .docx and .epub are; `pandoc` makes text of it")
    if sum(map(beginning.count, CONTROL)) > max(2, len(beginning) // 20):
        raise NotText(
            f"{name} is no text but binary data; UTF-16 without a mark takes --encoding=utf-16-le, "
            "Parquet --format=parquet, and a compressed file needs its suffix, .gz for example"
        )


def is_json_lines(beginning: str) -> bool:
    """Tell whether a file begins with a line that is a JSON object, or goes on as one."""
    line, ends, _ = beginning.lstrip().partition("\n")
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return not ends and bool(re.match(r'\{\s*"[^"]*"\s*:', line))


def read_json_file(text: str, name: str) -> list[Any]:
    """Return the records of a list, or the one that an object is; NotText if it is neither."""
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):
            raise
        raise NotText(f"{name} is damaged, or cannot be read as JSON: {error}") from error
    return content if isinstance(content, list) else [content]


def texts_of(
    records: Iterable[Any], name: str, reading: Reading, notes: Notes
) -> Iterator[Document]:
    """Yield the text of each record, bytes of JSON or an object; up to 1% of broken are skipped."""
    number, broken, without, first = 0, 0, 0, ""
    for record in records:
        number += 1
        place = f"{name}, record {number:,}"
        try:
            if isinstance(record, bytes):
                record = json.loads(record.decode(errors="replace"))
            text = text_of(record, reading)
        except (ValueError, RecursionError) as error:
            first = first or f"record {number:,}: {error}"
            broken += 1
            without += isinstance(error, NotText)
            if broken > max(10, number // 100):
                break
            continue
        yield place, in_chunks(to_utf8(text, place, notes))
    if broken * 100 > number:
        share = f"{broken:,} of {number:,} records are broken, over 1%; {first}"
        way_out = "; --format=text takes the file as one text" if reading.holds == "text" else ""
        kind = NotText if without == number else UserError
        raise kind(f"{name}: {share}{way_out}")
    if broken:
        notes.add("broken records skipped", f"{name}, {first}", broken)


def text_of(record: Any, reading: Reading) -> str:
    """Return the text of a record; ValueError if it is broken, NotText if it just has none."""
    key = reading.text_key
    if isinstance(record, dict) and None in record:  # csv keeps there what is left of a row
        raise ValueError("it has more columns than the first row")
    if reading.holds == "keys":
        return "\n".join(record)
    if reading.holds == "conversations":
        text = conversation_text(record)
        if len(text) > LONGEST_PIECE // 4:  # characters; it is not cut into pieces
            raise ValueError(f"it is longer than {LONGEST_PIECE // 4:,} characters")
        return text
    if isinstance(record, dict):
        if key not in record:
            raise NotText(f"no key {key!r}; --text_key is one of {list(record)[:20]}")
        record = "" if record[key] is None else record[key]
    if not isinstance(record, str):
        found = repr(record)[:60]
        raise NotText(f"no text under {key!r} but {found}; --text_key names another key")
    return record


def read_parquet(raw: BinaryIO, name: str, reading: Reading, notes: Notes) -> Iterator[Document]:
    """Yield each row of the text's column, or of those of a conversation."""
    import pyarrow
    from pyarrow import parquet

    # Without these settings a whole row group is held in memory.
    table = parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
    names, key = table.schema_arrow.names, reading.text_key
    if reading.holds != "text":
        columns = [column for column in names if column in (key, *CONVERSATION_KEYS)]
        batches = table.iter_batches(batch_size=256, columns=columns)
        records = (row for batch in batches for row in batch.to_pylist())
        yield from texts_of(records, name, reading, notes)
        return
    if key not in names:
        raise ValueError(f"no column {key!r}; --text_key is one of {names}")
    number = 0
    for batch in table.iter_batches(batch_size=256, columns=[key]):
        for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
            number += 1
            yield f"row {number:,}", in_chunks(text or b"")


def in_chunks(text: bytes) -> list[bytes]:
    """Return a text in chunks, as a file is read."""
    return [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]


def to_utf8(text: str, place: str, notes: Notes) -> bytes:
    """Return a text as UTF-8; what JSON's escapes give half of becomes a question mark."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        notes.add("documents with half a character (a surrogate), now ?", place)
        return text.encode(errors="replace")
