"""Turn text, or conversations, into a dataset: data/NAME/{train.bin, val.bin, meta.json, ...}.

    python prepare.py                                      Shakespeare's plays, 5 MB
    python prepare.py book.txt notes/ 'web/*.jsonl.gz'     your own files, folders and globs
    ... | python prepare.py - --out=data/mine --tokenizer=gpt2
    python prepare.py 'hf://datasets/OWNER/NAME/**/train-*.parquet'
    python prepare.py chats.jsonl                          records with the key messages

It reads what plainllama/text.py knows: text, source code, HTML, .jsonl, .json, .csv, .tsv, .parquet
and URLs. Everything is read twice in constant memory: first to count, to find duplicates and to
sample text for the tokenizer, then to encode. The bins are flat arrays of ids, with
`<|endoftext|>` after every document. Conversations are written by a chat template instead, and
beside their ids is written which of them are learned; plainllama/chat.py has the details.
"""

import plainllama.startup  # noqa: F401 isort: skip (first: see there)

import hashlib
import json
import os
import re
import runpy
import sys
import tempfile
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from plainllama.bins import is_prepared, new_dataset, replace_dataset, write_chats, write_text
from plainllama.chat import CHATML, Encoded, Learn, Template, find_template
from plainllama.data import SPLITS, identity
from plainllama.encoding import Sample, encode_pieces, find_encoder, tokenizers_encoder
from plainllama.settings import load
from plainllama.shakespeare import PLAYS, fetch_plays
from plainllama.terminal import ROOT, UserError, command, note, run_main
from plainllama.text import (
    Format,
    Notes,
    NotText,
    Reading,
    Source,
    find_sources,
    hold_conversations,
    local_files,
    read_file,
)
from plainllama.tokenizer import Tokenizer, find_tokenizer, tokenizer_file, train_bpe, with_turns

TRAIN, VAL, DROPPED = 0, 1, 2
SMALL, LARGE = 1_000_000, 25_000_000  # bytes of a text for which docs/RUNS.md names other configs
A_MINUTE = 50_000  # bytes of a text up to which training takes about a minute anywhere
FEW = 20  # documents; of fewer, no whole ones are kept for validation
TRAINING_BYTES = 100_000_000  # of text that a tokenizer is trained on, at most
CHECKED_BYTES = 1_000_000  # of text that encoders are compared on, at most
CHECKED_PIECE = 4096  # bytes of each piece
DAMAGED, WITHOUT_TEXT = "damaged files skipped", "files without text skipped"


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a dataset of tokens. INPUT: files, folders, globs, URLs such as
    hf://datasets/owner/name/file, or - for standard input; without any, Shakespeare's plays."""

    inputs: tuple[str, ...] = ()
    # input
    text_key: str = "text"  # key (.jsonl, .json) or column (.csv, .parquet) that holds the text
    format: Format = "auto"  # of all inputs; auto: by a file's name; chat: conversations, as found
    encoding: str = ""  # of inputs that are not UTF-8 and do not say so, cp1252 for example
    learn: Learn = "assistant"  # of conversations: the assistant's answers, or all
    # output
    out: str = ""  # directory to write; by default data/ and the name of the first input
    overwrite: bool = False  # replace an existing dataset
    preview: bool = False  # show the first documents as tokens, and the counts; write nothing
    # tokenizer
    tokenizer: str = "bpe"  # bpe (trained here), byte, gpt2 or another of tiktoken's, or a file
    vocab_size: int = 0  # tokens of a trained bpe vocabulary; 0: one for each kB, 512 to 4,096
    # split
    val_fraction: float = 0.1  # share of the text that is kept for validation
    seed: int = 0  # chooses the documents kept for validation
    # advanced
    workers: int = 0  # cores to encode with; 0: all. The result does not depend on it

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        trained = self.tokenizer == "bpe" and self.vocab_size != 0
        if trained and not 259 <= self.vocab_size <= 1_000_000:  # bytes and special tokens are 259
            raise UserError(f"vocab_size={self.vocab_size} must be 259 to 1,000,000")
        if not 0 <= self.workers <= 1024:
            raise UserError(f"workers={self.workers} must be 0 to 1,024")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed={self.seed} must not be negative, and less than 2**64")


