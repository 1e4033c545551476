"""Text from files, folders, globs, standard input and the hub, as documents in blocks of UTF-8.

    find_sources(inputs, notes)           what the names on the command line stand for
    local_files(sources, folder, ...)     the same as files, which can be read twice
    read_file(source, reading, notes)     the documents of a file, in constant memory

A text file is one document (Markdown and source code too); so is each record of a .jsonl or
.ndjson, .json, .csv, .tsv or .parquet. HTML is reduced to its text. All but .parquet may be
compressed (.gz, .bz2, .xz, .zst), and in another encoding than UTF-8: the one that a byte-order
mark or `encoding` says. What is not text is refused; in a folder it is skipped and counted.
"""

import csv
import glob
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tqdm import tqdm

from plainllama.decode import (
    BLOCK,
    COMPRESSED,
    DAMAGED,
    HTML_START,
    Check,
    decoded,
    decompressed,
    html_text,
    not_text,
    required,
)
from plainllama.settings import UserError
from plainllama.tokenizer_json import LAST_SAFE_CUT

HEAD = 1 << 13  # bytes at the beginning of a file that show what it is
FORMATS = {  # by the ending of a file's name, in any case; all others are text
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".html": "html",
    ".htm": "html",
    ".xhtml": "html",
}
Format = Literal["auto", "text", "jsonl", "json", "csv", "tsv", "parquet", "html"]
Block = tuple[bytes, bool]  # UTF-8 text, and whether its document ends with it
Placed = tuple[str, bytes, bool]  # the same with its place in the input, perhaps not yet UTF-8
Record = tuple[str, bytes, str]  # the place, the text, and what is wrong with it if something is


@dataclass(frozen=True)
class Reading:
    """How files are read."""

    text_key: str = "text"
    format: Format = "auto"
    encoding: str = ""


@dataclass(frozen=True)
class Source:
    """A file, or what will be one: standard input, or a dataset of the hub."""

    name: str
    path: Path | None = None
    in_folder: bool = False  # it was found, not named: it may turn out to be no text


class Notes:
    """What was odd in the input: how often, and where first."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.skipped: Counter[str] = Counter()

    def add(self, kind: str, place: object, count: int = 1) -> None:
        self.counts[kind] += count
        self.first.setdefault(kind, str(place))

    def skip(self, kind: str, place: object) -> None:
        """Count something in a folder that is not read."""
        self.skipped[kind] += 1
        self.first.setdefault("skipped", str(place))

    def include(self, others: "Notes") -> None:
        self.counts += others.counts
        self.first = others.first | self.first

    def __iter__(self) -> Iterator[str]:
        """Yield a line for each kind."""
        for kind, count in self.counts.items():
            yield f"{count:,} {kind}; the first: {self.first[kind]}"
        if self.skipped:
            kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.skipped.most_common())
            yield f"skipped {self.skipped.total():,}: {kinds}; the first: {self.first['skipped']}"


def find_sources(inputs: Iterable[str], notes: Notes) -> list[Source]:
    """Expand folders and globs into files, in one order everywhere."""
    sources: dict[str, Source] = {}
    for name in inputs:
        if name == "-" or name.startswith("hf://"):
            found = [Source(name)]
        elif os.path.exists(name):
            found = expand(Path(name), notes)
        else:
            matches = sorted(map(Path, glob.glob(name, recursive=True)))
            found = [s for path in matches if path.exists() for s in expand(path, notes)]
        if not found:
            broken = " (it is a link that leads nowhere)" if os.path.islink(name) else ""
            folder = os.path.isdir(name)
            raise UserError(f"no text files in {name}" if folder else f"no file {name}{broken}")
        for source in found:
            sources.setdefault(source.name, source)
    return list(sources.values())


def expand(path: Path, notes: Notes) -> list[Source]:
    """Return a file, or the files of a folder that may be text; hidden ones are left out."""
    if path.is_file():
        return [Source(str(path), path)]
    if not path.is_dir():
        raise UserError(f"{path} is no regular file; pipe it in: ... | python prepare.py -")
    files = []
    unreadable = lambda error: notes.skip("unreadable folders", error.filename)  # noqa: E731
    for parent, folders, names in os.walk(path, onerror=unreadable):
        for folder in folders:
            if os.path.islink(os.path.join(parent, folder)) and not folder.startswith("."):
                notes.skip("linked folders", os.path.join(parent, folder))
        folders[:] = [folder for folder in folders if not folder.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    found = []
    for file in sorted(files, key=lambda file: file.relative_to(path)):
        if not file.is_file():
            notes.skip("broken links" if file.is_symlink() else "special files", file)
        elif what_it_is(file):
            notes.skip(file.suffix.lower() or "without a suffix", file)
        else:
            found.append(Source(str(file), file, in_folder=True))
    return found


def what_it_is(path: Path) -> str:
    """Say what a file is that holds no text; nothing if it may, or when that shows on reading."""
    if FORMATS.get(path.suffix.lower()) == "parquet":
        return ""
    try:
        with open(path, "rb") as raw:
            stream, _ = decoded(decompressed(path.suffix, raw), "")
            return not_text(stream.peek(HEAD)[:HEAD])
    except (*DAMAGED, UserError):
        return ""


def local_files(sources: Iterable[Source], folder: Path, reading: Reading) -> list[Source]:
    """Return sources that can be read twice: stdin and downloads are first copied to `folder`."""
    files = []
    for source in sources:
        path = source.path or folder / f"{len(files)}.txt"
        if source.name == "-":
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            source = Source("standard input", path)
        elif source.path is None:
            path = path.with_suffix(".jsonl")
            download(source.name, path, reading.text_key)
            source = Source(source.name, path)
        files.append(source)
    return files


def download(name: str, path: Path, text_key: str) -> None:
    """Copy the texts of hf://owner/name to a .jsonl file."""
    if not re.fullmatch(r"hf://[\w.-]+(/[\w.-]+)?", name):
        raise UserError(f"{name!r} is no dataset of the hub; its name is hf://owner/name")
    datasets = required("datasets")
    try:
        rows = datasets.load_dataset(name.removeprefix("hf://"), split="train", streaming=True)
    except ValueError as error:  # no such split, or one of several parts is to be chosen
        raise UserError(f"{name}: {error}") from error
    with open(path, "w", encoding="utf-8") as file:
        for row in tqdm(rows, desc=name, unit=" rows", disable=None, leave=False):
            if text_key not in row:
                raise UserError(f"{name} has no {text_key!r}; --text_key is one of {list(row)}")
            text, problem = text_of(row, text_key)
            if problem:
                raise UserError(f"{name} has {problem}")
            file.write(json.dumps({text_key: text.decode(errors="surrogateescape")}) + "\n")


