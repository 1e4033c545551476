"""prepare.py: tokenizers against tiktoken and transformers, datasets against their text."""

import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare

SCRIPT = Path(prepare.__file__)
END = prepare.END_OF_TEXT
LINE = "To be, or not to be: that is the question.\n"
PATTERNS = list(prepare.PATTERNS.values())

ODD = "aeiou thTHE'sd  \n\r\t1234.,;-\u00a0\u3000\u0301\u65e5\u672c\u3067\u3059\u3002\u0436\u0e01"
ODD += "\U0001f469\u200d\0"
texts = st.one_of(
    st.text(),
    st.text(st.sampled_from(ODD)),
    st.text(st.sampled_from("a b"), max_size=60),
    st.lists(st.sampled_from([" the", "ing", "'ll", "  ", "\n", END, "HAMLET"])).map("".join),
)
quick = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run_script(*arguments: object, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=120)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Callable[..., prepare.Dataset]:
    """Run prepare.py in this process, in a folder of its own, and open what it wrote to `out`."""

    def call(*arguments: object) -> prepare.Dataset:
        monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, arguments), "--out=out"])
        prepare.main()
        return prepare.load_dataset(Path("out"))

    monkeypatch.chdir(tmp_path)
    return call


def write(path: str, text: str | bytes = LINE * 9) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_jsonl(path: str, documents: list[str], key: str = "text") -> str:
    return write(path, "".join(json.dumps({key: text}) + "\n" for text in documents))


def documents(dataset: prepare.Dataset, split: str) -> list[str]:
    """Decode a split and cut it at the end-of-text ids."""
    tokenizer = prepare.load_tokenizer(dataset.data_dir / "tokenizer.json")
    ids = np.fromfile(dataset.path(split), dataset.dtype)
    ends = np.flatnonzero(ids == tokenizer.eot_token)
    assert len(ids) == dataset.tokens[split] == ends[-1] + 1
    assert len(ends) == dataset.documents[split]
    digest = hashlib.sha256(dataset.path(split).read_bytes()).hexdigest()
    assert dataset.sha256[f"{split}.bin"] == digest
    parts = np.split(ids, ends + 1)[:-1]
    found = [tokenizer.decode_bytes(part[:-1].tolist()) for part in parts]
    assert sum(map(len, found)) == dataset.bytes[split]
    return [text.decode() for text in found]


def all_text(dataset: prepare.Dataset) -> str:
    return "".join(documents(dataset, "train") + documents(dataset, "val"))


def contents(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix != ""}


# Tokenizers


@pytest.fixture(scope="module")
def shakespeare(tmp_path_factory, plays_wheel) -> prepare.Dataset:
    folder = tmp_path_factory.mktemp("shakespeare")
    result = run_script(cwd=folder)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stdout.decode().endswith("next: python train.py config/tiny.py\n")
    return prepare.load_dataset(folder / "data" / "shakespeare")


