"""prepare.py: tokenizers against tiktoken and transformers, datasets against their text."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from tests.conftest import ROOT

END = prepare.END_OF_TEXT
SOME_TEXT = "To be, or not to be: that is the question.\n" * 50


def run_prepare(*arguments: object, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "prepare.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=120)


def prepared(*arguments: object, cwd: Path, stdin: bytes = b"") -> prepare.Dataset:
    result = run_prepare(*arguments, "--out=out", cwd=cwd, stdin=stdin)
    assert result.returncode == 0, result.stderr.decode()
    return prepare.load_dataset(cwd / "out")


def refusal(*arguments: object, cwd: Path, stdin: bytes = b"") -> str:
    """Run, and return the one line of a refusal."""
    result = run_prepare(*arguments, cwd=cwd, stdin=stdin)
    lines = result.stderr.decode().strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (result.returncode, len(errors), lines[-1]) == (2, 1, errors[0])
    assert b"Traceback" not in result.stderr
    assert not list(cwd.glob("**/*.partial"))
    return errors[0]


def documents(dataset: prepare.Dataset, split: str) -> list[str]:
    """Decode a split and cut it at the end-of-text ids."""
    tokenizer = prepare.load_tokenizer(dataset.data_dir / "tokenizer.json")
    ids = np.fromfile(dataset.path(split), dataset.dtype)
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    assert len(ids) == dataset.tokens[split] == ends[-1] + 1
    parts = np.split(ids, ends + 1)[:-1]
    return [tokenizer.decode_bytes(part[:-1].tolist()).decode() for part in parts]


@pytest.fixture(scope="session")
def shakespeare(tmp_path_factory, plays_wheel) -> prepare.Dataset:
    folder = tmp_path_factory.mktemp("shakespeare")
    result = run_prepare(cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    assert "python train.py config/tiny.py\n" in result.stdout.decode()
    return prepare.load_dataset(folder / "data" / "shakespeare")


@pytest.fixture(scope="session")
def trained(shakespeare) -> tiktoken.Encoding:
    return prepare.load_tokenizer(shakespeare.data_dir / "tokenizer.json")


def test_gpt2_gives_the_ids_of_the_two_seed_sentences(gpt2_vocabulary, tmp_path):
    path = tmp_path / "tokenizer.json"
    prepare.save_tokenizer(gpt2_vocabulary, path)
    tokenizer = prepare.load_tokenizer(path)
    sentence = "The quick brown fox jumps over the lazy dog."
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]
    assert prepare.encode(tokenizer, sentence) == fox
    assert prepare.encode(tokenizer, "How to predict") == [2437, 284, 4331]
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)


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


def test_end_of_text_is_the_last_id_and_follows_every_document(shakespeare, trained):
    assert shakespeare.vocab_size == trained.n_vocab == 4096
    assert trained.eot_token == 4095
    assert shakespeare.dtype == "uint16"
    for split in ("train", "val"):
        assert len(documents(shakespeare, split)) == shakespeare.documents[split]
        size = sum(len(text.encode()) for text in documents(shakespeare, split))
        assert size == shakespeare.bytes[split]


def test_one_text_is_split_where_nanogpt_splits_it(tmp_path):
    text = "".join(f"line {number}, and more of it\n" for number in range(3000))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    dataset = prepared("input.txt", "--vocab_size=300", cwd=tmp_path)
    cut = int(len(text) * 0.9)
    assert documents(dataset, "train") == [text[:cut]]
    assert documents(dataset, "val") == [text[cut:]]


def test_trained_merges_equal_those_of_the_tokenizers_trainer(shakespeare, trained):
    text = [document.encode() for document in documents(shakespeare, "train")[:5]]
    ours = prepare.train_with_gigatoken(text, 1000)
    assert ours == prepare.train_with_tokenizers(text, 1000)
    assert len(ours) == 1000 - 257


texts = st.one_of(
    st.text(),
    st.text(st.sampled_from("aeiou thTHE'sd  \n\r\t1234.,;-\u00a0\u3000é\u0301日本語。👩‍👧\0")),
    st.lists(st.sampled_from([" the", "ing", "'ll", "  ", "\n", END, "HAMLET", "ed"])).map("".join),
)


@settings(max_examples=150, deadline=None)
@given(texts)
def test_ids_agree_between_tiktoken_tokenizers_and_our_file(trained_files, text):
    for tokenizer, other in trained_files:
        ids = prepare.encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode_ordinary(text)
        if END not in text:  # transformers reads it as the special token
            assert ids == other.encode(text).ids


@pytest.fixture(scope="session")
def trained_files(tmp_path_factory, shakespeare, gpt2_vocabulary):
    """Tokenizers as tiktoken and as `tokenizers` read them from the same file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    tiny = prepare.train_bpe([SOME_TEXT.encode()], 400)
    pairs = []
    for number, tokenizer in enumerate([tiny, gpt2_vocabulary]):
        prepare.save_tokenizer(tokenizer, folder / f"{number}.json")
    for path in [*folder.iterdir(), shakespeare.data_dir / "tokenizer.json"]:
        pairs.append((prepare.load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))))
    return pairs


