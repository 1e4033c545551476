"""prepare.py: datasets against their text, refusals, and accidents."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from helpers import run_stage
from hypothesis import given
from hypothesis import strategies as st
from prepared import (
    END,
    LINE,
    ODD,
    SCRIPT,
    all_text,
    contents,
    documents,
    quick,
    run_script,
    texts,
    write,
    write_jsonl,
)
from several import finish, start
from vocabularies import byte_level

import prepare
from plainllama.data import load_dataset, lock, read_batch, verify_dataset
from plainllama.terminal import UserError
from plainllama.tokenizer import find_tokenizer, load_tokenizer, train_bpe

CONFIG = f"{SCRIPT.parent}/config"
TRAIN = f"python {SCRIPT.parent}/train.py"  # from another directory


def test_byte_tokenizer_has_257_tokens_and_one_a_byte(run):
    dataset = run(write("a.txt", LINE * 9 + "\u00e9"), "--tokenizer=byte")
    assert dataset.vocab_size == 257
    assert dataset.tokens == {split: dataset.bytes[split] + 1 for split in ("train", "val")}


def test_one_text_is_split_where_nanogpt_splits_it(run):
    text = "".join(f"line {number}, and more of it\n" for number in range(3000))
    dataset = run(write("input.txt", text), "--vocab_size=300")
    cut = int(len(text) * 0.9)
    assert documents(dataset, "train") == [text[:cut]]
    assert documents(dataset, "val") == [text[cut:]]


@quick(max_examples=25)
@given(st.lists(texts, min_size=1, max_size=9), st.floats(0.05, 0.95))
def test_bins_hold_exactly_the_documents_in_order(run, found, val_fraction):
    expected = list(dict.fromkeys(text for text in found if text.encode().strip()))
    write_jsonl("a.jsonl", found)
    arguments = ("a.jsonl", "--tokenizer=byte", f"--val_fraction={val_fraction}", "--overwrite")
    size = sum(len(text.encode()) for text in expected)
    if size * min(val_fraction, 1 - val_fraction) < 4:  # bytes of the longest character
        return  # may leave a split without text
    dataset = run(*arguments)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    whole = train + val
    if len(whole) > len(expected):  # the document at the cut became two
        whole = [*train[:-1], train[-1] + val[0], *val[1:]]
    assert whole == expected
    total = sum(dataset.bytes.values())
    assert 0 <= dataset.bytes["train"] - int(total * (1 - val_fraction)) <= 3


def test_many_documents_are_split_by_their_own_text_alone(run):
    texts = [f"document {number}. {LINE}" for number in range(1200)]
    first = run(write_jsonl("a.jsonl", texts), "--tokenizer=byte")
    val = documents(first, "val")
    assert 60 < len(val) < 180
    random.Random(0).shuffle(texts)
    extended = [*texts, *(f"another {number}. {LINE}" for number in range(300))]
    write_jsonl("a.jsonl", extended)
    second = documents(run("a.jsonl", "--tokenizer=byte", "--overwrite"), "val")
    assert set(val) == set(second) & set(texts)
    third = documents(run("a.jsonl", "--tokenizer=byte", "--seed=1", "--overwrite"), "val")
    assert set(third) != set(second)


@quick(max_examples=15)
@given(st.lists(texts, min_size=1, max_size=30), st.floats(0.05, 0.95))
def test_a_new_vocabulary_comes_from_the_training_split_alone(run, found, val_fraction):
    found = [f"{number} {text} {LINE}" for number, text in enumerate(found)]
    write_jsonl("a.jsonl", [*found, *found[:3], " "])
    arguments = ("--vocab_size=320", f"--val_fraction={val_fraction}", "--overwrite")
    dataset = run("a.jsonl", *arguments)
    learned = train_bpe([text.encode() for text in documents(dataset, "train")], 320)
    assert load_tokenizer(dataset.data_dir / "tokenizer.json").content == learned.content


def test_a_folder_of_notes_is_split_by_whole_notes_from_all_of_it(run, capsys):
    sizes = random.Random(3)
    notes = [f"note {number}. " + LINE * sizes.randint(1, 30) for number in range(60)]
    for number, text in enumerate(notes):
        write(f"notes/{'abc'[number // 20]}{number % 20:02d}.txt", text)
    dataset = run("notes", "--tokenizer=byte")
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert sorted(train + val) == sorted(notes)
    total = sum(map(len, notes))
    assert 0.05 * total < sum(map(len, val)) <= 0.1 * total and len(val) <= 6
    places = sorted(map(notes.index, val))
    assert places[-1] - places[0] >= 20  # they are not neighbours
    assert "validation: whole documents, chosen by a hash" in capsys.readouterr().out
    write("notes/b00.txt", LINE * 300)  # a third of the text in one note, which is too large
    again = run("notes", "--tokenizer=byte", "--overwrite")
    assert LINE * 300 in documents(again, "train") and 2 <= again.documents["val"] <= 6
    write("notes/b00.txt", LINE * 30_000)  # beside which the others are hardly anything
    run("notes", "--tokenizer=byte", "--overwrite")
    assert "validation: the last 0.1 of the text" in capsys.readouterr().out


def test_repeated_and_empty_documents_are_dropped_and_counted(run, capsys):
    write_jsonl("a.jsonl", ["", "one " * 30, "two " * 30, "one " * 30, " \n", "three " * 30])
    dataset = run("a.jsonl", "--tokenizer=byte", "--val_fraction=0.01")
    assert all_text(dataset) == "one " * 30 + "two " * 30 + "three " * 30
    assert "dropped: 2 empty and 1 repeated documents" in capsys.readouterr().out


@pytest.fixture
def corpus(run) -> list[str]:
    """Several files of odd text, some longer than one block."""
    letters = random.Random(0)
    words = ["".join(letters.choices(ODD, k=letters.randint(1, 9))) for _ in range(2000)]
    long = " ".join(letters.choices(words, k=90_000))
    files = {f"{n}.txt": long[n * 1000 : n * 90_000] for n in range(1, 4)}
    return [write(name, text) for name, text in files.items()]


def test_bytes_written_do_not_depend_on_workers_or_engine(run, corpus, monkeypatch, capfd):
    pytest.importorskip("gigatoken")
    run(*corpus, "--workers=1", "--vocab_size=1000")
    expected = contents()
    assert json.loads(expected["meta.json"])["engine"] == "gigatoken"
    run(*corpus, "--workers=3", "--vocab_size=1000", "--overwrite")
    assert contents()["train.bin"] == expected["train.bin"]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    run(*corpus, "--workers=2", "--tokenizer=out/tokenizer.json", "--overwrite")
    assert json.loads(contents()["meta.json"])["engine"] != "gigatoken"
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert contents()[name] == expected[name]


def test_preview_shows_tokens_of_three_documents_and_writes_nothing(run, capsys):
    write_jsonl("a.jsonl", [f"{number} {LINE}" * 40_000 for number in range(5)])
    run_stage(prepare.main, "a.jsonl", "--preview", "--tokenizer=byte")
    out = capsys.readouterr().out
    shown = [line for line in out.splitlines() if " -> [" in line]
    assert len(shown) == 3
    assert all(line.startswith(f'["{number}", " ", "T"') for number, line in enumerate(shown))
    assert "-> [48, 32, 84, 111, 32" in shown[0] and "5 documents, 9," in out
    assert os.listdir() == ["a.jsonl"]


def test_small_text_gives_a_smaller_vocabulary_and_says_so(run, capfd):
    size = run(write("a.txt", "hello hello\n" * 20)).vocab_size
    assert f"a vocabulary of {size}, not 512" in "".join(capfd.readouterr())


@pytest.mark.parametrize("numbers", [20_000, 300_000, 1_000_000])
def test_a_vocabulary_has_a_token_for_each_kilobyte_from_512_to_4096(run, numbers):
    draw = random.Random(0)
    write("a.txt", "".join(f"{draw.randrange(10**4)} " for _ in range(numbers)))
    kilobytes = Path("a.txt").stat().st_size // 1000  # 97, 1,466, 4,889
    assert run("a.txt").vocab_size == min(max(512, kilobytes), 4096)


def test_second_run_with_the_same_settings_does_nothing_another_is_refused(run, capsys):
    first = run(write("a.txt"), "--tokenizer=byte")
    written = first.path("train").stat().st_mtime_ns
    run("a.txt", "--tokenizer=byte", "--workers=1")
    assert "already prepared" in capsys.readouterr().out
    assert first.path("train").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="another dataset; add --overwrite"):
        run("a.txt", "--tokenizer=byte", "--val_fraction=0.2")
    assert run("a.txt", "--tokenizer=byte", "--val_fraction=0.2", "--overwrite") != first
    with pytest.raises(ValueError, match="another dataset"):
        run(write("a.txt", LINE * 10), "--tokenizer=byte", "--val_fraction=0.2")


def test_thousands_of_added_tokens_are_no_hurdle(run):
    added = {END: True} | {f"<|{n}|>": n % 3 == 0 for n in range(10_000)}
    write("t.json", json.dumps(byte_level(added=added)))
    text = "a<|1|>b <|3|>\n" * 99
    found = np.fromfile(run(write("a.txt", text), "--tokenizer=t.json").path("train"), np.uint16)
    oracle = tokenizers.Tokenizer.from_file("t.json")
    oracle.encode_special_tokens = True
    assert found[:-1].tolist() == oracle.encode(text).ids[: len(found) - 1]


def test_another_tokenizer_under_the_same_name_is_another_dataset(run):
    find_tokenizer("byte").save(Path("t.json"))
    run(write("a.txt"), "--tokenizer=t.json")
    train_bpe([LINE.encode()], 300).save(Path("t.json"))
    with pytest.raises(ValueError, match="another dataset"):
        run("a.txt", "--tokenizer=t.json")


def test_a_changed_text_of_the_same_size_and_time_is_another_dataset(run):
    first = os.stat(write("a.txt", LINE * 9))
    run("a.txt", "--tokenizer=byte")
    write("a.txt", LINE.upper() * 9)
    os.utime("a.txt", ns=(first.st_atime_ns, first.st_mtime_ns))
    with pytest.raises(UserError, match="another dataset"):
        run("a.txt", "--tokenizer=byte")


# Refusals and accidents


def test_files_that_are_not_ours_are_not_deleted(run):
    run(write("a.txt"), "--tokenizer=byte")
    before = contents()
    for name in ("notes.md", "train.txt", ".git"):
        precious = Path(write(f"out/{name}", "precious"))
        with pytest.raises(UserError, match=f"out also holds {name}, which is none of ours"):
            run("a.txt", "--tokenizer=byte", "--val_fraction=0.2", "--overwrite")
        assert precious.read_text() == "precious"
        precious.unlink()
    assert contents() == before


def test_a_mount_point_is_no_place_to_write(run, monkeypatch):
    run(write("a.txt"), "--tokenizer=byte")
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == "out")
    with pytest.raises(UserError, match="out is where a disk is mounted"):
        run("a.txt", "--tokenizer=byte", "--overwrite")


@pytest.mark.skipif(os.name != "posix", reason="containers are Linux's")
def test_the_first_process_of_a_container_ends_on_term_and_leaves_nothing(tmp_path):
    alone = ["unshare", "--pid", "--fork"]
    if not shutil.which("unshare") or subprocess.run([*alone, "true"]).returncode:
        pytest.skip("this user may not make a namespace")
    command = [*alone, sys.executable, str(SCRIPT), "-", "--out=out"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not (tmp_path / "out.partial/stdin.txt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    os.kill(int(children), signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not os.listdir(tmp_path)


def test_too_little_text_is_refused(run):
    for name, text in (("empty.txt", ""), ("short.txt", "a")):
        with pytest.raises(ValueError, match=f"{len(text)} bytes of text are too few"):
            run(write(name, text), "--tokenizer=byte")
    assert not list(Path().glob("out*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "--val_fraction=1.5"], "val_fraction=1.5 must lie between 0 and 1"),
        (["a.txt", "--vocab_size=100"], "vocab_size=100 must be 259"),
        (["a.txt", "--workers=-1"], "workers=-1 must be 0 to 1,024"),
        (["a.txt", "--seed=-1"], "seed=-1 must not be negative"),
        (["nowhere.txt"], "no file nowhere.txt"),
        (["a.txt", "--vocab_sise=300"], "did you mean --vocab_size?"),
        (["a.txt", "--tokenizer=gtp2"], "none of bpe, byte"),
    ],
)
def test_mistakes_are_refused_in_one_line(run, arguments, message):
    write("a.txt")
    with pytest.raises(UserError, match=re.escape(message)):
        run(*arguments)
    assert os.listdir() == ["a.txt"]


def test_full_disk_leaves_nothing_and_is_one_line(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text(LINE * 50_000)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "a.txt", "--tokenizer=byte"],
        cwd=tmp_path,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)),
    )
    assert result.returncode == 2
    assert b"error: no space left for data/a: free some" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not list((tmp_path / "data").iterdir())


def test_interrupted_run_leaves_nothing_that_looks_complete(tmp_path):
    (tmp_path / "a.txt").write_text(LINE * 100_000)
    command = [sys.executable, str(SCRIPT), "a.txt", "--vocab_size=300"]
    moments = random.Random(0)
    for stop in (signal.SIGINT, signal.SIGKILL):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        while not (tmp_path / "data" / "a.partial").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(stop)
        process.communicate()
        if (tmp_path / "data" / "a").exists():  # it was done before the signal came
            assert all_text(load_dataset(tmp_path / "data" / "a")) == LINE * 100_000
        elif stop == signal.SIGINT:
            assert process.returncode == 130 and not os.listdir(tmp_path / "data")
    (tmp_path / "data" / "a.partial").mkdir(exist_ok=True)
    assert run_script("a.txt", "--vocab_size=300", cwd=tmp_path).returncode == 0
    assert os.listdir(tmp_path / "data") == ["a"]
    assert all_text(load_dataset(tmp_path / "data" / "a")) == LINE * 100_000


# What the other stages read


def test_load_dataset_refuses_damage_and_older_versions(run):
    meta = json.loads(contents(str(run(write("a.txt"), "--tokenizer=byte").data_dir))["meta.json"])
    for content in ("", "{", "[]", "{}", '{"tokens": 3}', json.dumps(meta | {"dtype": "x"})):
        write("out/meta.json", content)
        with pytest.raises(ValueError, match="meta.json is damaged.*--out=out --overwrite"):
            load_dataset(Path("out"))


def test_a_changed_bin_is_noticed_once_it_is_not_known(run):
    dataset = run(write("a.txt"), "--tokenizer=byte")
    verify_dataset(dataset)
    known = Path("out/.verified").read_bytes()
    path = dataset.path("train")
    content = path.read_bytes()
    before = path.stat()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as copies with -p have it
    with pytest.raises(UserError, match="train.bin is damaged: .*--overwrite"):
        verify_dataset(load_dataset(Path("out")))
    path.write_bytes(content)
    verify_dataset(load_dataset(Path("out")))
    assert Path("out/.verified").read_bytes() != known
    digest = hashlib.file_digest

    def of_small_files(file, name):
        assert not str(file.name).endswith(".bin")
        return digest(file, name)

    with pytest.MonkeyPatch.context() as patch:  # the same bins are not read again
        patch.setattr(hashlib, "file_digest", of_small_files)
        verify_dataset(load_dataset(Path("out")))
        with pytest.raises(AssertionError):
            verify_dataset(load_dataset(Path("out")), again=True)


def test_windows_are_read_where_a_disk_cannot_be_mapped(run, monkeypatch):
    def no_device(*arguments, **options):
        raise OSError(errno.ENODEV, "No such device")

    dataset = run(write("a.txt", LINE * 99), "--tokenizer=byte")
    monkeypatch.setattr(mmap, "mmap", no_device)
    ids = np.fromfile(dataset.path("train"), dataset.dtype).astype(np.int64)
    starts = np.array([0, 7, len(ids) - 9])
    tokens, targets = read_batch(dataset, "train", starts, 8, torch.device("cpu"))
    for row, first in enumerate(starts):
        assert tokens[row].tolist() == ids[first : first + 8].tolist()
        assert targets[row].tolist() == ids[first + 1 : first + 9].tolist()
    with pytest.raises(UserError, match="train.bin was cut short"):
        read_batch(dataset, "train", starts + 1, 8, torch.device("cpu"))


def test_an_id_beyond_the_vocabulary_is_refused(run):
    dataset = run(write("a.txt"), "--tokenizer=byte")
    ids = np.fromfile(dataset.path("train"), dataset.dtype)
    ids[3] = 300
    ids.tofile(dataset.path("train"))
    with pytest.raises(UserError, match="out is damaged: id 300 of train in a vocabulary of 257"):
        read_batch(load_dataset(Path("out")), "train", np.zeros(1, int), 8, torch.device("cpu"))


@pytest.mark.parametrize("out", [".", "..", "/", "folder"])
def test_a_directory_that_is_there_is_no_place_to_write(run, out):
    write("folder/a.txt")
    with pytest.raises(UserError, match="exists and is not a dataset"):
        run_stage(prepare.main, "folder/a.txt", f"--out={out}", "--overwrite")


# Accidents while a dataset is replaced, and others


KILLED = """
import json, os, shutil, sys
import prepare
count = 0
def dying(function):
    def call(*arguments, **options):
        global count
        if "out" in str(arguments[0]) and os.path.exists("out.partial"):
            count += 1
            if count == int(os.environ["DIE_BEFORE"]):
                os._exit(9)
        return function(*arguments, **options)
    return call