@pytest.fixture(scope="module")
def trained(shakespeare) -> tiktoken.Encoding:
    return prepare.load_tokenizer(shakespeare.data_dir / "tokenizer.json")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, trained, gpt2_vocabulary):
    """Tokenizers as tiktoken and as `tokenizers` read them from the same file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    ranks = trained._mergeable_ranks
    made = [prepare.new_tokenizer(ranks, 4095, pattern) for pattern in PATTERNS]
    made += [prepare.find_tokenizer("gpt2"), prepare.train_bpe([LINE.encode() * 9], 400)]
    for number, tokenizer in enumerate(made):
        prepare.save_tokenizer(tokenizer, folder / f"{number}.json")
    return [
        (prepare.load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path)))
        for path in folder.iterdir()
    ]


def test_gpt2_gives_the_ids_of_the_two_seed_sentences(gpt2_vocabulary):
    tokenizer = prepare.find_tokenizer("gpt2")
    sentence = "The quick brown fox jumps over the lazy dog."
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]
    assert prepare.encode(tokenizer, sentence) == fox
    assert prepare.encode(tokenizer, "How to predict") == [2437, 284, 4331]
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)


@quick(max_examples=200)
@given(texts)
def test_ids_decode_to_the_text_and_agree_between_tiktoken_and_tokenizers(pairs, text):
    for tokenizer, other in pairs:
        ids = prepare.encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode_ordinary(text)
        if END not in text:  # there it is the special token
            assert ids == other.encode(text).ids


def test_transformers_reads_the_tokenizer_file(shakespeare, trained):
    path = shakespeare.data_dir / "tokenizer.json"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert fast.encode(LINE * 3) == prepare.encode(trained, LINE * 3)
    assert fast.decode(fast.encode(LINE)) == LINE
    assert fast.convert_tokens_to_ids(END) == trained.eot_token


def test_trained_merges_equal_those_of_the_tokenizers_trainer(shakespeare):
    text = [document.encode() for document in documents(shakespeare, "val")]
    ours = prepare.train_with_gigatoken(text, 1000)
    assert ours == prepare.train_with_tokenizers(text, 1000)
    assert len(ours) == 1000 - 257


def test_training_prints_nothing_of_its_own(capfd):
    prepare.train_bpe([LINE.encode() * 9], 300)
    assert capfd.readouterr() == ("", "")


def test_text_that_contains_end_of_text_is_data(trained, run):
    ids = prepare.encode(trained, f"a {END} b")
    assert trained.eot_token not in ids
    dataset = run(write("a.txt", f"{LINE}{END}{LINE}" * 9))
    assert all_text(dataset) == f"{LINE}{END}{LINE}" * 9
    assert dataset.documents == {"train": 1, "val": 1}


def test_character_outside_the_vocabulary_is_named(trained, run):
    ranks = {token: rank for token, rank in trained._mergeable_ranks.items() if token != b"\xe6"}
    small = prepare.new_tokenizer(ranks, 4095)
    assert prepare.encode(small, "hello") == prepare.encode(trained, "hello")
    with pytest.raises(ValueError, match="'\u65e5' is not in the vocabulary"):
        prepare.encode(small, "hello \u65e5\u672c")
    prepare.save_tokenizer(small, Path("small.json"))
    assert all_text(run(write("a.txt"), "--tokenizer=small.json")) == LINE * 9
    with pytest.raises(ValueError, match="'\u65e5' is not in the vocabulary"):
        run(write("b.txt", "hello \u65e5\u672c"), "--tokenizer=small.json", "--overwrite")


def test_undecodable_bytes_of_a_command_line_are_refused(trained):
    with pytest.raises(ValueError, match="not a character"):
        prepare.encode(trained, b"caf\xe9".decode(errors="surrogateescape"))


def test_known_encodings_keep_their_ids_and_get_a_wide_dtype(run, trained, monkeypatch):
    for name, pattern in (("cl100k_base", "gpt4"), ("o200k_base", "o200k")):
        base = prepare.new_tokenizer(trained._mergeable_ranks, 100257, prepare.PATTERNS[pattern])
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name, base=base: base)
        dataset = run(write("a.txt"), f"--tokenizer={name}", "--overwrite")
        assert (dataset.dtype, dataset.vocab_size) == ("uint32", 100258)
        ids = np.fromfile(dataset.path("train"), "<u4").tolist()
        assert ids == [*base.encode_ordinary(documents(dataset, "train")[0]), 100257]


def test_load_tokenizer_refuses_what_is_not_byte_level_bpe(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no tokenizer at"):
        prepare.load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        prepare.load_tokenizer(path)
    prepare.save_tokenizer(prepare.train_bpe([LINE.encode()], 300), path)
    content = json.loads(path.read_text(encoding="utf-8"))
    model = content["model"]
    for changes in (
        {"model": {"type": "Unigram", "vocab": []}},
        {"model": model | {"byte_fallback": True}},
        {"model": model | {"merges": model["merges"][::-1]}},
        {"model": model | {"merges": [["x", "y"]]}},
        {"model": model | {"vocab": {"\u2581the": 0}}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"normalizer": {"type": "Lowercase"}},
        {"added_tokens": []},
        {"model": None},
    ):
        path.write_text(json.dumps(content | changes), encoding="utf-8")
        with pytest.raises(ValueError, match="byte-level BPE") as caught:
            prepare.load_tokenizer(path)
        assert "\n" not in str(caught.value)


# Tokenizers of pretrained models

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = {  # and whether text has no such token
    "gpt2": {END: True},
    "llama3": {"<|begin_of_text|>": True, "<|end_of_text|>": True, "<|eot_id|>": True},
    "smollm": {END: True, "<|im_start|>": True, "<repo_name>": True},
    "qwen": {END: True, "<|im_start|>": True, "<think>": False, "</think>": False},
}


def family(name: str, text: list[str]) -> tokenizers.Tokenizer:
    """Train a tokenizer with the steps of a family's tokenizer.json."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    regex = tokenizers.Regex(LLAMA_SPLIT if name == "llama3" else LLAMA_SPLIT.replace("{1,3}", ""))
    first = {
        "gpt2": [],
        "smollm": [tokenizers.pre_tokenizers.Digits(individual_digits=True)],
    }.get(name, [tokenizers.pre_tokenizers.Split(regex, "isolated")])
    byte_level = functools.partial(tokenizers.pre_tokenizers.ByteLevel, add_prefix_space=False)
    steps = [*first, byte_level(use_regex=name in ("gpt2", "smollm"))]
    tokenizer.pre_tokenizer = (
        tokenizers.pre_tokenizers.Sequence(steps) if name != "gpt2" else steps[0]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    if name == "qwen":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    added = [tokenizers.AddedToken(token, special=True) for token in SPECIAL[name]]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=added if name == "smollm" else [],  # there they have the first ids
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    for token, special in SPECIAL[name].items():
        added = tokenizers.AddedToken(token, special=special, normalized=False)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
    if name == "llama3":  # every way to halve a token is a merge, and whole words are not merged
        content = json.loads(tokenizer.to_str())
        ids = content["model"]["vocab"]
        cuts = [(t[:cut], t[cut:]) for t in sorted(ids, key=ids.get) for cut in range(1, len(t))]
        merges = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        content["model"] |= {"ignore_merges": True, "merges": merges}
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        begin = [("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))]
        template = tokenizers.processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=begin
        )
        tokenizer.post_processor = tokenizers.processors.Sequence(
            [tokenizers.processors.ByteLevel(trim_offsets=False), template]
        )
    return tokenizer


@pytest.fixture(scope="module")
def families(tmp_path_factory, shakespeare) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    text = documents(shakespeare, "val") + ["caf\u00e9 12 345 6,789\n\n  x" * 50]
    for name in SPECIAL:
        family(name, text).save(str(folder / f"{name}.json"))
    return {name: folder / f"{name}.json" for name in SPECIAL}


@pytest.fixture(scope="module")
def family_pairs(families):
    """The families' tokenizers, as read here and as `tokenizers` reads them."""
    found = {}
    for name, path in families.items():
        other = tokenizers.Tokenizer.from_file(str(path))
        other.encode_special_tokens = True  # in text they are text
        found[name] = (prepare.load_tokenizer(path), other)
    return found


awkward = st.lists(
    st.sampled_from(
        [*SPECIAL["llama3"], *SPECIAL["smollm"], *SPECIAL["qwen"], "e\u0301", "\u0338", "\u0323"]
        + ["\u0301", "\u1e0b", "\u1ac1", "\u212b", "\u1100\u1161", " 12", "  3", "\u00bd", "\u2167"]
        + ["\n\n", "'LL", " the", "ing", "   ", "1", "HAMLET:", "\r", "\u00a0", ">", "."]
    )
).map("".join)


@quick(max_examples=300)
@given(st.one_of(texts, awkward))
def test_pretrained_tokenizers_give_the_ids_of_tokenizers_for_any_text(family_pairs, text):
    for name, (tokenizer, other) in family_pairs.items():
        ids = prepare.encode(tokenizer, text)
        assert ids == other.encode(text, add_special_tokens=False).ids, name
        whole = text if name != "qwen" else tokenizer.normalized(text)
        assert tokenizer.decode(ids) == whole


def test_added_tokens_are_decoded_and_known_by_name(family_pairs):
    for name, (tokenizer, other) in family_pairs.items():
        for token in SPECIAL[name]:
            id = other.token_to_id(token)
            assert tokenizer.decode_single_token_bytes(id) == token.encode()
        end = END if END in SPECIAL[name] else "<|end_of_text|>"
        assert tokenizer.eot_token == other.token_to_id(end)
        assert tokenizer.n_vocab == other.get_vocab_size()
        begin = [other.token_to_id("<|begin_of_text|>")] if name == "llama3" else []
        assert list(tokenizer.begin_of_text) == begin == other.encode("").ids


@pytest.mark.parametrize("name", SPECIAL)
def test_data_of_a_pretrained_tokenizer_has_its_ids_and_its_very_file(run, families, name, capfd):
    text = (
        "  12 caf\u00e9 e\u0301\u0323 <think>\u0338 now <|im_start|> 1 \U0001f469\u200d\u0301\n"
        * 500
    )
    dataset = run(write("a.txt", text), f"--tokenizer={families[name]}")
    assert (dataset.data_dir / "tokenizer.json").read_bytes() == families[name].read_bytes()
    other = tokenizers.Tokenizer.from_file(str(families[name]))
    other.encode_special_tokens = True
    ids = np.fromfile(dataset.path("train"), dataset.dtype)
    tokenizer = prepare.load_tokenizer(families[name])
    assert dataset.vocab_size == tokenizer.n_vocab and ids[-1] == tokenizer.eot_token
    part = tokenizer.decode(ids[:-1].tolist())
    assert other.encode(part, add_special_tokens=False).ids == ids[:-1].tolist()
    assert tokenizer.normalized(text).startswith(part) and len(part) > 0.8 * len(text)
    note = capfd.readouterr().err
    assert ("encoding with tiktoken" in note) == (name == "smollm")  # gigatoken lacks its pattern


def test_old_gpt2_file_without_defaults_is_read(families, tmp_path, family_pairs):
    content = json.loads(families["gpt2"].read_text(encoding="utf-8"))
    del content["pre_tokenizer"]["use_regex"], content["model"]["type"]
    content["model"]["merges"] = list(map(" ".join, content["model"]["merges"]))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    ours, theirs = prepare.load_tokenizer(path), family_pairs["gpt2"][1]
    assert prepare.encode(ours, LINE * 9) == theirs.encode(LINE * 9).ids


def change(content: dict, **changes) -> dict:
    """Replace model.KEY, or the first added token's KEY, or a KEY of the file."""
    content = json.loads(json.dumps(content))
    for key, value in changes.items():
        where = content["model"] if key in content["model"] else content
        where[key] = value(where[key]) if callable(value) else value
    return content


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {"type": "Unigram"}, "SentencePiece"),
        ("gpt2", {"byte_fallback": True}, "SentencePiece"),
        ("llama3", {"pre_tokenizer": {"type": "Metaspace"}}, "SentencePiece"),
        ("qwen", {"normalizer": {"type": "NFKC"}}, "changes text before encoding"),
        ("gpt2", {"dropout": 0.1}, "another kind"),
        ("gpt2", {"end_of_word_suffix": "</w>"}, "another kind"),
        ("gpt2", {"pre_tokenizer": lambda p: p | {"add_prefix_space": True}}, "split text"),
        ("gpt2", {"pre_tokenizer": lambda p: p | {"use_regex": False}}, "split text"),
        ("smollm", {"pre_tokenizer": lambda p: p | {"pretokenizers": p["pretokenizers"][:1]}}, ""),
        ("llama3", {"added_tokens": lambda a: a[:1]}, r"no <.*but \['<\|begin_of_text\|>'\]"),
        ("qwen", {"added_tokens": lambda a: a[:2] + [a[2] | {"lstrip": True}]}, "'<think>'"),
        ("qwen", {"added_tokens": lambda a: a[:2] + [a[2] | {"content": "a b"}]}, "'a b'"),
        ("qwen", {"added_tokens": lambda a: a[:2] + [a[2] | {"content": "endof"}]}, "'endof'"),
        ("gpt2", {"added_tokens": lambda a: [a[0] | {"id": 3}]}, "one id"),
        ("gpt2", {"merges": lambda m: m[:-1]}, "merges"),
        ("gpt2", {"merges": lambda m: [m[1], m[0], *m[2:]]}, "merges"),
        ("gpt2", {"vocab": lambda v: v | {"\u0120wherefore": 9999}}, "merges"),
        ("llama3", {"merges": lambda m: m[:-1]}, "merges"),
        ("llama3", {"ignore_merges": False}, "merges"),
    ],
)
def test_file_that_would_give_other_ids_is_refused(families, tmp_path, name, changes, reason):
    content = json.loads(families[name].read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(change(content, **changes)), encoding="utf-8")
    with pytest.raises(ValueError, match=f"cannot be used .*{reason}.*byte-level BPE") as caught:
        prepare.load_tokenizer(path)
    assert "\n" not in str(caught.value)


