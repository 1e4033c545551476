"""Reading text: every format, damaged files, and what is no text."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import pickle
import random
import re
import sqlite3
import sys
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared import LINE, all_text, documents, quick, run_script, texts, write, write_jsonl

from plainllama import text as text_module
from plainllama.data import load_dataset
from plainllama.settings import UserError
from plainllama.text import Notes, html_text, split_blocks
from plainllama.tokenizer import encode

pytest_plugins = ["prepared_fixtures"]


def test_shakespeare_is_plain_text_of_38_plays(shakespeare):
    plays = documents(shakespeare, "train") + documents(shakespeare, "val")
    text = "".join(plays)
    assert len(plays) == 39  # one is cut in two, where validation begins
    assert 4_990_000 < len(text) < 5_010_000
    assert text.isascii()
    assert not any(mark in text for mark in "*_#\\\t")
    assert " \n" not in text and "\n\n\n" not in text
    assert "\nHAMLET:\nTo be, or not to be: that is the question:\n" in text
    assert "\n[Exeunt]\n" in text and "\nSCENE I. Elsinore. A platform before the castle.\n" in text
    assert text.count("[") == text.count("]")


@quick(max_examples=100)
@given(texts, st.integers(5, 40))
def test_blocks_of_a_document_have_the_ids_of_the_whole(monkeypatch, pairs, text, size):
    monkeypatch.setattr(text_module, "BLOCK", size)
    notes = Notes()
    blocks = list(split_blocks(io.BytesIO(text.encode()), notes, "x"))
    assert b"".join(block for _, block, _ in blocks).decode() == text
    assert [ends for _, _, ends in blocks] == [False] * (len(blocks) - 1) + [True]
    if not notes.counts:
        for tokenizer, _ in pairs:
            ids = [encode(tokenizer, block.decode()) for _, block, _ in blocks]
            assert list(itertools.chain(*ids)) == tokenizer.encode_ordinary(text)


def test_every_format_folder_and_glob_in_one_call(run):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [f"document {number}: {LINE * 5}" for number in range(12)]
    write("one.txt", texts[0])
    write("folder/b/two.py", texts[2])
    write("folder/a.md", texts[1])
    write("folder/.git/config", "hidden")
    write("folder/picture.png", b"\x89PNG\0\0\0")
    write("x1.txt.gz", gzip.compress(texts[3].encode()))
    write_jsonl("x2.jsonl", texts[4:6])
    write_jsonl("y.jsonl", texts[6:8])
    write("x3.jsonl.gz", gzip.compress(Path("y.jsonl").read_bytes()))
    write_jsonl("y.jsonl", texts[8:10])
    data = pyarrow.compress(Path("y.jsonl").read_bytes(), "zstd", asbytes=True)
    write("x4.jsonl.zst", data)
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": texts[10:]}), "x5.parquet")
    dataset = run("one.txt", "folder", "x*", "--val_fraction=0.01")
    assert all_text(dataset) == "".join(texts)
    assert dataset.documents["train"] == len(texts)


def test_standard_input_is_one_document(tmp_path):
    text = (LINE + "\u00e9\r\n").encode() * 9
    result = run_script("-", "--out=out", "--tokenizer=byte", cwd=tmp_path, stdin=text)
    assert result.returncode == 0, result.stderr.decode()
    assert all_text(load_dataset(tmp_path / "out")).encode() == text


def test_hugging_face_dataset_is_streamed(run, monkeypatch):
    datasets = pytest.importorskip("datasets")
    texts = [f"row {number}: {LINE}" for number in range(30)]
    rows = datasets.Dataset.from_dict({"body": texts}).to_iterable_dataset()
    asked = []
    load = lambda name, **options: asked.append((name, options)) or rows  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert all_text(run("hf://owner/name", "--text_column=body")) == "".join(texts)
    assert asked == [("owner/name", {"split": "train", "streaming": True})]
    with pytest.raises(ValueError, match=r"no 'text'; --text_key is one of \['body'\]"):
        run("hf://owner/name", "--overwrite")


def test_odd_bytes_are_kept_or_replaced_counted_and_placed(run, capfd):
    write("a.txt", b"\xef\xbb\xbf" + b"caf\xc3\xa9 " * 200 + b"bad \xff\xfe byte, \0 NUL\r\n" * 2)
    dataset = run("a.txt", "--tokenizer=byte")
    expected = "caf\u00e9 " * 200 + "bad \ufffd\ufffd byte, \0 NUL\r\n" * 2
    assert all_text(dataset) == expected
    err = capfd.readouterr().err
    assert "4 pieces of invalid UTF-8 replaced; the first: a.txt, byte 0" in err
    assert "2 NUL bytes kept; the first: a.txt" in err


def test_broken_json_lines_are_skipped_counted_and_named(run, capfd):
    lines = [json.dumps({"text": f"{number} {LINE}"}) for number in range(200)]
    lines[57] = lines[57][:9]
    lines[91] = '{"text": 5}'
    write("a.jsonl", "\n".join(lines))
    assert all_text(run("a.jsonl", "--tokenizer=byte")).count(LINE) == 198
    assert "a.jsonl, line 58" in capfd.readouterr().err
    write("a.jsonl", "\n".join(lines[50:100]))
    with pytest.raises(ValueError, match="2 of 50 lines are broken, over 1%; line 8"):
        run("a.jsonl", "--overwrite")


def test_wrong_key_or_column_is_refused_with_the_way_out(run):
    write_jsonl("a.jsonl", ["a"] * 1000, key="body")
    with pytest.raises(ValueError, match="11 of 11 lines.*line 1: no key 'text'.*--text_key"):
        run("a.jsonl")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text'; --text_key is one of \['body', 'n'\]"):
        run("a.parquet")
    with pytest.raises(ValueError, match="a.parquet is damaged, or has no text under 'n'"):
        run("a.parquet", "--text_key=n")


def test_damaged_files_are_named(run):
    pyarrow = pytest.importorskip("pyarrow")
    text = os.urandom(3000).hex().encode()
    for name, data in (
        ("a.txt.gz", gzip.compress(text)[:-500]),
        ("b.txt.gz", b"not gzip"),
        ("c.jsonl.zst", pyarrow.compress(text, "zstd", asbytes=True)[:-500]),
        ("d.txt.zst", b"not zstd"),
        ("e.parquet", b"PAR1 no"),
    ):
        with pytest.raises(ValueError, match=f"{name} is damaged") as caught:
            run(write(name, data))
        assert "\n" not in str(caught.value)


def test_text_without_any_safe_cut_is_cut_and_counted(run, capfd, monkeypatch):
    monkeypatch.setattr(text_module, "BLOCK", 1000)
    text = "\u65e5" * 5000
    assert all_text(run(write("a.txt", text), "--tokenizer=byte")) == text
    assert "blocks cut inside a word; the first: a.txt, byte" in capfd.readouterr().err


# Formats


RECORDS = [
    f'record {number}: caf\u00e9 \u65e5\u672c, "quoted", two\nlines\n' for number in range(9)
]


def as_csv(delimiter: str) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter).writerows([["n", "text"], *enumerate(RECORDS)])
    return file.getvalue().encode()


def as_parquet() -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": RECORDS}), file)
    return file.getvalue()


def in_format(name: str) -> bytes:
    """Write RECORDS as Python's own modules and pyarrow do."""
    if name in ("jsonl", "ndjson"):
        return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in RECORDS)
    if name == "json":
        return json.dumps([{"text": text} for text in RECORDS], indent=1).encode()
    return as_parquet() if name == "parquet" else as_csv("," if name == "csv" else "\t")


