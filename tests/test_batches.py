"""Batches: the right tokens, every row, little padding, an order that can be found again."""

import pytest
import torch

from batches import TokenRows, epoch_steps, steps_per_epoch

TEXTS = ["a", "the happy cat", "never again", "", "the day was so very good", "rain and rain and rain and rain", "you", "it hurts"] * 5


@pytest.fixture
def rows(tokenizer):
    return TokenRows(TEXTS, tokenizer, 12)


def test_a_batch_is_what_pad_makes(rows, tokenizer):
    chosen = torch.tensor([4, 0, 3, 39])
    input_ids, attention_mask = rows.batch(chosen)
    expected_ids, expected_mask = tokenizer.pad([tokenizer.encode(TEXTS[i], 12) for i in chosen])
    assert torch.equal(input_ids, expected_ids) and torch.equal(attention_mask, expected_mask)
    wide, mask = rows.batch(chosen, width=20)
    assert wide.shape == (4, 20) and torch.equal(wide[:, :expected_ids.shape[1]], expected_ids) and mask.sum() == expected_mask.sum()
    assert rows.lengths.max() == 12      # cut


def test_by_length_covers_every_row_within_the_budget(rows):
    seen = []
    for batch in rows.by_length(40):
        assert len(batch) * int(rows.lengths[batch].max()) <= 40
        seen += batch.tolist()
    assert sorted(seen) == list(range(len(TEXTS)))
    assert [len(batch) for batch in rows.by_length(1)] == [1] * len(TEXTS)      # a row that is over the budget goes alone


def test_no_rows(tokenizer):
    empty = TokenRows([], tokenizer, 12)
    assert len(empty) == 0 and list(empty.by_length(100)) == []


@pytest.fixture
def two(tokenizer):
    return {"sentiment": TokenRows(TEXTS, tokenizer, 12), "emotion": TokenRows(TEXTS[:13], tokenizer, 12)}


def test_longest_sees_every_row_of_every_task(two):
    assert steps_per_epoch(two, 6, "longest") == 7
    steps = epoch_steps(two, 6, "longest", seed=1, epoch=0)
    assert len(steps) == 7
    for task, rows in two.items():
        assert all(step[task].shape == (6,) for step in steps)
        seen = torch.cat([step[task] for step in steps]).bincount(minlength=len(rows))
        assert seen.min() >= 1 and seen.max() - seen.min() <= 1      # the shorter task repeats evenly


def test_shortest_drops_the_surplus(two):
    assert steps_per_epoch(two, 6, "shortest") == 2
    seen = torch.cat([step["sentiment"] for step in epoch_steps(two, 6, "shortest", 1, 0)])
    assert len(seen) == 12 and len(set(seen.tolist())) == 12


def flat(steps):
    return [rows.tolist() for step in steps for rows in step.values()]


def test_the_order_is_a_function_of_seed_and_epoch(two):
    assert flat(epoch_steps(two, 6, "longest", 1, 2)) == flat(epoch_steps(two, 6, "longest", 1, 2))
    assert flat(epoch_steps(two, 6, "longest", 1, 2)) != flat(epoch_steps(two, 6, "longest", 1, 3))
    assert flat(epoch_steps(two, 6, "longest", 1, 2)) != flat(epoch_steps(two, 6, "longest", 2, 2))


def test_batches_hold_rows_of_like_length(two):
    padded = real = 0
    for step in epoch_steps(two, 5, "longest", 1, 0):
        width = max(int(two[task].lengths[rows].max()) for task, rows in step.items())
        padded += width * 10
        real += sum(int(two[task].lengths[rows].sum()) for task, rows in step.items())
    assert real / padded > 0.75      # in random order it is 0.49


def test_batches_are_int64_and_stay_together(rows):
    input_ids, attention_mask = rows.to("cpu").batch(torch.tensor([7]))
    assert input_ids.dtype == attention_mask.dtype == torch.int64 and rows.ids.dtype == torch.int32
    assert int(rows.starts[-1] + rows.lengths[-1]) == len(rows.ids)


def test_a_task_with_fewer_rows_than_a_batch_still_fills_it(two):
    for pairing, steps in (("longest", 2), ("shortest", 1)):
        plan = epoch_steps(two, 30, pairing, 1, 0)
        assert len(plan) == steps and all(step["emotion"].shape == (30,) for step in plan)
        assert {row for step in plan for row in step["emotion"].tolist()} == set(range(13))


def test_short_and_long_steps_are_mixed(tokenizer):
    """Within a window rows are sorted; the steps made of them must not be, or every epoch would run from short to long."""
    rows = {"emotion": TokenRows(["day " * (1 + i % 10) for i in range(400)], tokenizer, 32)}
    widths = [int(rows["emotion"].lengths[step["emotion"]].max()) for step in epoch_steps(rows, 10, "longest", 1, 0)]
    assert widths != sorted(widths) and widths != sorted(widths, reverse=True) and len(set(widths)) == 10


def test_neighbours_change_from_epoch_to_epoch(two):
    def company(epoch):
        return {frozenset(step["sentiment"].tolist()) for step in epoch_steps(two, 4, "longest", 1, epoch)}
    assert len(company(0) & company(1)) < 5      # of ten batches
