"""Reading text: every format and encoding, URLs, damaged files, and what is no text."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import re
import sys
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import pyarrow
import pytest
import regex
import tiktoken_ext.openai_public as openai
from fsspec.implementations.memory import MemoryFileSystem
from helpers import run_stage
from hypothesis import given
from hypothesis import strategies as st
from prepared import (
    LINE,
    ODD,
    all_documents,
    all_text,
    documents,
    quick,
    run_script,
    texts,
    write,
    write_jsonl,
)
from pyarrow import parquet
from tqdm import tqdm

import prepare
from plainllama import text as text_module
from plainllama.data import load_dataset
from plainllama.terminal import UserError
from plainllama.text import Notes, Reading, Source, find_sources, read_file


def pieces_of(path: str, **reading) -> list[tuple[bytes, bool]]:
    """Read a file as prepare.py does."""
    source, bar = Source(path, Path(path)), tqdm(disable=True)
    return list(read_file(source, Reading(**reading), Notes(), bar))


def test_shakespeare_is_plain_text_of_38_plays(shakespeare):
    plays = documents(shakespeare, "train") + documents(shakespeare, "val")
    text = "".join(plays)
    assert len(plays) == 38
    assert 4_990_000 < len(text) < 5_010_000
    assert text.isascii()
    assert not any(mark in text for mark in "*_#\\\t")
    assert " \n" not in text and "\n\n\n" not in text
    assert "\nHAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert "\n[Exeunt]\n" in text and "\nSCENE I. Elsinore. A platform before the castle.\n" in text
    assert text.count("[") == text.count("]")


# Long documents


@pytest.fixture(scope="module")
def patterns() -> list[str]:
    """How GPT-2, GPT-4, GPT-4o and Qwen split text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai, "load_tiktoken_bpe", lambda *_, **__: {})
        encodings = [openai.r50k_base(), openai.cl100k_base(), openai.o200k_base()]
    found = [encoding["pat_str"] for encoding in encodings]
    return [*found, found[1].replace(r"\p{N}{1,3}", r"\p{N}")]


@quick(max_examples=300)
@given(texts | st.text(st.sampled_from(ODD + "\n\n\n/=")), st.integers(1, 40), st.integers(4, 40))
def test_a_long_document_is_cut_where_every_pattern_splits_it(
    tmp_path, monkeypatch, patterns, text, size, chunk
):
    monkeypatch.setattr(text_module, "PIECE", size)
    monkeypatch.setattr(text_module, "CHUNK", chunk)
    text = "x" * text_module.HEAD + text  # what the text begins with does not look binary
    pieces = pieces_of(write(str(tmp_path / "a"), text), format="text")
    assert b"".join(piece for piece, _ in pieces).decode() == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    for pattern in patterns:
        apart = [word for piece, _ in pieces for word in regex.findall(pattern, piece.decode())]
        assert apart == regex.findall(pattern, text)


@pytest.mark.parametrize("text", ["\u65e5", "e\u0301", "word ", "\n", "\n\u3000", "\U0001f469"])
def test_text_without_a_place_to_cut_is_cut_between_characters(tmp_path, monkeypatch, text):
    monkeypatch.setattr(text_module, "PIECE", 1000)
    monkeypatch.setattr(text_module, "CHUNK", 100)
    monkeypatch.setattr(text_module, "LONGEST_PIECE", 3000)
    pieces = pieces_of(write(str(tmp_path / "a.txt"), text * 5000))
    assert b"".join(piece for piece, _ in pieces).decode() == text * 5000
    assert len(pieces) > 1 and max(len(piece.decode()) for piece, _ in pieces) <= 3100
    assert all(piece.decode() for piece, _ in pieces)


def test_pieces_of_a_long_document_are_about_1_mb_whatever_holds_it(tmp_path):
    lines = "".join(f"{number} {LINE}" for number in range(100_000))
    for name, content in (
        ("a.txt", lines),
        ("a.jsonl", json.dumps({"text": lines})),
        ("a.csv", f'text\n"{lines}"'),
        ("b.txt", lines.encode("utf-16")),
    ):
        pieces = pieces_of(write(str(tmp_path / name), content))
        assert len(pieces) == 5 and b"".join(piece for piece, _ in pieces).decode() == lines


