"""Much text to ids, on all cores, by the fastest engine that gives the ids of `tokenizers`.

Sample                                     some of the text, to train on and to compare engines
find_encoder(tokenizer, sample)            gigatoken, tiktoken, or else `tokenizers` itself
encode_pieces(pieces, encoder, workers)    the ids of pieces of documents, in order
"""

import itertools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from plainllama.terminal import command, note
from plainllama.tokenizer import Tokenizer, byte_level_tokenizer, portable, unprinted, with_turns

BATCH = 1 << 21  # bytes that are encoded at a time
CACHE_BYTES = 500_000_000  # of text, after which gigatoken's cache of words starts anew

# The pattern of cl100k_base. gigatoken knows it as an earlier tiktoken wrote it, with a + at its
# end; `tokenizers` and JavaScript need it portable.
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
# What engines disagree about, when they do.
PROBE = (
    "I'll we've 'S don't  \r\n\r\n\t x=12345.67;\n\n  y \u00a0\u3000\u65e5\u672c\u8a9e\u3002 "
    "caf\u00e9 e\u0301\u0915\u094d\u0937 \U0001f469\u200d\U0001f467 \0\x7f\x85\ufeff<0x0A>\u2581"
    "x\n  "
)
Encoder = Callable[[list[bytes]], list[np.ndarray]]
Piece = tuple[Any, ...]  # its bytes, whether its document ends with it, and what a caller adds


class Sample:
    """Pieces spread evenly over all text, of at most `limit` bytes together."""

    def __init__(self, limit: int) -> None:
        # Each with the number of its document, and the byte at which it begins there.
        self.pieces: list[tuple[int, int, bytes]] = []
        self.limit, self.step, self.seen, self.size = limit, 1, 0, 0

    def add(self, document: int, begin: int, piece: bytes) -> None:
        if self.seen % self.step == 0:
            self.pieces.append((document, begin, piece))
            self.size += len(piece)
        self.seen += 1
        if self.size > self.limit:
            self.pieces = self.pieces[::2]
            self.step *= 2
            self.size = sum(len(piece) for *_, piece in self.pieces)

    def keep(self, count: int) -> None:
        """Forget the pieces of all but the first `count` documents."""
        while self.pieces and self.pieces[-1][0] >= count:
            self.size -= len(self.pieces.pop()[2])


def find_encoder(tokenizer: Tokenizer, sample: list[bytes]) -> tuple[str, Encoder]:
    """Return the name of an engine for much text, and its function from UTF-8 texts to ids.

    It is the first of gigatoken, tiktoken and `tokenizers` that gives the ids of the last on a
    probe and on a sample of the text.
    """
    if tokenizer.unknown:  # SmolLM2's, for example: texts with such characters are refused
        return "tokenizers", tokenizers_encoder(tokenizer)
    starts = [text[:4096].decode(errors="ignore") for text in sample[:: len(sample) // 64 + 1]]
    names = "".join(token.content for token in tokenizer.added.values())
    texts = [text.encode() for text in (PROBE, names[:4096], *starts)]
    slow = tokenizers_encoder(tokenizer)
    expected = slow(texts)
    for name, make in (("gigatoken", gigatoken_encoder), ("tiktoken", tiktoken_encoder)):
        try:
            encoder = make(tokenizer)
            found = encoder(texts)
        except ImportError:
            how = command("-m", "pip", "install", name)
            note(f"note: `{how}` makes encoding many times as fast")
        except BaseException as error:  # a panic of the compiled code is not even an Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        else:
            if all(map(np.array_equal, found, expected)):
                return name, encoder
    return "tokenizers", slow


def gigatoken_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return gigatoken's encoder; it raises errors of its own if it cannot use the tokenizer."""
    import gigatoken

    words = [token for token in tokenizer.settings["added_tokens"] if not token["special"]]
    settings = json.dumps(tokenizer.settings | {"added_tokens": words, "post_processor": None})
    settings = settings.replace(json.dumps(portable(CL100K)), json.dumps(CL100K + "+"))
    backend, encoded = gigatoken.Tokenizer.from_json(settings), 0

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        nonlocal backend, encoded
        encoded += sum(map(len, texts))
        if encoded > CACHE_BYTES:  # it keeps all words that it has seen, without a limit
            backend, encoded = gigatoken.Tokenizer.from_json(settings), 0
        rows = backend.encode_batch(texts, parallel=False).layout  # lets other threads run
        bounds = itertools.pairwise(rows.offsets.data.tolist())
        return [rows.content.data[start:end] for start, end in bounds]

    return encoder


def tiktoken_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return tiktoken's encoder; ValueError for a file that byte_level_tokenizer did not make."""
    vocabulary = tokenizer.vocabulary.items()
    ranks = {unprinted(token): id for token, id in vocabulary if id not in tokenizer.added}
    split = tokenizer.settings["pre_tokenizer"].get("pretokenizers", [None])[0]
    pattern = split["pattern"]["Regex"] if split else r50k_pat_str
    made = byte_level_tokenizer(ranks, tokenizer.end_of_text, pattern)
    if not any(same.gives_ids_of(tokenizer) for same in (made, with_turns(made))):
        raise ValueError("tiktoken's ids may be others")
    encoding = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        return [encoding.encode_to_numpy(text.decode()) for text in texts]

    return encoder


def tokenizers_encoder(tokenizer: Tokenizer) -> Encoder:
    """Return the encoder of `tokenizers`, which the others are held to.

    Characters that the vocabulary lacks are a UserError.
    """

    def encoder(texts: list[bytes]) -> list[np.ndarray]:
        decoded = [text.decode() for text in texts]
        if tokenizer.unknown:
            return [np.array(tokenizer.encode(text), np.uint32) for text in decoded]
        rows = tokenizer.backend.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(row.ids, np.uint32) for row in rows]

    return encoder


def encode_pieces(
    pieces: Iterable[Piece], encoder: Encoder, workers: int
) -> Iterator[tuple[list[Piece], list[np.ndarray]]]:
    """Yield batches of pieces of documents, in order, with the ids of each piece.

    They are encoded on `workers` cores, or on all: in threads, where Ctrl-C does not interrupt
    what compiled code has begun. No more than `workers` + 3 batches are held at a time. Each piece
    is encoded by itself, which to SentencePiece may make a difference of a token.
    """
    workers = workers or os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    pending: deque = deque()
    try:
        for batch in in_batches(pieces):
            pending.append((batch, pool.submit(encoder, [text for text, *_ in batch])))
            if len(pending) > workers + 2:
                done, ids = pending.popleft()
                yield done, ids.result()
        for done, ids in pending:
            yield done, ids.result()
    finally:
        pool.shutdown(cancel_futures=True)


def in_batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield lists of pieces of about BATCH bytes."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
