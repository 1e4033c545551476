"""Datasets prepared in parts: joined, they are what one run writes of the same files."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_stage
from prepared import write
from several import TINY

import train
from plainllama.data import load_dataset, read_windows, verify_dataset
from plainllama.metrics import read_metrics

pytest_plugins = ["prepared_fixtures"]

WORDS = ["the", "cat", "dog", "sees", "bites", "a", "man"]


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(count)]


@pytest.fixture
def in_parts(run):
    """The function that prepares seven files in so many parts, and returns their directories."""
    for number in range(7):
        texts = sentences(number, 300) + sentences(99, 20) + ["", "the cat"]  # some are everywhere
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        write(f"text/{number}.jsonl", lines)

    def made(count: int, *more: str) -> list[str]:
        found = []
        for number in range(1, count + 1):
            run("text", "--tokenizer=byte", f"--part={number}/{count}", *more)
            found.append(f"parts/{count}/{number}")
            shutil.copytree("out", found[-1])
            shutil.rmtree("out")
        return found

    return made


def ids_of(dataset, split: str) -> np.ndarray:
    return np.concatenate([np.fromfile(p, dataset.dtype) for p in dataset.paths(split)])


@pytest.mark.parametrize("count", [1, 5])
def test_joined_parts_are_what_one_run_writes(in_parts, run, count):
    parts = in_parts(count)
    random.Random(0).shuffle(parts)
    joined = run("--join", *parts)
    Path("out").rename("joined")
    joined, whole = load_dataset(Path("joined")), run("text", "--tokenizer=byte")
    for split in ("train", "val"):
        assert len(joined.paths(split)) == count
        assert np.array_equal(ids_of(joined, split), ids_of(whole, split))
    for key in ("tokens", "bytes", "documents", "vocab_size", "dtype"):
        assert getattr(joined, key) == getattr(whole, key)
    metas = [json.loads(Path(name, "meta.json").read_text()) for name in ("joined", "out")]
    assert metas[0]["dropped"] == metas[1]["dropped"]
    assert metas[0]["files"] == metas[1]["files"] == 7
    verify_dataset(joined)
    starts = np.append(np.random.default_rng(0).integers(0, joined.tokens["train"] - 500, 99), 0)
    for length in (16, 400):  # of which some cross the ends of the parts
        where = starts, length, torch.device("cpu")
        for one, other in zip(
            read_windows(joined, "train", *where), read_windows(whole, "train", *where), strict=True
        ):
            assert torch.equal(one, other)


def test_training_on_joined_parts_is_the_same_run(in_parts, run):
    run("--join", *in_parts(2))
    Path("out").rename("joined")
    run("text", "--tokenizer=byte")
    Path("out").rename("whole")
    losses = {}
    for name in ("joined", "whole"):
        data = [f"--data_dir={name}", f"--out_dir=run-{name}", "--eval_tokens=0"]
        run_stage(train.main, *TINY, *data, "--eval_interval=6")
        run_stage(train.main, *data, "--resume", "--verify")
        losses[name] = [r.get("loss", r.get("val_loss")) for r in read_metrics(Path(f"run-{name}"))]
    assert losses["joined"] == losses["whole"] and len(losses["whole"]) == 7


def test_a_document_that_ends_a_part_is_followed_by_the_next_part(in_parts, run):
    dataset = run("--join", *in_parts(3))
    ids = ids_of(dataset, "train")
    for end in dataset.ends("train")[:-1]:
        tokens, targets = read_windows(
            dataset, "train", np.array([end - 5, end, end - 1]), 9, torch.device("cpu")
        )
        assert tokens[0].tolist() == ids[end - 5 : end + 4].tolist()
        assert targets[1].tolist() == ids[end + 1 : end + 10].tolist()
        assert tokens[2, 0] == 256  # the end of text


def test_a_join_is_done_once_and_a_damaged_part_of_it_is_found(in_parts, run, capsys):
    parts = in_parts(2)
    dataset = run("--join", *parts)
    run("--join", *parts)
    assert "is already prepared" in capsys.readouterr().out
    path = dataset.paths("train")[1]
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="train-00001.bin is damaged"):
        verify_dataset(load_dataset(Path("out")))
    path.write_bytes(content[:-2])
    with pytest.raises(ValueError, match="train-00001.bin has"):
        load_dataset(Path("out"))


def refused(run, *arguments: str) -> str:
    with pytest.raises(ValueError) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", ["0/64", "65/64", "3", "-1/2", "1/0", "a/b", "1/2/3"])
def test_a_part_that_cannot_be_is_refused(run, part):
    write("a.txt")
    assert f"part={part}: it is written" in refused(
        run, "a.txt", "--tokenizer=byte", f"--part={part}"
    )


def test_settings_that_no_part_can_have_are_refused(run):
    write("a.txt")
    assert "needs a tokenizer that all parts share" in refused(run, "a.txt", "--part=1/2")
    assert "but there are 1 files" in refused(run, "a.txt", "--tokenizer=byte", "--part=1/2")
    assert "is a share of files" in refused(run, "-", "--tokenizer=byte", "--part=1/1")
    more = ["--tokenizer=byte", "--part=1/1", "--shuffle"]
    assert "shuffle mixes all documents" in refused(run, "a.txt", *more)
    assert "join takes" in refused(run, "a", "--join", "--part=1/2")


def test_parts_that_do_not_make_a_whole_are_refused(in_parts, run, gpt2_vocabulary):
    one, two, three = in_parts(3)
    assert "missing: part 2/3" in refused(run, "--join", one, three)
    assert "missing: part 1/3, 3/3" in refused(run, "--join", two)
    assert f"{one} and {one} are both part 1/3" in refused(run, "--join", one, two, three, one)
    assert "name the directories" in refused(run, "--join")
    assert "no prepared data in nowhere" in refused(run, "--join", "nowhere")
    other, _ = in_parts(2)
    assert "other number of parts" in refused(run, "--join", one, other)
    run("text", "--tokenizer=byte", "--part=2/3", "--val_fraction=0.2")
    Path("out").rename("other")
    said = refused(run, "--join", one, "other", three)
    assert "other was made with other val_fraction than" in said and "(0.2, not 0.1)" in said
    run("text", "--tokenizer=gpt2", "--part=2/3")
    shutil.rmtree("other")
    Path("out").rename("other")
    assert "with other tokenizer.json than" in refused(run, "--join", one, "other", three)
    run("text", "--tokenizer=byte")
    shutil.rmtree("other")
    Path("out").rename("other")
    assert "other is no part" in refused(run, "--join", one, "other", three)
    write("text/7.jsonl", '{"text": "a man"}\n')
    shutil.rmtree("other")
    run("text", "--tokenizer=byte", "--part=2/3")
    Path("out").rename("other")
    assert "made with other files than" in refused(run, "--join", one, "other", three)
    Path(two, "train.documents").write_bytes(b"")
    assert "train.documents is damaged" in refused(run, "--join", one, two, three)
