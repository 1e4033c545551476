"""What prepare.py --preview prints."""

import json
import os
import sys
from collections.abc import Iterable
from itertools import cycle

import numpy as np

from plainllama.text import Block
from plainllama.tokenizer import Tokenizer, encode


def preview(tokenizer: Tokenizer, blocks: Iterable[Block], sizes: np.ndarray) -> None:
    """Print how the first three documents begin, as tokens in two colours, and the counts.

    `blocks` are those of the documents that are kept, `sizes` these documents' bytes.
    """
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colours = cycle(("\x1b[30;46m{}\x1b[0m", "\x1b[30;43m{}\x1b[0m") if coloured else ("{}",))
    size = tokens = shown = 0
    begins = True
    for block, last in blocks:
        if begins and shown == 3:
            break
        if begins:
            start = block[:300].decode(errors="ignore")
            ids = encode(tokenizer, start)
            size, tokens, shown = size + len(start.encode()), tokens + len(ids), shown + 1
            pieces = [tokenizer.token_bytes(id).decode(errors="replace") for id in ids]
            print("".join(next(colours).format(piece) for piece in pieces))
            print(json.dumps(pieces, ensure_ascii=False), "->", ids, "\n")
        begins = last
    print(f"{size / max(tokens, 1):.2f} bytes per token here, vocabulary of {tokenizer.n_vocab:,}")
    print(f"{len(sizes):,} documents, {sizes.sum():,} bytes, without empty and repeated ones")
