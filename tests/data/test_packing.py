import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.data.examples import TokenTable, make_example
from rlm_jax.data.packing import (
    Bucketed,
    Packed,
    Plan,
    check_batch,
    lay_out,
    pack_examples,
    pack_lengths,
    padding_share,
)

LENGTHS = st.lists(st.integers(1, 16), min_size=1, max_size=40)


def example_of(length, number=0):
    """An example whose every column tells which example and token it is."""
    tokens = np.arange(length) + 100 * number
    return make_example(
        tokens,
        num_prompt=min(2, length),
        soft_ids=np.stack([tokens + 1, tokens + 2], 1)[:, : number % 3],
        soft_weights=np.full((length, 2), 0.25)[:, : number % 3],
        value_target=-tokens.astype(np.float32),
        value_weight=np.full(length, 0.5),
        goals=(tokens[:, None] + np.arange(number % 4)) % 3 - 1,
    )


def unpack(batch):
    """Every example of a batch, row by row, in plain Python."""
    found = []
    for row in range(batch.tokens.shape[0]):
        segments = batch.segments[row].tolist()
        for segment in sorted(set(segments) - {0}):
            places = [i for i, s in enumerate(segments) if s == segment]
            assert places == list(range(places[0], places[-1] + 1))
            assert batch.positions[row, places].tolist() == list(range(len(places)))
            found.append(
                tuple(
                    getattr(batch, name)[row, places].tolist()
                    for name in ("tokens", "loss_weight", "soft_ids", "value_target", "goals")
                )
            )
    return found


def as_found(example, num_soft, num_goals):
    missing = [[0] * (num_soft - example.soft_ids.shape[1])] * len(example.tokens)
    soft = [a + b for a, b in zip(example.soft_ids.tolist(), missing, strict=True)]
    tokens, loss_weight = example.tokens.tolist(), example.loss_weight.tolist()
    missing = [[0] * (num_goals - example.goals.shape[1])] * len(example.tokens)
    goals = [a + b for a, b in zip(example.goals.tolist(), missing, strict=True)]
    return (tokens, loss_weight, soft, example.value_target.tolist(), goals)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS)
def test_packing_keeps_every_token_of_every_example_once(lengths):
    examples = [example_of(length, i) for i, length in enumerate(lengths)]
    batch = pack_examples(examples, 16, num_soft=2)
    num_goals = batch.goals.shape[-1]
    assert sorted(unpack(batch)) == sorted(as_found(one, 2, num_goals) for one in examples)
    assert padding_share(batch) == pytest.approx(1 - sum(lengths) / batch.tokens.size)
    assert (batch.soft_weights.sum(-1) <= 0.5).all()
    assert batch.value_weight.sum() == pytest.approx(0.5 * sum(lengths))


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_how_full_rows_are_does_not_depend_on_the_order(lengths, data):
    order = data.draw(st.permutations(range(len(lengths))))
    num_rows = data.draw(st.one_of(st.none(), st.integers(1, 8)))

    def fill(lengths):
        rows, left_over = pack_lengths(lengths, 16, num_rows=num_rows)
        assert sorted(itertools.chain(left_over, *rows)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= 16 for row in rows)
        return sorted(sorted(lengths[i] for i in row) for row in rows)

    assert fill(lengths) == fill([lengths[i] for i in order])


