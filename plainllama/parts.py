"""A dataset prepared in parts, on many machines: who reads which files, and joining them.

A part's directory is a dataset with {train, val}.documents beside its bins: of each document the
hash of its text and its bytes, int64, in the order of the bins. The join needs no text.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from plainllama.data import SPLITS, copy_documents
from plainllama.settings import UserError, read_json, sha256
from plainllama.text import Source
from plainllama.tokenizer import load_tokenizer


class Part(NamedTuple):
    """A part's directory, and what its meta.json says."""

    directory: Path
    meta: dict[str, Any]


ANY = ("part", "out", "overwrite", "preview", "workers")  # settings in which parts may differ


def check_part(config: Any) -> None:
    """Raise a UserError if prepare.py's settings ask for a part, or a join, that cannot be."""
    if config.join and (config.part or config.preview or not config.out):
        raise UserError("join takes the directories of the parts and --out, no part and no preview")
    if not config.part:
        return
    parse(config.part)
    if config.tokenizer == "bpe":
        raise UserError(
            f"part={config.part} needs a tokenizer that all parts share: train one on some of the "
            "text, python prepare.py SOME --out=data/some, and add "
            "--tokenizer=data/some/tokenizer.json"
        )
    if config.shuffle:
        raise UserError(f"shuffle mixes all documents: leave it out with part={config.part}")


def parse(part: str) -> tuple[int, int]:
    """Return (3, 64) for "3/64"; UserError if there is no such part."""
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", part)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"part={part}: it is written 1/64, 2/64 and so on, up to 64/64")
    return int(match[1]), int(match[2])