@quick(max_examples=60)
@given(st.data())
def test_files_of_any_merges_are_refused_or_give_the_ids_of_tokenizers(tmp_path, data):
    ids = {chr(letter): letter - 97 for letter in range(97, 101)}
    merges = []
    for _ in range(data.draw(st.integers(1, 8))):
        pair = tuple(data.draw(st.sampled_from(sorted(ids))) for _ in "lr")
        merges.append(pair)
        ids.setdefault("".join(pair), len(ids))
    whole = data.draw(st.booleans())
    model = {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": whole}
    added = {"id": 99, "content": END, "special": True, "normalized": False}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {"version": "1.0", "added_tokens": [added], "pre_tokenizer": byte_level}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {"model": model}), encoding="utf-8")
    try:
        tokenizer = prepare.load_tokenizer(path)
    except ValueError:
        return
    other = tokenizers.Tokenizer.from_file(str(path))
    for length in range(1, 6):
        for text in map("".join, itertools.product("abc", repeat=length)):
            assert prepare.encode(tokenizer, text) == other.encode(text).ids


# Datasets


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


def test_end_of_text_is_the_last_id(shakespeare, trained):
    assert shakespeare.vocab_size == trained.n_vocab == 4096
    assert trained.eot_token == 4095
    assert shakespeare.dtype == "uint16"


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
    if sum(len(text.encode()) for text in expected) < 50:
        return  # may leave a split without text
    dataset = run(*arguments)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    whole = train + val
    if len(whole) > len(expected):  # the document at the cut became two
        whole = [*train[:-1], train[-1] + val[0], *val[1:]]
    assert whole == expected
    total = sum(dataset.bytes.values())
    assert 0 <= int(total * (1 - val_fraction)) - dataset.bytes["train"] <= 3