def test_a_long_file_is_read_in_constant_memory(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(LINE * 1_000_000)
    source, bar = Source("a", path), tqdm(disable=True)
    tracemalloc.start()
    try:
        size = sum(len(piece) for piece, _ in read_file(source, Reading(), Notes(), bar))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == path.stat().st_size == 43_000_000
    assert peak < 5_000_000


@quick(max_examples=300)
@given(st.sampled_from(["txt", "jsonl", "json", "csv", "tsv"]), st.binary(max_size=200), st.data())
def test_any_bytes_are_read_as_valid_text_or_refused_in_one_line(tmp_path, suffix, data, draw):
    whole = in_format(suffix)
    place = draw.draw(st.integers(0, len(whole)))
    path = write(str(tmp_path / f"a.{suffix}"), whole[:place] + data + whole[place + len(data) :])
    try:
        for piece, _ in pieces_of(path):
            piece.decode()
    except UserError as error:
        assert path in str(error) and len(str(error)) < 600


# Formats


RECORDS = [
    f'record {number}: caf\u00e9 \u65e5\u672c, "quoted", two\nlines\n' for number in range(9)
]
IN_ONE_LINE = [text.replace("\n", " ") for text in RECORDS]


def as_parquet() -> bytes:
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"n": range(9), "text": RECORDS}), file)
    return file.getvalue()


def in_format(name: str) -> bytes:
    """Write RECORDS as Python's own modules and pyarrow do."""
    if name in ("jsonl", "ndjson"):
        return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in RECORDS)
    if name == "json":
        return json.dumps([{"text": text} for text in RECORDS], indent=1).encode()
    if name == "parquet":
        return as_parquet()
    if name == "tsv":
        return "".join(["n\ttext\n", *(f"1\t{text}\n" for text in IN_ONE_LINE)]).encode()
    if name == "txt":
        return "".join(RECORDS).encode()
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["n", "text"], *enumerate(RECORDS)])
    return file.getvalue().encode()


def expected(name: str) -> str:
    return "".join(IN_ONE_LINE if name == "tsv" else RECORDS)


FORMATS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_by_its_suffix_in_any_case_and_named_for_standard_input(
    run, monkeypatch, name
):
    for path in (f"a.{name}", f"b.v2.{name.upper()}"):
        dataset = run(write(path, in_format(name)), "--tokenizer=byte", "--overwrite")
        assert all_text(dataset) == expected(name)
        assert sum(dataset.documents.values()) == len(RECORDS) + 1  # one is cut in two
    format = name.replace("ndjson", "jsonl")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(in_format(name))))
    piped = run("-", "--tokenizer=byte", f"--format={format}", "--overwrite")
    assert all_text(piped) == expected(name)