def test_transformers_reads_the_tokenizer_file(shakespeare, trained):
    path = shakespeare.data_dir / "tokenizer.json"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert fast.encode(SOME_TEXT) == prepare.encode(trained, SOME_TEXT)
    assert fast.convert_tokens_to_ids(END) == trained.eot_token


def test_text_that_contains_end_of_text_is_data(trained):
    ids = prepare.encode(trained, f"a {END} b")
    assert trained.eot_token not in ids
    assert trained.decode(ids) == f"a {END} b"


def test_character_outside_the_vocabulary_is_named(trained):
    ranks = {token: rank for token, rank in trained._mergeable_ranks.items() if token != b"\xe6"}
    small = prepare.new_tokenizer(ranks, 4095)
    assert prepare.encode(small, "hello") == prepare.encode(trained, "hello")
    with pytest.raises(ValueError, match="'日' is not in the vocabulary"):
        prepare.encode(small, "hello 日本")


def test_undecodable_bytes_of_a_command_line_are_refused(trained):
    with pytest.raises(ValueError, match="not a character"):
        prepare.encode(trained, b"caf\xe9".decode(errors="surrogateescape"))


def test_byte_tokenizer_has_257_tokens_and_one_a_byte(tmp_path):
    (tmp_path / "a.txt").write_text(SOME_TEXT + "é", encoding="utf-8")
    dataset = prepared("a.txt", "--tokenizer=byte", cwd=tmp_path)
    assert dataset.vocab_size == 257
    assert dataset.tokens == {split: dataset.bytes[split] + 1 for split in ("train", "val")}


def test_gpt2_dataset_holds_tiktokens_ids(tmp_path, gpt2_vocabulary):
    (tmp_path / "a.txt").write_text(SOME_TEXT, encoding="utf-8")
    dataset = prepared("a.txt", "--tokenizer=gpt2", cwd=tmp_path)
    ids = np.fromfile(dataset.path("train"), dataset.dtype).tolist()
    expected = gpt2_vocabulary.encode_ordinary(SOME_TEXT[: int(len(SOME_TEXT) * 0.9)])
    assert ids == [*expected, gpt2_vocabulary.eot_token]


def test_small_text_gives_a_smaller_vocabulary_and_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("hello hello\n" * 20, encoding="utf-8")
    result = run_prepare("a.txt", "--out=out", cwd=tmp_path)
    size = prepare.load_dataset(tmp_path / "out").vocab_size
    assert f"a vocabulary of {size}, not 4,096" in result.stdout.decode()


def test_second_run_with_the_same_settings_does_nothing_another_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(SOME_TEXT, encoding="utf-8")
    first = prepared("a.txt", "--tokenizer=byte", cwd=tmp_path)
    time = first.path("train").stat().st_mtime_ns
    again = run_prepare("a.txt", "--tokenizer=byte", "--out=out", cwd=tmp_path)
    assert again.returncode == 0 and b"already prepared" in again.stdout
    assert first.path("train").stat().st_mtime_ns == time
    other = ["a.txt", "--tokenizer=byte", "--val_fraction=0.2", "--out=out"]
    assert "--overwrite" in refusal(*other, cwd=tmp_path)
    assert run_prepare(*other, "--overwrite", cwd=tmp_path).returncode == 0
    assert prepare.load_dataset(tmp_path / "out").tokens != first.tokens


