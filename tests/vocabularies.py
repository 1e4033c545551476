"""Small tokenizer.json files of both kinds, made without our code: byte-level and SentencePiece."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors, trainers
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


def byte_level(tokens: Iterable[bytes] = (), split: str = "") -> dict[str, Any]:
    """A byte-level file: the 256 bytes by value, `tokens`, then the end of a text.

    Any two neighbours that make a token merge. Text is split by the regular expression `split`, or
    as GPT-2 does, for "Digits" each digit by itself before.
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
    tokenizer.add_special_tokens([END_OF_TEXT])
    return json.loads(tokenizer.to_str())


def sentencepiece(text: str, vocab_size: int = 600) -> dict[str, Any]:
    """A file as of Llama 2, its pieces learned from a text: other characters are bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False)
    learned.train_from_iterator([text], trainer)
    known = sorted(learned.get_vocab(), key=learned.token_to_id)
    pieces = sorted(known, key=lambda token: len(token) == 1)  # single characters last, as there
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    vocab = {name: id for id, name in enumerate(names)}
    bytes_too = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    tokenizer = Tokenizer(models.BPE(vocab, halves(pieces), **bytes_too))
    blank = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), blank])
    single, pair, ids = "<s> $A", "<s> $A <s>:1 $B:1", [("<s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, ids)
    back = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(names[:3])
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