@quick(max_examples=100)
@given(texts, st.integers(5, 40))
def test_blocks_of_a_document_have_the_ids_of_the_whole(monkeypatch, pairs, text, size):
    monkeypatch.setattr(prepare, "BLOCK", size)
    notes: prepare.Notes = {}
    blocks = list(prepare.text_blocks(io.BytesIO(text.encode()), notes, Path("x")))
    assert b"".join(block for block, _ in blocks).decode() == text.removeprefix("\ufeff")
    assert [ends for _, ends in blocks] == [False] * (len(blocks) - 1) + [True]
    if not notes and not text.startswith("\ufeff"):
        for tokenizer, _ in pairs:
            ids = [prepare.encode_bytes(tokenizer, block).tolist() for block, _ in blocks]
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
    assert all_text(prepare.load_dataset(tmp_path / "out")).encode() == text


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


def test_repeated_and_empty_documents_are_dropped_and_counted(run, capsys):
    write_jsonl("a.jsonl", ["", "one " * 30, "two " * 30, "one " * 30, " \n", "three " * 30])
    dataset = run("a.jsonl", "--tokenizer=byte", "--val_fraction=0.01")
    assert all_text(dataset) == "one " * 30 + "two " * 30 + "three " * 30
    assert "dropped: 2 empty and 1 repeated documents" in capsys.readouterr().out