def test_directory_that_is_no_dataset_is_never_replaced(tmp_path):
    (tmp_path / "a.txt").write_text(SOME_TEXT, encoding="utf-8")
    message = refusal("a.txt", "--out=.", "--overwrite", cwd=tmp_path)
    assert "not a dataset" in message
    assert (tmp_path / "a.txt").exists()


def test_wrong_values_are_refused_with_the_limit(tmp_path):
    (tmp_path / "a.txt").write_text(SOME_TEXT, encoding="utf-8")
    assert "between 0 and 1" in refusal("a.txt", "--val_fraction=1.5", cwd=tmp_path)
    assert "257" in refusal("a.txt", "--vocab_size=100", cwd=tmp_path)
    assert "vocab_size" in refusal("a.txt", "--vocab_sise=100", cwd=tmp_path)
    assert "no file b.txt" in refusal("b.txt", cwd=tmp_path)
    assert "none of bpe, byte" in refusal("a.txt", "--tokenizer=gtp2", cwd=tmp_path)


def test_vocabulary_that_cannot_be_downloaded_is_said(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(SOME_TEXT, encoding="utf-8")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    message = refusal("a.txt", "--tokenizer=gpt2", cwd=tmp_path)
    assert "TIKTOKEN_CACHE_DIR" in message and "--tokenizer=bpe" in message


@pytest.fixture
def dataset(tmp_path) -> prepare.Dataset:
    (tmp_path / "a.txt").write_text(SOME_TEXT, encoding="utf-8")
    return prepared("a.txt", "--tokenizer=byte", cwd=tmp_path)


def test_load_dataset_refuses_a_missing_directory(tmp_path):
    with pytest.raises(ValueError, match=r"no prepared data in .*nowhere; run `python prepare.py"):
        prepare.load_dataset(tmp_path / "nowhere")


def test_load_dataset_refuses_a_truncated_bin_with_both_sizes(dataset):
    size = dataset.path("train").stat().st_size
    dataset.path("train").write_bytes(dataset.path("train").read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{size - 1:,} bytes instead of {size:,}"):
        prepare.load_dataset(dataset.data_dir)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tokens": 3}', '{"dtype": "x"}'])
def test_load_dataset_refuses_a_damaged_meta_json(dataset, content):
    (dataset.data_dir / "meta.json").write_text(content)
    with pytest.raises(ValueError, match="meta.json is damaged"):
        prepare.load_dataset(dataset.data_dir)


def damaged(spec: dict, **changes: object) -> str:
    return json.dumps(spec | changes)


def test_load_tokenizer_refuses_what_is_not_byte_level_bpe(tmp_path, dataset):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no tokenizer at"):
        prepare.load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        prepare.load_tokenizer(path)
    prepare.save_tokenizer(prepare.train_bpe([SOME_TEXT.encode()], 300), path)
    spec = json.loads(path.read_text(encoding="utf-8"))
    metaspace = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always"}
    merges = spec["model"]["merges"]
    for changes in (
        {"model": {"type": "Unigram", "vocab": []}},
        {"model": spec["model"] | {"byte_fallback": True}},
        {"model": spec["model"] | {"merges": merges[::-1]}},
        {"model": spec["model"] | {"merges": [["x", "y"]]}},
        {"pre_tokenizer": metaspace},
        {"pre_tokenizer": None},
        {"normalizer": {"type": "NFC"}},
        {"added_tokens": []},
        {"model": None},
    ):
        path.write_text(json.dumps(spec | changes), encoding="utf-8")
        with pytest.raises(ValueError, match="byte-level BPE") as caught:
            prepare.load_tokenizer(path)
        assert "\n" not in str(caught.value)
