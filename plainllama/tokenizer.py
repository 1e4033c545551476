"""Tokenizers: any tokenizer.json, run by Hugging Face's `tokenizers`.

load_tokenizer(path)             the tokenizer of a tokenizer.json
find_tokenizer("gpt2")           by name: byte, one of tiktoken's, or a tokenizer.json
train_bpe(texts, vocab_size)     a new byte-level BPE
Tokenizer.encode(text)           the ids of a text; encoding.py does that for much text
"""

import codecs
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tiktoken_ext.openai_public import r50k_pat_str
from tokenizers import decoders, models, pre_tokenizers

from plainllama.settings import read_json, write_json
from plainllama.terminal import UserError, command, note

END_OF_TEXT = "<|endoftext|>"
TURNS = ("<|im_start|>", "<|im_end|>")  # begin and end a turn of a conversation, in ChatML
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>")  # the usual names of what ends a text
MOST_IDS = 10_000_000  # a model has a row of weights for each id

# A byte-level tokenizer.json writes a token's bytes as printable characters: a byte that is not
# printable in Latin-1 is written as the next character from 256 on.
HIDDEN = [*range(33), *range(127, 161), 173]
PRINTED = {byte: 256 + number for number, byte in enumerate(HIDDEN)}
UNPRINTED = {char: byte for byte, char in PRINTED.items()}
UTF8_BYTES = frozenset(range(0xF5)) - {0xC0, 0xC1}  # those that texts have


class Tokenizer:
    """A tokenizer.json, and what the stages ask of it.

    content        the file's bytes
    vocab_size     its largest id + 1, added tokens included
    special        the ids of its special tokens
    end_of_text    the id that ends a document
    ends           the ids that end a generated text; plainllama.load() asks the model's files
    begin_of_text  the ids that its post-processor puts before a document
    begin_id       the first of them, or end_of_text: what a model's files call bos_token
    """

    def __init__(self, content: bytes, end_of_text: str = "") -> None:
        """Read the file; `end_of_text` is the token that ends a text if none of ENDS is there."""
        try:
            self.backend = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # `tokenizers` raises nothing narrower
            raise UserError(f"it is damaged or no tokenizer.json: {error}") from error
        self.content = content
        self.settings = json.loads(content)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocabulary = self.backend.get_vocab()
        self.vocab_size = max(self.vocabulary.values(), default=-1) + 1
        if self.vocab_size > MOST_IDS:
            raise UserError(
                f"it has the id {self.vocab_size - 1:,}; ids must be below {MOST_IDS:,}"
            )
        self.added = self.backend.get_added_tokens_decoder()
        self.special = frozenset(id for id, token in self.added.items() if token.special)
        ids = {token.content: id for id, token in self.added.items()}
        self.end_name = next((name for name in (*ENDS, end_of_text) if name in ids), "")
        if not self.end_name:
            raise UserError(
                f"it has none of {', '.join(ENDS)} but {[*ids][:9]}; name what ends a text as the "
                "eos_token of a tokenizer_config.json beside it"
            )
        self.end_of_text = ids[self.end_name]
        self.ends = [self.end_of_text]
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a").ids
        self.begin_of_text = tuple(whole[: whole.index(plain[0])]) if plain else ()
        self.begin_id = (*self.begin_of_text, self.end_of_text)[0]
        self.backend.encode_special_tokens = True  # what is written like a special token is text

    def encode(self, text: str, special_tokens: bool = False) -> list[int]:
        """Return the ids of `text`, without begin_of_text.

        What it writes like a special token, `<|endoftext|>` for example, is text unless asked for.
        """
        try:
            unknown = self.unknown.intersection(text.encode())
        except UnicodeEncodeError as error:
            raise UserError(f"{text[error.start]!r} is not a character; give UTF-8 text") from error
        if unknown:
            char = next(char for char in text if unknown.intersection(char.encode()))
            raise UserError(f"{char!r} is not in the vocabulary; leave it out")
        self.backend.encode_special_tokens = not special_tokens
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens too, with U+FFFD for what is no UTF-8."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def stream(self) -> Callable[[int], str]:
        """Return what turns one id after the other into text: the characters that became whole.

        The DecodeStream of `tokenizers` fails at bytes that are no UTF-8, which models write.
        """
        characters = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda id: characters.decode(self.token_bytes(id))

    @cached_property
    def byte_level(self) -> bool:
        """Whether tokens write bytes as characters; otherwise they are written as SentencePiece."""
        steps = [self.settings.get("pre_tokenizer"), self.settings.get("decoder")]
        return '"ByteLevel"' in json.dumps(steps)

    @cached_property
    def unknown(self) -> frozenset[int]:
        """The bytes of UTF-8 that no token of a byte-level vocabulary has: they would be lost."""
        if not self.byte_level or self.settings["model"].get("unk_token"):
            return frozenset()
        return UTF8_BYTES - {token[0] for token in self.all_bytes if len(token) == 1}

    @cached_property
    def all_bytes(self) -> list[bytes]:
        """The bytes of text that each id stands for; none where no token has the id."""
        found = [b""] * self.vocab_size
        for token, id in self.vocabulary.items():
            if id in self.added:
                found[id] = self.added[id].content.encode()
            elif self.byte_level:
                found[id] = unprinted(token)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):  # SentencePiece's way to write a byte
                found[id] = bytes.fromhex(token[3:5])
            else:
                found[id] = token.replace("\u2581", " ").encode()
        return found

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of text of a token; none for an id that the vocabulary does not have."""
        return self.all_bytes[id] if 0 <= id < self.vocab_size else b""

    @cached_property
    def token_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, (vocab_size,); special tokens have none."""
        lengths = np.array([len(token) for token in self.all_bytes], np.int64)
        lengths[list(self.special)] = 0
        return lengths

    def gives_ids_of(self, other: "Tokenizer") -> bool:
        """Tell whether two files give the same ids, however they are written."""
        ours, theirs = (json.loads(one.backend.to_str()) for one in (self, other))
        keys = ("added_tokens", "normalizer", "pre_tokenizer", "model")
        same = all(ours[key] == theirs[key] for key in keys)
        return same and self.begin_of_text == other.begin_of_text

    def save(self, path: Path) -> None:
        """Write the file as it was read, and beside it what ends a text if that is unusual."""
        path.write_bytes(self.content)
        if self.end_name not in ENDS:
            write_json(path.with_name("tokenizer_config.json"), {"eos_token": self.end_name})