def test_shuffle_permutes_the_documents_and_depends_on_the_seed_alone(run):
    texts = [f"document {number}. " for number in range(1100)]
    write_jsonl("a.jsonl", texts)
    orders = []
    for seed in (0, 0, 1):
        dataset = run("a.jsonl", "--tokenizer=byte", "--shuffle", f"--seed={seed}", "--overwrite")
        orders.append(documents(dataset, "train"))
    assert orders[0] == orders[1] != orders[2]
    plain = run("a.jsonl", "--tokenizer=byte", "--overwrite")
    assert orders[0] != documents(plain, "train") == sorted(orders[0], key=texts.index)


@pytest.fixture
def corpus(run) -> list[str]:
    """Several files of odd text, some longer than one block."""
    letters = random.Random(0)
    words = ["".join(letters.choices(ODD, k=letters.randint(1, 9))) for _ in range(2000)]
    long = " ".join(letters.choices(words, k=90_000))
    files = {f"{n}.txt": long[n * 1000 : n * 90_000] for n in range(1, 4)}
    return [write(name, text) for name, text in files.items()]


def test_bytes_written_do_not_depend_on_workers_or_encoder(run, corpus, monkeypatch, capfd):
    run(*corpus, "--workers=1", "--vocab_size=1000")
    expected = contents()
    run(*corpus, "--workers=3", "--vocab_size=1000", "--overwrite")
    assert contents()["train.bin"] == expected["train.bin"]
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    run(*corpus, "--workers=2", "--tokenizer=out/tokenizer.json", "--overwrite")
    assert "pip install gigatoken" in capfd.readouterr().err
    for name in ("train.bin", "val.bin", "tokenizer.json"):
        assert contents()[name] == expected[name]


