"""Small tokenizer.json files of both kinds, made without our code: byte-level and SentencePiece."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel, Digits, Metaspace, Sequence, Split

END_OF_TEXT = "<|endoftext|>"
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes written as themselves
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
CHARS = {byte: chr(byte) for byte in SHOWN} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {  # llama.cpp's names -> how a file has text split into words
    "gpt-2": "",
    "llama-bpe": GPT4,
    "qwen2": GPT4.replace("{1,3}", ""),
    "gpt-4o": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "smollm": "Digits",
}


def byte_level(
    tokens: Iterable[bytes] = (),
    split: str = "",
    added: dict[str, bool] | None = None,
    begin: str = "",
) -> dict[str, Any]:
    """A byte-level file: the 256 bytes by value, `tokens`, then what is added: special, or not.

    Any two neighbours that make a token merge. Text is split by the regular expression `split`, or
    as GPT-2 does, for "Digits" each digit by itself before. Where nothing is said, the end of a
    text is added alone. A text has `begin`, one of these words, before it.
    """
    names = [*map(CHARS.get, range(256)), *("".join(map(CHARS.get, token)) for token in tokens)]
    tokenizer = Tokenizer(models.BPE({name: id for id, name in enumerate(names)}, halves(names)))
    if split == "Digits":
        steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    else:
        as_gpt2 = ByteLevel(add_prefix_space=False, use_regex=not split)
        steps = [Split(Regex(split), "isolated"), as_gpt2] if split else [as_gpt2]
    tokenizer.pre_tokenizer = Sequence(steps) if split else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    return finished(tokenizer, added or {END_OF_TEXT: True}, begin)


FIRST = dict.fromkeys(("llama2", "mistral"), ("<unk>", "<s>", "</s>"))  # special tokens
FIRST["gemma"] = ("<unk>", "<bos>", "<eos>", "<pad>")


def sentencepiece(text: str, vocab_size: int = 600, family: str = "llama2") -> dict[str, Any]:
    """A file as of Llama 2, Mistral or Gemma, its pieces learned from a text; others are bytes."""
    first = FIRST[family]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = Metaspace()
    size = vocab_size - 256 - len(first)
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    learned.train_from_iterator([text], trainer)
    known = sorted(learned.get_vocab(), key=learned.token_to_id)
    pieces = sorted(known, key=lambda token: len(token) == 1)  # single characters last, as there
    names = [*first, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: id for id, name in enumerate(names)}
    bytes_too = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab, halves(pieces), **bytes_too))
    blank = normalizers.Replace(" ", "\u2581")
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blank])
    elif family == "mistral":
        tokenizer.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = blank
    strip = [] if family == "gemma" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([*back, *strip])
    return finished(tokenizer, dict.fromkeys(first, True), first[1])


def finished(tokenizer: Tokenizer, added: dict[str, bool], begin: str) -> dict[str, Any]:
    """Add words, and `begin` before each text."""
    tokens = [AddedToken(word, special=s, normalized=False) for word, s in added.items()]
    tokenizer.add_tokens(tokens)
    if begin:
        single, pair = f"{begin} $A", f"{begin} $A {begin}:1 $B:1"
        ids = [(begin, tokenizer.token_to_id(begin))]
        tokenizer.post_processor = processors.TemplateProcessing(single, pair, ids)
    return json.loads(tokenizer.to_str())


def halves(names: list[str]) -> list[tuple[str, str]]:
    """Every way to make one of the names of two of them, in their order."""
    known, merges = set(names), []
    for name in names:
        for cut in range(1, len(name)):
            if name[:cut] in known and name[cut:] in known:
                merges.append((name[:cut], name[cut:]))
    return merges


def save(content: dict[str, Any], directory: Path) -> None:
    """Write a tokenizer.json into a directory, which is made."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
