"""Text from files, folders, globs, standard input and URLs, as documents of UTF-8.

    find_sources(inputs, notes)               the files that the inputs of prepare.py stand for
    local_files(sources, folder)              the same as files of this machine, to be read twice
    hold_conversations(files, reading)        whether their records are conversations, or texts
    read_file(source, reading, notes, bar)    the documents of a file, in constant memory

A text file is one document, source code and Markdown too, and so is each record of a .jsonl,
.ndjson, .json, .csv, .tsv or .parquet. HTML is reduced to its text. All but .parquet may be
compressed (.gz, .bz2, .xz, .zst) and have another encoding than UTF-8. fsspec opens URLs.
A conversation is a document, too: its text is the JSON of its messages, in one piece.
"""

import csv
import glob
import io
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal

import fsspec
from fsspec.compression import compr
from tqdm import tqdm

from plainllama.chat import CONVERSATION_KEYS, conversation_text, is_conversation
from plainllama.terminal import UserError, command

CHUNK = 1 << 16  # characters that are read at a time
PIECE = 1 << 20  # characters; a document longer than that is yielded in several pieces
LONGEST_PIECE = 1 << 22  # characters; where no line ends in so many, a piece ends inside a line
HEAD = 1 << 13  # bytes at the beginning of a file that show what it is
FORMATS = {f".{name}": name for name in ("jsonl", "json", "csv", "tsv", "parquet", "html")}
FORMATS |= {".ndjson": "jsonl", ".htm": "html"}  # by the ending of a file's name; others are text
Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "html", "chat"]
OUTPUTS = ({"train.bin", "val.bin"}, {"settings.json", "metrics.jsonl"})  # are in a dataset, a run
COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".bz2": "bz2", ".xz": "xz"}  # and .zst
# Byte-order marks.
MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
CONTROL = [chr(c) for c in range(32) if chr(c) not in "\b\t\n\v\f\r\x1b"]  # rare in text
# Up to the last newline between two characters that are no white space, where byte-level tokenizers
# split any text; not before a slash, which some patterns (o200k's) put into the newline's token.
LINE_END = re.compile(r"(?s)(.*\S\n(?=[^\s/]))?")


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_key: str = "text"
    format: Format = "auto"
    encoding: str = ""
    in_chats: bool = False  # a record is a conversation, not a text

    def __post_init__(self) -> None:
        try:
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
            way_out = f"pipe it in: ... | {command('prepare.py', '-')}"
            raise UserError(f"{name} is no regular file; {way_out}")
        else:
            matches = sorted(glob.glob(name, recursive=True))
            found = find_sources(filter(os.path.exists, matches), notes)
        if not found:
            kind = "files in" if os.path.isdir(name) else "file"
            raise UserError(f"no {kind} {name} {'; '.join(notes)}")
        for source in found:
            sources.setdefault(source.name, source)
    return list(sources.values())


def find_in_folder(folder: str, notes: Notes) -> list[Source]:
    """Return the files in a folder and in its folders; not in hidden ones, nor in linked ones."""
    paths = []
    for parent, folders, names in os.walk(folder):
        if parent.endswith(".partial") or any(files <= {*names} for files in OUTPUTS):
            notes.add("folders that prepare.py or train.py wrote skipped", parent)
            folders[:] = names[:] = []
        folders[:] = [name for name in folders if not name.startswith(".")]
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
        remotes = [file for file in fsspec.open_files(url) if file.fs.isfile(file.path)]
        for number, remote in enumerate(remotes):
            path = folder / f"{number}-{os.path.basename(remote.path.partition('?')[0])}"
            remote.fs.get_file(remote.path, str(path))
            files.append(Source(remote.full_name, path))
    except Exception as error:  # the package of each protocol has its own
        raise UserError(f"{url} cannot be read: {type(error).__name__}: {error}") from error
    if not files:
        raise UserError(f"no file {url}; a folder is named with its files, FOLDER/*.parquet")
    return files


# Documents


def hold_conversations(files: Iterable[Source], reading: Reading) -> bool:
    """Tell by the keys of the first record in files, or by the format asked for, what they hold.

    A record with the text key is a text, whatever else it has.
    """
    for source in files if reading.format != "chat" else ():
        # What is wrong with a file is said when it is read.
        with suppress(Exception), open(source.path, "rb") as raw:
            format, stream = open_stream(source, raw, reading)
            for record in records_of(format, stream, reading) if format != "text" else ():
                if not isinstance(record, Exception):
                    return reading.text_key not in record and is_conversation(record.keys())
    return reading.format == "chat"


