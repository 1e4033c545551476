"""Tokenizers: the ids of tiktoken, of `tokenizers` and of transformers, for any text."""

import functools
import itertools
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from prepared import END, LINE, ODD, all_text, documents, quick, texts, write

from plainllama.settings import UserError
from plainllama.tokenizer import (
    BYTE_LEVEL,
    PATTERNS,
    PRINTED,
    all_merges,
    encode,
    find_encoder,
    find_tokenizer,
    gigatoken_encoder,
    load_tokenizer,
    new_tokenizer,
    save_tokenizer,
    splitting_steps,
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


# Files of every kind, against `tokenizers`

LETTERS = ["a", "b", "t", "h", "e", "1", "<", ">", "|", "\u0120", "\u010a"]
CONTENTS = [END, "<|im_start|>", "<|im", "<th", "the", "th", "<|a|>", "|>b", " x", "x ", "\n", "ab"]
CONTENTS += ["\u0120a", "<think>", "e\u0301", "\u00e9", "<\u00e9>", "end", ">", "\u65e5", "12"]
PIECES = ["a", "b", "ab", " ", "  ", "\n", "\n\n", "\t", "the", "th", "e\u0301", "\u0301", "\u0338"]
PIECES += ["1", "23", "<", "|>", "<|", "x", "_", "\u65e5", "\u017f", "'s", "'S", ".", "\u00a0"]


def random_vocabulary(chance: random.Random) -> dict:
    """Return a BPE model: of any merges, or of all that are possible."""
    ids = {chr(PRINTED.get(byte, byte)): byte for byte in range(256)}
    merges = []
    for _ in range(chance.randint(0, 12)):
        short = [token for token in ids if len(token) < 4 and set(token) <= set(LETTERS)]
        left, right = chance.choice(short), chance.choice(short)
        merges.append([left, right])
        ids.setdefault(left + right, len(ids))
    whole = chance.random() < 0.5
    if whole and chance.random() < 0.7:
        merges = [merge.split(" ") for merge in all_merges(ids)]
    return {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": whole}


def random_added_tokens(chance: random.Random, vocab: dict[str, int]) -> list[dict]:
    contents = [END, *chance.sample(CONTENTS[1:], chance.randint(0, 4))]
    chance.shuffle(contents)
    inside = [content for content in contents if chance.random() < 0.1]
    for content in inside:
        vocab.setdefault(content, len(vocab))
    tokens, following = [], len(vocab)
    for content in contents:
        flags = {flag: chance.random() < 0.15 for flag in ("single_word", "lstrip", "rstrip")}
        flags |= {"normalized": chance.random() < 0.3, "special": chance.random() < 0.8}
        if not flags["special"] and chance.random() < 0.8:
            flags |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        id = vocab.get(content, following)
        following = max(following, id + 1)
        tokens.append({"id": id + (chance.random() < 0.02), "content": content, **flags})
    return tokens


def random_template(before: list[dict], after: list[dict]) -> dict:
    known = [*before, *after]
    pieces = [{"SpecialToken": {"id": token["content"], "type_id": 0}} for token in known]
    pieces.insert(len(before), {"Sequence": {"id": "A", "type_id": 0}})
    ids = {t["content"]: {"id": t["content"], "ids": [t["id"]], "tokens": ["x"]} for t in known}
    pair = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {"type": "TemplateProcessing", "single": pieces, "pair": pair, "special_tokens": ids}


def random_file(chance: random.Random) -> dict:
    """Return a tokenizer.json that is mostly one of byte-level BPE, with a few surprises."""
    model = random_vocabulary(chance)
    added = random_added_tokens(chance, model["vocab"])
    steps = json.loads(json.dumps(splitting_steps(chance.choice(list(PATTERNS.values())))))
    if steps[0]["type"] == "Split" and chance.random() < 0.5:
        behaviors = ["Isolated", "Removed", "MergedWithNext", "MergedWithPrevious", "Contiguous"]
        steps[0] |= {"behavior": chance.choice(behaviors), "invert": chance.random() < 0.6}
    for key in ("add_prefix_space", "use_regex", "trim_offsets"):
        if chance.random() < 0.05:
            steps[-1][key] = not steps[-1][key]
    sequence = {"type": "Sequence", "pretokenizers": steps}
    nfc = {"type": "NFC"}
    normalizers = [None, None, nfc, {"type": "Sequence", "normalizers": [nfc]}]
    normalizers += [{"type": "Sequence", "normalizers": []}, {"type": "NFKC"}]
    one, two = chance.choice(added), chance.choice(added)
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    ends = {"sep": [one["content"], one["id"]], "cls": [two["content"], two["id"]]}
    begins = random_template([one], [])
    processors = [None, None, byte_level, begins, random_template([one, two], [])]
    processors += [random_template([one], [two]), {"type": "BertProcessing", **ends}]
    processors += [{"type": "Sequence", "processors": [byte_level, begins]}]
    processors += [{"type": "Sequence", "processors": [begins, begins]}]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": chance.choice(normalizers),
        "pre_tokenizer": chance.choice([sequence] * 9 + [None]) if steps[1:] else steps[0],
        "post_processor": chance.choice(processors),
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    if chance.random() < 0.03:
        content["truncation"] = {
            "direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0
        }  # fmt: skip
    return content


@pytest.mark.parametrize("seed", range(6))
def test_any_file_is_refused_or_gives_the_ids_of_tokenizers(tmp_path, seed):
    chance = random.Random(seed)
    path = tmp_path / "tokenizer.json"
    accepted = 0
    for _ in range(150):
        content = random_file(chance)
        path.write_text(json.dumps(content), encoding="utf-8")
        try:
            tokenizer = load_tokenizer(path)
        except UserError:
            continue
        accepted += 1
        other = tokenizers.Tokenizer.from_file(str(path))
        pieces = [token["content"] for token in content["added_tokens"]] * 3 + PIECES
        for special_tokens in (False, True) * 15:
            text = "".join(chance.choices(pieces, k=chance.randint(0, 14)))
            other.encode_special_tokens = not special_tokens
            try:
                expected = other.encode(text).ids
            except BaseException as error:
                assert "Panic" in type(error).__name__  # there are texts that it cannot encode
                continue
            try:
                found = [*tokenizer.begin_of_text, *encode(tokenizer, text, special_tokens)]
            except UserError:  # a special token of one byte, which text then lacks
                continue
            assert found == expected, (text, content["added_tokens"])
    assert accepted > 15


@pytest.fixture
def plain(tmp_path) -> dict:
    """Return the content of a file that can be used."""
    save_tokenizer(train_bpe([LINE.encode() * 9], 400), tmp_path / "plain.json")
    content = json.loads((tmp_path / "plain.json").read_text(encoding="utf-8"))
    return content | {"post_processor": None}


def added_token(file: dict, **changes) -> dict:
    """Return a further entry of added_tokens."""
    last = file["added_tokens"][-1]
    return last | {"id": last["id"] + 1, "content": "<|x|>", "special": True} | changes


TEMPLATE = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
ENDS = {"SpecialToken": {"id": END, "type_id": 0}}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"truncation": {"max_length": 5}}, "truncation.*max_length"),
        ({"padding": {"pad_id": 0}}, "padding.*pad_id"),
        ({"normalizer": {"type": "Replace"}}, "normalizer.*Replace"),
        ({"normalizer": "NFC"}, "normalizers hold"),
        ({"decoder": {"type": "WordPiece"}}, "decoder.*WordPiece"),
        ({"colour": "red"}, "'colour'.*red"),
        ({"post_processor": {"type": "RobertaProcessing", "sep": 1}}, "post_processor.*Roberta"),
        ({"post_processor": {"type": "New"}}, "post_processor.*New"),
        ({"post_processor": TEMPLATE | {"single": [TEXT, ENDS]}}, "does not end with the text"),
        ({"post_processor": TEMPLATE | {"single": [TEXT, TEXT]}}, "before a text"),
        ({"post_processor": TEMPLATE | {"single": [ENDS, TEXT]}}, "before a text"),
        ({"post_processor": TEMPLATE}, "does not end with the text"),
        ({"post_processor": [1]}, r"processors hold \[1\]"),
        ({"pre_tokenizer": None}, "split text into words is not known: null"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "split text.*Whitespace"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": 5}}, "pretokenizers is 5"),
        ({"added_tokens": None}, "added_tokens is null"),
        ({"added_tokens": [5]}, "added_tokens is 5"),
        ({"model": "bpe"}, "model is \"bpe\""),
        ({"model": {"type": "BPE", "vocab": [], "merges": []}}, r"vocab is \[\]"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": [["a"]]}}, r"merges is \[\"a\"\]"),
        ({"model": {"type": "BPE", "vocab": {"a": 10**12}, "merges": []}}, "'a'.* 1000000000000"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, "'a' has the id -1"),
        ({"model": {"type": "BPE", "vocab": {"a": True}, "merges": []}}, "'a' has the id true"),
        ({"model": {"type": "BPE", "vocab": {"a": 1.0}, "merges": []}}, "'a' has the id 1.0"),
        ({"model": {"type": "BPE", "vocab": {"": 1}, "merges": []}}, "'' has the id 1"),
        ({"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [], "new": 2}}, "'new'.*2"),
        ({"model": {"type": "WordLevel", "vocab": {}}}, "kind: type \"WordLevel\""),
        ({"model": {"vocab": {}, "merges": [], "ignore_merges": 1}}, "ignore_merges is 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_its_name_and_value(tmp_path, plain, changes, reason):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(plain | changes), encoding="utf-8")
    with pytest.raises(UserError, match=f"cannot be used .*{reason}") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": 10**12}, "has the id 1000000000000 instead of"),
        ({"id": "5"}, 'its id is "5"'),
        ({"special": 1}, "its special is 1"),
        ({"lstrip": None}, "its lstrip is null"),
        ({"content": ""}, "empty, repeated or no text"),
        ({"content": END}, "empty, repeated or no text"),
        ({"content": "\ud800"}, "empty, repeated or no text"),
        ({"colour": "red"}, "'colour'"),
        ({"special": False, "rstrip": True}, "what is around"),
        ({"special": False, "content": "ex|>"}, "what is around"),  # the end of another begins it
        ({"special": False, "content": "|>x"}, "what is around"),
    ],
)
def test_added_tokens_are_checked_key_by_key(tmp_path, plain, changes, reason):
    path = tmp_path / "tokenizer.json"
    tokens = [*plain["added_tokens"], added_token(plain, **changes)]
    path.write_text(json.dumps(plain | {"added_tokens": tokens}), encoding="utf-8")
    if changes.get("content") == "ex|>":
        tokens[0]["content"] = END + "e"
        tokens.append(added_token({"added_tokens": tokens}, content=END))
        path.write_text(json.dumps(plain | {"added_tokens": tokens}), encoding="utf-8")
    with pytest.raises(UserError, match=f"cannot be used .*{reason}"):
        load_tokenizer(path)


@pytest.mark.parametrize("data", [b"[" * 10**6, b'{"model":' * 10**5, b"\xff\xfe", b"5", b"null"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(data)
    with pytest.raises(UserError, match="is damaged|cannot be used") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_harmless_keys_change_nothing(tmp_path, plain):
    path = tmp_path / "tokenizer.json"
    model = plain["model"] | {"unk_token": "x", "fuse_unk": True, "dropout": None}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": "", "byte_fallback": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
    normalizer = {"type": "Sequence", "normalizers": []}
    changed = plain | {"model": model, "post_processor": byte_level, "normalizer": normalizer}
    path.write_text(json.dumps(changed), encoding="utf-8")
    ours, other = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    for text in (LINE, " to be", "caf\u00e9 12\n\n"):
        assert encode(ours, text) == other.encode(text).ids


def test_a_file_that_we_wrote_with_a_gap_before_end_of_text_is_read(tmp_path, plain):
    del plain["post_processor"]
    plain["added_tokens"][0]["id"] += 7
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    assert load_tokenizer(path).eot_token == plain["added_tokens"][0]["id"]


def test_the_file_that_was_read_is_saved_whatever_became_of_it(tmp_path, plain):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(plain), encoding="utf-8")
    data, tokenizer = path.read_bytes(), load_tokenizer(path)
    path.write_text("another")
    save_tokenizer(tokenizer, tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_bytes() == data


def test_bytes_of_a_token_are_none_for_an_id_that_is_none(trained):
    assert trained.token_bytes(104) == b"h"
    assert trained.token_bytes(trained.eot_token) == END.encode()
    assert [trained.token_bytes(id) for id in (4096, -1, 10**30)] == [b"", b"", b""]


# tiktoken's encodings


@pytest.fixture(scope="module")
def encodings(trained) -> dict[str, tiktoken.Encoding]:
    """Return tiktoken's encodings as it defines them, but with a vocabulary that is here."""
    with pytest.MonkeyPatch.context() as patch:
        for function in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(tiktoken_ext.openai_public, function, lambda *_, **__: trained.ranks)
        constructors = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS
        made = {name: make() | {"name": name} for name, make in constructors.items()}
    for definition in made.values():
        definition.pop("explicit_n_vocab", None)
    return {name: tiktoken.Encoding(**definition) for name, definition in made.items()}


@pytest.mark.parametrize("name", tiktoken.list_encoding_names())
def test_every_encoding_of_tiktoken_keeps_its_ids(tmp_path, encodings, monkeypatch, name):
    theirs = encodings[name if name != "gpt2" else "r50k_base"]
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: theirs)
    ours = find_tokenizer(name)
    assert ours.eot_token == theirs.eot_token
    path = tmp_path / "tokenizer.json"
    save_tokenizer(ours, path)
    again, other = load_tokenizer(path), tokenizers.Tokenizer.from_file(str(path))
    assert again.eot_token == other.token_to_id(END) == theirs.eot_token
    chance = random.Random(0)
    letters = ODD + "THE'lldsSvemrt\u017f  \n\n\r\n\t12345\u2028\x85\u0660"
    texts = ["".join(chance.choices(letters, k=chance.randint(1, 24))) for _ in range(4000)]
    encoder = find_encoder(ours, [LINE.encode()], tmp_path / "ranks")
    fast = encoder([text.encode() for text in texts])
    for text, ids in zip(texts, fast, strict=True):
        expected = theirs.encode_ordinary(text)
        assert encode(ours, text) == encode(again, text) == ids.tolist() == expected, text
        assert other.encode(text).ids == expected, text


def test_an_encoding_that_splits_in_its_own_way_is_refused(trained, monkeypatch):
    strange = tiktoken.Encoding(
        "mine", pat_str=r"\S+|\s+", mergeable_ranks=trained.ranks, special_tokens={END: 4095}
    )
    monkeypatch.setattr(tiktoken, "list_encoding_names", lambda: ["mine"])
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: strange)
    with pytest.raises(UserError, match="how mine splits text is not known"):
        find_tokenizer("mine")


@pytest.mark.parametrize("pattern", [name for name in PATTERNS if name != "digits"])
def test_every_character_has_the_ids_of_tiktoken_from_the_fast_encoder(tmp_path, pattern):
    pytest.importorskip("gigatoken")
    pairs = itertools.product(range(256), repeat=2)  # all merge: a word's bounds are seen
    tokens = [bytes([byte]) for byte in range(256)] + [bytes(pair) for pair in pairs]
    tokenizer = new_tokenizer(
        dict(zip(tokens, range(10**6), strict=False)), 70_000, PATTERNS[pattern]
    )
    encoder = gigatoken_encoder(tokenizer, tmp_path / "ranks")
    # Blocks with letters of Unicode 17, which the encoders' tables differ in, and a fifth of all.
    blocks = (0x880, 0x900), (0xC50, 0xCE0), (0x1AC0, 0x1B00), (0xA7C0, 0xA800), (0x10940, 0x10960)
    codes = {
        *itertools.chain(*(range(*block) for block in blocks)),
        *range(len(pattern), 0x32000, 5),
    }
    letters = [chr(code) for code in sorted(codes) if not 0xD800 <= code < 0xE000]
    texts = [f"a{c}b1{c}{c}2 {c}A' {c}\n!{c}." for c in letters]
    for text, ids in zip(texts, encoder([text.encode() for text in texts]), strict=True):
        assert ids.tolist() == tokenizer.encode_ordinary(text), text


def test_without_a_package_that_can_train_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match="pip install gigatoken"):
        train_bpe([LINE.encode()], 300)