def share(sources: list[Source], part: str) -> list[Source]:
    """Return the files that are read for a part: the parts' files in order are all files in order.

    UserError if there are fewer files than parts.
    """
    number, count = parse(part)
    if any(source.path is None for source in sources):
        raise UserError(f"part={part} is a share of files: name files and folders as inputs")
    if len(sources) < count:
        raise UserError(f"part={part}, but there are {len(sources):,} files: take fewer parts")
    n = len(sources)
    return sources[(number - 1) * n // count : number * n // count]


def listing(sources: list[Source]) -> str:
    """Return the hex digest of the names and sizes of all files, whatever part reads them."""
    names = [f"{s.name}\0{s.path.stat().st_size if s.path else 0}\n" for s in sources]
    return hashlib.sha256("".join(names).encode(errors="surrogateescape")).hexdigest()


def write_documents(folder: Path, digests: Any, sizes: Any, splits: np.ndarray) -> dict[str, str]:
    """Write what the join must know of the documents; return the files' checksums."""
    table = np.stack((np.array(digests, "<i8"), np.array(sizes, "<i8")), axis=1)  # (documents, 2)
    for number, split in enumerate(SPLITS):
        table[splits == number].tofile(folder / f"{split}.documents")
    return {f"{split}.documents": sha256(folder / f"{split}.documents") for split in SPLITS}


def find_parts(directories: Iterable[str]) -> list[Part]:
    """Return the parts in order.

    UserError unless they are all parts of one dataset, each once.
    """
    from plainllama.data import load_dataset  # it imports torch, which takes seconds

    found: dict[int, Part] = {}
    first: Part | None = None
    for directory in map(Path, directories):
        load_dataset(directory)
        meta = read_json(directory / "meta.json")
        if not meta.get("part"):
            raise UserError(f"{directory} is no part: prepare it with --part=1/2, for example")
        number, count = parse(meta["part"])
        first = first or Part(directory, meta)
        compare(Part(directory, meta), first)
        if number in found:
            both = f"{found[number].directory} and {directory}"
            raise UserError(f"{both} are both part {number}/{count}: name each part once")
        found[number] = Part(directory, meta)
    if first is None:
        raise UserError("name the directories of the parts to join: --join data/part-*")
    missing = [f"{n}/{count}" for n in range(1, count + 1) if n not in found]
    if missing:
        raise UserError(f"missing: part {', '.join(missing[:3])}{', ...' * (len(missing) > 3)}")
    return [found[number] for number in sorted(found)]


def compare(part: Part, first: Part) -> None:
    """Raise a UserError unless two parts were made of the same files in the same way."""
    for key in ("tokenizer.json", "files", "number of parts", *first.meta["settings"]):
        one, other = (look_up(key, meta) for meta in (part.meta, first.meta))
        if key not in ANY and one != other:
            shown = f" ({str(one)[:60]}, not {str(other)[:60]})"
            raise UserError(
                f"{part.directory} was made with other {key} than {first.directory}"
                f"{'' if key in ('tokenizer.json', 'files') else shown}: parts must agree"
            )


def look_up(key: str, meta: dict[str, Any]) -> Any:
    """Return what a part's meta.json says of something that all parts have in common."""
    if key == "number of parts":
        return parse(meta["part"])[1]
    if key == "files":
        return meta["listing"]
    return (meta["sha256"] if key == "tokenizer.json" else meta["settings"]).get(key)


def join(parts: list[Part], folder: Path) -> dict[str, Any]:
    """Put the bins of all parts into `folder`, and return what meta.json says of them.

    Of equal documents in several parts the first stays. Bins that lose none are linked, not copied,
    where the file system can.
    """
    first = parts[0].meta
    shutil.copyfile(parts[0].directory / "tokenizer.json", folder / "tokenizer.json")
    eot = load_tokenizer(folder / "tokenizer.json").eot_token
    meta = {key: first[key] for key in ("dtype", "vocab_size", "tokenizer", "inputs", "listing")}
    meta |= {"settings": first["settings"] | {"part": ""}, "trained_on_bytes": 0}
    meta |= {"split": first["split"], "files": sum(part.meta["files"] for part in parts)}
    meta |= {key: dict.fromkeys(SPLITS, 0) for key in ("tokens", "bytes", "documents")}
    meta |= {"sha256": {"tokenizer.json": first["sha256"]["tokenizer.json"]}}
    meta["parts"], repeated = {}, 0
    for split in SPLITS:
        tables = [read_documents(part, split) for part in parts]
        seen = np.unique(np.concatenate([table[:, 0] for table in tables]), return_index=True)[1]
        kept = np.zeros(sum(map(len, tables)), bool)
        kept[seen] = True
        meta["parts"][split] = {}
        places = np.cumsum([len(table) for table in tables])[:-1]
        for part, table, stays in zip(parts, tables, np.split(kept, places), strict=True):
            repeated += len(stays) - int(stays.sum())
            if not stays.any():
                continue
            name = f"{split}-{len(meta['parts'][split]):05d}.bin"
            source, target = part.directory / f"{split}.bin", folder / name
            tokens, digest = part.meta["tokens"][split], part.meta["sha256"][f"{split}.bin"]
            if stays.all():
                link(source, target)
            else:
                tokens, digest = copy_documents(source, target, np.dtype(meta["dtype"]), eot, stays)
            meta["parts"][split][name] = tokens
            meta["sha256"][name] = digest
            meta["tokens"][split] += tokens
            meta["bytes"][split] += int(table[stays, 1].sum())
            meta["documents"][split] += int(stays.sum())
        if not meta["tokens"][split]:
            raise UserError(f"no document of any part is in {split}: choose another val_fraction")
    dropped = {key: sum(part.meta["dropped"][key] for part in parts) for key in first["dropped"]}
    meta["dropped"] = dropped | {"repeated": dropped["repeated"] + repeated}
    return meta


def read_documents(part: Part, split: str) -> np.ndarray:
    """Return hashes and bytes of a part's documents, (documents, 2); UserError if damaged."""
    path = part.directory / f"{split}.documents"
    if not path.is_file() or sha256(path) != part.meta["sha256"].get(path.name):
        raise UserError(f"{path} is damaged: prepare that part again")
    return np.fromfile(path, "<i8").reshape(-1, 2)


def link(source: Path, target: Path) -> None:
    """Give a file a second name; on another file system, or one without links, copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
