"""Hugging Face's tokenizer.json, as far as it gives the same ids in tiktoken for any text.

    parse(content)        the Vocabulary of a file: GPT-2's, Llama 3's, SmolLM's, Qwen's, our own
    describe(vocabulary)  the content of a file that gives the same ids in `tokenizers`

Each key of a file is obeyed, or harmless, or the file is refused with the key's name and value.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import regex
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
