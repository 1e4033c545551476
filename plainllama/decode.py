"""Bytes to text: compression, encodings, what is not text, and the text of a page of HTML.

decompressed(suffix, raw)   the stream of what a file holds
decoded(stream, encoding)   the same in UTF-8, from what a byte-order mark or the user says
not_text(head)              what a file is that begins like this, if it is no text
Check(name, notes)          makes text valid UTF-8 where little of it is not
html_text(page)             what a page shows
"""

import bz2
import codecs
import gzip
import importlib
import io
import lzma
import re
import zlib
from html.parser import HTMLParser
from typing import Any, BinaryIO

from plainllama.settings import UserError

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
