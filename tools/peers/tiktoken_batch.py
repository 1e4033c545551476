"""Encode text files by tiktoken's own batch call: python tiktoken_batch.py THREADS FILE ..."""

import sys
from pathlib import Path

import tiktoken

texts = [Path(name).read_text(encoding="utf-8") for name in sys.argv[2:]]
tiktoken.get_encoding("r50k_base").encode_ordinary_batch(texts, num_threads=int(sys.argv[1]))