@pytest.mark.parametrize("pack", [("gz", gzip), ("bz2", bz2), ("xz", lzma), ("zst", None)])
@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "txt"])
def test_compressed_files_are_read(run, name, pack):
    suffix, module = pack
    if suffix == "zst":
        data = pyarrow.compress(in_format(name), "zstd", asbytes=True) * 2
    else:
        data = module.compress(in_format(name)) * 2  # what is concatenated is read to its end
    path = write(f"a.{name}.{suffix.upper()}", data)
    if name in ("json", "csv"):
        write(path, data[: len(data) // 2])
    once = expected(name)
    twice = once * 2 if name == "txt" else once  # repeated documents are dropped
    assert all_text(run(path, "--tokenizer=byte")) == twice


def test_every_format_folder_and_glob_in_one_call(run):
    texts = [f"document {number}: {LINE * 5}" for number in range(9)]
    write("one.txt", texts[0])
    write("folder/a.md", texts[1])
    write("folder/b/two.py", texts[2])
    write("folder/.git/config", "hidden")
    write("folder/picture.png", b"\x89PNG\0\0\0")
    write("x1.txt.gz", gzip.compress(texts[3].encode()))
    write_jsonl("x2.jsonl", texts[4:6])
    write_jsonl("y.jsonl", texts[6:8])
    write("x3.jsonl.gz", gzip.compress(Path("y.jsonl").read_bytes()))
    write("x4/deep/a.txt", texts[8])
    dataset = run("one.txt", "folder", "x*", "one.txt", "--val_fraction=0.01")
    assert all_text(dataset) == "".join(texts)
    assert dataset.documents["train"] == len(texts)


def test_standard_input_is_one_document(tmp_path):
    text = (LINE + "\u00e9\r\n").encode() * 9
    result = run_script("-", "--out=out", "--tokenizer=byte", cwd=tmp_path, stdin=text)
    assert result.returncode == 0, result.stderr.decode()
    assert all_text(load_dataset(tmp_path / "out")).encode() == text


def test_json_lines_are_known_without_a_name_for_it(run):
    for name in ("records.txt", "parts/part-00000", "parts/part-00001.gz"):
        data = in_format("jsonl")
        write(name, gzip.compress(data) if name.endswith(".gz") else data)
    for name, expected in (("records.txt", RECORDS), ("parts", RECORDS)):
        dataset = run(name, "--tokenizer=byte", "--overwrite")
        assert all_text(dataset) == "".join(expected)  # the same records again are dropped
    as_text = run("records.txt", "--format=text", "--tokenizer=byte", "--overwrite")
    assert all_text(as_text).encode() == in_format("jsonl")
    long = write_jsonl("long", ["word " * 9000, "other " * 9], key="body")
    with pytest.raises(UserError, match=r"no key 'text'; --text_key is one of \['body'\]"):
        run(long, "--overwrite")
    braces = write("b.txt", "{ not JSON }\n" + LINE * 9)
    assert all_text(run(braces, "--tokenizer=byte", "--overwrite")) == Path(braces).read_text()


def test_json_is_a_list_of_records_or_of_texts_or_json_lines(run):
    as_records = run(write("a.json", json.dumps(RECORDS)), "--tokenizer=byte")
    assert all_text(as_records) == "".join(RECORDS)
    lines = run(write("b.json", in_format("jsonl")), "--tokenizer=byte", "--overwrite")
    assert all_text(lines) == "".join(RECORDS)
    write("c.json", json.dumps({"data": RECORDS}, indent=1))
    with pytest.raises(UserError, match=r"c.json: .* are broken, over 1%; .*no key 'text'"):
        run("c.json", "--overwrite")


def test_broken_json_lines_are_skipped_counted_and_named(run, capfd):
    lines = [json.dumps({"text": f"{number} {LINE}"}) for number in range(200)]
    lines[57] = lines[57][:9]
    lines[91] = '{"text": 5}'
    write("a.jsonl", "\n".join(lines) + "\n \n\t\r\n")  # blank lines are no records
    assert all_text(run("a.jsonl", "--tokenizer=byte")).count(LINE) == 198
    assert "2 broken records skipped; the first: a.jsonl, record 58" in capfd.readouterr().err
    write("a.jsonl", "\n".join(lines[50:100]))
    with pytest.raises(UserError, match="2 of 50 records are broken, over 1%; record 8: "):
        run("a.jsonl", "--overwrite")


@pytest.mark.parametrize(
    "line", ["null", "5", "[]", "[" * 100_000, '{"text": 5}', '{"text": ["a"]}', '{"text": false}']
)
def test_a_line_that_has_no_text_is_broken(run, line):
    for name in ("a.jsonl", "a.json"):
        with pytest.raises(
            UserError, match=r"broken, over 1%|damaged, or cannot be read"
        ) as caught:
            run(write(name, f"{line}\n" * 9))
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_missing_keys_and_columns_name_those_that_are_there(run):
    write_jsonl("a.jsonl", ["a"] * 1000, key="body")
    with pytest.raises(UserError, match=r"11 of 11 records .*no key 'text'; .* of \['body'\]"):
        run("a.jsonl")
    for name, content in (
        ("b.json", json.dumps([{"body": "a", "title": "b"}])),
        ("b.csv", "body,title\na,b\n"),
        ("b.tsv", "body\ttitle\na\tb\n"),
    ):
        with pytest.raises(UserError, match=r"--text_key is one of \['body', 'title'\]"):
            run(write(name, content))
    write("b.parquet", as_parquet())
    with pytest.raises(UserError, match=r"no key 'body'; --text_key is one of \['n', 'text'\]"):
        run("b.parquet", "--text_key=body")
    with pytest.raises(UserError, match="no text but 0 under 'n'; --text_key names another key"):
        run("b.parquet", "--text_key=n")


def test_a_row_of_another_width_or_an_open_quote_is_no_row(run):
    rows = "".join(f"{number},text {number}\n" for number in range(300))
    dataset = run(write("a.csv", f"n,text\n{rows}7\n8,one, two\n"), "--tokenizer=byte")
    assert all_documents(dataset) == sorted(f"text {number}" for number in range(300))
    with pytest.raises(
        UserError, match="b.csv is damaged, or cannot be read: unexpected end of data"
    ):
        run(write("b.csv", f'n,text\n1,"open\n{rows}'), "--overwrite")


# URLs, by fsspec


def test_urls_and_globs_of_urls_are_read(run):
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/b.jsonl", in_format("jsonl"))
    memory.pipe("/corpus/a.txt.gz", gzip.compress(LINE.encode() * 9))
    both = run("memory://corpus/*", "--tokenizer=byte")
    assert all_text(both) == LINE * 9 + "".join(RECORDS)
    one = run("memory://corpus/a.txt.gz", "--tokenizer=byte", "--overwrite")
    assert all_text(one) == LINE * 9
    for url in ("memory://corpus", "memory://corpus/c*", "memory://nowhere/a.txt"):
        with pytest.raises(UserError, match=f"no file {re.escape(url)}; a folder is named with"):
            run(url, "--overwrite")
    assert os.listdir() == ["out"]


def test_the_hub_is_read_with_what_is_installed(run, monkeypatch):
    class Hub(MemoryFileSystem):
        protocol = "hf"
        store: dict = {}
        pseudo_dirs = [""]

        @classmethod
        def _strip_protocol(cls, path):
            return MemoryFileSystem._strip_protocol(path.removeprefix("hf://"))

    assert fsspec.get_filesystem_class("hf").__name__ == "HfFileSystem"
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    Hub().pipe("/datasets/owner/name/data/train-0.parquet", as_parquet())
    Hub().pipe("/datasets/owner/name/README.md", b"no text to train on")
    found = run("hf://datasets/owner/name/**/train-*.parquet", "--tokenizer=byte")
    assert all_text(found) == "".join(RECORDS)


def test_what_goes_wrong_with_a_url_is_said_in_one_line(run, monkeypatch):
    with pytest.raises(UserError, match="nothing://a cannot be read: ValueError: Protocol"):
        run("nothing://a")
    for url, package in (("s3://bucket/a.txt", "s3fs"), ("https://host/a.txt", "aiohttp")):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
        for protocol in ("s3", "https"):
            monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
        with pytest.raises(UserError, match=f"{url} cannot be read: ImportError: .*{package}"):
            run(url)


@pytest.mark.parametrize("flag", ["--overwrite", "--preview"])
@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "a.html"])
def test_a_package_that_is_missing_is_named(run, monkeypatch, name, flag):
    for module in ("pyarrow", "resiliparse", "resiliparse.extract", *sys.modules):
        if module.startswith(("pyarrow", "resiliparse")):
            monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"{name} .*-m pip install (pyarrow|resiliparse)"):
        run(write(name, "<html>"), flag)