def unprinted(token: str) -> bytes:
    """Return the bytes that a byte-level tokenizer.json writes as printable characters."""
    return token.translate(UNPRINTED).encode("latin-1", errors="replace")


# Made anew, or found by name


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, and what the tokenizer_config.json beside it says ends a text."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no tokenizer at {path}; `{command('prepare.py')}` makes one")
    beside = path.with_name("tokenizer_config.json")
    end = read_json(beside).get("eos_token") if beside.is_file() else ""
    if isinstance(end, dict):  # an AddedToken
        end = end.get("content")
    try:
        return Tokenizer(path.read_bytes(), end or "")
    except UserError as error:
        raise UserError(f"{path} cannot be used: {error}") from error


def tokenizer_file(name: str) -> Path:
    """Return the tokenizer.json that --tokenizer names, by itself or by its directory."""
    return Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)


def find_tokenizer(name: str) -> Tokenizer:
    """Return `byte`, one of tiktoken's, or the one of a tokenizer.json or of its directory."""
    if name == "byte":
        return byte_level_tokenizer({bytes([b]): b for b in range(256)}, 256)
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
    return byte_level_tokenizer(encoding._mergeable_ranks, encoding.eot_token, encoding._pat_str)


def train_bpe(sample: list[bytes], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE: ids are the 256 bytes, the merges in order, end-of-text and TURNS.

    gigatoken learns the merges, or else `tokenizers` the same ones slowly.
    """
    size = vocab_size - len(TURNS)
    try:
        import gigatoken

        with silence():
            text = END_OF_TEXT.encode().join(sample)
            merges = gigatoken.train_bpe(text, size, [END_OF_TEXT])[1]
    except ImportError:
        trained = tokenizers.ByteLevelBPETokenizer()
        texts = (text.decode() for text in sample)
        trained.train_from_iterator(texts, size - 1, min_frequency=0, show_progress=False)
        pairs = json.loads(trained.to_str())["model"]["merges"]
        merges = [(unprinted(left), unprinted(right)) for left, right in pairs]
    ranks = {bytes([b]): b for b in range(256)}
    for left, right in merges:
        ranks.setdefault(left + right, len(ranks))
    tokenizer = with_turns(byte_level_tokenizer(ranks, len(ranks)))
    if tokenizer.vocab_size < vocab_size:
        note(f"note: this text gives a vocabulary of {tokenizer.vocab_size:,}, not {vocab_size:,}")
    return tokenizer


def with_turns(tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer with the words of TURNS that it lacks as its last ids."""
    made = tokenizers.Tokenizer.from_buffer(tokenizer.content)
    words = [word for word in TURNS if word not in tokenizer.vocabulary]
    made.add_special_tokens([tokenizers.AddedToken(word, normalized=False) for word in words])
    return Tokenizer(made.to_str().encode(), tokenizer.end_name) if words else tokenizer


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing reach the screen, not even what compiled code prints."""
    sys.stdout.flush()
    with ExitStack() as after, open(os.devnull, "wb") as nowhere:
        for screen in (1, 2):
            copy = os.dup(screen)
            after.callback(os.close, copy)
            after.callback(os.dup2, copy, screen)
            os.dup2(nowhere.fileno(), screen)
        yield


def portable(pattern: str) -> str:
    """Return a pattern of tiktoken's that means the same in `tokenizers` and in JavaScript.

    It has no possessive quantifiers, which only save time, and no `$`, which may end a line.
    """
    return re.sub(r"([?*+]|\d\})\+", r"\1", pattern).replace("$", r"(?![\s\S])")


def byte_level_tokenizer(
    ranks: dict[bytes, int], end_of_text: int, pattern: str = r50k_pat_str
) -> Tokenizer:
    """Return the tokenizer that gives tiktoken's ids, with end-of-text as its one added token.

    tiktoken merges any two neighbours that make a token together, so every way to halve a token
    is listed as a merge, not just the one that training found.
    """
    ids = {t.decode("latin-1").translate(PRINTED): id for t, id in ranks.items()}
    merges = [
        (token[:cut], token[cut:])
        for token in sorted(ids, key=ids.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    if end_of_text != len(ids):  # it would get the next free id, unless it is in the vocabulary
        ids[END_OF_TEXT] = end_of_text
    made = tokenizers.Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # with GPT-2's pattern
    if pattern != r50k_pat_str:
        split = pre_tokenizers.Split(tokenizers.Regex(portable(pattern)), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        made.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, normalized=False)])
    return Tokenizer(made.to_str().encode())