def main() -> None:
    run(load(PrepareConfig))


def run(config: PrepareConfig) -> None:
    """Find the text, read it once, split it, encode and write it, and report."""
    started = time.perf_counter()
    if config.workers:
        os.environ.setdefault("RAYON_NUM_THREADS", str(config.workers))  # to train with
    notes = Notes()
    sources = find_sources(config.inputs, notes)
    if config.preview:
        with tempfile.TemporaryDirectory() as folder:
            preview(read_corpus(sources, Path(folder), config, notes), config)
        tell(notes)
        return

    out = find_out(config)
    known_by = fingerprint(config, sources)
    if is_prepared(out, known_by, config.overwrite):
        print(f"{out} is already prepared from this text with these settings")
        return
    with new_dataset(out) as partial:
        corpus = read_corpus(sources, partial, config, notes)
        meta = encode_corpus(corpus, partial / "new", config, notes)
        replace_dataset(out, partial, meta | {"fingerprint": known_by})
    tell(notes)
    report(meta, out, time.perf_counter() - started)


# Find


def find_out(config: PrepareConfig) -> Path:
    """Return the directory to write: by default, data/ and the name of the first input."""
    name = "shakespeare"
    if config.inputs:
        name = os.path.basename(os.path.abspath(config.inputs[0])).split(".")[0]
        name = re.sub(r"\W+", "-", name).strip("-") or "text"
    out = Path(config.out or f"data/{name}")
    return Path(os.path.realpath(out)) if out.is_symlink() or out.name in ("", "..") else out


def fingerprint(config: PrepareConfig, sources: list[Source]) -> str:
    """Hash the settings, and which files there are; text from stdin is always new."""
    settings = asdict(config)
    for key in ("inputs", "out", "overwrite", "workers"):  # these change nothing in the dataset
        del settings[key]
    paths = [source.path for source in sources if source.path]
    path = tokenizer_file(config.tokenizer)
    if path.is_file():  # beside it may be its chat template
        beside = ("tokenizer_config.json", "chat_template.jinja")
        paths += [path, *(path.with_name(name) for name in beside)]
    files = [(str(path), identity(path.stat())) for path in paths if path.exists()]
    names = [source.name for source in sources]
    now = time.time_ns() if "-" in names else 0
    return hashlib.sha256(json.dumps([settings, names, files, now]).encode()).hexdigest()


# Read once


@dataclass(frozen=True)
class Corpus:
    """What the first reading learns of the text, and how it is split and encoded."""

    reading: Reading
    files: list[Source]  # those that could be read
    sizes: np.ndarray  # (documents,), bytes; 0 of a blank one
    split: np.ndarray  # (documents,), TRAIN, VAL, or DROPPED: blank, or seen before
    cut: int | None  # all kept text from this byte on goes to validation; None: `split` decides
    sample: list[bytes]  # of the training split
    tokenizer: Tokenizer
    template: Template | None  # of conversations


class Documents:
    """The digest of every document, by which repeated ones and the split are told, and its size."""

    def __init__(self, seed: int) -> None:
        self.digests, self.sizes = array("q"), array("q")
        # Of the standard library's digests the fastest.
        self.start = hashlib.sha1(str(seed).encode(), usedforsecurity=False)
        self.keep(0)

    def keep(self, count: int) -> None:
        """Forget all but the first `count` documents, and begin another."""
        del self.digests[count:], self.sizes[count:]
        self.digest = self.start.copy()
        self.size = 0
        self.blank = True

    def add(self, piece: bytes, ends: bool) -> None:
        """Take in the next piece, with which a document may end."""
        self.digest.update(piece)
        self.size += len(piece)
        self.blank = self.blank and not piece.strip()
        if ends:
            self.digests.append(int.from_bytes(self.digest.digest()[:8], "little", signed=True))
            self.sizes.append(0 if self.blank else self.size)
            self.keep(len(self.sizes))


