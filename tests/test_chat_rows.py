"""Rows of whole conversations: packed, cut, drawn and read; each is computed as if alone."""

import numpy as np
import pytest
import torch
from helpers import close, every_family, random_model, random_tokens
from hypothesis import given
from hypothesis import strategies as st
from prepared import quick
from test_chat_data import chats, talk

from plainllama.data import draw, read_batch
from plainllama.packing import Rows, pack
from plainllama.terminal import UserError

CPU = torch.device("cpu")


@quick()
@given(st.lists(st.integers(1, 40)), st.integers(40, 60))
def test_packing_puts_each_size_into_one_row_with_room_and_opens_no_row_too_early(sizes, capacity):
    sizes = np.array(sizes, np.int64)
    rows = pack(sizes, capacity)
    filled = np.bincount(rows, sizes)
    assert sorted(set(rows.tolist())) == list(range(len(filled)))
    assert all(filled <= capacity)
    # Two rows that would fit into one have nothing that was placed after both were open.
    assert len(filled) <= max(1, 2 * sizes.sum() / capacity + 1)


def items(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """What stands in all rows: the ids of each conversation, and those that are learned."""
    found = []
    where = rows.dataset, rows.split, np.arange(len(rows)), rows.length
    tokens, targets, positions = (x.numpy() for x in read_batch(*where, CPU))
    for row, (learned, begins) in zip(tokens, zip(targets, positions, strict=True), strict=True):
        starts = np.flatnonzero(begins == 0)
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            found.append((row[start:end].tolist(), learned[start:end].tolist()))
    return found


def test_rows_hold_every_conversation_once_and_its_answers_are_the_targets(run):
    dataset = run(chats(), "--tokenizer=byte")
    rows = Rows(dataset, "train", 400)
    ids, mask = dataset.read("train"), dataset.read("train", "mask")
    ends = np.cumsum(dataset.read("train", "lengths"))
    expected = []
    for row, learned in zip(np.split(ids, ends)[:-1], np.split(mask, ends)[:-1], strict=True):
        targets = np.where(learned, row.astype(int), -100)[1:].tolist()
        expected.append((row.tolist(), [*targets, -100]))
    found = [(row, learned) for row, learned in items(rows) if max(learned) > 0]
    # The last id of a full row is a target alone.
    key = lambda item: item[0][:-1]  # noqa: E731
    for (row, learned), (wanted, targets) in zip(
        sorted(found, key=key), sorted(expected, key=key), strict=True
    ):
        assert row in (wanted, wanted[:-1]) and learned == targets[: len(row)]
    assert rows.learned.sum() == sum(sum(t >= 0 for t in targets) for _, targets in expected)
    assert (rows.n_cut, rows.n_left_out) == (0, 0)


def test_a_long_conversation_is_cut_where_the_user_speaks_and_each_part_has_the_system(run):
    system = [{"role": "system", "content": "Be brief."}]
    longest = {"role": "assistant", "content": "x" * 300}
    turns = system + talk(1, 3) + [talk(1)[0], longest] + talk(2, 2)
    dataset = run(chats(talks=[turns, *map(talk, range(40))]), "--tokenizer=byte", "--seed=1")
    rows = Rows(dataset, "train", 160)
    assert (rows.n_cut, rows.n_left_out) == (1, 1)
    texts = [dataset.tokenizer.decode(ids) for ids, _ in items(rows)]
    parts = [text for text in texts if text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n")]
    assert "".join(sorted(parts)).count("<|im_start|>user") == 5
    assert all(text.rstrip("\x00\n").endswith("<|im_end|>") for text in parts)
    with pytest.raises(UserError, match="max_seq_len=20 is too short for any exchange"):
        Rows(dataset, "train", 20)


def test_what_is_learned_of_all_stays_so_in_parts(run):
    dataset = run(chats(talks=[talk(n, 3) for n in range(40)]), "--tokenizer=byte", "--learn=all")
    rows = Rows(dataset, "train", 100)
    _, targets, _ = read_batch(dataset, "train", np.arange(len(rows)), 100, CPU)
    assert rows.n_cut == 36 and rows.learned.sum() == (targets >= 0).sum()


def test_an_epoch_draws_each_row_once(run):
    rows = draw(7, np.arange(70), 35)[0]
    assert sorted(rows[:35]) == sorted(rows[35:]) == list(range(35))
    assert not np.array_equal(rows[:35], rows[35:])


@every_family
def test_a_packed_rows_logits_are_those_of_each_conversation_alone(changes):
    model, tokens = random_model(**changes), random_tokens()
    lengths = (9, 1, 14, 8)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    packed = model(tokens, positions=positions)[0]
    alone = torch.cat([model(part)[0] for part in tokens.split(lengths, dim=1)], dim=1)
    close(packed, alone, atol=1e-5 * alone.abs().max().item())
