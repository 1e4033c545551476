"""What --data_dir names: a prepared directory, or several that are read as one text or in shares.

data/a                    one
data/a,data/b             both, as if their texts had been prepared as one
'data/part-*'             all that match, in the same way
data/a:0.7,data/b:0.3     7 of 10 windows are data/a's, whatever the sizes of both
"""

import glob
import json
import math
from dataclasses import dataclass, fields
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import numpy as np

from plainllama.data import SPLITS, Dataset, load_dataset
from plainllama.settings import UserError

LONGEST_PERIOD = 100_000  # windows, after which the order of the sources repeats itself


@dataclass(frozen=True)
class Mixture(Dataset):
    """Several datasets of one tokenizer as one: their ids follow each other, as do their rows."""

    members: tuple[Dataset, ...] = ()
    quotas: tuple[int, ...] = ()  # windows of each member in a period; (): no shares

    def parts(self) -> list[Dataset]:
        """Return the prepared directories."""
        return [part for member in self.members for part in member.parts()]

    def span(self, split: str, kind: str, start: int, end: int) -> np.ndarray:
        """Return what Dataset.span does, of all members' ids, mask or lengths in a row."""
        found, first = [np.empty(0, int)], 0
        for member in self.members:
            size = member.documents[split] if kind == "lengths" else member.tokens[split]
            begin, stop = max(start, first), min(end, first + size)
            if begin < stop:
                found.append(member.span(split, kind, begin - first, stop - first))
            first += size
        return np.concatenate(found[len(found) > 1 :])

    def described(self, tokens: int, length: int) -> str:
        """Return lines that say how often a run of so many tokens reads what has a share."""
        text = ""
        for member, quota in zip(self.members, self.quotas, strict=False):
            share = quota / sum(self.quotas)
            epochs = tokens * share / member.epoch_tokens(length)
            more = f" and {len(member.parts()) - 1} more" * (len(member.parts()) > 1)
            text += f"         {share:.1%} {member.data_dir}{more}, {epochs:.1f} epochs\n"
        return text

    def sources(self) -> tuple[Dataset, ...]:
        """Return what has a share, in the order of `turns`."""
        return self.members if self.quotas else (self,)

    @cached_property
    def period(self) -> np.ndarray:
        """The source of each window of a period, (sum(quotas),)."""
        return in_shares(self.quotas)

    def turns(self, source: int, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of a run's windows are a source's, and of these how many it had before."""
        if not self.quotas:
            return super().turns(source, windows)
        is_own = self.period == source
        turn, place = np.divmod(windows, len(is_own))
        before = turn * self.quotas[source] + (np.cumsum(is_own) - is_own)[place]
        return is_own[place], before[is_own[place]]


def in_shares(quotas: tuple[int, ...]) -> np.ndarray:
    """Return an order of sum(quotas) windows in which each source has as many as its quota says.

    After any n windows a source has had n of its share, to within one: each time the source comes
    whose next window is due first, of those that are not ahead of their share (earliest deadline
    first, with the deadlines of proportionate fairness, Baruah et al. 1996).
    """
    period, had = sum(quotas), [0] * len(quotas)
    order = np.empty(period, np.int64)
    for n in range(period):
        behind = [i for i, quota in enumerate(quotas) if had[i] * period < (n + 1) * quota]
        order[n] = min(behind, key=lambda i: Fraction(had[i] + 1, quotas[i]))
        had[order[n]] += 1
    return order


def load_data(data_dir: str) -> Dataset:
    """Open what --data_dir names; UserError where directories and shares do not fit each other."""
    words = [data_dir] if Path(data_dir).is_dir() else data_dir.split(",")
    named = [share_of(word) for word in words]
    members = [join([load_dataset(Path(name)) for name in matching(name)]) for name, _ in named]
    shares = [share for _, share in named if share is not None]
    if shares and len(shares) < len(named):
        raise UserError(f"data_dir={data_dir}: give every directory a share, or none")
    whole = join(members, shares) if shares else join([p for m in members for p in m.parts()])
    paths = [part.data_dir.resolve() for part in whole.parts()]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise UserError(f"data_dir={data_dir} names {twice[0]} twice: give it a larger share")
    return whole


def share_of(word: str) -> tuple[str, Fraction | None]:
    """Return the directory, or the pattern, and the share that a word of --data_dir names."""
    name, colon, number = word.rpartition(":")
    if not colon or Path(word).is_dir():
        return word, None
    try:
        share = Fraction(number)
    except (ValueError, ZeroDivisionError):
        share = Fraction(0)
    if share <= 0:
        raise UserError(f"data_dir={word}: a share is a number above 0, {name}:0.5 for example")
    return name, share


def matching(name: str) -> list[str]:
    """Return the prepared directories that a pattern matches; any other name is itself."""
    if Path(name).is_dir() or glob.escape(name) == name:
        return [name]
    found = [path for path in sorted(glob.glob(name)) if Path(path, "meta.json").is_file()]
    if not found:
        raise UserError(f"no prepared data matches {name}")
    return found


def join(members: list[Dataset], shares: list[Fraction] | None = None) -> Dataset:
    """Return datasets as one; UserError unless they have one tokenizer and are of one kind."""
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
    sums = {
        key: {split: sum(getattr(member, key)[split] for member in members) for split in SPLITS}
        for key in ("tokens", "bytes", "documents")
    }
    quotas = whole_numbers(shares) if shares else ()
    checksums = {
        f"{n}/{name}": sum for n, m in enumerate(members) for name, sum in m.sha256.items()
    }
    if quotas:
        checksums["shares"] = json.dumps(quotas)
    kept = {field.name: getattr(first, field.name) for field in fields(Dataset)}
    return Mixture(**kept | sums | {"sha256": checksums}, members=tuple(members), quotas=quotas)


def whole_numbers(shares: list[Fraction]) -> tuple[int, ...]:
    """Return the least whole numbers in the relation of shares; UserError if these are large."""
    common = math.lcm(*(share.denominator for share in shares))
    numbers = [int(share * common) for share in shares]
    least = tuple(number // math.gcd(*numbers) for number in numbers)
    if sum(least) > LONGEST_PERIOD:
        raise UserError(f"data_dir: shares {least} are too fine: give them fewer digits")
    return least
