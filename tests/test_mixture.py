"""Several prepared directories: read as one text, or in shares."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import several
import torch
from helpers import random_model, run_stage
from several import SMALL, finish
from test_chat_data import lines, talk
from training import CPU, final_weights, refusal, run_train, same, small_config

import prepare
import train
from plainllama.data import load_dataset
from plainllama.metrics import read_metrics
from plainllama.mixture import load_data
from plainllama.terminal import UserError

WORDS = {"a": "the cat sees a dog. ", "b": "un chat voit le chien. ", "c": "0123 4567 89. "}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """Three texts of different lengths as bytes, data/a, data/b and data/c, and a whole of two."""
    folder = tmp_path_factory.mktemp("mixture")
    for number, (name, words) in enumerate(WORDS.items()):
        draw = random.Random(number)
        count = 900 * (number + 1)
        text = " ".join(draw.choice(words.split()) for _ in range(count))
        (folder / f"{name}.txt").write_text(text)
        flags = f"--out={folder / name}", "--tokenizer=byte", "--val_fraction=0.2"
        run_stage(prepare.main, folder / f"{name}.txt", *flags)
    whole = folder / "whole"
    shutil.copytree(folder / "a", whole)
    meta = json.loads((whole / "meta.json").read_text())
    theirs = json.loads((folder / "b" / "meta.json").read_text())
    for split in ("train", "val"):
        name = f"{split}.bin"
        (whole / name).write_bytes((folder / "a" / name).read_bytes())
        with open(whole / name, "ab") as file:
            file.write((folder / "b" / name).read_bytes())
        for key in ("tokens", "bytes", "documents"):
            meta[key][split] += theirs[key][split]
        del meta["sha256"][name]
    (whole / "meta.json").write_text(json.dumps(meta))
    return folder


def places_of(spec: str, config: train.TrainConfig, steps: range) -> np.ndarray:
    return np.concatenate([train.step_places(n, load_data(spec), config)[0] for n in steps])


def source_of(spec: str, places: np.ndarray) -> np.ndarray:
    """Which directory each window is of."""
    ends = np.cumsum([part.tokens["train"] for part in load_data(spec).parts()])
    return np.searchsorted(ends, places, side="right")


def test_several_directories_train_as_the_text_that_holds_both(folders, tmp_path):
    spec = f"{folders / 'a'},{folders / 'b'}"
    run_train(folders / "whole", tmp_path / "whole")
    run_train(spec, tmp_path / "both")
    run_train(f"{folders}/[ab]", tmp_path / "pattern")
    assert same(final_weights(tmp_path / "both"), final_weights(tmp_path / "whole"))
    assert same(final_weights(tmp_path / "pattern"), final_weights(tmp_path / "whole"))


@pytest.mark.parametrize(
    "shares", [(0.7, 0.3), (1, 1), (1, 2, 4), (0.05, 0.25, 0.7), (3, 1000), (0.333, 0.333, 0.334)]
)
def test_after_any_number_of_windows_each_source_has_its_share_to_within_one(folders, shares):
    spec = ",".join(f"{folders / n}:{share}" for n, share in zip("abc", shares, strict=False))
    config = replace(small_config(folders / "a"), tokens_per_step=16 * 3000)
    found = source_of(spec, places_of(spec, config, range(2)))
    n = np.arange(1, len(found) + 1)
    for number, share in enumerate(shares):
        assert (abs((found == number).cumsum() - n * share / sum(shares)) < 1).all()


def test_a_window_of_a_share_is_its_sources_next_and_none_comes_twice_in_its_epoch(folders):
    spec = f"{folders / 'a'}:2,{folders / 'c'}:1"
    config = small_config(folders / "a")
    mixed = places_of(spec, config, range(150))
    of_a = source_of(spec, mixed) == 0
    alone = places_of(str(folders / "a"), config, range(150))
    np.testing.assert_array_equal(mixed[of_a], alone[: of_a.sum()])
    first, size = (load_dataset(folders / name).tokens["train"] for name in "ac")
    of_c = mixed[~of_a] - first
    slots = (size - 16) // 16
    assert len(of_c) < slots and of_c.min() >= 0 and of_c.max() < size - 16
    assert (np.diff(np.sort(of_c)) >= 15).all()  # windows of one epoch do not overlap


def test_the_windows_do_not_depend_on_how_many_a_step_takes(folders):
    spec = f"{folders / 'a'}:0.7,{folders / 'b'}:0.3"
    config = small_config(folders / "a")
    small, large = (replace(config, tokens_per_step=16 * n) for n in (5, 35))
    np.testing.assert_array_equal(
        places_of(spec, small, range(14)), places_of(spec, large, range(2))
    )


def test_a_run_in_shares_is_the_same_resumed_and_by_two_processes(folders, tmp_path):
    spec = f"{folders / 'a'}:0.7,{folders / 'b'}:0.3"
    words = [*SMALL, f"--data_dir={spec}", "--max_steps=3", "--batch_size=2"]
    runs = {n: several.start(n, [*words, f"--out_dir={tmp_path / str(n)}"]) for n in (1, 2)}
    run_train(spec, tmp_path / "whole", "--decay_fraction=0")
    run_train(spec, tmp_path / "half", "--decay_fraction=0", "--max_steps=8")
    run_train(spec, tmp_path / "half", "--max_steps=12", "--resume")
    assert same(final_weights(tmp_path / "half"), final_weights(tmp_path / "whole"))
    for n, workers in runs.items():
        assert [code for code, _, _ in finish(workers)] == [0] * n
    one, two = (final_weights(tmp_path / str(n)) for n in (1, 2))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)


def test_validation_is_told_of_each_and_of_all(folders, tmp_path, capsys):
    spec, model = f"{folders / 'a'}:0.9,{folders / 'b'}:0.1", random_model(vocab_size=257)
    config = replace(small_config(folders / "a"), eval_tokens=0)
    found = train.evaluate(model, load_data(spec), config, CPU)
    sums = 0.0, 0
    for name in "ab":
        alone = load_dataset(folders / name)
        loss = train.evaluate(model, alone, config, CPU)["val_loss"]
        assert found[f"val_loss/{folders / name}"] == pytest.approx(loss)
        n = alone.tokens["val"] - 1
        sums = sums[0] + loss * n, sums[1] + n
    assert found["val_loss"] == pytest.approx(sums[0] / sums[1])
    run_train(spec, tmp_path / "run")
    record = read_metrics(tmp_path / "run")[-1]
    assert {f"val_loss/{folders / name}" for name in "ab"} <= record.keys()
    assert f"{folders / 'b'} {record[f'val_loss/{folders / name}']:.4f}" in capsys.readouterr().out


def test_conversations_are_mixed_in_whole_rows(tmp_path):
    for name, first in (("a", 0), ("b", 500)):
        talks = [{"messages": talk(first + number)} for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text(lines(*talks))
        out = f"--out={tmp_path / name}"
        run_stage(prepare.main, tmp_path / f"{name}.jsonl", out, "--tokenizer=byte")
    spec = f"{tmp_path / 'a'}:3,{tmp_path / 'b'}:1"
    data = load_data(spec)
    config = replace(small_config(tmp_path / "a"), max_seq_len=160, tokens_per_step=160 * 8)
    places, n_targets = train.step_places(0, data, config)
    batch = next(train.step_batches(places[None].reshape(2, 4), data, config, CPU))
    texts = [data.tokenizer.decode(row.tolist()) for row in batch[0]]
    of_b = ["What is 5" in text for text in texts]
    assert sum(of_b) == 1
    assert n_targets == data.rows("train", 160).learned[places].sum()
    for text, is_b in zip(texts, of_b, strict=True):
        numbers = {int(word) for word in text.split() if word.isdigit()}
        assert all((number >= 500) == is_b for number in numbers if number > 99)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("{0}/a:0.7,{0}/b", "give every directory a share, or none"),
        ("{0}/a:0,{0}/b:1", "a share is a number above 0"),
        ("{0}/a:-1,{0}/b:1", "a share is a number above 0"),
        ("{0}/a:much,{0}/b:1", "a share is a number above 0"),
        ("{0}/a:0.1234567,{0}/b:0.8765433", "are too fine: give them fewer digits"),
        ("{0}/a:1,{0}/b:1,{0}/a:1", "twice: give it a larger share"),
        ("{0}/[ab],{0}/a", "twice"),
        ("{0}/a, {0}/nowhere", "no prepared data in"),
        ("{0}/a:1e-5000,{0}/b:1", "a share is a number above 0"),
        ("{0}/x*", "no prepared data matches"),
        ("{0}/a,{0}/gpt2", "have different tokenizers: prepare one with --tokenizer="),
        ("{0}/a,{0}/chats", "are text and conversations, which are not trained together"),
        ("{0}/a,{0}/short", "less than a window"),
    ],
)
def test_directories_that_do_not_fit_are_refused_in_one_line(
    folders, tmp_path, capsys, words, message
):
    (tmp_path / "t.txt").write_text("one two three four five six seven. " * 40)
    (tmp_path / "c.jsonl").write_text(lines(*({"messages": talk(n)} for n in range(40))))
    for name in ("a", "b"):
        shutil.copytree(folders / name, tmp_path / name)
    flags = {
        "gpt2": ("t.txt", "--vocab_size=300"),
        "chats": ("c.jsonl", "--tokenizer=byte"),
        "short": ("t.txt", "--tokenizer=byte", "--val_fraction=0.005"),
    }
    for name, (file, *more) in flags.items():
        if name in words:
            run_stage(prepare.main, tmp_path / file, f"--out={tmp_path / name}", *more)
    capsys.readouterr()
    assert message in refusal(capsys, words.format(tmp_path), tmp_path / "run")


def test_a_run_goes_on_with_the_directories_and_shares_that_it_began_with(
    folders, tmp_path, capsys
):
    spec = f"{folders / 'a'}:0.7,{folders / 'b'}:0.3"
    run_train(spec, tmp_path / "run", "--max_steps=4")
    for other in (f"{folders / 'a'}:0.6,{folders / 'b'}:0.4", f"{folders / 'a'}"):
        line = refusal(capsys, other, tmp_path / "run", "--resume", "--max_steps=8")
        assert "is not the data that" in line
    with pytest.raises(UserError):
        load_data(f"{folders / 'nowhere'}")