def read_file(
    source: Source, reading: Reading, notes: Notes, bar: tqdm
) -> Iterator[tuple[bytes, bool]]:
    """Yield the documents of a file in pieces of about 1 MB, and whether one ends with the piece.

    A UserError names a file that is damaged, and NotText one that holds no text.
    """
    start, size, invalid = bar.n, 0, 0
    try:
        with open(source.path, "rb") as raw:
            for document in read_documents(source, raw, reading, notes):
                for chunks, ends in in_pieces(document):
                    # One at a time, in the cache. Half a character, as JSON can write, becomes "?".
                    text = b"".join(chunk.encode(errors="replace") for chunk in chunks)
                    size += len(text)
                    invalid += sum(chunk.count("\ufffd") for chunk in chunks)
                    yield text, ends
                    bar.update(start + raw.tell() - bar.n)
    except ImportError as error:
        install = command("-m", "pip", "install", error.name)
        raise UserError(f"{source.name} needs a further package: {install}") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each format and compression has its own
        raise UserError(f"{source.name} is damaged, or cannot be read: {error}") from error
    if invalid * 100 > size:
        encoding = f"{reading.encoding or 'UTF-8'}: {invalid:,} characters in {size:,} bytes"
        way_out = "say what it is, with --encoding=cp1252 for example"
        raise UserError(f"{source.name} is not {encoding} are invalid, over 1%; {way_out}")
    if invalid:
        notes.add("invalid characters, now U+FFFD", source.name, invalid)


def in_pieces(chunks: Iterable[str]) -> Iterator[tuple[list[str], bool]]:
    """Yield the chunks of each piece of a document, and whether it is the last.

    A long document is cut after line ends; where none is found in LONGEST_PIECE, inside a line,
    which may change a token.
    """
    held: list[str] = []
    size = 0
    for chunk in chunks:
        if size >= PIECE:
            *before, last = held
            end = LINE_END.match(last).end() or (len(last) if size >= LONGEST_PIECE else 0)
            if end:
                yield [*before, last[:end]], False
                held, size = [last[end:]], len(last) - end
        held.append(chunk)
        size += len(chunk)
    yield held, True


