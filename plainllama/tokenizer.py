"""Byte-level BPE tokenizers: tiktoken encodes and decodes, Hugging Face's files keep them.

load_tokenizer(path)             the tokenizer of a tokenizer.json (see tokenizer_json.py)
find_tokenizer("gpt2")           by name: byte, one of tiktoken's, or a tokenizer.json
train_bpe(texts, vocab_size)     a new one; gigatoken or `tokenizers` finds the merges
save_tokenizer(tokenizer, path)  to a tokenizer.json
encode(tokenizer, text)          the ids of a text
find_encoder(...)                the same for much text: gigatoken's, where it gives those ids
"""

import base64
import contextlib
import itertools
import json
import os
import re
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from plainllama.settings import UserError

END_OF_TEXT, LLAMA_END_OF_TEXT = "<|endoftext|>", "<|end_of_text|>"
MAX_ID = 10_000_000  # no vocabulary is larger, and a model needs a row of weights for each id
# How text is split into words before merging. "it's 2024" becomes `it` `'s` ` 2024` by gpt2, and
# `it` `'s` ` ` `202` `4` by the others; "digits" is SmolLM's way, each digit by itself.
GPT2 = r50k_pat_str
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt2": GPT2,
    "gpt4": GPT4,  # as Hugging Face's files have it, Llama 3's too
    # As tiktoken has it: it differs where white space ends a text. (There a `$` is the end of the
    # text, as \z is for everybody.)
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|\s+(?!\S)|\s",
    "qwen2": GPT4.replace("{1,3}", ""),
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
# All patterns split at these places, whatever is around: before a blank (not after one), at a line
# end after a word, before a Chinese full stop or comma after Han or Hiragana. Greedy, so that the
# match ends at the last such place.
LAST_SAFE_CUT = re.compile(
    rb"(?s:.*)(?:(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2})(?=[ \t])"
    rb"|[0-9A-Za-z](?=[\r\n])"
    rb"|(?:[\xe5-\xe9][\x80-\xbf]|\xe3\x81)[\x81-\xbf](?=\xe3\x80\x82|\xef\xbc\x8c))"
)
OWN_KEYS = {"version", "added_tokens", "pre_tokenizer", "decoder", "model"}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# A tokenizer.json writes a token's bytes as printable characters: a byte that is not printable in
# Latin-1 as the next character from 256 on.
HIDDEN = [*range(33), *range(127, 161), 173]
PRINTED = {byte: 256 + number for number, byte in enumerate(HIDDEN)}
UNPRINTED = {char: byte for byte, char in PRINTED.items()} | dict.fromkeys(HIDDEN, 256)


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the rest is split into words: in added_tokens."""

    id: int
    content: str
    single_word: bool = False  # not inside a longer word
    lstrip: bool = False  # takes the white space before it
    rstrip: bool = False  # takes the white space after it
    normalized: bool = False  # is looked for after normalization
    special: bool = True  # text has none unless asked for


@dataclass(frozen=True)
class Vocabulary:
    """What a byte-level BPE tokenizer consists of."""

    ranks: dict[bytes, int]  # the id of each token that merging makes; the lowest is merged first
    pattern: str  # the one of PATTERNS that splits a text into words
    added: tuple[AddedToken, ...]
    nfc: bool = False  # text is normalized to NFC first
    begin_of_text: tuple[int, ...] = ()  # ids that belong before every text


def parse(content: Any) -> Vocabulary:
    """Return what a file describes; a UserError names what cannot be obeyed."""
    if not isinstance(content, dict):
        raise UserError("it holds no JSON object")
    known = {"version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer"}
    check_keys("the file", content, {*known, "post_processor", "decoder", "model"})
    for key in ("truncation", "padding"):
        if content.get(key) is not None:
            raise UserError(f"its {key} would change ids; make it null: {shorten(content[key])}")
    for step in steps_of(content.get("decoder"), "decoders"):
        if step.get("type") not in ("ByteLevel", "Fuse"):
            raise UserError(f"it changes text after decoding: decoder {shorten(step)}")
    normalizers = steps_of(content.get("normalizer"), "normalizers")
    for step in normalizers:
        if step != {"type": "NFC"}:
            raise UserError(f"it changes text before encoding: normalizer {shorten(step)}")
    vocab, merges, ignore_merges = read_model(take(content, "model", dict))
    pattern = read_pattern(content.get("pre_tokenizer"))
    added = read_added_tokens(take(content, "added_tokens", list))
    ids = {token: id for token, id in vocab.items() if token not in added}
    if len({*ids.values(), *(token.id for token in added.values())}) < len(ids) + len(added):
        raise UserError("two of its tokens have one id")
    check_merges(ids, merges, ignore_merges)
    if set(content) != OWN_KEYS or len(added) > 1:  # before this was checked, we left a gap
        check_ids(added, vocab)
    check_words(added, bool(normalizers))
    ranks = {unprinted(token): id for token, id in ids.items()}
    for token in (
        added.values() if ignore_merges else ()
    ):  # `tokenizers` takes a word that is a token whole
        if token.content in vocab and regex.fullmatch(
            pattern, unprinted(token.content).decode(errors="replace")
        ):
            raise UserError(f"its added token {token.content!r} is a word of text as well")
    begin_of_text = read_begin_of_text(content.get("post_processor"), added)
    return Vocabulary(ranks, pattern, tuple(added.values()), bool(normalizers), begin_of_text)


def check_keys(where: str, found: dict[str, Any], known: Iterable[str]) -> None:
    """Refuse a key that is not known, by its name and value."""
    for key, value in found.items():
        if key not in known:
            raise UserError(f"{where} has {key!r}, which is not known: {shorten(value)}")


def take(found: dict[str, Any], key: str, kind: type) -> Any:
    """Return the value of a key that must be there and of this type."""
    value = found.get(key)
    if type(value) is not kind:
        raise UserError(f"its {key} is {shorten(value)}, not of the type {kind.__name__}")
    return value


def shorten(value: Any) -> str:
    """Return a value as JSON, but not more of it than a message can hold."""
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + " ..."


def steps_of(step: Any, key: str) -> list[dict[str, Any]]:
    """Return the steps of one that may be a Sequence of others, or null."""
    if step is None:
        return []
    if not isinstance(step, dict):
        raise UserError(f"its {key} hold {shorten(step)}")
    if step.get("type") != "Sequence":
        return [step]
    return [inner for one in take(step, key, list) for inner in steps_of(one, key)]


def read_model(model: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]], bool]:
    """Return the vocabulary, the merges, and whether a word that is a token is taken whole."""
    for key in (
        "type",
        "byte_fallback",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "dropout",
    ):
        if model.get(key) and model[key] != "BPE":
            value = f"{key} {shorten(model[key])}"
            raise UserError(f"it is a SentencePiece tokenizer, or of another kind: {value}")
    # What is done with a character that no token has does not matter: it is refused.
    harmless = {"unk_token", "fuse_unk", "cache_capacity"}
    off = {"type", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"}
    check_keys("its model", model, {"vocab", "merges", "ignore_merges"} | harmless | off)
    vocab = take(model, "vocab", dict)
    for token, id in vocab.items():
        if type(id) is not int or not 0 <= id < MAX_ID or not token:
            raise UserError(f"its token {token!r} has the id {shorten(id)}")
    merges = []
    for merge in take(model, "merges", list):
        halves = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(halves, list) or [type(half) for half in halves] != [str, str]:
            raise UserError(f"one of its merges is {shorten(merge)}")
        merges.append(tuple(halves))
    ignore_merges = model.get("ignore_merges", False)
    if type(ignore_merges) is not bool:
        raise UserError(f"its ignore_merges is {shorten(ignore_merges)}")
    return vocab, merges, ignore_merges


def read_pattern(pre_tokenizer: Any) -> str:
    """Return the one of PATTERNS that splits text into the same words."""
    if "Metaspace" in str(pre_tokenizer):
        raise UserError("it is a SentencePiece tokenizer: pre_tokenizer Metaspace")
    steps = []
    for step in steps_of(pre_tokenizer, "pretokenizers"):
        if step.get("type") == "ByteLevel":
            step = {"use_regex": True} | step | {"trim_offsets": True}
        # Each pattern matches all of a text, so that nothing is left to isolate or to remove.
        kept = (step.get("behavior"), step.get("invert"))
        if step.get("type") == "Split" and kept in (("Isolated", True), ("Removed", True)):
            step = step | {"behavior": "Isolated", "invert": False}
        steps.append(step)
    for pattern in PATTERNS.values():
        if splitting_steps(pattern) == steps:
            return pattern
    raise UserError(f"its way to split text into words is not known: {shorten(pre_tokenizer)}")


def read_added_tokens(entries: list[Any]) -> dict[str, AddedToken]:
    """Return the added tokens by their contents."""
    added: dict[str, AddedToken] = {}
    for entry in entries:
        if not isinstance(entry, dict):
            raise UserError(f"one of its added_tokens is {shorten(entry)}")
        check_keys("one of its added_tokens", entry, [field.name for field in fields(AddedToken)])
        token = AddedToken(*(take(entry, field.name, field.type) for field in fields(AddedToken)))
        if not token.content or token.content in added or not is_unicode(token.content):
            raise UserError(f"one of its added tokens is empty, repeated or no text: {entry}")
        added[token.content] = token
    if not {END_OF_TEXT, LLAMA_END_OF_TEXT} & added.keys():
        raise UserError(f"it has no {END_OF_TEXT} or {LLAMA_END_OF_TEXT} but {list(added)[:9]}")
    return added


def check_ids(added: dict[str, AddedToken], vocab: dict[str, int]) -> None:
    """Refuse ids that are not those that `tokenizers` gives: the next free ones."""
    following = len(vocab)
    for content, token in added.items():
        expected = vocab.get(content, following)
        following = max(following, token.id + 1)
        if token.id != expected:
            raise UserError(f"its token {content!r} has the id {token.id} instead of {expected}")


def check_words(added: dict[str, AddedToken], nfc: bool) -> None:
    """Refuse words that cannot be found in a block of a text without all of it.

    Data is encoded in blocks, and by encoders that look for the words alone.
    """
    for word, token in added.items():
        context = token.lstrip or token.rstrip or token.single_word or (nfc and token.normalized)
        overlaps = any(other != word and may_hide(other, word) for other in added)
        cut = LAST_SAFE_CUT.match(word.encode())
        if not token.special and (context or overlaps or cut):
            raise UserError(f"where its token {word!r} is found depends on what is around")


def is_unicode(text: str) -> bool:
    """Tell whether a text has no half of a surrogate pair."""
    return not regex.search(r"\p{Cs}", text)


def may_hide(other: str, word: str) -> bool:
    """Tell whether a text may hold `other` so that it ends inside of `word`, or after it."""
    return word in other or any(other.endswith(word[:end]) for end in range(1, len(word)))


def check_merges(ids: dict[str, int], merges: list[tuple[str, str]], ignore_merges: bool) -> None:
    """Refuse merges that do not give tiktoken's ids."""
    alphabet = set(map(chr, PRINTED.values())) | set(map(chr, set(range(256)) - set(HIDDEN)))
    if strange := set("".join(ids)) - alphabet:
        raise UserError(f"it has tokens that are no bytes, of {sorted(strange)[:9]}")
    for left, right in merges:
        if not {left, right, left + right} <= ids.keys():
            raise UserError(f"its merges have {shorten([left, right])}, which is no token of text")
    if not merges_by_id(ids, merges, ignore_merges):
        raise UserError("its merges are not in the order of their ids")


