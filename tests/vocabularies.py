"""Small tokenizer.json files of both kinds, made without our code: byte-level and SentencePiece."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
SHOWN = [
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
]  # bytes that are written as themselves
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
CHARS = {byte: chr(byte) for byte in SHOWN} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
Content = dict[str, Any]


def byte_level(tokens: Iterable[bytes] = (), split: str = "") -> Content:
    """A byte-level file: the 256 bytes by value, `tokens`, then the end of a text.

    Any two neighbours that make a token merge. Text is split by the regular expression `split`, or
    as GPT-2 does, for "Digits" each digit by itself before.
    """
    names = [CHARS[byte] for byte in range(256)]
    names += ["".join(CHARS[byte] for byte in token) for token in tokens]
    step = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps = [step | {"use_regex": split in ("", "Digits")}]
    if split == "Digits":
        steps.insert(0, {"type": split, "individual_digits": True})
    elif split:
        isolated = {"behavior": "Isolated", "invert": False}
        steps.insert(0, {"type": "Split", "pattern": {"Regex": split}, **isolated})
    return {
        "version": "1.0",
        "added_tokens": [special(len(names), END_OF_TEXT)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps} if split else steps[0],
        "post_processor": None,
        "decoder": step | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": halves(names),
        },
    }


def sentencepiece(text: str, vocab_size: int = 600) -> Content:
    """A file as of Llama 2, its pieces learned from a text: other characters are bytes."""
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 259, show_progress=False)
    learned.train_from_iterator([text], trainer)
    known = sorted(learned.get_vocab(), key=learned.token_to_id)
    pieces, chars = [t for t in known if len(t) > 1], [t for t in known if len(t) == 1]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, *chars]
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    single = [begin, {"Sequence": {"id": "A", "type_id": 0}}]
    blank = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {
        "version": "1.0",
        "added_tokens": [special(id, names[id]) for id in range(3)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                blank,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {name: id for id, name in enumerate(names)},
            "merges": halves([*pieces, *chars]),
        },
    }


def special(id: int, content: str) -> Content:
    return {"id": id, "content": content, "special": True, **FLAGS}


def halves(names: list[str]) -> list[list[str]]:
    """Every way to make one of the names of two of them, in their order."""
    known = set(names)
    return [
        [name[:cut], name[cut:]]
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in known and name[cut:] in known
    ]


def save(content: Content, directory: Path) -> Path:
    """Write a tokenizer.json into a directory, which is made; return its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
