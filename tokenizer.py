"""Byte-level BPE tokenizers: tiktoken encodes and decodes, Hugging Face's files keep them.

Own ones, and those of pretrained models: GPT-2, Llama 3, SmolLM, Qwen2 and 3.
"""

import itertools
import json
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

END_OF_TEXT, LLAMA_END_OF_TEXT = "<|endoftext|>", "<|end_of_text|>"

# How text is split before merging, by gigatoken's name for it. It has none for "digits", SmolLM's
# way: each digit by itself, and what is between them by GPT-2's pattern.
GPT2 = r50k_pat_str
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "gpt2": GPT2,
    "gpt4": GPT4,  # and Llama 3
    "qwen2": GPT4.replace("{1,3}", ""),
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "digits": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}
# All of them split at these places, whatever is around: before a blank (not after one), at a line
# end after a word, before a Chinese full stop or comma after Han or Hiragana. Greedy, so that the
# match ends at the last such place.
LAST_SAFE_CUT = re.compile(
    rb"(?s:.*)(?:(?:[!-~]|[\xc3-\xdf][\x80-\xbf]|[\xe0\xe4-\xef][\x80-\xbf]{2})(?=[ \t])"
    rb"|[0-9A-Za-z](?=[\r\n])"
    rb"|(?:[\xe5-\xe9][\x80-\xbf]|\xe3\x81)[\x81-\xbf](?=\xe3\x80\x82|\xef\xbc\x8c))"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
# A tokenizer.json writes a token's bytes as printable characters: a byte that is not printable in
# Latin-1 as the next character from 256 on.
HIDDEN = [*range(33), *range(127, 161), 173]
PRINTED = {byte: 256 + number for number, byte in enumerate(HIDDEN)}
UNPRINTED = {char: byte for byte, char in PRINTED.items()} | dict.fromkeys(HIDDEN, 256)


class Tokenizer(tiktoken.Encoding):
    """A tiktoken.Encoding, and what a pretrained model's tokenizer.json adds to it."""

    path: Path | None = None  # the file, if there is one
    nfc = False  # text is normalized to NFC first
    words: frozenset[str] = frozenset()  # added tokens that are not special: text has them too
    begin_of_text: tuple[int, ...] = ()  # ids that the model expects before a text

    @property
    def eot_token(self) -> int:
        ids = self._special_tokens
        return ids[END_OF_TEXT if END_OF_TEXT in ids else LLAMA_END_OF_TEXT]

    def normalized(self, text: str) -> str:
        """Return the text that is encoded: in NFC, by the Unicode tables of `tokenizers`."""
        if not self.nfc or unicodedata.is_normalized("NFC", text):
            return text
        try:
            from tokenizers.normalizers import NFC
        except ImportError as error:
            raise ValueError("to normalize text to NFC, `pip install tokenizers`") from error
        pattern = "|".join(map(re.escape, self.words))
        pieces = re.split(f"({pattern})", text) if pattern else [text]
        return "".join(map(NFC().normalize_str, pieces))


def new_tokenizer(ranks: dict[bytes, int], end_of_text: int, pattern: str = GPT2) -> Tokenizer:
    """Build a tokenizer whose one special token is end-of-text."""
    special = {END_OF_TEXT: end_of_text}
    return Tokenizer("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def encode(tokenizer: tiktoken.Encoding, text: str, special_tokens: bool = False) -> list[int]:
    """Return the ids of `text`.

    What it writes like a special token, `<|endoftext|>` for example, is text unless asked for.
    A ValueError names the first character that the vocabulary lacks.
    """
    try:
        text = tokenizer.normalized(text) if isinstance(tokenizer, Tokenizer) else text
        return encode_bytes(tokenizer, text.encode(), special_tokens).tolist()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[error.start]!r} is not a character; give UTF-8 text") from error


def encode_bytes(
    tokenizer: tiktoken.Encoding, data: bytes, special_tokens: bool = False
) -> np.ndarray:
    """Do what `encode` does, for normalized UTF-8 text."""
    text = data.decode()
    known = bytes(b for b in range(256) if bytes([b]) in tokenizer._mergeable_ranks)
    if data.translate(None, known):
        unknown = next(char for char in text if char.encode().translate(None, known))
        raise ValueError(f"{unknown!r} is not in the vocabulary; leave it out")
    words = "all" if special_tokens else getattr(tokenizer, "words", set())
    return tokenizer.encode_to_numpy(text, allowed_special=words, disallowed_special=())


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json of byte-level BPE; a ValueError says why it cannot be used.

    Only a file that gives the same ids in `tokenizers` and here, for any text, can be. (There,
    `encode_special_tokens` says that text has no special tokens.)
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no tokenizer at {path}; `python prepare.py` makes one")
    try:
        return read_tokenizer(path)
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        problem = "cannot be used" if type(error) is ValueError else "is damaged"
        known = "byte-level BPE as of GPT-2, Llama 3, SmolLM or Qwen"
        raise ValueError(f"{path} {problem} ({error}); choose a file with {known}") from error


def read_tokenizer(path: Path) -> Tokenizer:
    content = json.loads(path.read_bytes())
    model, added, words = content["model"], content["added_tokens"], content["pre_tokenizer"]
    other = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout")
    if model.get("type", "BPE") != "BPE" or any(map(model.get, other)) or "Metaspace" in str(words):
        raise ValueError("it is a SentencePiece tokenizer, or of another kind")
    normalizer = content.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise ValueError("it changes text before encoding")
    steps = words.get("pretokenizers", [words])
    steps[-1] = {"use_regex": True} | steps[-1] | {"trim_offsets": True}
    pattern = next((p for p in PATTERNS.values() if splitting_steps(p) == steps), None)
    if not pattern:
        raise ValueError("its way to split text into words is not known")
    special = {token["content"]: token["id"] for token in added}
    if not {END_OF_TEXT, LLAMA_END_OF_TEXT} & special.keys():
        raise ValueError(f"it has no {END_OF_TEXT} or {LLAMA_END_OF_TEXT} but {list(special)[:9]}")
    in_text = {token["content"]: token for token in added if not token["special"]}
    for word, token in in_text.items():
        context = token["lstrip"] or token["rstrip"] or token["single_word"]
        if context or LAST_SAFE_CUT.match(word.encode()) or sum(word in t for t in special) > 1:
            raise ValueError(f"where its token {word!r} is found depends on what is around")
    ids = {token: id for token, id in model["vocab"].items() if token not in special}
    if len({*ids.values(), *special.values()}) < len(ids) + len(special):
        raise ValueError("two of its tokens have one id")
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    if not merges_by_id(ids, merges, model.get("ignore_merges", False)):
        raise ValueError("its merges are not in the order of their ids")
    ranks = {unprinted(token): id for token, id in ids.items()}
    tokenizer = Tokenizer("", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    tokenizer.path, tokenizer.nfc, tokenizer.words = path, bool(normalizer), frozenset(in_text)
    template = content.get("post_processor") or {}
    tokenizer.begin_of_text = tuple(
        special[piece["SpecialToken"]["id"]]
        for step in template.get("processors", [template])
        for piece in itertools.takewhile(lambda p: "SpecialToken" in p, step.get("single", []))
    )
    return tokenizer


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


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write Hugging Face's tokenizer.json, which gives the same ids there.

    tiktoken merges any two neighbours that make a token together, so every way to halve a token
    is listed as a merge, not just the one that training found.
    """
    if tokenizer.path:
        shutil.copyfile(tokenizer.path, path)
        return
    ranks = tokenizer._mergeable_ranks
    vocab = {token.decode("latin-1").translate(PRINTED): ranks[token] for token in ranks}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special |= {"id": tokenizer.eot_token, "content": END_OF_TEXT, "special": True}
    steps = splitting_steps(tokenizer._pat_str)
    model = {"type": "BPE", "vocab": vocab, "merges": all_merges(vocab), "ignore_merges": True}
    content = {
        "version": "1.0",
        "added_tokens": [special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if steps[1:] else steps[0],
        "decoder": BYTE_LEVEL,
        "model": model,
    }
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


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
    return token.translate(UNPRINTED).encode("latin-1")
