"""What the tests of preparing text share: texts, calls of prepare.py, what is in a dataset."""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import prepare
from plainllama.data import Dataset
from plainllama.tokenizer import load_tokenizer

SCRIPT = Path(prepare.__file__)
LINE = "To be, or not to be: that is the question.\n"
END = "<|endoftext|>"

ODD = "aeiou thTHE'sd  \n\r\t1234.,;-\u00a0\u3000\u0301\u65e5\u672c\u3067\u3059\u3002\u0436\u0e01"
ODD += "\U0001f469\u200d\0"
texts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\ufffd")),  # which is refused
    st.text(st.sampled_from(ODD)),
    st.text(st.sampled_from("a b"), max_size=60),
    st.lists(st.sampled_from([" the", "ing", "'ll", "  ", "\n", END, "HAMLET"])).map("".join),
)
quick = functools.partial(
    settings, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def run_script(*arguments: object, cwd: Path, stdin: bytes = b"") -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=120)


def write(path: str, text: str | bytes = LINE * 9) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_jsonl(path: str, documents: list[str], key: str = "text") -> str:
    return write(path, "".join(json.dumps({key: text}) + "\n" for text in documents))


def documents(dataset: Dataset, split: str) -> list[str]:
    """Decode a split and cut it at the end-of-text ids."""
    tokenizer = load_tokenizer(dataset.data_dir / "tokenizer.json")
    ids = np.fromfile(dataset.path(split), dataset.dtype)
    ends = np.flatnonzero(ids == tokenizer.end_of_text)
    assert len(ids) == dataset.tokens[split] == ends[-1] + 1
    assert len(ends) == dataset.documents[split]
    digest = hashlib.sha256(dataset.path(split).read_bytes()).hexdigest()
    assert dataset.sha256[f"{split}.bin"] == digest
    rows = [row[:-1].tolist() for row in np.split(ids, ends + 1)[:-1]]
    found = [b"".join(map(tokenizer.token_bytes, row)) for row in rows]
    assert sum(map(len, found)) == dataset.bytes[split]
    return [text.decode() for text in found]


def all_documents(dataset: Dataset) -> list[str]:
    """Return the documents of both splits in the order of the alphabet."""
    return sorted(documents(dataset, "train") + documents(dataset, "val"))


def all_text(dataset: Dataset) -> str:
    return "".join(documents(dataset, "train") + documents(dataset, "val"))


def contents(folder: str = "out") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix != ""}