FORMATS = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_suffix_means_the_same_in_any_case(run, name):
    for path in (f"a.{name}", f"A.{name.upper()}", f"b.v2.{name.title()}"):
        dataset = run(write(path, in_format(name)), "--tokenizer=byte", "--overwrite")
        assert all_text(dataset) == "".join(RECORDS)
        assert sum(dataset.documents.values()) == len(RECORDS) + 1  # one is cut in two


@pytest.mark.parametrize("pack", [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("name", ["jsonl", "json", "csv", "txt"])
def test_compressed_files_are_read(run, name, pack):
    suffix, module = pack
    data = LINE.encode() * 9 if name == "txt" else in_format(name)
    path = write(f"a.{name}.{suffix.upper()}", module.compress(data))
    expected = LINE * 9 if name == "txt" else "".join(RECORDS)
    assert all_text(run(path, "--tokenizer=byte")) == expected


@pytest.mark.parametrize("name", FORMATS)
def test_standard_input_takes_a_format(tmp_path, name):
    format = name.replace("ndjson", "jsonl")
    arguments = ("-", "--out=out", "--tokenizer=byte", f"--format={format}")
    result = run_script(*arguments, cwd=tmp_path, stdin=in_format(name))
    assert result.returncode == 0, result.stderr.decode()
    assert all_text(load_dataset(tmp_path / "out")) == "".join(RECORDS)


def test_json_lines_without_a_name_for_it_are_not_read_as_one_text(tmp_path, run):
    result = run_script("-", "--out=out", cwd=tmp_path, stdin=in_format("jsonl"))
    assert result.returncode == 2
    assert b"standard input looks like JSON lines; add --format=jsonl" in result.stderr
    with pytest.raises(UserError, match="records.txt looks like JSON lines"):
        run(write("records.txt", in_format("jsonl")))
    as_text = run("records.txt", "--format=text", "--tokenizer=byte")
    assert all_text(as_text).encode() == in_format("jsonl")


def test_json_is_a_list_of_records_or_of_texts_or_json_lines(run):
    as_records = run(write("a.json", json.dumps(RECORDS)), "--tokenizer=byte")
    assert all_text(as_records) == "".join(RECORDS)
    lines = run(write("b.json", in_format("jsonl")), "--tokenizer=byte", "--overwrite")
    assert all_text(lines) == "".join(RECORDS)
    with pytest.raises(UserError, match=r"c.json holds no list of records; --format=text"):
        run(write("c.json", json.dumps({"data": RECORDS}, indent=1)), "--overwrite")
    # In a folder, of source code for example, it is text.
    write("folder/package.json", json.dumps({"data": RECORDS}, indent=1))
    folder = run("folder", "--tokenizer=byte", "--overwrite")
    assert json.loads(all_text(folder)) == {"data": RECORDS}


@pytest.mark.parametrize("nested", ["[" * 100_000, '{"text":' * 100_000])
def test_deeply_nested_json_is_refused_in_one_line(run, nested):
    for path in ("a.jsonl", "a.json"):
        with pytest.raises(UserError, match=f"{path}.*(broken|damaged|holds no)") as caught:
            run(write(path, nested))
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_blank_lines_of_a_jsonl_are_no_records(run, capfd):
    lines = [json.dumps({"text": f"{number} {LINE}"}) for number in range(50)]
    for blank in ("", " ", "\t\r"):
        write("a.jsonl", "\n".join([*lines[:20], blank, blank, *lines[20:], blank]))
        dataset = run("a.jsonl", "--tokenizer=byte", "--overwrite")
        assert all_text(dataset).count(LINE) == 50
    assert "broken" not in capfd.readouterr().err
    write("a.jsonl", "\n\n".join([*lines, "{", "{"]))
    with pytest.raises(UserError, match="2 of 52 lines are broken, over 1%; line 101: no JSON"):
        run("a.jsonl", "--overwrite")


def test_marks_inside_of_concatenated_json_lines_are_no_text(run):
    write("a.jsonl", in_format("jsonl").decode().encode("utf-8-sig") * 2)
    assert all_text(run("a.jsonl", "--tokenizer=byte")) == "".join(RECORDS)


@pytest.mark.parametrize("line", ["null", "5", "[]", "true"])
def test_a_line_that_is_no_record_is_broken(run, line):
    with pytest.raises(UserError, match="9 of 9 lines are broken"):
        run(write("a.jsonl", f"{line}\n" * 9))


@pytest.mark.parametrize("name", ["hf://", "hf://a/b/c/d", "hf:///b"])
def test_what_is_no_name_of_a_dataset_is_refused(run, name):
    with pytest.raises(UserError, match="is no dataset of the hub"):
        run(name)


@pytest.mark.parametrize("value", [5, ["a"], {"a": 1}, False, 0, []])
def test_a_value_that_is_no_text_is_no_document(run, value):
    write("a.jsonl", json.dumps({"text": value}))
    with pytest.raises(UserError, match="1 of 1 lines are broken.*no text under 'text'"):
        run("a.jsonl")


def test_missing_keys_and_columns_name_those_that_are_there(run):
    write("a.jsonl", json.dumps({"body": "a", "title": "b"}))
    with pytest.raises(UserError, match=r"--text_key is one of \['body', 'title'\]"):
        run("a.jsonl")
    write("a.json", json.dumps([{"body": "a", "title": "b"}]))
    with pytest.raises(UserError, match=r"--text_key is one of \['body', 'title'\]"):
        run("a.json")
    write("a.csv", "body,title\na,b\n")
    with pytest.raises(UserError, match=r"--text_key is one of \['body', 'title'\]"):
        run("a.csv")


def test_a_row_of_another_width_or_an_open_quote_is_no_row(run):
    rows = "".join(f"{number},text {number}\n" for number in range(300))
    dataset = run(write("a.csv", f"n,text\n{rows}7\n"), "--tokenizer=byte")
    assert all_text(dataset) == "".join(f"text {number}" for number in range(300))
    with pytest.raises(UserError, match="b.csv is damaged: line"):
        run(write("b.csv", f'n,text\n1,"open\n{rows}'), "--overwrite")


def test_long_fields_of_a_csv_are_read(run):
    dataset = run(write("a.csv", f"text\n{'word ' * 100_000}\n"), "--tokenizer=byte")
    assert all_text(dataset) == "word " * 100_000


# Encodings


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["txt", "jsonl", "json", "csv"])
def test_a_byte_order_mark_says_the_encoding_and_is_no_text(run, codec, name):
    data = (LINE * 9 + "caf\u00e9 \U0001f469\n").encode() if name == "txt" else in_format(name)
    path = write(f"a.{name}", data.decode().encode(codec))
    expected = data.decode() if name == "txt" else "".join(RECORDS)
    assert all_text(run(path, "--tokenizer=byte")) == expected


@pytest.mark.parametrize("codec", ["utf-16-be", "utf-32-be"])
def test_a_mark_in_the_other_byte_order_is_read_too(run, codec):
    data = ("\ufeff" + LINE * 9).encode(codec)
    assert all_text(run(write("a.txt", data), "--tokenizer=byte")) == LINE * 9


@pytest.mark.parametrize("codec", ["cp1252", "latin-1", "cp1251", "koi8-r", "gbk", "shift-jis"])
def test_another_encoding_is_refused_and_read_when_named(run, codec):
    letters = {"cp1251": "\u0436\u0437", "koi8-r": "\u0436\u0437", "gbk": "\u65e5\u672c"}
    word = letters.get(codec, "\u65e5\u672c" if codec == "shift-jis" else "\u00e9\u00e8")
    text = f"{LINE}{word} {word} {word}\n" * 200
    write("a.txt", text.encode(codec))
    with pytest.raises(UserError, match=r"a.txt is not UTF-8: .*over 1%; .*--encoding=cp1252"):
        run("a.txt", "--tokenizer=byte")
    assert all_text(run("a.txt", "--tokenizer=byte", f"--encoding={codec}")) == text


def test_refused_characters_are_counted_truly(run):
    write("a.txt", b"abcd" * 20 + b"\xff" * 4)
    with pytest.raises(UserError, match="4 of 84 characters are invalid"):
        run("a.txt", "--tokenizer=byte")
    write("b.jsonl", b'{"text": "' + b"abcd" * 20 + b"\xff" * 4 + b'"}')
    with pytest.raises(UserError, match="4 of 84 characters are invalid"):
        run("b.jsonl", "--tokenizer=byte")


def test_encoding_must_be_one_of_text(run):
    for codec in ("latin-0", "base64", "rot13", "idna", "undefined"):
        with pytest.raises(UserError, match=f"encoding='{codec}'"):
            run(write("a.txt"), f"--encoding={codec}")


def test_wrong_encoding_is_refused(run):
    write("a.txt", "caf\u00e9 " * 100)
    with pytest.raises(UserError, match="over 1%"):
        run("a.txt", "--encoding=ascii", "--tokenizer=byte")


def test_utf_16_without_a_mark_is_refused_with_the_way_out(run):
    write("a.txt", (LINE * 9).encode("utf-16-le"))
    with pytest.raises(UserError, match="--encoding=utf-16-le"):
        run("a.txt")
    for codec in ("utf-16-le", "UTF-16", "utf16"):
        dataset = run("a.txt", f"--encoding={codec}", "--tokenizer=byte", "--overwrite")
        assert all_text(dataset) == LINE * 9


# What is no text


def as_zip(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, LINE * 99)
    return file.getvalue()


def as_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.txt"))
    return file.getvalue()


def as_sqlite() -> bytes:
    with sqlite3.connect(":memory:") as database:
        database.execute("create table a (text)")
        return database.serialize()


def as_npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(999))
    return file.getvalue()