def test_differing_encoder_is_noticed_and_not_used(run, corpus, monkeypatch, capfd):
    run(*corpus, "--tokenizer=byte")
    expected = contents()["train.bin"]
    wrong = lambda texts: [np.zeros(len(text), np.uint32) for text in texts]  # noqa: E731
    monkeypatch.setattr(prepare, "gigatoken_encoder", lambda *_: wrong)
    run(*corpus, "--tokenizer=byte", "--overwrite")
    assert "gigatoken's ids are not tiktoken's" in capfd.readouterr().err
    assert contents()["train.bin"] == expected


def test_preview_shows_pieces_with_ids_and_writes_nothing(run, capsys, monkeypatch):
    write("a.txt", LINE * 9)
    monkeypatch.setattr(sys, "argv", ["prepare.py", "a.txt", "--preview", "--tokenizer=byte"])
    prepare.main()
    out = capsys.readouterr().out
    assert '["T", "o", " ", "b", "e"' in out and "-> [84, 111, 32, 98, 101" in out
    assert "\x1b[" in out and "1 documents" in out
    assert os.listdir() == ["a.txt"]


def test_small_text_gives_a_smaller_vocabulary_and_says_so(run, capsys):
    size = run(write("a.txt", "hello hello\n" * 20)).vocab_size
    assert f"a vocabulary of {size}, not 4,096" in capsys.readouterr().out


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


def test_another_tokenizer_under_the_same_name_is_another_dataset(run, families):
    run(write("a.txt"), "--tokenizer=" + write("t.json", families["gpt2"].read_bytes()))
    write("t.json", families["qwen"].read_bytes())
    with pytest.raises(ValueError, match="another dataset"):
        run("a.txt", "--tokenizer=t.json")


def test_directory_that_is_no_dataset_is_never_replaced(run):
    write("out/precious.txt")
    with pytest.raises(ValueError, match="not a dataset"):
        run(write("a.txt"), "--overwrite")
    assert os.listdir("out") == ["precious.txt"]


# Bad input


def test_odd_bytes_are_kept_or_replaced_counted_and_placed(run, capfd):
    write("a.txt", b"\xef\xbb\xbf" + b"caf\xc3\xa9 " * 20 + b"bad \xff\xfe byte, \0 NUL\r\n" * 2)
    dataset = run("a.txt", "--tokenizer=byte")
    expected = "caf\u00e9 " * 20 + "bad \ufffd\ufffd byte, \0 NUL\r\n" * 2
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