def read_begin_of_text(processor: Any, added: dict[str, AddedToken]) -> tuple[int, ...]:
    """Return the ids that a file puts before every text; ids after it are refused."""
    begin: tuple[int, ...] = ()
    for step in steps_of(processor, "processors"):
        if step.get("type") == "ByteLevel":
            continue  # it moves offsets, no ids
        if step.get("type") != "TemplateProcessing" or begin:
            raise UserError(f"its post_processor is not known: {shorten(step)}")
        check_keys("its post_processor", step, ("type", "single", "pair", "special_tokens"))
        *before, text = take(step, "single", list) or [None]
        if text not in ({"Sequence": {"id": "A", "type_id": n}} for n in (0, 1)):
            raise UserError(f"its post_processor does not end with the text: {shorten(step)}")
        known = {token.id for token in added.values()}
        for piece in before:
            try:
                ids = step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
            except (LookupError, TypeError):
                ids = None
            if not isinstance(ids, list) or not known.issuperset(ids):
                raise UserError(f"its post_processor puts {shorten(piece)} before a text")
            begin += tuple(ids)
    return begin


def merges_by_id(ids: dict[str, int], merges: list[tuple[str, str]], whole_words: bool) -> bool:
    """Say whether `merges` give tiktoken's ids, which merges what makes the lowest id.

    They do if they are all that are possible, in the order of the ids, and a word that is a token
    is taken whole; or if each token has one, which merging its bytes by id ends with.
    """
    halves = {left + right: (left, right) for left, right in merges}
    made = [ids[left + right] for left, right in merges]
    if made != sorted(made):
        return False
    if whole_words and len(set(merges)) == len(all_merges(ids)):
        return True
    if not len(halves) == len(merges) == sum(len(token) > 1 for token in ids):
        return False
    for (left, right), limit in zip(merges, made, strict=True):
        # Undo merges from the last one on; none across the middle may come before any of them.
        while len(left + right) > 2:
            if len(right) == 1 or (len(left) > 1 and ids[left] > ids[right]):
                last, left = ids[left], halves[left][1]
            else:
                last, right = ids[right] + 1, halves[right][0]
            if last > limit or ids.get(left + right, last) < last:
                return False
            limit = last
    return True


