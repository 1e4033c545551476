"""Reading text: every format, damaged files, and what is no text."""

import gzip
import io
import itertools
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared import LINE, all_text, documents, quick, run_script, texts, write, write_jsonl

from plainllama import text as text_module
from plainllama.data import load_dataset
from plainllama.text import Notes, split_blocks
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