def read_corpus(sources: list[Source], folder: Path, config: PrepareConfig, notes: Notes) -> Corpus:
    """Read everything once; `folder` takes what is downloaded, or comes from standard input."""
    tokenizer = None if config.tokenizer == "bpe" else find_tokenizer(config.tokenizer)
    plays = [] if sources else fetch_plays(folder)
    files = local_files(sources, folder) or [Source(path.name, path) for path in plays]
    reading = Reading(config.text_key, config.format, config.encoding)
    reading = replace(reading, in_chats=hold_conversations(files, reading))
    documents = Documents(config.seed)
    sample = Sample(CHECKED_BYTES if tokenizer else TRAINING_BYTES)
    readable: list[Source] = []
    with progress(files, "reading") as bar:
        for file in files:
            before = len(documents.sizes)
            try:
                for piece, ends in read_file(file, reading, notes, bar):
                    said = [piece]
                    if reading.in_chats:  # of which the tokenizer reads the contents alone
                        said = [message["content"].encode() for message in json.loads(piece)]
                    for text in said:
                        text = text[:CHECKED_PIECE] if tokenizer else text
                        sample.add(len(documents.sizes), documents.size, text)
                    documents.add(piece, ends)
                readable.append(file)
            except UserError as error:
                if not file.in_folder:
                    raise
                documents.keep(before)
                sample.keep(before)
                notes.add(WITHOUT_TEXT if isinstance(error, NotText) else DAMAGED, error)
    damaged, in_folders = notes.counts[DAMAGED], sum(file.in_folder for file in files)
    if damaged * 100 > in_folders:
        share = f"{damaged:,} of {in_folders:,} files"
        raise UserError(f"{share} cannot be read, over 1%; the first: {notes.first[DAMAGED]}")
    if not readable:
        raise UserError(f"no text: {notes.first[WITHOUT_TEXT]}")
    split, cut = assign_splits(documents, config.val_fraction, not reading.in_chats)
    sizes = np.array(documents.sizes)
    learned = training_pieces(sample, sizes, split, cut)
    vocab_size = config.vocab_size or min(max(512, int(sizes.sum()) // 1000), 4096)
    tokenizer = tokenizer or train_bpe(learned, vocab_size)
    template = None
    if reading.in_chats:  # they need a template: that in the tokenizer's directory, or ChatML
        path = tokenizer_file(config.tokenizer)
        template = find_template(path.parent, tokenizer) if path.is_file() else None
        template = template or Template(CHATML, with_turns(tokenizer), {})
        tokenizer = template.tokenizer
    return Corpus(reading, readable, sizes, split, cut, learned, tokenizer, template)


def progress(files: list[Source], label: str) -> tqdm:
    """Return a progress bar over the bytes of all files."""
    size = sum(source.path.stat().st_size for source in files)
    return tqdm(total=size, desc=label, unit="B", unit_scale=True, disable=None, leave=False)


# Split


def assign_splits(
    documents: Documents, val_fraction: float, may_cut: bool = True
) -> tuple[np.ndarray, int | None]:
    """Return the split of each document, by its digest; of very few, where to cut all text.

    Of many documents, each is for validation with a probability of val_fraction. Of fewer, this
    share of them is, those that come first by their digests and fit into the same share of the
    text. Where these are hardly anything, or not even FEW are there, the end of all text is,
    unless it may not be cut.
    """
    sizes, digests = np.array(documents.sizes), np.array(documents.digests)
    # 64 bits: among 10 million different documents two are alike with probability 3e-6.
    first = np.unique(digests, return_index=True)[1]
    kept = first[sizes[first] > 0]
    split = np.full(len(sizes), DROPPED, np.uint8)
    split[kept] = TRAIN
    places = digests[kept] % 2**32  # uniform
    if len(kept) * min(val_fraction, 1 - val_fraction) >= 100:
        split[kept[places < val_fraction * 2**32]] = VAL
        return split, None
    total = int(sizes[kept].sum())
    by_digest = kept[places.argsort()]
    chosen: list[int] = []
    room = int(total * val_fraction)  # bytes
    for document in by_digest.tolist():
        if len(chosen) == round(len(kept) * val_fraction):
            break
        if sizes[document] <= room:
            chosen.append(document)
            room -= sizes[document]
    if may_cut and (len(kept) < FEW or sizes[chosen].sum() < total * val_fraction / 10):
        return split, int(total * (1 - val_fraction))
    split[chosen or by_digest[:1]] = VAL
    return split, None


def training_pieces(
    sample: Sample, sizes: np.ndarray, split: np.ndarray, cut: int | None
) -> list[bytes]:
    """Return what belongs to the training split: the tokenizer learns from no other text.

    Merges that have seen the validation text make its tokens fewer and its loss lower.
    """
    begins = np.where(split == DROPPED, 0, sizes).cumsum() - sizes  # of documents, in kept bytes
    pieces = []
    for document, begin, piece in sample.pieces:
        if split[document] == TRAIN:
            left = len(piece) if cut is None else cut - int(begins[document]) - begin
            pieces.append(piece[: after_character(piece, left)])
    return [piece for piece in pieces if piece]


def after_character(text: bytes, cut: int) -> int:
    """Return the first place from `cut` on that is not inside a character of a UTF-8 text."""
    while 0 < cut < len(text) and 0x80 <= text[cut] < 0xC0:
        cut += 1
    return max(cut, 0)


def split_pieces(corpus: Corpus, config: PrepareConfig) -> Iterator[tuple[bytes, bool, int]]:
    """Read everything again, and yield the kept pieces with their split.

    Where the text is cut by its length, the document at the cut becomes two.
    """
    document, left = 0, corpus.cut or 0  # bytes that training still takes
    with progress(corpus.files, "encoding") as bar:
        for file in corpus.files:
            for piece, ends in read_file(file, corpus.reading, Notes(), bar):
                if document == len(corpus.split):
                    raise UserError("a file grew while it was read; prepare it when it is complete")
                split = int(corpus.split[document])
                document += ends
                if split == DROPPED:
                    continue
                if corpus.cut is not None:
                    left = after_character(piece, left)
                    if 0 < left < len(piece):
                        yield piece[:left], True, TRAIN
                        piece, left = piece[left:], 0
                    split = TRAIN if left > 0 else VAL
                    left -= len(piece)
                    ends = ends or left == 0
                yield piece, ends, split
    if document < len(corpus.split):
        raise UserError("a file shrank while it was read; prepare it when it is complete")


# Encode


def encode_corpus(
    corpus: Corpus, folder: Path, config: PrepareConfig, notes: Notes
) -> dict[str, Any]:
    """Encode everything, write it to `folder`, and return what meta.json says."""
    pieces, template = split_pieces(corpus, config), corpus.template
    reader = template.plain if template else corpus.tokenizer
    engine, encoder = find_encoder(reader, corpus.sample)
    if template:

        def encode(texts: list[bytes]) -> list[Encoded]:
            return template.encode([json.loads(text) for text in texts], encoder, config.learn)

        encoded = encode_pieces(pieces, encode, config.workers)
        meta = write_chats(folder, encoded, template, notes)
    else:
        encoded = encode_pieces(pieces, encoder, config.workers)
        meta = write_text(folder, encoded, corpus.tokenizer)
    empty = int((corpus.sizes == 0).sum())
    return meta | {
        "tokenizer": config.tokenizer,
        "engine": engine,
        "split": "hash of the document" if corpus.cut is None else "tail of the text",
        "dropped": {"empty": empty, "repeated": int((corpus.split == DROPPED).sum()) - empty},
        "notes": notes.counts,
        "inputs": config.inputs or [PLAYS],
        "files": len(corpus.files),
        "settings": asdict(config),
    }


# Report


def tell(notes: Notes) -> None:
    """Print what was odd."""
    for line in notes:
        note(f"note: {line}")


def preview(corpus: Corpus, config: PrepareConfig) -> None:
    """Print the tokens with which the first three documents begin, and the counts."""
    shown, begins = 0, True
    for piece, ends, _ in split_pieces(corpus, config):
        if begins and corpus.template:
            print(underlined(piece, corpus.template, config.learn))
        elif begins:
            ids = corpus.tokenizer.encode(piece[:300].decode(errors="ignore"))
            tokens = [corpus.tokenizer.token_bytes(id).decode(errors="replace") for id in ids]
            print(json.dumps(tokens, ensure_ascii=False), "->", ids, "\n")
        shown += begins
        if shown == 3:
            break
        begins = ends
    kept = corpus.sizes[corpus.split != DROPPED]
    print(f"{len(kept):,} documents, {kept.sum():,} bytes, without empty and repeated ones")
    print(f"vocabulary of {corpus.tokenizer.vocab_size:,}")


def underlined(conversation: bytes, template: Template, learn: Learn) -> str:
    """Return a conversation as its template writes it, what is learned underlined."""
    encoder = tokenizers_encoder(template.plain)
    ids, learned, reason, _ = template.encode([json.loads(conversation)], encoder, learn)[0]
    if reason:
        return f"left out: {reason}\n"
    begin, end = ("\033[4m", "\033[24m") if sys.stdout.isatty() else ("[[", "]]")
    runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(learned)) + 1)
    texts = (template.tokenizer.decode(ids[run].tolist()) for run in runs)
    pairs = zip(texts, (learned[run[0]] for run in runs), strict=True)
    return "".join(f"{begin}{text}{end}" if is_learned else text for text, is_learned in pairs)


