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
import sys
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import regex
import tiktoken

from plainllama.settings import UserError
from plainllama.tokenizer_json import (
    END_OF_TEXT,
    GPT2,
    LLAMA_END_OF_TEXT,
    PATTERNS,
    AddedToken,
    Vocabulary,
    describe,
    parse,
    unprinted,
)

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
