"""What --data_dir names: a prepared directory, or several that are read as one text or in shares.

data/a                    one
data/a,data/b             both, as if their texts had been prepared as one
'data/part-*'             all that match, in the same way
data/a:0.7,data/b:0.3     7 of 10 windows are data/a's, whatever the sizes of both
"""

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from plainllama.chat import Template
from plainllama.data import SPLITS, Dataset, load_dataset
from plainllama.terminal import UserError
from plainllama.tokenizer import Tokenizer

LONGEST_PERIOD = 100_000  # windows, after which the order of the sources repeats itself


@dataclass(frozen=True)
class Joined(Dataset):
    """Several datasets of one tokenizer as one: the ids of one follow those of another."""

    members: tuple[Dataset, ...] = ()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all."""
        return self.members[0].tokenizer

    @cached_property
    def template(self) -> Template | None:
        """The chat template of all, if they are of conversations."""
        return self.members[0].template

    def parts(self) -> list[Dataset]:
        """Return the prepared directories."""
        return [part for member in self.members for part in member.parts()]

    def span(self, split: str, kind: str, start: int, end: int) -> np.ndarray:
        """Return what Dataset.span does, of all members' ids, masks or lengths in a row."""
        found, first = [], 0
        for member in self.members:
            size = member.documents[split] if kind == "lengths" else member.tokens[split]
            begin, stop = max(start, first), min(end, first + size)
            if begin < stop:
                found.append(member.span(split, kind, begin - first, stop - first))
            first += size
        return np.concatenate(found) if found else self.members[0].span(split, kind, 0, 0)


@dataclass(frozen=True)
class InShares(Joined):
    """Several datasets of which each has a share of a run's windows, whatever their sizes."""

    quotas: tuple[int, ...] = ()  # windows of each member in a period of sum(quotas)

    def sources(self) -> tuple[Dataset, ...]:
        """Return what takes turns in giving a run its windows."""
        return self.members

    @cached_property
    def period(self) -> np.ndarray:
        """The source of each window of a period, (sum(quotas),)."""
        return in_shares(self.quotas)

    @cached_property
    def earlier(self) -> np.ndarray:
        """How many windows of a period its source had before each one, (sum(quotas),)."""
        earlier = np.empty_like(self.period)
        for source, quota in enumerate(self.quotas):
            earlier[self.period == source] = np.arange(quota)
        return earlier

    def turns(self, source: int, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of a run's windows are a source's, and of these how many it had before."""
        turn, place = np.divmod(windows, len(self.period))
        mine = self.period[place] == source
        return mine, turn[mine] * self.quotas[source] + self.earlier[place[mine]]

    def shares(self) -> list[float]:
        """Return each source's share of the windows, 1 together."""
        return [quota / sum(self.quotas) for quota in self.quotas]


def in_shares(quotas: tuple[int, ...]) -> np.ndarray:
    """Return an order of sum(quotas) windows in which each source has as many as its quota says.

    After any n windows a source has had n of its share, to within one: each window goes to the
    source whose next one is due first, of those that are not ahead of their share (earliest
    deadline first, with the deadlines of proportionate fairness, Baruah et al. 1996).
    """
    period, had = sum(quotas), [0] * len(quotas)
    order = np.empty(period, np.int64)
    for n in range(period):
        ready = [i for i, quota in enumerate(quotas) if had[i] * period // quota <= n]
        order[n] = min(ready, key=lambda i: -(-(had[i] + 1) * period // quotas[i]))  # upwards
        had[order[n]] += 1
    return order


def load_data(data_dir: str) -> Dataset:
    """Open what --data_dir names; UserError where directories and shares do not fit each other."""
    words = [data_dir] if Path(data_dir).is_dir() else [w.strip() for w in data_dir.split(",")]
    named = [share_of(word) for word in words if word]
    if not named:
        raise UserError(f"data_dir={data_dir!r} names no directory of prepared data")
    members = [join([load_dataset(path) for path in matching(name)], name) for name, _ in named]
    shares = [share for _, share in named if share is not None]
    if shares and len(shares) < len(named):
        raise UserError(f"data_dir={data_dir}: give every directory a share, or none")
    if not shares:
        members = [part for member in members for part in member.parts()]
    whole = join(members, data_dir, shares)
    paths = [part.data_dir.resolve() for part in whole.parts()]
    if twice := [path for path in paths if paths.count(path) > 1]:
        way_out = ": give it a larger share" if shares else ""
        raise UserError(f"data_dir={data_dir} names {twice[0]} twice{way_out}")
    return whole


def share_of(word: str) -> tuple[str, Fraction | None]:
    """Return the directory, or the pattern, and the share that a word of --data_dir names."""
    name, colon, number = word.rpartition(":")
    if not colon or Path(word).is_dir() or "/" in number or "\\" in number:
        return word, None
    try:
        share = Fraction(number)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if not 1e-6 <= share <= 1e6:
        raise UserError(f"data_dir={word}: a share is a number above 0, {name}:0.5 for example")
    return name, share


def matching(name: str) -> list[Path]:
    """Return the prepared directories that a pattern matches; any other name is itself."""
    if Path(name).is_dir() or glob.escape(name) == name:
        return [Path(name)]
    found = [Path(path) for path in sorted(glob.glob(name)) if Path(path, "meta.json").is_file()]
    if not found:
        raise UserError(f"no prepared data matches {name}")
    return found


def join(members: list[Dataset], name: str, shares: Sequence[Fraction] = ()) -> Dataset:
    """Return datasets as one of this name; UserError unless tokenizers and kinds are the same."""
    first = members[0]
    if len(members) == 1:
        return first
    for other in members[1:]:
        names = f"{first.data_dir} and {other.data_dir}"
        if bool(first.conversations) != bool(other.conversations):
            raise UserError(f"{names} are text and conversations, which are not trained together")
        same_ids = other.tokenizer.gives_ids_of(first.tokenizer)
        if not same_ids or other.vocab_size != first.vocab_size:
            raise UserError(
                f"{names} have different tokenizers: prepare one with --tokenizer={first.data_dir}"
            )
        if first.template and other.template.source != first.template.source:
            raise UserError(f"{names} have different chat templates: prepare them with one")
    values = {field.name: getattr(first, field.name) for field in fields(Dataset)}
    values |= {"data_dir": Path(name), "members": tuple(members)}
    for key in ("tokens", "bytes", "documents"):
        counts = [getattr(member, key) for member in members]
        values[key] = {split: sum(count[split] for count in counts) for split in SPLITS}
    values["sha256"] = {
        f"{number}/{file}": checksum
        for number, member in enumerate(members)
        for file, checksum in member.sha256.items()
    }
    if not shares:
        return Joined(**values)
    quotas = whole_numbers(shares)
    values["sha256"]["shares"] = str(quotas)  # with which a run that is resumed must go on
    return InShares(**values, quotas=quotas)


def whole_numbers(shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Return the least whole numbers in the relation of shares; UserError if these are large."""
    common = math.lcm(*(share.denominator for share in shares))
    numbers = [int(share * common) for share in shares]
    least = tuple(number // math.gcd(*numbers) for number in numbers)
    if sum(least) > LONGEST_PERIOD:
        raise UserError(f"data_dir: shares {least} are too fine: give them fewer digits")
    return least