def progress(files: list[Source], label: str) -> tqdm:
    """Return a progress bar over the bytes of all files."""
    size = sum(source.path.stat().st_size for source in files)
    return tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None, leave=False)


def read_file(source: Source, reading: Reading, notes: Notes, bar: tqdm) -> Iterator[Block]:
    """Yield the blocks of the documents of a file; a UserError names the file that is damaged."""
    start, size = bar.n, 0
    try:
        with open(source.path, "rb") as raw:
            size = os.fstat(raw.fileno()).st_size
            check = Check(source.name, notes)
            for place, text, ends in read_documents(source, raw, reading, check):
                yield check(text, place), ends
                bar.update(start + raw.tell() - bar.n)
    except PermissionError as error:
        raise UserError(f"{source.name} may not be read: {error.strerror}") from error
    except DAMAGED as error:
        raise UserError(f"{source.name} is damaged or cut short: {error}") from error
    check.finish()
    bar.update(start + size - bar.n)


def read_documents(
    source: Source, raw: BinaryIO, reading: Reading, check: Check
) -> Iterator[Placed]:
    """Yield the blocks of the documents of an open file, as they are."""
    *_, inner, outer = ["", "", *(suffix.lower() for suffix in source.path.suffixes)]
    stream = decompressed(outer, raw)
    suffix = inner if outer in COMPRESSED else outer
    format = FORMATS.get(suffix, "text") if reading.format == "auto" else reading.format
    name, key = source.name, reading.text_key
    if format == "parquet":
        yield from in_blocks(read_parquet(stream, key, name), check.notes)
        return
    stream, check.encoding = decoded(stream, reading.encoding)
    head = stream.peek(HEAD)[:HEAD]
    if what := not_text(head):
        raise UserError(f"{name} is {what}")
    if reading.format == "auto":
        format = sniff(format, head, source, key)
    if format == "text":
        yield from split_blocks(stream, check.notes, name)
        return
    if format == "html":
        documents = iter([(name, html_text(stream.read(), name))])
    elif format == "jsonl":
        documents = skip_broken(read_json_lines(stream, key), name, "lines", check.notes)
    elif format == "json":
        documents = skip_broken(read_json_array(stream, key, name), name, "records", check.notes)
    else:
        rows = read_table(stream, key, name, "," if format == "csv" else "\t")
        documents = skip_broken(rows, name, "rows", check.notes)
    yield from in_blocks(documents, check.notes)


def sniff(format: str, head: bytes, source: Source, key: str) -> str:
    """Return the format of a file of which the suffix does not say enough."""
    start, first_line = head.lstrip(), head.lstrip().split(b"\n")[0]
    if format == "text" and HTML_START.match(start):
        return "html"
    if format == "json" and start.startswith(b"["):
        return "json"
    try:
        record = json.loads(first_line) if start.startswith(b"{") else None
    except (ValueError, RecursionError):  # a longer line, or no JSON
        record = None
    if format == "json" and record is not None:
        return "jsonl"
    if format == "json" and source.in_folder:
        return "text"
    if format == "json":
        raise UserError(f"{source.name} holds no list of records; --format=text reads it as it is")
    if format == "text" and record is not None and key in record and not source.in_folder:
        raise UserError(
            f"{source.name} looks like JSON lines; add --format=jsonl, or --format=text to read it "
            "as it is"
        )
    return format