BINARY = {
    "pdf": (
        b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n" + b"1 0 obj\n<< /Type /Catalog >>\n" * 99,
        "pdftotext",
    ),
    "rtf": (b"{\\rtf1\\ansi " + b"some text\\par\n" * 99, "pandoc"),
    "ps": (b"%!PS-Adobe-3.0\n" + b"newpath 0 0 moveto\n" * 99, "ps2ascii"),
    "docx": (as_zip("[Content_Types].xml", "word/document.xml"), "pandoc"),
    "epub": (as_zip("mimetype", "content.opf"), "pandoc"),
    "zip": (as_zip("a.txt"), "unzip"),
    "doc": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 99, "libreoffice"),
    "png": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\x08\2\0\0\0", "PNG"),
    "jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", "JPEG"),
    "gif": (b"GIF89a\1\0\1\0\x80\0\0\0\0\0\xff\xff\xff", "GIF"),
    "so": (b"\x7fELF\2\1\1\0\0\0\0\0\0\0\0\0\3\0>\0\1\0\0\0", "ELF"),
    "exe": (b"MZ\x90\0\3\0\0\0\4\0\0\0\xff\xff\0\0\xb8", "Windows"),
    "tar": (as_tar(), "binary data"),
    "sqlite": (as_sqlite(), "sqlite3"),
    "npy": (as_npy(), "NumPy"),
    "pickle": (pickle.dumps({"a": list(range(999))}), "binary data"),
    "wav": (b"RIFF\x24\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0", "RIFF"),
    "mp3": (b"ID3\3\0\0\0\0\0\x21TIT2\0\0\0\7\0\0\0Title", "MP3"),
    "gzip": (gzip.compress(LINE.encode() * 99), "gzip -dc"),
    "bzip2": (bz2.compress(os.urandom(999)), "bzip2 -dc"),
    "lzma": (lzma.compress(os.urandom(999)), "xz -dc"),
    "random": (random.Random(0).randbytes(5000), "binary data"),
    "few": (random.Random(1).randbytes(40), "binary data|not UTF-8"),
}


