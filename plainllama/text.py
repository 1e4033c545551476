"""Text from files, folders, globs, standard input and the hub, as documents in blocks of UTF-8.

    find_sources(inputs, notes)           what the names on the command line stand for
    local_files(sources, folder, ...)     the same as files, which can be read twice
    read_file(source, reading, notes)     the documents of a file, in constant memory

A text file is one document (Markdown and source code too); so is each record of a .jsonl or
.ndjson, .json, .csv, .tsv or .parquet. HTML is reduced to its text. All but .parquet may be
compressed (.gz, .bz2, .xz, .zst), and in another encoding than UTF-8: the one that a byte-order
mark or `encoding` says. What is not text is refused; in a folder it is skipped and counted.
"""

import bz2
import codecs
import csv
import glob
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, BinaryIO, Literal

from tqdm import tqdm

from plainllama.settings import UserError
from plainllama.tokenizer import LAST_SAFE_CUT

BLOCK = 1 << 16  # bytes; a longer document is read and encoded in several blocks
DAMAGED = (EOFError, OSError, zlib.error, lzma.LZMAError)  # what reading such a file raises
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MARKS = {  # the longer ones first
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
PANDOC = "`pandoc FILE -t plain -o FILE.txt` makes text of it"
PRINTED = {  # what is written in ASCII but made for a printer or a word processor
    b"%PDF": "a PDF; `pdftotext FILE` makes text of it",
    b"{\\rtf": f"an RTF document; {PANDOC}",
    b"%!PS": "PostScript; `ps2ascii FILE FILE.txt` makes text of it",
}
BINARY = {  # the first bytes of files that are mostly not text
    b"PK": f"a ZIP archive, as .docx, .odt and .epub are; {PANDOC}, or `unzip` it",
    b"\xd0\xcf\x11\xe0": "an old Office document; `libreoffice --convert-to txt FILE` reads it",
    b"PAR1": "a Parquet file; end its name in .parquet, or add --format=parquet",
    b"\x1f\x8b": "compressed; end its name in .gz, or pipe it through `gzip -dc`",
    b"BZh": "compressed; end its name in .bz2, or pipe it through `bzip2 -dc`",
    b"\xfd7zXZ": "compressed; end its name in .xz, or pipe it through `xz -dc`",
    b"\x28\xb5\x2f\xfd": "compressed; end its name in .zst, or pipe it through `zstd -dc`",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"GIF8": "a GIF picture",
    b"BM": "a BMP picture",
    b"II*\0": "a TIFF picture",
    b"MM\0*": "a TIFF picture",
    b"RIFF": "a RIFF file of sound or pictures",
    b"OggS": "an Ogg file of sound",
    b"fLaC": "a FLAC file of sound",
    b"ID3": "an MP3 file of sound",
    b"\x7fELF": "an ELF program",
    b"MZ": "a Windows program",
    b"\xca\xfe\xba\xbe": "a compiled program",
    b"\xcf\xfa\xed\xfe": "a compiled program",
    b"\0asm": "a WebAssembly program",
    b"SQLite format 3": "an SQLite database; `sqlite3 -csv` writes its tables as .csv",
    b"ARROW1": "an Arrow file; save it as .parquet",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"GGUF": "a GGUF model",
}
# Bytes that text has none of, or few: control characters, but not \b \t \n \v \f \r and escape.
CONTROL = bytes({*range(32)} - {*range(8, 14), 27})
HTML_START = re.compile(rb"(?is)\s*(<\?xml.*?>\s*|<!--.*?-->\s*)*<(!doctype )?html\b")
MARK = "\ufffd".encode()  # stands for what cannot be decoded
HTML_HIDDEN = {"script", "style", "template", "noscript"}
HTML_BLOCKS = re.compile(
    "address|article|aside|blockquote|body|br|caption|center|d[dlt]|details|div|fieldset|fig.*"
    "|footer|form|h[1-6r]|head|header|html|legend|li|main|nav|ol|option|p|pre|section|summary"
    "|table|tbody|tfoot|thead|title|tr|ul"
)


def required(name: str) -> Any:
    """Import a module that not everybody needs; a UserError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0]
        raise UserError(f"{package} is needed to read this: pip install {package}") from error


def decompressed(suffix: str, raw: BinaryIO) -> BinaryIO:
    """Return the stream of what a file with this suffix holds."""
    suffix = suffix.lower()
    if suffix not in COMPRESSED:
        return raw
    if suffix == ".zst":
        pyarrow = required("pyarrow")
        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
    opener = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}[suffix]
    return io.BufferedReader(opener(raw))


def decoded(stream: BinaryIO, encoding: str) -> tuple[BinaryIO, str]:
    """Return the stream in UTF-8, without a mark, and the encoding that it was in."""
    head = stream.peek(4)
    for mark, marked in MARKS.items():
        if head.startswith(mark):
            stream.read(len(mark))
            encoding = marked
            break
    encoding = codecs.lookup(encoding or "utf-8").name
    if encoding in ("utf-16", "utf-32"):  # without a mark, which these ask for
        encoding += "-le"
    if encoding == "utf-8":
        return stream, encoding
    return io.BufferedReader(Recoded(stream, encoding), BLOCK), encoding


def check_encoding(encoding: str) -> None:
    """Refuse what is no encoding of text, or cannot be read piece by piece."""
    try:
        text = "text".encode(encoding)
        codecs.getincrementaldecoder(encoding)(errors="replace").decode(text)
    except (LookupError, UnicodeError) as error:
        raise UserError(f"encoding={encoding!r}: {error}; cp1252, for example") from None


class Recoded(io.RawIOBase):
    """A stream of text in another encoding, as UTF-8."""

    def __init__(self, stream: BinaryIO, encoding: str) -> None:
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder(encoding)(errors="replace")
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b"more"
        while data and not self.ready:
            data = self.stream.read(len(buffer))
            self.ready = self.decoder.decode(data, not data).encode(errors="replace")
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size


def not_text(head: bytes) -> str:
    """Say what a file is that begins like this, and the way out; nothing if it is text."""
    for start, what in PRINTED.items():
        if head.startswith(start):
            return what
    control = len(head) - len(head.translate(None, CONTROL))
    if control > 2:
        for start, what in BINARY.items():
            if head.startswith(start):
                return what
    if control <= max(2, len(head) // 20):
        return ""
    if head.count(0) * 3 > len(head) and head.count(0) * 3 < 2 * len(head):
        return "UTF-16 without a byte-order mark, or no text; try --encoding=utf-16-le"
    return "no text but binary data"


class Check:
    """Makes text valid UTF-8, and counts what that replaces; a file has at most 1% of it."""

    def __init__(self, name: str, notes: Any) -> None:
        self.name, self.notes = name, notes
        self.characters = self.replaced = 0
        self.encoding = "utf-8"  # of the file; from another one it was decoded already

    def __call__(self, text: bytes, place: str) -> bytes:
        if b"\0" in text:
            self.notes.add("NUL bytes kept", place, text.count(0))
        replaced = text.count(MARK) if self.encoding != "utf-8" else 0
        try:
            characters = len(text.decode())
        except UnicodeDecodeError:
            decoded = text.decode(errors="replace")
            characters, marks = len(decoded), text.count(MARK)
            text = decoded.encode()
            replaced = text.count(MARK) - marks
        if replaced:
            self.notes.add("pieces of invalid UTF-8 replaced", place, replaced)
        self.characters += characters
        self.replaced += replaced
        return text

    def finish(self) -> None:
        if self.replaced * 100 > self.characters:
            raise UserError(
                f"{self.name} is not {self.encoding.upper()}: {self.replaced:,} of "
                f"{self.characters:,} characters are invalid, over 1%; say what it is, with "
                "--encoding=cp1252 for example"
            )


class PageText(HTMLParser):
    """The text of a page, as it is shown: elements that are blocks begin and end a line."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts = ["\n"]
        self.hidden = self.preformatted = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in HTML_HIDDEN
        self.preformatted += tag == "pre"
        if HTML_BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        if HTML_BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = max(0, self.hidden - (tag in HTML_HIDDEN))
        self.preformatted = max(0, self.preformatted - (tag == "pre"))
        if HTML_BLOCKS.fullmatch(tag):
            self.parts.append("\n")
        elif tag in ("td", "th"):
            self.parts.append("\t")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.preformatted:
            data = re.sub(r"[ \t\r\n\f]+", " ", data)
            if self.parts[-1][-1] in " \t\n":
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)


def html_text(page: bytes, name: str) -> bytes:
    """Return what a page shows as text."""
    parser = PageText()
    try:
        parser.feed(page.decode(errors="surrogateescape"))
        parser.close()
    except AssertionError as error:  # so the parser reports a declaration that it does not know
        raise UserError(
            f"{name} is damaged HTML ({error}); --format=text reads it as it is"
        ) from error
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts))
    return (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode(errors="surrogateescape")


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
