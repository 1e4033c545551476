"""Tokenizers: the ids of tiktoken, of `tokenizers` and of transformers, for any text."""

import functools
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from prepared import END, LINE, all_text, documents, quick, texts, write

from plainllama.tokenizer import (
    PATTERNS,
    encode,
    find_tokenizer,
    load_tokenizer,
    new_tokenizer,
    save_tokenizer,
    train_bpe,
    train_with_gigatoken,
    train_with_tokenizers,
)

pytest_plugins = ["prepared_fixtures"]


def test_gpt2_gives_the_ids_of_the_two_seed_sentences(gpt2_vocabulary):
    tokenizer = find_tokenizer("gpt2")
    sentence = "The quick brown fox jumps over the lazy dog."
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]
    assert encode(tokenizer, sentence) == fox
    assert encode(tokenizer, "How to predict") == [2437, 284, 4331]
    assert (tokenizer.n_vocab, tokenizer.eot_token) == (50257, 50256)


@quick(max_examples=200)
@given(texts)
def test_ids_decode_to_the_text_and_agree_between_tiktoken_and_tokenizers(pairs, text):
    for tokenizer, other in pairs:
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer.encode_ordinary(text)
        if END not in text:  # there it is the special token
            assert ids == other.encode(text).ids


def test_transformers_reads_the_tokenizer_file(shakespeare, trained):
    path = shakespeare.data_dir / "tokenizer.json"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    assert fast.encode(LINE * 3) == encode(trained, LINE * 3)
    assert fast.decode(fast.encode(LINE)) == LINE
    assert fast.convert_tokens_to_ids(END) == trained.eot_token


def test_trained_merges_equal_those_of_the_tokenizers_trainer(shakespeare):
    text = [document.encode() for document in documents(shakespeare, "val")]
    ours = train_with_gigatoken(text, 1000)
    assert ours == train_with_tokenizers(text, 1000)
    assert len(ours) == 1000 - 257


def test_training_prints_nothing_of_its_own(capfd):
    train_bpe([LINE.encode() * 9], 300)
    assert capfd.readouterr() == ("", "")


def test_text_that_contains_end_of_text_is_data(trained, run):
    ids = encode(trained, f"a {END} b")
    assert trained.eot_token not in ids
    dataset = run(write("a.txt", f"{LINE}{END}{LINE}" * 9))
    assert all_text(dataset) == f"{LINE}{END}{LINE}" * 9
    assert dataset.documents == {"train": 1, "val": 1}


def test_character_outside_the_vocabulary_is_named(trained, run):
    ranks = {token: rank for token, rank in trained.ranks.items() if token != b"\xe6"}
    small = new_tokenizer(ranks, 4095)
    assert encode(small, "hello") == encode(trained, "hello")
    with pytest.raises(ValueError, match="'\u65e5' is not in the vocabulary"):
        encode(small, "hello \u65e5\u672c")
    save_tokenizer(small, Path("small.json"))
    assert all_text(run(write("a.txt"), "--tokenizer=small.json")) == LINE * 9
    with pytest.raises(ValueError, match="'\u65e5' is not in the vocabulary"):
        run(write("b.txt", "hello \u65e5\u672c"), "--tokenizer=small.json", "--overwrite")


def test_undecodable_bytes_of_a_command_line_are_refused(trained):
    with pytest.raises(ValueError, match="not a character"):
        encode(trained, b"caf\xe9".decode(errors="surrogateescape"))


def test_known_encodings_keep_their_ids_and_get_a_wide_dtype(run, trained, monkeypatch):
    for name, pattern in (("cl100k_base", "gpt4"), ("o200k_base", "o200k")):
        base = new_tokenizer(trained.ranks, 100257, PATTERNS[pattern])
        monkeypatch.setattr(tiktoken, "get_encoding", lambda name, base=base: base)
        dataset = run(write("a.txt"), f"--tokenizer={name}", "--overwrite")
        assert (dataset.dtype, dataset.vocab_size) == ("uint32", 100258)
        ids = np.fromfile(dataset.path("train"), "<u4").tolist()
        assert ids == [*base.encode_ordinary(documents(dataset, "train")[0]), 100257]


def test_load_tokenizer_refuses_what_is_not_byte_level_bpe(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        load_tokenizer(path)
    save_tokenizer(train_bpe([LINE.encode()], 300), path)
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
            load_tokenizer(path)
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
        found[name] = (load_tokenizer(path), other)
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
        ids = encode(tokenizer, text)
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
    tokenizer = load_tokenizer(families[name])
    assert dataset.vocab_size == tokenizer.n_vocab and ids[-1] == tokenizer.eot_token
    assert ids[: len(tokenizer.begin_of_text)].tolist() == list(tokenizer.begin_of_text)
    part = tokenizer.decode(ids[len(tokenizer.begin_of_text) : -1].tolist())
    assert other.encode(part).ids == ids[:-1].tolist()  # with begin-of-text, if it has one
    assert tokenizer.normalized(text).startswith(part) and len(part) > 0.8 * len(text)
    note = capfd.readouterr().err
    assert ("encoding with tiktoken" in note) == (name == "smollm")  # gigatoken lacks its pattern


def test_old_gpt2_file_without_defaults_is_read(families, tmp_path, family_pairs):
    content = json.loads(families["gpt2"].read_text(encoding="utf-8"))
    del content["pre_tokenizer"]["use_regex"], content["model"]["type"]
    content["model"]["merges"] = list(map(" ".join, content["model"]["merges"]))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    ours, theirs = load_tokenizer(path), family_pairs["gpt2"][1]
    assert encode(ours, LINE * 9) == theirs.encode(LINE * 9).ids


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
        load_tokenizer(path)
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
    added = {"id": len(ids), "content": END, "special": True, "normalized": False}
    added |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    content = {"version": "1.0", "added_tokens": [added], "pre_tokenizer": byte_level}
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content | {"model": model}), encoding="utf-8")
    try:
        tokenizer = load_tokenizer(path)
    except ValueError:
        return
    other = tokenizers.Tokenizer.from_file(str(path))
    for length in range(1, 6):
        for text in map("".join, itertools.product("abc", repeat=length)):
            assert encode(tokenizer, text) == other.encode(text).ids