@given(lengths=LENGTHS)
def test_best_fit_decreasing_leaves_little_room(lengths):
    rows, left_over = pack_lengths(lengths, 16)
    fewest = -(-sum(lengths) // 16)
    assert left_over == []
    assert len(rows) <= 11 / 9 * max(fewest, sum(n > 8 for n in lengths)) + 1
    # No two rows would have fitted into one.
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > 16


def test_the_fullest_row_that_has_room_is_taken():
    assert pack_lengths([5, 9, 8, 1, 2], 10) == ([[0], [1, 3], [2, 4]], [])
    assert pack_lengths([3, 9, 8, 1, 2], 10, num_rows=2) == ([[1, 3], [2, 4]], [0])
    assert pack_lengths([3, 9, 8, 1, 2], 10, num_rows=2, num_first=1) == ([[0, 4], [1, 3]], [2])
    assert pack_lengths([1, 2, 9, 10], 10, num_rows=1, num_first=2) == ([[0, 1]], [2, 3])
    assert pack_lengths([3], 10, num_rows=3) == ([[0], [], []], [])


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS)
def test_buckets_hold_every_example_once_in_the_narrowest_row(lengths):
    layout = Bucketed((4, 8, 16), batch_tokens=32)
    left, seen = list(enumerate(lengths)), []
    while left:
        plan = layout.plan([n for _, n in left], 0)
        batch = lay_out([example_of(n, i) for i, n in left], plan, 2, 3)
        assert batch.tokens.shape == (32 // plan.width, plan.width)
        for _, (place,) in zip(range(99), filter(None, plan.rows), strict=False):
            assert min(w for w in (4, 8, 16) if w >= left[place][1]) == plan.width
            seen.append(left[place][0])
        placed = {place for row in plan.rows for place in row}
        left = [item for place, item in enumerate(left) if place not in placed]
    assert sorted(seen) == list(range(len(lengths)))


def test_a_layout_asks_for_more_examples_until_a_batch_is_full():
    packed = Packed(num_rows=2, row_tokens=8, slack=0.25)  # 20 tokens
    assert [packed.num_missing(n) for n in ([], [8, 8], [8, 8, 4], [8] * 4)] == [3, 1, 0, 0]
    assert packed.plan([8], 0) == Plan(8, [[0], []])
    assert packed.plan([3, 8, 8, 5], 1) == Plan(8, [[0, 3], [1]])
    bucketed = Bucketed((4, 8), batch_tokens=16)  # 4 rows of 4, 2 rows of 8
    assert [bucketed.num_missing(n) for n in ([], [5], [1, 2, 3], [5, 8])] == [2, 1, 1, 0]
    assert bucketed.plan([3, 5, 4, 8, 8], 0) == Plan(8, [[1], [3]])
    assert bucketed.plan([5, 3], 0) == Plan(4, [[1], [], [], []])
    assert Bucketed((64,), batch_tokens=8).plan([3], 0) == Plan(64, [[0]])


def test_a_table_gives_the_same_examples():
    examples = [example_of(length, i) for i, length in enumerate([3, 1, 7])]
    table = TokenTable(iter(examples))
    assert len(table) == 3
    for i, example in enumerate(examples):
        assert as_found(table[i], 2, 3) == as_found(example, 2, 3)
    with pytest.raises(IndexError, match="3 of 3"):
        table[3]
    with pytest.raises(ValueError, match="no examples"):
        TokenTable([])


def test_what_an_example_says_by_default():
    example = make_example([5, 6, 7], num_prompt=2)
    assert example.loss_weight.tolist() == [0, 0, 1]
    assert example.soft_ids.shape == example.soft_weights.shape == (3, 0)
    assert not example.value_weight.any()
    dtypes = [np.int32, np.float32] * 2 + [np.float32] * 2 + [np.int8]
    assert [column.dtype for column in example] == dtypes
    assert make_example([5, 6, 7]).loss_weight.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": []}, "not empty"),
        ({"tokens": np.array([[1]])}, "one sequence"),
        ({"tokens": np.array([1.5, 2.0])}, "whole numbers"),
        ({"tokens": [-1, 2]}, "-1 to 2"),
        ({"num_prompt": 0}, "1 to 2, not 0"),
        ({"loss_weight": [1, 1]}, r"loss_weight\[0\] is 1"),
        ({"loss_weight": [0, -1]}, "loss_weight must not be negative"),
        ({"loss_weight": [0, 1, 1]}, "loss_weight has shape"),
        ({"soft_ids": [[1], [2]]}, "come together"),
        ({"value_target": [0, 1]}, "come together"),
        ({"soft_ids": [[1], [2]], "soft_weights": [[1, 2], [2, 3]]}, "shapes"),
        ({"soft_ids": [[1]], "soft_weights": [[1]]}, "beside 2 tokens"),
        ({"value_target": [0, np.nan], "value_weight": [0, 1]}, "value_target holds"),
        ({"goals": np.array([[0, 2], [1, -1]])}, "goals must be -1, 0 or 1, not -1 to 2"),
        ({"goals": np.array([[1, -1]])}, r"goals has shape \(1, 2\) beside 2 tokens"),
    ],
)
def test_what_an_example_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        make_example(**({"tokens": [1, 2]} | fields))


@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        ("segments", (0, 3), 3, "count 1, 2"),
        ("segments", (0, 0), 0, "padding"),
        ("segments", (0, 5), 1, "count 1, 2"),
        ("positions", (0, 1), 2, "positions"),
        ("positions", (0, 7), 1, "positions"),
        ("loss_weight", (0, 3), 1.0, "first token"),
        ("loss_weight", (0, 7), 1.0, "padding"),
        ("value_weight", (0, 7), 1.0, "padding"),
        ("soft_weights", (0, 7, 0), 1.0, "padding"),
        ("goals", (0, 7, 0), -1, "padding"),
    ],
)
def test_a_bad_batch_is_refused(name, index, value, message):
    batch = lay_out([example_of(3, 1), example_of(4, 2)], Plan(8, [[0, 1]]), 2, 3)
    array = getattr(batch, name).copy()
    array[index] = value
    with pytest.raises(ValueError, match=message):
        check_batch(dataclasses.replace(batch, **{name: array}))
    with pytest.raises(ValueError, match="shape"):
        check_batch(dataclasses.replace(batch, **{name: array[:, :4]}))


def test_bad_layouts_are_refused():
    for make, message in [
        (lambda: Packed(0, 8), "num_rows must be at least 1"),
        (lambda: Packed(8, 8, slack=0.6), "slack"),
        (lambda: Packed(8, 8, num_soft=-1), "num_soft"),
        (lambda: Packed(8, 8, num_goals=-1), "num_goals"),
        (lambda: Bucketed((), 8), "widths must rise"),
        (lambda: Bucketed((8, 4), 8), "widths must rise"),
        (lambda: Bucketed((0, 4), 8), "widths must be at least 1"),
        (lambda: pack_lengths([3, 9], 8), "example 1 has 9 tokens"),
        (lambda: pack_lengths([0], 8), "example 0 has 0 tokens"),
        (lambda: pack_examples([], 8), "no examples"),
        (lambda: pack_examples([example_of(4, 2)], 8, num_soft=1), "num_soft=1"),
        (lambda: lay_out([example_of(4), example_of(5)], Plan(8, [[0, 1]])), "row 0"),
        (lambda: lay_out([example_of(4, 3)], Plan(8, [[0]])), "3 goals; num_goals=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