@pytest.mark.parametrize("kind", BINARY)
def test_what_is_no_text_is_refused_with_the_way_out(run, kind):
    data, way_out = BINARY[kind]
    for name in (f"a.{kind}", "a.txt", "a"):
        with pytest.raises(UserError, match=f"{name} is .*({way_out})"):
            run(write(name, data))
    with pytest.raises(UserError, match=f"{way_out}|no JSON"):
        run(write("a.jsonl", data))
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", BINARY)
def test_standard_input_that_is_no_text_is_refused(tmp_path, kind):
    data, way_out = BINARY[kind]
    result = run_script("-", "--out=out", cwd=tmp_path, stdin=data)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 2 and len(lines) == 1
    assert re.search(f"error: standard input is .*({way_out})", lines[0])


def test_parquet_under_another_name_says_so(run):
    with pytest.raises(UserError, match="a.txt is a Parquet file.*--format=parquet"):
        run(write("a.txt", as_parquet()))
    dataset = run("a.txt", "--format=parquet", "--tokenizer=byte")
    assert all_text(dataset) == "".join(RECORDS)


@pytest.mark.parametrize(
    "start", ["BM ", "MZ ", "PK ", "ID3 ", "GIF89a ", "RIFF ", "II* ", "Rar! "]
)
def test_text_that_begins_like_a_binary_file_is_text(run, start):
    dataset = run(write("a.txt", start + LINE * 9), "--tokenizer=byte")
    assert all_text(dataset) == start + LINE * 9