def test_nothing_to_read_is_refused(run):
    Path("empty").mkdir()
    for name, message in (
        ("nowhere.txt", "no file nowhere.txt"),
        ("*.nothing", r"no file \*.nothing"),
        ("empty", "no text files in empty"),
        (write("empty.txt", ""), "0 bytes of text"),
        (write("short.txt", "a"), "1 bytes of text"),
    ):
        with pytest.raises(ValueError, match=message):
            run(name, "--tokenizer=byte")
    assert not list(Path().glob("out*"))


def test_text_without_any_safe_cut_is_cut_and_counted(run, capfd, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 1000)
    text = "\u65e5" * 5000
    assert all_text(run(write("a.txt", text), "--tokenizer=byte")) == text
    assert "blocks cut inside a word; the first: a.txt, byte" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.txt", "--val_fraction=1.5"], "val_fraction=1.5 must lie between 0 and 1"),
        (["a.txt", "--vocab_size=100"], "vocab_size=100 must be 257"),
        (["a.txt", "--vocab_sise=300"], "did you mean --vocab_size?"),
        (["a.txt", "--tokenizer=gtp2"], "none of bpe, byte"),
        (["a.txt", "--tokenizer=gpt2"], "TIKTOKEN_CACHE_DIR"),
    ],
)
def test_refusal_is_one_line_with_exit_code_2(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    (tmp_path / "a.txt").write_text(LINE * 9)
    result = run_script(*arguments, cwd=tmp_path)
    lines = result.stderr.decode().splitlines()
    assert result.returncode == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert not list(tmp_path.glob("data/*"))


def test_full_disk_leaves_nothing_and_says_so(tmp_path):
    resource = pytest.importorskip("resource")
    (tmp_path / "a.txt").write_text(LINE * 9000)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "a.txt", "--tokenizer=byte"],
        cwd=tmp_path,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert result.returncode == 2
    assert b"error: no space left for data/a" in result.stderr
    assert not list((tmp_path / "data").iterdir())


def test_disk_that_is_too_small_is_noticed_before_encoding(run, monkeypatch):
    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs about 1 MB, but 0 MB are free; .*--out"):
        run(write("a.txt", LINE * 9000), "--tokenizer=byte")


def test_interrupted_run_leaves_nothing_that_looks_complete(tmp_path):
    (tmp_path / "a.txt").write_text(LINE * 100_000)
    command = [sys.executable, str(SCRIPT), "a.txt", "--vocab_size=300"]
    moments = random.Random(0)
    for stop in (signal.SIGINT, signal.SIGINT, signal.SIGKILL, signal.SIGKILL):
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE)
        while not (tmp_path / "data" / "a.partial").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.5))
        process.send_signal(stop)
        process.communicate()
        if (tmp_path / "data" / "a").exists():  # it was done before the signal came
            assert all_text(prepare.load_dataset(tmp_path / "data" / "a")) == LINE * 100_000
        elif stop == signal.SIGINT:
            assert process.returncode == 130 and not os.listdir(tmp_path / "data")
    (tmp_path / "data" / "a.partial").mkdir(exist_ok=True)
    assert run_script("a.txt", "--vocab_size=300", cwd=tmp_path).returncode == 0
    assert os.listdir(tmp_path / "data") == ["a"]
    assert all_text(prepare.load_dataset(tmp_path / "data" / "a")) == LINE * 100_000


# What the other stages read


def test_load_dataset_refuses_a_missing_directory(tmp_path):
    with pytest.raises(ValueError, match=r"no prepared data in .*nowhere; run `python prepare.py"):
        prepare.load_dataset(tmp_path / "nowhere")


def test_load_dataset_refuses_a_truncated_bin_with_both_sizes(run):
    path = run(write("a.txt"), "--tokenizer=byte").path("train")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{size - 1:,} bytes instead of {size:,}"):
        prepare.load_dataset(Path("out"))
    path.unlink()
    with pytest.raises(ValueError, match=f"0 bytes instead of {size:,}"):
        prepare.load_dataset(Path("out"))


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"tokens": 3}', '{"dtype": "x"}'])
def test_load_dataset_refuses_a_damaged_meta_json(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(ValueError, match="meta.json is damaged"):
        prepare.load_dataset(tmp_path)