def read_documents(
    source: Source, raw: BinaryIO, reading: Reading, notes: Notes
) -> Iterator[Iterable[str]]:
    """Yield the documents of an open file in chunks. Of records, up to 1% may be broken."""
    format, stream = open_stream(source, raw, reading)
    if format == "text" and reading.in_chats:
        wrong = "is text, and other files hold conversations: prepare them apart"
        raise UserError(f"{source.name} {wrong}")
    if format == "text":
        yield iter(lambda: stream.read(CHUNK), "")
        return
    number, broken, without, first = 0, 0, 0, ""
    for number, record in enumerate(records_of(format, stream, reading), 1):
        try:
            text = text_of(record, reading)
        except ValueError as error:
            first = first or f"record {number:,}: {error}"
            broken += 1
            without += isinstance(error, NotText)
            if broken > max(10, number // 100):
                break
            continue
        yield [text[start : start + CHUNK] for start in range(0, len(text), CHUNK)]
    if broken * 100 > number:
        kind = NotText if without == number else UserError
        share = f"{broken:,} of {number:,} records are broken, over 1%"
        raise kind(f"{source.name}: {share}; {first}")
    if broken:
        notes.add("broken records skipped", f"{source.name}, {first}", broken)


def open_stream(source: Source, raw: BinaryIO, reading: Reading) -> tuple[str, IO[Any]]:
    """Return an open file's format and stream: of characters, HTML's text, or Parquet's bytes."""
    stream, suffix = decompressed(raw, source.path)
    by_name = reading.format in ("auto", "chat")
    format = FORMATS.get(suffix, "text") if by_name else reading.format
    if format == "parquet":
        return format, stream
    head = stream.peek(HEAD)[:HEAD]
    marked = (encoding for mark, encoding in MARKS.items() if head.startswith(mark))
    encoding = next(marked, reading.encoding or "utf-8")
    beginning = head.decode(encoding, errors="ignore")
    refuse_binary(head, beginning, source.name)
    may_be_lines = format == "json" or (format == "text" and by_name)
    if may_be_lines and is_json_lines(beginning):
        format = "jsonl"
    text = io.TextIOWrapper(stream, encoding, "replace", newline="")
    if format == "html":
        from resiliparse.extract.html2text import extract_plain_text

        content = extract_plain_text(text.read())
        text.detach()  # which otherwise closes the file
        return "text", io.StringIO(content)
    return format, text


def decompressed(raw: BinaryIO, path: Path) -> tuple[BinaryIO, str]:
    """Return the stream of what a file holds, and the suffix that says its format."""
    *_, suffix, last = ["", "", *(suffix.lower() for suffix in path.suffixes)]
    if last == ".zst":
        import pyarrow  # fsspec's zstandard takes a file that was cut short for a whole one

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")), suffix
    if last in COMPRESSIONS:
        return io.BufferedReader(compr[COMPRESSIONS[last]](raw, mode="rb")), suffix
    return raw, last


def refuse_binary(head: bytes, beginning: str, name: str) -> None:
    """Raise NotText for a file that begins with what is no text."""
    is_known = head.startswith((b"%PDF-", b"PK\3\4")) or head[257:262] == b"ustar"
    if is_known or sum(map(beginning.count, CONTROL)) > max(2, len(beginning) // 20):
        raise NotText(
            f"{name} is no text but binary data: unpack an archive, make text of a PDF (pdftotext) "
            "or a document (pandoc); UTF-16 without a mark takes --encoding=utf-16-le, Parquet "
            "--format=parquet, and a compressed file needs its suffix"
        )


def is_json_lines(beginning: str) -> bool:
    """Tell whether a file begins with a line that is a JSON object, or goes on as one."""
    line, ends, _ = beginning.lstrip().partition("\n")
    with suppress(ValueError, RecursionError):
        return isinstance(json.loads(line), dict)
    return not ends and bool(re.match(r'\{\s*"[^"]*"\s*:', line))


def records_of(format: str, stream: IO[Any], reading: Reading) -> Iterable[Any]:
    """Return the records of a stream; one that cannot be parsed is the error that says why."""
    if format == "parquet":
        return read_parquet(stream, reading)
    if format == "jsonl":
        return read_json_lines(stream)
    if format == "json":
        return read_json_file(stream.read())
    csv.field_size_limit(2**31 - 1)
    if format == "csv":
        return csv.DictReader(stream, restval=(), strict=True)
    # Tab-separated fields have no quotes.
    return csv.DictReader(stream, restval=(), delimiter="\t", quoting=csv.QUOTE_NONE)


def read_json_file(text: str) -> list[Any]:
    """Return the records of a list, or the one that an object is."""
    try:
        content = json.loads(text)
    except ValueError as error:
        if text.lstrip().startswith("["):  # the list was cut short
            raise
        return [NotText(f"no JSON: {error}")]
    return content if isinstance(content, list) else [content]


def read_json_lines(lines: Iterable[str]) -> Iterator[Any]:
    """Yield the record of each line that is not blank, or what is wrong with it."""
    for line in lines:
        try:
            if not line.isspace():
                yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield ValueError(str(error))


def read_parquet(raw: BinaryIO, reading: Reading) -> Iterator[dict[str, Any]]:
    """Yield the rows, of the columns alone that are asked for if these are there."""
    from pyarrow import parquet

    # Without these settings a whole row group is held in memory.
    table = parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
    names = table.schema_arrow.names
    is_text = reading.text_key in names and not reading.in_chats
    wanted = (reading.text_key,) if is_text else CONVERSATION_KEYS
    columns = [name for name in names if name in wanted] or names
    for batch in table.iter_batches(batch_size=256, columns=columns):
        yield from batch.to_pylist()


def text_of(record: Any, reading: Reading) -> str:
    """Return the text of a record; ValueError if it is broken, NotText if it just has none."""
    if isinstance(record, Exception):
        raise record
    if isinstance(record, dict) and None in record:  # csv keeps there what is left of a row
        raise ValueError("it has more columns than the first row")
    if reading.in_chats:
        record = conversation_text(record)
        if len(record) > LONGEST_PIECE:  # it is not cut into pieces
            raise ValueError(f"it is longer than {LONGEST_PIECE:,} characters")
    if isinstance(record, dict):
        if reading.text_key not in record:
            known = list(record)[:20]
            raise NotText(f"no key {reading.text_key!r}; --text_key is one of {known}")
        record = "" if record[reading.text_key] is None else record[reading.text_key]
    if isinstance(record, bytes):  # some programs write columns of Parquet so
        return record.decode(errors="replace")
    if not isinstance(record, str):
        found = f"no text but {repr(record)[:60]} under {reading.text_key!r}"
        raise NotText(f"{found}; --text_key names another key")
    return record