def test_terminal_colours_and_overstrikes_are_text(run):
    text = "\x1b[31mred\x1b[0m and b\bbold, \f a new page\n" * 99
    assert all_text(run(write("log.txt", text), "--tokenizer=byte")) == text


def test_files_of_a_folder_that_are_no_text_are_skipped_and_named_by_kind(run, capfd):
    for number in range(3):
        write(f"folder/{number}.txt", f"{number} {LINE}" * 9)
        write(f"folder/{number}.PDF", BINARY["pdf"][0])
    write("folder/deep/a.docx", BINARY["docx"][0])
    write("folder/b.txt.gz", gzip.compress(random.Random(0).randbytes(500)))
    write("folder/LICENSE.bin", BINARY["random"][0])
    dataset = run("folder", "--tokenizer=byte")
    assert all_text(dataset) == "".join(f"{number} {LINE}" * 9 for number in range(3))
    assert re.search(
        r"skipped 6: 3 \.pdf, .*1 \.docx.*; the first: folder/0.PDF", capfd.readouterr().err
    )


# HTML


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.txt", "a.html.gz"])
def test_html_is_reduced_to_its_text(run, name):
    page = (
        "<!DOCTYPE html>\n<html><head><title>A &amp; B</title><style>p { color: red }</style>\n"
        "<script>if (a < b) alert('no')</script></head><body>\n<h1>One</h1>\n"
        + "<p>First   <b>bold</b>\nline &eacute; &#x65e5;<br>second<!-- not this --></p>\n" * 3
        + "<pre>a\n   b</pre><ul><li>x<li>y</ul>tail</body></html>"
    )
    data = gzip.compress(page.encode()) if name.endswith("gz") else page.encode()
    text = all_text(run(write(name, data), "--tokenizer=byte"))
    assert text.startswith("A & B\n\nOne\n\nFirst bold line \u00e9 \u65e5\nsecond\n\nFirst bold")
    assert text.endswith("\n\na\n   b\n\nx\ny\ntail\n")
    assert not re.search("color|alert|not this|<", text)