os.replace, shutil.rmtree = dying(os.replace), dying(shutil.rmtree)
((_, arguments),) = json.loads(sys.argv[1])
sys.argv = ["prepare.py", *arguments]
os.chdir(os.environ["FOLDER"])
prepare.main()
"""


def test_a_kill_at_any_moment_leaves_the_old_dataset_or_the_new_one(run, tmp_path):
    texts = {"a.txt": f"old {LINE}" * 9, "b.txt": f"new {LINE}" * 9}
    for path, text in texts.items():
        write(path, text)
    found, codes = set(), []
    for moment in range(1, 6):
        shutil.rmtree("out", ignore_errors=True)
        run("a.txt", "--tokenizer=byte", "--overwrite")
        words = ["b.txt", "--out=out", "--tokenizer=byte", "--overwrite"]
        where = {"DIE_BEFORE": str(moment), "FOLDER": str(tmp_path)}
        ((code, _, _),) = finish(start(1, words, script=KILLED, **where))
        codes.append(code)
        # The next run puts back what there was, whatever it is asked for, and then can replace it.
        with contextlib.suppress(UserError):
            run("a.txt", "--tokenizer=byte")
        found.add(all_text(load_dataset(Path("out"))))
        assert all_text(run("b.txt", "--tokenizer=byte", "--overwrite")) == texts["b.txt"]
        assert sorted(os.listdir()) == ["a.txt", "b.txt", "out"]
    assert found == set(texts.values())
    assert codes.count(9) >= 3 and codes[-1] == 0


def test_a_linked_output_stays_a_link(run):
    Path("disk").mkdir()
    os.symlink("disk/data", "out")
    assert all_text(run(write("a.txt"), "--tokenizer=byte")) == LINE * 9
    assert all_text(run("a.txt", "--tokenizer=byte", "--overwrite")) == LINE * 9
    assert os.path.islink("out") and os.listdir("disk") == ["data"]


def test_two_runs_do_not_write_one_dataset(run, capsys):
    Path("out.partial").mkdir()
    with lock(Path("out.partial/lock"), "out"), pytest.raises(UserError, match="another process"):
        run(write("a.txt"), "--tokenizer=byte")
    assert all_text(run("a.txt", "--tokenizer=byte")) == LINE * 9
    assert not Path("out.partial").exists()


@pytest.mark.parametrize("change", ["grow", "shrink"])
def test_a_file_that_changes_while_it_is_read_is_refused(run, monkeypatch, change):
    write_jsonl("a.jsonl", [f"{number} {LINE}" for number in range(20)])
    assign = prepare.assign_splits

    def meanwhile(*arguments):
        write_jsonl("a.jsonl", [f"{n} {LINE}" for n in range(25 if change == "grow" else 15)])
        return assign(*arguments)

    monkeypatch.setattr(prepare, "assign_splits", meanwhile)
    with pytest.raises(UserError, match="a file (grew|shrank) while it was read"):
        run("a.jsonl", "--tokenizer=byte")
    assert os.listdir() == ["a.jsonl"]


def test_the_hint_leads_to_the_data_that_was_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("my text.txt")
    for more, hint in (
        ([], "--data_dir=data/my-text --out_dir=out/my-text"),
        (["--out=my data"], "'--data_dir=my data' '--out_dir=out/my data'"),
    ):
        run_stage(prepare.main, "my text.txt", "--tokenizer=byte", *more)
        *_, quick, better = capsys.readouterr().out.splitlines()
        assert quick == f"next, quick: {TRAIN} {CONFIG}/tiny.py {hint} --epochs=4"
        assert better == f"or better, a minute here: {TRAIN} {CONFIG}/book.py {hint}"


def test_begin_of_text_is_written_before_every_document(run):
    content = byte_level([b"be", b" be", b"or"], added={END: True, "<s>": True}, begin="<s>")
    write("t.json", json.dumps(content))
    end = content["added_tokens"][0]["id"]
    oracle = tokenizers.Tokenizer.from_file("t.json")
    texts = [f"{number} {LINE}" * (1 + 4000 * (number % 400 == 0)) for number in range(1200)]
    dataset = run(write_jsonl("a.jsonl", texts), "--tokenizer=t.json")
    for split in ("train", "val"):
        ids = np.fromfile(dataset.path(split), dataset.dtype)
        ends = np.flatnonzero(ids == end)
        rows = np.split(ids, ends + 1)[:-1]
        assert len(rows) == dataset.documents[split]
        decoded = [oracle.decode(row.tolist()) for row in rows]
        assert set(decoded) <= set(texts)
        for row, text in zip(rows, decoded, strict=True):
            assert row.tolist() == [*oracle.encode(text).ids, end]