def report(meta: dict[str, Any], out: Path, seconds: float) -> None:
    """Print what was written, and what to run next."""
    chats = meta.get("conversations")
    what = "conversations" if chats else "documents"
    for split in SPLITS:
        documents, size, tokens = (meta[key][split] for key in ("documents", "bytes", "tokens"))
        print(f"{split:5s} {documents:10,} {what} {size:15,} bytes {tokens:14,} tokens")
    empty, repeated = meta["dropped"]["empty"], meta["dropped"]["repeated"]
    print(f"dropped: {empty:,} empty and {repeated:,} repeated {what}")
    kept = f"whole {what}, chosen by a hash of their text"
    if meta["split"] == "tail of the text":
        kept = f"the last {meta['settings']['val_fraction']:.3g} of the text"
    print(f"validation: {kept}; {size / max(tokens, 1):.3f} bytes per token")
    if chats:
        share = sum(chats["learned"].values()) / sum(meta["tokens"].values())
        print(f"learned: {share:.1%} of the tokens of conversations ({meta['settings']['learn']})")
    print(f"vocabulary: {meta['tokenizer']}, {meta['vocab_size']:,} tokens, {meta['dtype']}")
    rate = sum(meta["bytes"].values()) / seconds / 1e6
    print(f"wrote {out} in {seconds:.1f} s ({rate:.1f} MB/s of text, {meta['engine']})")
    demo = out == Path("data/shakespeare")
    places = [] if demo else [f"--data_dir={out}", f"--out_dir={Path('out', out.name)}"]
    if chats:
        print("next:", command("train.py", "config/chat.py", *places))
        return
    size = sum(meta["bytes"].values())
    epochs = ["--epochs=4"] if size < SMALL else []
    print("next, quick:", command("train.py", "config/tiny.py", *places, *epochs))
    better = "config/small.py" if size >= LARGE else "config/book.py"
    longer = about(training_time(better, meta)) if size > A_MINUTE else "a minute"
    print(f"or better, {longer} here:", command("train.py", better, *places))


def training_time(config_file: str, meta: dict[str, Any]) -> float:
    """Return about how many seconds training with a config file takes on this machine."""
    from model import ModelConfig  # torch is not imported before text is prepared
    from plainllama.machine import training_seconds

    settings = runpy.run_path(str(ROOT / config_file))
    keys = settings.keys() & {field.name for field in fields(ModelConfig)}
    shape = {key: settings[key] for key in keys} | {"vocab_size": meta["vocab_size"]}
    if "epochs" in settings:
        n_tokens = settings["epochs"] * meta["tokens"]["train"]
    else:
        n_tokens = settings["max_steps"] * settings["tokens_per_step"]
    return training_seconds(ModelConfig(**shape), n_tokens)


def about(seconds: float) -> str:
    """Return a time in words, for which two digits are enough."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= length:
            return f"about {seconds / length:.2g} {unit}"
    return "a minute"


if __name__ == "__main__":
    run_main(main)
