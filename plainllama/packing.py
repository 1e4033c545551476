"""Rows of whole conversations, side by side, as training reads them.

A row has room for `length` + 1 ids, and begins where a conversation begins. Each conversation is
computed as if it stood alone: its positions begin at 0, and where they do, attention ends.
"""

import itertools
from typing import TYPE_CHECKING

import numpy as np

from plainllama.terminal import UserError

if TYPE_CHECKING:
    from plainllama.data import Dataset


class Rows:
    """The conversations of a split in rows of `length` + 1 ids; len() counts the rows.

    What is in which row is a function of the data and the length. A conversation that is longer is
    cut where the user speaks, and each part begins as it does, with the system's message; an
    exchange that does not fit is left out, so that no answer is learned without its end.
    """

    def __init__(self, dataset: "Dataset", split: str, length: int) -> None:
        self.dataset, self.split, self.length = dataset, split, length
        self.n_cut = self.n_left_out = 0
        lengths = dataset.read(split, "lengths").astype(np.int64)
        ends = lengths.cumsum()
        starts = ends - lengths
        learned = np.add.reduceat(dataset.read(split, "mask"), starts, dtype=np.int64)
        fits = lengths <= length + 1
        whole = np.stack((starts, starts, starts, ends, learned), axis=1)[fits]
        spans = zip(starts[~fits].tolist(), ends[~fits].tolist(), strict=True)
        cut = [part for span in spans for part in self.cut(*span)]
        # Of each part two spans of the bin, its opening and its exchanges; how many are learned.
        parts = np.concatenate((whole, np.array(cut, np.int64).reshape(-1, 5)))
        opening, opening_end, begin, end, learned = parts.T
        sizes = opening_end - opening + end - begin
        # Each of the dataset's sources has rows of its own, one source's after another's.
        source_ends = np.cumsum([source.tokens[split] for source in dataset.sources()])
        source_of_part = np.searchsorted(source_ends, opening, side="right")
        row, self.counts = np.empty(len(parts), np.int64), []  # rows of each source
        for number in range(len(source_ends)):
            is_its = source_of_part == number
            packed = pack(sizes[is_its], length + 1)
            row[is_its] = sum(self.counts) + packed
            self.counts.append(int(packed.max(initial=-1)) + 1)
        for source, count in zip(dataset.sources(), self.counts, strict=True):
            if not count:
                place = source.path(split)
                raise UserError(f"max_seq_len={length} is too short for any exchange in {place}")
        self.parts = parts[row.argsort(kind="stable")]
        self.bounds = np.concatenate(([0], np.bincount(row).cumsum()))
        self.learned = np.bincount(row, learned).astype(np.int64)  # (rows,)
        self.filled = sizes.sum() / (len(self) * (length + 1))  # share of the ids

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def described(self) -> str:
        """Return lines that say how much the rows hold."""
        share = self.learned.sum() / self.dataset.tokens[self.split]
        text = f"rows     {len(self):,} of whole conversations, {self.filled:.1%} filled, "
        text += f"{share:.1%} of the tokens learned\n"
        if self.n_cut:
            text += f"         {self.n_cut:,} longer than {self.length:,} tokens are cut, "
            text += f"{self.n_left_out:,} of their exchanges left out\n"
        return text

    def cut(self, start: int, end: int) -> list[list[int]]:
        """Return the parts of a long conversation, and count it and what does not fit."""
        opening = self.dataset.template.opening
        begins = []
        if opening:
            ids = self.dataset.span(self.split, "bin", start, end)
            found = np.lib.stride_tricks.sliding_window_view(ids, len(opening))
            begins = (start + np.flatnonzero((found == opening).all(axis=1))).tolist()
        begins = begins or [start]
        head = begins[0] - start
        parts: list[list[int]] = []
        for begin, stop in itertools.pairwise([*begins, end]):
            if parts and parts[-1][3] == begin and head + stop - parts[-1][2] <= self.length + 1:
                parts[-1][3] = stop
            elif head + stop - begin <= self.length + 1:
                parts.append([start, begins[0], begin, stop])
            else:
                self.n_left_out += 1
        self.n_cut += 1
        learned = [int(self.joined("mask", part)[1:].sum()) for part in parts]
        return [[*part, n] for part, n in zip(parts, learned, strict=True) if n]

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return ids, targets and positions of rows, int64 (B, T + 1).

        Positions begin at 0 in each conversation, and in what fills a row up. A target is the id
        itself, or -100 where it is not learned.
        """
        ids, learned, positions = np.zeros((3, len(numbers), self.length + 1), np.int64)
        for row, number in enumerate(numbers):
            place = 0
            for part in self.parts[self.bounds[number] : self.bounds[number + 1]].tolist():
                found = self.joined("bin", part)
                here = row, slice(place, place + len(found))
                ids[here], learned[here] = found, self.joined("mask", part)
                positions[here] = np.arange(len(found))
                place += len(found)
            positions[row, place:] = np.arange(self.length + 1 - place)
        return ids, np.where((learned > 0) & (positions > 0), ids, -100), positions

    def joined(self, kind: str, part: list[int]) -> np.ndarray:
        """Return the ids, or the mask, of the two spans of a part."""
        spans = (part[:2], part[2:4])
        return np.concatenate([self.dataset.span(self.split, kind, *span) for span in spans])


def pack(sizes: np.ndarray, capacity: int) -> np.ndarray:
    """Return the row of each size, so that no row has more than `capacity`: best-fit decreasing.

    The largest comes first, and goes where the least room stays.
    """
    row, count = np.empty(len(sizes), np.int64), 0
    rows_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit n is set where a row has room for n
    values = sizes.tolist()
    for item in np.argsort(-sizes, kind="stable").tolist():
        if fitting := rooms >> values[item]:
            room = values[item] + (fitting & -fitting).bit_length() - 1
            row[item] = rows_by_room[room].pop()
            if not rows_by_room[room]:
                rooms ^= 1 << room
        else:
            room, row[item] = capacity, count
            count += 1
        room -= values[item]
        rows_by_room[room].append(row[item])
        rooms |= 1 << room
    return row