# Encodings


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["txt", "jsonl", "json", "csv"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(run, codec, name):
    mark = "\ufeff" if codec.endswith("be") else ""
    path = write(f"a.{name}", (mark + in_format(name).decode()).encode(codec))
    assert all_text(run(path, "--tokenizer=byte")) == "".join(RECORDS)


@pytest.mark.parametrize("codec", ["cp1252", "koi8-r", "gbk", "shift-jis"])
@pytest.mark.parametrize("name", ["txt", "html"])
def test_another_encoding_is_refused_and_read_when_named(run, codec, name):
    letters = {"koi8-r": "\u0436\u0437", "cp1252": "\u00e9\u00e8"}
    word = letters.get(codec, "\u65e5\u672c")
    text = f"{LINE}{word} {word} {word}\n" * 200
    path = write(f"a.{name}", text.encode(codec))
    with pytest.raises(UserError, match=rf"{path} is not UTF-8: .*over 1%; .*--encoding=cp1252"):
        run(path, "--tokenizer=byte")
    found = all_text(run(path, "--tokenizer=byte", f"--encoding={codec}"))
    assert found.split() == text.split()


@pytest.mark.parametrize("codec", ["punycode", "idna", "rot13", "nothing"])
def test_what_is_no_encoding_of_text_is_refused(run, codec):
    with pytest.raises(UserError, match=f"encoding='{codec}': .*; cp1252, for example"):
        run(write("a.txt"), f"--encoding={codec}")


def test_half_a_character_of_json_is_no_wrong_encoding(run):
    write("a.jsonl", "".join(f'{{"text": "{n}\\ud83d \\ud83d\\ude00"}}\n' for n in range(9)))
    found = all_text(run("a.jsonl", "--tokenizer=byte"))
    assert found == "".join(f"{n}? \U0001f600" for n in range(9))


def test_tab_separated_fields_have_no_quotes(run):
    rows = [f'{number}\t{chr(34) * (number % 2)}row {number}, "x"' for number in range(200)]
    dataset = run(write("a.tsv", "\n".join(["n\ttext", *rows])), "--tokenizer=byte")
    assert all_documents(dataset) == sorted(row.split("\t")[1] for row in rows)


def test_odd_bytes_are_kept_or_replaced_counted_and_placed(run, capfd):
    write("a.txt", b"\xef\xbb\xbf" + b"caf\xc3\xa9 " * 200 + b"bad \xff\xfe byte, \0 NUL\r\n" * 2)
    dataset = run("a.txt", "--tokenizer=byte")
    assert all_text(dataset) == "caf\u00e9 " * 200 + "bad \ufffd\ufffd byte, \0 NUL\r\n" * 2
    assert "4 invalid characters, now U+FFFD; the first: a.txt" in capfd.readouterr().err


def test_wrong_encodings_are_refused(run):
    for codec in ("latin-0", "base64", "rot13", "undefined", "punycode", "idna"):
        with pytest.raises(UserError, match=f"encoding='{codec}': .*; cp1252, for example"):
            run(write("a.txt"), f"--encoding={codec}")
    write("a.txt", "caf\u00e9 " * 100)
    with pytest.raises(UserError, match="is not ascii: 200 characters in .* over 1%"):
        run("a.txt", "--encoding=ascii", "--tokenizer=byte")


def test_utf_16_without_a_mark_is_refused_with_the_way_out(run):
    write("a.txt", (LINE * 9).encode("utf-16-le"))
    with pytest.raises(UserError, match="--encoding=utf-16-le"):
        run("a.txt")
    dataset = run("a.txt", "--encoding=utf-16-le", "--tokenizer=byte")
    assert all_text(dataset) == LINE * 9


# What is no text


def as_docx() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", LINE * 99)
    return file.getvalue()


BINARY = {
    "pdf": (b"%PDF-1.7\n" + b"1 0 obj\n<< /Type /Catalog >>\n" * 99, "make text of a PDF"),
    "docx": (as_docx(), "unpack an archive.*pandoc"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0", "binary data"),
    "pickle": (pickle.dumps({"a": list(range(999))}), "binary data"),
    "unnamed gzip": (gzip.compress(LINE.encode() * 99), "needs its suffix"),
    "random": (random.Random(0).randbytes(5000), "binary data"),
}


@pytest.mark.parametrize("kind", BINARY)
def test_what_is_no_text_is_refused_with_what_it_is(run, kind):
    data, what = BINARY[kind]
    for name in ("a.txt", "a", "a.jsonl"):
        with pytest.raises(UserError, match=f"{name} is .*({what})"):
            run(write(name, data))
    assert not Path("out").exists()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_archives_are_not_read_as_one_text(run, form):
    write("long.txt", LINE * 999)
    for name, mode in (
        ("a.tar", "w"),
        ("a.tar.gz", "w:gz"),
        ("a.tgz", "w:gz"),
        ("a.tar.bz2", "w:bz2"),
        ("a.tar.xz", "w:xz"),
    ):
        with tarfile.open(name, mode, format=form) as archive:
            archive.add("long.txt")
        with pytest.raises(UserError, match=f"{name} is no text .*: unpack an archive"):
            run(name)


def test_parquet_under_another_name_says_so(run):
    with pytest.raises(UserError, match="a.txt is no text .*--format=parquet"):
        run(write("a.txt", as_parquet()))
    assert all_text(run("a.txt", "--format=parquet", "--tokenizer=byte")) == "".join(RECORDS)


def test_terminal_colours_and_overstrikes_are_text(run):
    text = "\x1b[31mred\x1b[0m and b\bbold, \f a new page\n" * 99
    assert all_text(run(write("log.txt", text), "--tokenizer=byte")) == text


def test_files_of_a_folder_that_are_no_text_are_skipped_and_counted(run, capfd):
    for number in range(3):
        write(f"folder/{number}.txt", f"{number} {LINE}" * 9)
        write(f"folder/{number}.PDF", BINARY["pdf"][0])
    write("folder/deep/a.docx", BINARY["docx"][0])
    write("folder/LICENSE", BINARY["random"][0])
    dataset = run("folder", "--tokenizer=byte")
    assert all_text(dataset) == "".join(f"{number} {LINE}" * 9 for number in range(3))
    err = capfd.readouterr().err
    assert "5 files without text skipped; the first: folder/0.PDF is no text" in err


# HTML


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.html.gz"])
def test_html_is_reduced_to_its_text(run, name):
    page = (
        "<!DOCTYPE html>\n<html><head><style>p { color: red }</style>\n"
        "<script>if (a < b) alert('no')</script></head><body>\n<h1>One</h1>\n"
        + "<p>First   <b>bold</b>\nline &eacute; &#x65e5;<br>second<!-- not this --></p>\n" * 3
        + "<pre>a\n   b</pre><ul><li>x<li>y</ul>tail</body></html>"
    )
    data = gzip.compress(page.encode()) if name.endswith("gz") else page.encode()
    text = all_text(run(write(name, data), "--tokenizer=byte"))
    assert text.startswith("One\n\nFirst bold line \u00e9 \u65e5\nsecond\n\nFirst bold")
    assert "a\n   b" in text and text.split()[-5:] == ["\u2022", "x", "\u2022", "y", "tail"]
    assert not re.search("color|alert|not this|<", text)
    as_it_is = run(write("b.html", page), "--format=text", "--tokenizer=byte", "--overwrite")
    assert all_text(as_it_is) == page


# Folders and links


def test_what_the_project_wrote_into_a_folder_is_left_out(run, capfd):
    texts = {f"folder/{n}.txt": f"{n} {LINE}" * 9 for n in range(3)}
    for name, text in texts.items():
        write(name, text)
    run_stage(prepare.main, "folder", "--tokenizer=byte", "--out=folder/data")
    run_stage(prepare.main, "folder", "--tokenizer=byte", "--out=folder/data")
    assert "already prepared" in capfd.readouterr().out
    for name in ("settings.json", "metrics.jsonl", "step_000001/config.json", "tensorboard/a.txt"):
        write(f"folder/run/{name}", '{"text": "not this"}\n')
    write("folder/killed.partial/new/tokenizer.json", "{}")
    assert all_text(run("folder", "--tokenizer=byte")) == "".join(texts.values())
    assert "3 folders that prepare.py or train.py wrote skipped; the first: folder/" in (
        capfd.readouterr().err
    )
    with pytest.raises(UserError, match="no files in folder/data .*prepare.py or train.py wrote"):
        run("folder/data", "--overwrite")


def test_settings_among_sources_are_skipped_and_named(run, capfd):
    sources = {f"folder/{n}.py": f"print({n})  # {LINE}" * 9 for n in range(6)}
    for name, text in sources.items():
        write(name, text)
    write("folder/a\n\x1b[31m.pdf", "%PDF-1.7")
    write("folder/line.json", '{"name": "app", "version": 1}')
    write("folder/package.json", json.dumps({"name": "app", "files": ["a"]}, indent=2))
    write("folder/tsconfig.json", '{\n  // comments\n  "a": 1,\n}\n')
    write("folder/numbers.csv", "a,b\n1,2\n" * 20)
    write("folder/minified.map", '{"version":3,"sources":["a"]}')
    assert all_text(run("folder", "--tokenizer=byte")) == "".join(sources.values())
    (line,) = capfd.readouterr().err.splitlines()
    assert r"6 files without text skipped; the first: folder/a\n\x1b[31m.pdf is no text" in line
    with pytest.raises(UserError, match="no text: one/package.json: .*no key 'text'"):
        run(str(Path(write("one/package.json", '{"name": "app"}')).parent), "--overwrite")


def test_the_order_of_files_is_the_same_everywhere(run, monkeypatch):
    names = ["b.txt", "a/z.txt", "a.txt", "a/b/c.txt", "B.txt"]
    for name in names:
        write(f"folder/{name}")
    walk = os.walk
    shuffled = lambda folder: [(a, b, c[::-1]) for a, b, c in [*walk(folder)][::-1]]  # noqa: E731
    once = [source.name for source in find_sources(["folder"], Notes())]
    monkeypatch.setattr(os, "walk", shuffled)
    assert once == [source.name for source in find_sources(["folder"], Notes())]
    assert sorted(once) == sorted(f"folder/{name}" for name in names)


def test_links_are_read_once(run):
    write("folder/a.txt", LINE * 9)
    write("other/b.txt", f"other {LINE}" * 9)
    os.symlink("../other", "folder/linked")
    os.symlink(".", "folder/loop")
    os.symlink("nowhere", "folder/broken")
    os.symlink("../other/b.txt", "folder/c.txt")
    os.mkfifo("folder/pipe")
    dataset = run("folder", "--tokenizer=byte")
    assert all_text(dataset) == LINE * 9 + f"other {LINE}" * 9


def test_what_is_no_file_is_refused(run):
    os.symlink("self", "self")
    os.symlink("gone", "dangling")
    Path("empty").mkdir()
    for name in ("self", "dangling", "nowhere/a.txt", "*.nothing"):
        with pytest.raises(UserError, match=f"no file {re.escape(name)}"):
            run(name)
    with pytest.raises(UserError, match="no files in empty"):
        run("empty")
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="pipe is no regular file; pipe it in"):
        run("pipe")


DAMAGED = {
    "a.txt.gz": gzip.compress(os.urandom(3000).hex().encode())[:-500],
    "b.txt.gz": b"not gzip",
    "a.txt.xz": lzma.compress(os.urandom(3000).hex().encode())[:-500],
    "a.txt.bz2": bz2.compress(os.urandom(3000).hex().encode())[:-500],
    "a.txt.zst": b"not zstd",
    "b.txt.zst": pyarrow.compress(os.urandom(3000).hex().encode(), "zstd", asbytes=True)[:-500],
    "a.jsonl": b'{"text": "open\n' * 20,
    "a.json": b'[{"text": "a"}, {"text',
    "a.csv": b'text\n"open',
    "a.parquet": b"PAR1 no",
    "a.txt": ("caf\u00e9 " * 50).encode("latin-1"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_one_damaged_file_of_hundreds_is_named_and_skipped(run, capfd, name):
    for number in range(100):
        write(f"folder/{number:03}.txt", f"{number} {LINE}")
    write(f"folder/050{name}", DAMAGED[name])
    dataset = run("folder", "--tokenizer=byte")
    assert all_documents(dataset) == sorted(f"{number} {LINE}" for number in range(100))
    err = capfd.readouterr().err
    assert f"1 damaged files skipped; the first: folder/050{name}" in err
    assert len(err.splitlines()) == 1  # what was odd in it does not count
    write(f"folder/051{name}", DAMAGED[name])
    with pytest.raises(UserError, match=f"2 of 102 files cannot be read.*folder/050{name}"):
        run("folder", "--tokenizer=byte", "--overwrite")
    with pytest.raises(UserError, match=f"folder/050{name}"):
        run(f"folder/050{name}", "--tokenizer=byte", "--overwrite")


def test_a_zst_with_a_long_window_is_named_with_the_reason(run):
    pytest.importorskip("pyarrow")
    frame = b"\x28\xb5\x2f\xfd\x00\xa8\x29\x00\x00hello"  # RFC 8878: a window of 2 GiB, one block
    with pytest.raises(
        UserError, match="my a.zst is damaged, or cannot be read: .*too much memory"
    ):
        run(write("my a.zst", frame), "--format=jsonl")