@pytest.mark.parametrize("start", ["<?xml version='1.0'?>\n<!DOCTYPE html>", "\n<HTML lang='en'>"])
@pytest.mark.parametrize("before", ["", "<!-- saved from -->\n", "\ufeff"])
def test_a_page_is_known_by_its_beginning(run, start, before):
    dataset = run(write("a.txt", f"{before}{start}<p>{LINE * 9}</p></html>"), "--tokenizer=byte")
    assert all_text(dataset).split() == (LINE * 9).split()


def test_a_damaged_page_is_refused_in_one_line(run):
    with pytest.raises(UserError, match="a.html is damaged HTML .*--format=text"):
        run(write("a.html", "<html><![foo<p>" + LINE * 9))


@quick(max_examples=200)
@given(st.lists(st.sampled_from([*"abc <>&;/'\"=-!", "<p>", "</p>", "<br/>", "&lt;", "<script>"])))
def test_html_of_any_kind_has_the_words_that_the_parser_finds(parts):
    page = "".join(parts)

    class Words(HTMLParser):
        found = ""
        hidden = 0

        def handle_starttag(self, tag, attrs):
            self.hidden += tag == "script"

        def handle_endtag(self, tag):
            self.hidden -= tag == "script"

        def handle_data(self, data):
            self.found += data if not self.hidden else ""

    words = Words(convert_charrefs=True)
    words.feed(page)
    words.close()
    found = html_text(page.encode(), "page").decode()
    assert "".join(found.split()) == "".join(words.found.split())