def describe(vocabulary: Vocabulary) -> dict[str, Any]:
    """Return the content of a file, for a vocabulary whose one added token is end-of-text.

    tiktoken merges any two neighbours that make a token together, so every way to halve a token
    is listed as a merge, not just the one that training found.
    """
    ids = {t.decode("latin-1").translate(PRINTED): id for t, id in vocabulary.ranks.items()}
    merges = all_merges(ids)
    (end_of_text,) = vocabulary.added
    if end_of_text.id != len(ids):  # it would get the next free id, unless it is in the vocabulary
        ids[end_of_text.content] = end_of_text.id
    added = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added |= {"id": end_of_text.id, "content": end_of_text.content, "special": True}
    steps = splitting_steps(vocabulary.pattern)
    return {
        "version": "1.0",
        "added_tokens": [added],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps[1:] else steps[0],
        "decoder": BYTE_LEVEL,
        "model": {"type": "BPE", "vocab": ids, "merges": merges, "ignore_merges": True},
    }


def splitting_steps(pattern: str) -> list[dict[str, Any]]:
    """Return the steps of a tokenizer.json's pre_tokenizer that stand for one of PATTERNS."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    digits = {"type": "Digits", "individual_digits": True}
    first = {GPT2: [], PATTERNS["digits"]: [digits]}
    last = BYTE_LEVEL | {"use_regex": pattern in first}
    return [*first.get(pattern, [split | {"invert": False}]), last]


def all_merges(ids: dict[str, int]) -> list[str]:
    """Return every way to halve a token into two tokens, in the order of the tokens' ids."""
    return [
        f"{token[:cut]} {token[cut:]}"
        for token in sorted(ids, key=ids.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]


def unprinted(token: str) -> bytes:
    """Return the bytes that a tokenizer.json writes as printable characters."""
    return token.translate(UNPRINTED).encode("latin-1", errors="replace")


BATCH = 1 << 21  # bytes that are encoded at a time
CACHE_BYTES = 250_000_000  # of text after which gigatoken's cache of words starts anew

GIGATOKEN = {"gpt2": "gpt2", "gpt4": "olmo3", "cl100k": "gpt4", "qwen2": "qwen2", "o200k": "o200k"}
# What tokenizers disagree about, when they do.
PROBE = (
    "I'll we've 'S don't  \r\n\r\n\t x=12345.67;\n\n  y \u00a0\u3000\u65e5\u672c\u8a9e\u3002 "
    "caf\u00e9 e\u0301\u0915\u094d\u0937 \U0001f469\u200d\U0001f467 \0\x7f\x85\ufeff<|endoftext|>  "
)
# What `tokenizers` takes for a letter of a word, and for white space, around an added token.
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")
WHITE_SPACE = "".join(
    c for c in map(chr, range(0x3001)) if c.isspace() and c not in "\x1c\x1d\x1e\x1f"
)
NEW_LETTERS = (b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c", b"\xe1\xab", b"\xea\x9f")
Encoder = Callable[[list[bytes]], list[np.ndarray]]


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding, and what a pretrained model's tokenizer.json adds to it."""

    def __init__(
        self, vocabulary: Vocabulary, path: Path | None = None, content: bytes = b""
    ) -> None:
        self.vocabulary = vocabulary
        self.path = path  # the file that it was read from, if it was, and what that file held
        self.content = content
        self.ranks = vocabulary.ranks
        self.pattern = vocabulary.pattern
        self.special_tokens = {token.content: token.id for token in vocabulary.added}
        # Added tokens that are not special: text has them too.
        self.words = frozenset(token.content for token in vocabulary.added if not token.special)
        self.nfc = vocabulary.nfc
        self.begin_of_text = vocabulary.begin_of_text
        self.unknown_bytes = bytes(b for b in range(256) if bytes([b]) not in self.ranks)
        super().__init__(
            "",
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.special_tokens,
        )

    @property
    def token_lengths(self) -> np.ndarray:
        special = {*self.special_tokens.values()} - {self.special_tokens[w] for w in self.words}
        return np.array(
            [0 if i in special else len(self.token_bytes(i)) for i in range(self.n_vocab)]
        )

    @property
    def eot_token(self) -> int:
        ids = self.special_tokens
        return ids[END_OF_TEXT if END_OF_TEXT in ids else LLAMA_END_OF_TEXT]

    def token_bytes(self, id: int) -> bytes:
        """Return the text of a token; nothing for an id that the vocabulary does not have."""
        try:
            return self.decode_single_token_bytes(id)
        except (KeyError, OverflowError):
            return b""

    def normalized(self, text: str) -> str:
        """Return the text that is encoded: in NFC, but for the added tokens in it."""
        if not self.nfc or unicodedata.is_normalized("NFC", text):
            return text
        pieces = self.pieces(text, special_tokens=False)
        return "".join(p.content if isinstance(p, AddedToken) else p for p in pieces)

    def pieces(self, text: str, special_tokens: bool) -> Iterator[AddedToken | str]:
        """Yield the added tokens of a text and what is between them, as `tokenizers` finds them."""
        added = self.vocabulary.added if special_tokens or self.words else ()
        early = {token.content: token for token in added if not token.normalized}
        late = {self.to_nfc(token.content): token for token in added if token.normalized}
        for piece in find_added(text, early, special_tokens):
            if isinstance(piece, AddedToken):
                yield piece
            else:
                yield from find_added(self.to_nfc(piece), late, special_tokens)

    def to_nfc(self, text: str) -> str:
        """Return `text` in NFC, by the Unicode tables of `tokenizers`, if that is asked for."""
        if not self.nfc or unicodedata.is_normalized("NFC", text):
            return text
        try:
            from tokenizers.normalizers import NFC
        except ImportError as error:
            raise UserError("to normalize text to NFC, `pip install tokenizers`") from error
        return NFC().normalize_str(text)

    def encode_text(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """Do what `encode` does, for text without surrogates, and return an array."""
        ids = [np.zeros(0, np.uint32)]
        for piece in self.pieces(text, special_tokens):
            if isinstance(piece, AddedToken):
                ids.append(np.array([piece.id], np.uint32))
            else:
                self.check_bytes(piece)
                ids.append(self.encode_to_numpy(piece, disallowed_special=()))
        return np.concatenate(ids)

    def check_bytes(self, text: str) -> None:
        """Refuse text with bytes that no token has, naming the first character."""
        data, unknown = text.encode(), set(self.unknown_bytes)
        if len(data.translate(None, self.unknown_bytes)) < len(data):
            char = next(char for char in text if unknown.intersection(char.encode()))
            raise UserError(f"{char!r} is not in the vocabulary; leave it out")


def find_added(
    text: str, tokens: dict[str, AddedToken], special_tokens: bool = True
) -> Iterator[AddedToken | str]:
    """Yield the `tokens` that a text has, the first and longest ones, and what is between them."""
    start = 0
    longest_first = sorted(tokens, key=len, reverse=True)
    for match in regex.finditer("|".join(map(regex.escape, longest_first)), text) if tokens else ():
        token, (left, right) = tokens[match[0]], match.span()
        if token.special and not special_tokens:
            continue
        inside = WORD.match(text[right : right + 1]) or WORD.match(text[max(left - 1, 0) : left])
        if token.single_word and inside:
            continue
        if token.lstrip:
            left = max(start, len(text[:left].rstrip(WHITE_SPACE)))
        if token.rstrip:
            right = len(text) - len(text[right:].lstrip(WHITE_SPACE))
        if left > start:
            yield text[start:left]
        if left < right:  # not where the token before it has taken all of its white space
            yield token
        start = right
    if start < len(text):
        yield text[start:]


def encode(tokenizer: Tokenizer, text: str, special_tokens: bool = False) -> list[int]:
    """Return the ids of `text`.

    What it writes like a special token, `<|endoftext|>` for example, is text unless asked for.
    A UserError names the first character that the vocabulary lacks.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{text[error.start]!r} is not a character; give UTF-8 text") from error
    return tokenizer.encode_text(text, special_tokens).tolist()


# Made anew, or found by name


def new_tokenizer(ranks: dict[bytes, int], end_of_text: int, pattern: str = GPT2) -> Tokenizer:
    """Build a tokenizer whose one special token is end-of-text."""
    return Tokenizer(Vocabulary(ranks, pattern, (AddedToken(end_of_text, END_OF_TEXT),)))


def find_tokenizer(name: str) -> Tokenizer:
    """Return `byte`, one of tiktoken's, or the one of a tokenizer.json or of its directory."""
    if name == "byte":
        return new_tokenizer({bytes([b]): b for b in range(256)}, 256)
    known = tiktoken.list_encoding_names()
    if name not in known:
        path = tokenizer_file(name)
        if not path.exists() and path.suffix != ".json":
            raise UserError(
                f"tokenizer={name!r} is no tokenizer.json and none of bpe, byte, {known}"
            )
        return load_tokenizer(path)
    try:
        encoding = tiktoken.get_encoding("r50k_base" if name == "gpt2" else name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot download the vocabulary of {name} ({type(error).__name__}); go online, "
            "point TIKTOKEN_CACHE_DIR to a copy, or train your own with --tokenizer=bpe"
        ) from error
    # Other regular expressions than tiktoken's have other words for its end of text, and no {}+.
    written = encoding._pat_str.replace("$", r"\z").replace("{1,3}+", "{1,3}")
    pattern = next((p for p in PATTERNS.values() if p.replace("$", r"\z") == written), None)
    if pattern is None:
        raise UserError(f"how {name} splits text is not known; choose another of {known}")
    return new_tokenizer(encoding._mergeable_ranks, encoding.eot_token, pattern)


def tokenizer_file(name: str) -> Path:
    """Return the tokenizer.json that --tokenizer names, by itself or by its directory."""
    return Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)


def train_bpe(texts: list[bytes], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: ids are the 256 bytes, the merges in order, and end-of-text."""
    try:
        merges = train_with_gigatoken(texts, vocab_size)
    except ImportError:
        merges = train_with_tokenizers(texts, vocab_size)
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    if len(ranks) + 1 < vocab_size:
        print(f"note: this text gives a vocabulary of {len(ranks) + 1:,}, not {vocab_size:,}")
    return new_tokenizer(ranks, len(ranks))


def train_with_gigatoken(texts: list[bytes], vocab_size: int) -> list[tuple[bytes, bytes]]:
    """Return the merges, in order."""
    import gigatoken

    sys.stdout.flush()
    with contextlib.ExitStack() as after, open(os.devnull, "wb") as nowhere:
        for screen in (1, 2):  # where the compiled code prints
            after.callback(os.close, copy := os.dup(screen))
            after.callback(os.dup2, copy, screen)
            os.dup2(nowhere.fileno(), screen)
        text = END_OF_TEXT.encode().join(texts)
        return gigatoken.train_bpe(text, vocab_size, [END_OF_TEXT])[1]


def train_with_tokenizers(texts: list[bytes], vocab_size: int) -> list[tuple[bytes, bytes]]:
    """Return the same merges, slowly."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError as error:
        raise UserError("to train a tokenizer, `pip install gigatoken`") from error
    tokenizer = ByteLevelBPETokenizer()
    decoded = (text.decode() for text in texts)
    tokenizer.train_from_iterator(decoded, vocab_size - 1, min_frequency=0, show_progress=False)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [(unprinted(left), unprinted(right)) for left, right in merges]


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json of byte-level BPE; a UserError says why it cannot be used.

    Only a file that gives the same ids in `tokenizers` and here, for any text, can be. (There,
    `encode_special_tokens` says that text has no special tokens.)
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}; `python prepare.py` makes one")
    data = path.read_bytes()
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    try:
        return Tokenizer(parse(content), path, data)
    except UserError as error:
        known = "byte-level BPE as of GPT-2, Llama 3, SmolLM or Qwen"
        raise UserError(f"{path} cannot be used ({error}); choose a file with {known}") from error


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write the file that it was read from, or one that gives the same ids in `tokenizers`."""
    content = tokenizer.content
    if not content:
        content = json.dumps(describe(tokenizer.vocabulary), ensure_ascii=False).encode()
    path.write_bytes(content)


# Much text


def find_encoder(tokenizer: Tokenizer, sample: list[bytes], ranks: Path) -> Encoder:
    """Return gigatoken's encoder if it is there and gives tiktoken's ids on a sample, or that."""

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        return [tokenizer.encode_text(text.decode()) for text in texts]

    some = [block[:4096].decode(errors="ignore") for block in sample[:: len(sample) // 64 + 1]]
    probes = ("".join([PROBE, *tokenizer.words]), *some)
    texts = [tokenizer.normalized(text).encode() for text in probes]
    try:
        fast = gigatoken_encoder(tokenizer, ranks)
        if all(map(np.array_equal, fast(texts), encoder(texts))):
            return fast
        problem = "gigatoken's ids are not tiktoken's"
    except ImportError:
        problem = "`pip install gigatoken` makes encoding many times as fast"
    except BaseException as error:  # a panic of the compiled code is not even an Exception
        if not isinstance(error, RuntimeError | ValueError) and "Panic" not in type(error).__name__:
            raise
        problem = f"gigatoken cannot use this tokenizer ({str(error).splitlines()[0]})"
    print(f"note: {problem}; encoding with tiktoken", file=sys.stderr)
    return encoder


def gigatoken_encoder(tokenizer: Tokenizer, ranks: Path) -> Encoder:
    """Return a function that encodes with gigatoken, in each thread by itself."""
    import gigatoken

    scheme = GIGATOKEN.get(next(name for name in PATTERNS if PATTERNS[name] == tokenizer.pattern))
    if scheme is None or tokenizer.unknown_bytes:
        raise ValueError("it lacks its pattern, or the vocabulary lacks bytes")
    pairs = sorted(tokenizer.ranks.items(), key=lambda pair: pair[1])
    ranks.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(t), rank) for t, rank in pairs))
    # Not the special ones: gigatoken would recognise them inside documents.
    words = {word: tokenizer.special_tokens[word] for word in tokenizer.words}
    thread = threading.local()

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        encoded = getattr(thread, "encoded", CACHE_BYTES)
        if encoded >= CACHE_BYTES:
            thread.backend, encoded = gigatoken.Tokenizer.from_tiktoken(ranks, scheme, words), 0
        thread.encoded = encoded + sum(map(len, texts))
        rows = thread.backend.encode_batch(texts).layout  # unlike encode, it lets other threads run
        bounds = itertools.pairwise(rows.offsets.data.tolist())
        ids = [rows.content.data[start:end] for start, end in bounds]
        for number, text in enumerate(texts):
            if has_new_letters(text):
                ids[number] = tokenizer.encode_text(text.decode())
        return ids

    return encoder


def has_new_letters(text: bytes) -> bool:
    """Tell whether a text may have letters newer than Unicode 16, which gigatoken does not know.

    They are few, next to old ones, or above U+FFFF, where most of what texts have is no letter.
    """
    if b"\xf0" in text and text.count(b"\xf0") > text.count(b"\xf0\x9f"):
        return True
    # To look for one byte first is a hundred times as fast, where it is not there.
    return any(part[:1] in text and part in text for part in NEW_LETTERS)


def encode_blocks(
    blocks: Iterable[Any], tokenizer: Tokenizer, sample: list[bytes], ranks: Path, workers: int
) -> Iterator[tuple[list[Any], list[np.ndarray]]]:
    """Yield batches of blocks, tuples that begin with their text, in order, with their ids.

    They are encoded on `workers` cores, or on all: in threads, where Ctrl-C does not interrupt
    what compiled code has begun.
    """
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    pending: deque[tuple[list[Any], Future]] = deque()
    batch: list[Any] = []
    size = 0
    try:
        encoder = pool.submit(find_encoder, tokenizer, sample, ranks).result()
        for text, *other in itertools.chain(blocks, [(None,)]):
            if text is not None:
                if tokenizer.nfc:
                    text = tokenizer.normalized(text.decode()).encode()
                batch.append((text, *other))
                size += len(text)
            if size >= BATCH or text is None:
                pending.append((batch, pool.submit(encoder, [text for text, *_ in batch])))
                batch, size = [], 0
            while pending and (len(pending) > workers + 2 or text is None):
                batch_of, ids = pending.popleft()
                yield batch_of, ids.result()
    finally:
        pool.shutdown(cancel_futures=True)