def in_blocks(documents: Iterable[tuple[str, bytes]], notes: Notes) -> Iterator[Placed]:
    """Yield documents as blocks."""
    for place, text in documents:
        if len(text) <= BLOCK:
            yield place, text, True
        else:
            yield from split_blocks(io.BytesIO(text), notes, place)


def split_blocks(stream: BinaryIO, notes: Notes, place: str) -> Iterator[Placed]:
    """Read one document; blocks end where every pattern splits, so that this changes no id."""
    text, following = stream.read(BLOCK), stream.read(BLOCK)
    position = 0
    while following:
        text += following
        match = LAST_SAFE_CUT.match(text)
        if match:
            cut = match.end()
        else:  # before the last whole character, if there is any
            cut = len(text[:-3].rstrip(bytes(range(0x80, 0xC0)))) - 1
            cut = cut if cut > 0 else len(text)
            notes.add("blocks cut inside a word", f"{place}, byte {position + cut:,}")
        yield f"{place}, byte {position:,}", text[:cut], False
        text, following, position = text[cut:], stream.read(BLOCK), position + cut
    yield f"{place}, byte {position:,}", text, True


def skip_broken(
    records: Iterable[Record], name: str, kind: str, notes: Notes
) -> Iterator[tuple[str, bytes]]:
    """Yield the records that are texts; more than 1% of broken ones are refused."""
    number, broken, first, ended = 0, 0, "", " so far"
    for place, text, problem in records:
        number += 1
        if not problem:
            yield f"{name}, {place}", text
            continue
        notes.add(f"broken {kind} skipped", f"{name}, {place}")
        first = first or f"{place}: {problem}"
        broken += 1
        if broken > max(10, number // 100):
            break
    else:
        ended = ""
    if broken * 100 > number:
        share = f"{broken:,} of {number:,} {kind}{ended} are broken, over 1%"
        raise UserError(f"{name}: {share}; {first}; --text_key names another key")


def read_json_lines(lines: Iterable[bytes], key: str) -> Iterator[Record]:
    """Yield the text of each line that is not blank."""
    for number, line in enumerate(lines, 1):
        if line.isspace():
            continue
        text, problem = b"", ""
        try:
            text, problem = text_of(
                json.loads(line.decode(errors="surrogateescape").removeprefix("\ufeff")), key
            )
        except (ValueError, RecursionError) as error:
            problem = f"no JSON ({error})"
        yield f"line {number:,}", text, problem


def read_json_array(stream: BinaryIO, key: str, name: str) -> Iterator[Record]:
    """Yield the text of each element; the whole array is held in memory."""
    try:
        records = json.loads(stream.read().decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is damaged: no JSON ({error})") from error
    if not isinstance(records, list):
        raise UserError(f"{name} holds no list of records; --format=text reads it as it is")
    for number, record in enumerate(records, 1):
        yield f"record {number:,}", *text_of(record, key)


def text_of(record: Any, key: str) -> tuple[bytes, str]:
    """Return the text of a record, and what is wrong with it if it has none."""
    if isinstance(record, dict):
        if key not in record:
            return b"", f"no key {key!r}; --text_key is one of {list(record)[:20]}"
        record = "" if record[key] is None else record[key]
    if not isinstance(record, str):
        return b"", f"no text under {key!r} but {repr(record)[:60]}"
    try:
        return record.encode(errors="surrogateescape"), ""
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write
        return record.encode(errors="surrogatepass"), ""


def read_table(stream: BinaryIO, key: str, name: str, delimiter: str) -> Iterator[Record]:
    """Yield the text of each row of one column."""
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(stream, encoding="utf-8", errors="surrogateescape", newline="")
    rows = csv.reader(text, delimiter=delimiter, strict=True)
    try:
        columns = next(rows, [])
        if key not in columns:
            raise UserError(f"{name} has no column {key!r}; --text_key is one of {columns}")
        for number, row in enumerate(filter(None, rows), 1):
            if len(row) == len(columns):
                yield f"row {number:,}", *text_of(row[columns.index(key)], key)
            else:
                yield f"row {number:,}", b"", f"{len(row)} columns instead of {len(columns)}"
    except csv.Error as error:
        raise UserError(f"{name} is damaged: line {rows.line_num:,}: {error}") from error


def read_parquet(raw: BinaryIO, key: str, name: str) -> Iterator[tuple[str, bytes]]:
    """Yield the place and text of each row of one column."""
    pyarrow, parquet = required("pyarrow"), required("pyarrow.parquet")
    try:
        # Otherwise a whole row group is held in memory.
        table = parquet.ParquetFile(raw, buffer_size=1 << 20, pre_buffer=False)
        names = table.schema_arrow.names
        if key not in names:
            raise UserError(f"{name} has no column {key!r}; --text_key is one of {names}")
        batches = table.iter_batches(batch_size=256, columns=[key])
        columns = (batch.column(0).cast(pyarrow.large_binary()).to_pylist() for batch in batches)
        for number, text in enumerate(itertools.chain.from_iterable(columns), 1):
            yield f"{name}, row {number:,}", text or b""
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{name} is damaged, or has no text under {key!r}: {error}") from error