def test_html_is_read_as_it_is_when_asked_for(run):
    page = "<html><body>" + f"<p>{LINE}</p>" * 9 + "</body></html>"
    assert all_text(run(write("a.html", page), "--format=text", "--tokenizer=byte")) == page


# Folders and links


def test_links_are_read_once_or_named(run, capfd):
    write("folder/a.txt", LINE * 9)
    write("other/b.txt", f"other {LINE}" * 9)
    os.symlink("../other", "folder/linked")
    os.symlink(".", "folder/loop")
    os.symlink("nowhere", "folder/broken")
    os.symlink("../other/b.txt", "folder/c.txt")
    dataset = run("folder", "--tokenizer=byte")
    assert all_text(dataset) == LINE * 9 + f"other {LINE}" * 9
    assert (
        "skipped 3: 2 linked folders, 1 broken links; the first: folder/" in capfd.readouterr().err
    )


@pytest.mark.parametrize("name", ["self", "one", "nowhere/a.txt", "dangling"])
def test_a_link_that_leads_nowhere_is_no_file(run, name):
    os.symlink("self", "self")
    os.symlink("two", "one")
    os.symlink("one", "two")
    os.symlink("gone", "dangling")
    with pytest.raises(UserError, match=f"no file {name}"):
        run(name)


def test_what_is_no_regular_file_is_refused(run):
    os.mkfifo("pipe")
    for name in ("pipe", "/dev/null"):
        with pytest.raises(UserError, match=f"{name} is no regular file; pipe it in"):
            run(name)
    write("folder/a.txt")
    os.mkfifo("folder/pipe")
    assert all_text(run("folder", "--tokenizer=byte")) == LINE * 9


def test_a_glob_of_folders_reads_what_is_in_them(run):
    write("notes/a/1.txt", f"1 {LINE}" * 9)
    write("notes/b/2.txt", f"2 {LINE}" * 9)
    write("notes/b/3.pdf", BINARY["pdf"][0])
    assert all_text(run("notes/*", "--tokenizer=byte")) == f"1 {LINE}" * 9 + f"2 {LINE}" * 9


DAMAGED = {
    "a.txt.gz": gzip.compress(os.urandom(3000).hex().encode())[:-500],
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
    assert all_text(dataset) == "".join(f"{number} {LINE}" for number in range(100))
    err = capfd.readouterr().err
    assert f"1 damaged files skipped; the first: folder/050{name}" in err
    assert len(err.splitlines()) == 1  # what was odd in it does not count
    write(f"folder/051{name}", DAMAGED[name])
    with pytest.raises(UserError, match=f"2 of 102 files cannot be read.*folder/050{name}"):
        run("folder", "--tokenizer=byte", "--overwrite")
    with pytest.raises(UserError, match=f"folder/050{name}"):
        run(f"folder/050{name}", "--tokenizer=byte", "--overwrite")


@pytest.mark.parametrize("flag", ["--overwrite", "--preview"])
@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "hf://owner/name"])
def test_a_package_that_is_missing_is_named(run, monkeypatch, name, flag):
    for package in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    if "hf" not in name:
        write(name, b"PAR1")
    with pytest.raises(UserError, match="is needed to read this: pip install (pyarrow|datasets)"):
        run(name, flag)
