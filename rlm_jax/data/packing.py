"""Examples of many lengths in batches of few shapes: packed into rows, or bucketed by length.

The one idea: both are plans over lengths alone, made before any array is: a plan says which
example goes into which row, and one function lays the tokens out. Packing puts several examples
into a row, kept apart by `segments` and by positions that begin anew; best-fit decreasing leaves
the least room (Krell et al. 2021, 2107.02027). Buckets put one example into a row of the
narrowest width that holds it, and every width is compiled once.
"""

import bisect
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Float32, Int8, Int32
from rlm_jax.data.examples import TokenExample, pad_example


@struct
class TokenBatch:
    """B rows of T tokens with M alternatives and G goals a token; see `data.examples`.

    Attributes:
      tokens: 0 where there is no example.
      segments: which example of its row a token belongs to, counted from 1; 0 is padding.
      positions: places within the example, counted from 0.
      loss_weight: weight of predicting the token from what precedes it in its segment.
      soft_ids: alternatives to the token.
      soft_weights: their weights; where they sum to 0 the token itself is the label.
      value_target: what the value read at the token's hidden state should be.
      value_weight: weight of that target.
      goals: of each goal 1 where it can be reached from there, -1 where not, 0 where not learned.
    """

    tokens: Int32[Any, "B T"]
    segments: Int32[Any, "B T"]
    positions: Int32[Any, "B T"]
    loss_weight: Float32[Any, "B T"]
    soft_ids: Int32[Any, "B T M"]
    soft_weights: Float32[Any, "B T M"]
    value_target: Float32[Any, "B T"]
    value_weight: Float32[Any, "B T"]
    goals: Int8[Any, "B T G"]


class Plan(NamedTuple):
    """One batch to be laid out: its width, and the examples of each row by their place."""

    width: int
    rows: list[list[int]]


@dataclass(frozen=True)
class Packed:
    """Batches of `num_rows` rows of `row_tokens`, each row holding as many examples as fit.

    `slack` is the share of tokens waiting beyond a batch's worth before one is made: more to
    choose from leaves less padding. Examples left over go first into the next batch.
    """

    num_rows: int
    row_tokens: int
    num_soft: int = 0
    num_goals: int = 0
    slack: float = 0.25

    def __post_init__(self):
        _check_positive(num_rows=self.num_rows, row_tokens=self.row_tokens)
        _check_not_negative(num_soft=self.num_soft, num_goals=self.num_goals)
        if not 0.0 <= self.slack <= 0.5:
            raise ValueError(f"slack must lie in [0, 0.5], not {self.slack}")

    @property
    def max_tokens(self) -> int:
        """The longest example that has a place."""
        return self.row_tokens

    def num_missing(self, lengths: Sequence[int]) -> int:
        """At least so many more examples should be read before a batch is planned; 0 for none."""
        wanted = self.num_rows * self.row_tokens * (1 + self.slack) - sum(lengths)
        return max(0, math.ceil(wanted / self.row_tokens))

    def plan(self, lengths: Sequence[int], num_waiting: int) -> Plan:
        """The next batch.

        Args:
          lengths: of the examples at hand, at least one, in the order of reading.
          num_waiting: so many of them, at the beginning, were passed over before.
        """
        rows, _ = pack_lengths(
            lengths, self.row_tokens, num_rows=self.num_rows, num_first=num_waiting
        )
        return Plan(self.row_tokens, rows)


@dataclass(frozen=True)
class Bucketed:
    """Batches of one example a row, in rows of the narrowest of `widths` that holds it.

    A batch of width w has `batch_tokens // w` rows, at least one, so that every batch costs about
    the same.
    """

    widths: tuple[int, ...]
    batch_tokens: int
    num_soft: int = 0
    num_goals: int = 0

    def __post_init__(self):
        if not self.widths or list(self.widths) != sorted(set(self.widths)):
            raise ValueError(f"widths must rise, not {self.widths}")
        _check_positive(widths=self.widths[0], batch_tokens=self.batch_tokens)
        _check_not_negative(num_soft=self.num_soft, num_goals=self.num_goals)

    @property
    def max_tokens(self) -> int:
        """The longest example that has a place."""
        return self.widths[-1]

    def num_missing(self, lengths: Sequence[int]) -> int:
        """At least so many more examples should be read before a batch is planned; 0 for none."""
        counts = Counter(map(self._width_of, lengths))
        return max(0, min(self._num_rows(width) - counts[width] for width in self.widths))

    def plan(self, lengths: Sequence[int], num_waiting: int) -> Plan:
        """The next batch, of the narrowest full bucket, else of the narrowest; see `Packed`."""
        del num_waiting
        buckets: dict[int, list[int]] = {width: [] for width in self.widths}
        for place, length in enumerate(lengths):
            buckets[self._width_of(length)].append(place)
        full = [width for width in self.widths if len(buckets[width]) >= self._num_rows(width)]
        width = full[0] if full else next(width for width in self.widths if buckets[width])
        num_rows = self._num_rows(width)
        rows = [[place] for place in buckets[width][:num_rows]]
        return Plan(width, rows + [[] for _ in range(num_rows - len(rows))])

    def _num_rows(self, width: int) -> int:
        return max(1, self.batch_tokens // width)

    def _width_of(self, length: int) -> int:
        return self.widths[bisect.bisect_left(self.widths, length)]


Layout = Packed | Bucketed


def pack_lengths(
    lengths: Sequence[int],
    row_tokens: int,
    *,
    num_rows: int | None = None,
    num_first: int = 0,
) -> tuple[list[list[int]], list[int]]:
    """Best-fit decreasing: which example goes into which row.

    The longest example goes first, always into the fullest row that still has room. How full the
    rows become does not depend on the order of the examples.

    Args:
      lengths: tokens of each example.
      row_tokens: tokens of a row.
      num_rows: so many rows and no more; by default as many as are needed.
      num_first: so many examples, at the beginning, are placed before the others and in their
        order, so that none of them waits for ever.

    Returns:
      The examples of each row, rows in the order of their first example, and the examples that
      found no room.

    Raises:
      ValueError: an example is longer than a row, or empty.
    """
    for place, length in enumerate(lengths):
        if not 0 < length <= row_tokens:
            raise ValueError(f"example {place} has {length} tokens; a row has {row_tokens}")
    others = sorted(range(num_first, len(lengths)), key=lambda i: (-lengths[i], i))
    order = [*range(min(num_first, len(lengths))), *others]
    rows: list[list[int]] = []
    left_over: list[int] = []
    room: list[tuple[int, int]] = []  # (tokens free, row), ascending
    for place in order:
        found = bisect.bisect_left(room, (lengths[place], -1))
        if found < len(room):
            free, row = room.pop(found)
        elif num_rows is None or len(rows) < num_rows:
            free, row = row_tokens, len(rows)
            rows.append([])
        else:
            left_over.append(place)
            continue
        rows[row].append(place)
        bisect.insort(room, (free - lengths[place], row))
    rows = sorted((sorted(row) for row in rows), key=lambda row: row[0])
    return rows + [[] for _ in range((num_rows or 0) - len(rows))], sorted(left_over)


def pack_examples(
    examples: Sequence[TokenExample], row_tokens: int, *, num_soft: int | None = None
) -> TokenBatch:
    """One batch that holds all examples in as few rows as best-fit decreasing finds.

    Raises:
      ValueError: no example, one longer than a row, or one with over `num_soft` alternatives.
    """
    if not examples:
        raise ValueError("no examples to pack")
    most = max(example.soft_ids.shape[1] for example in examples)
    num_goals = max(example.goals.shape[1] for example in examples)
    rows, _ = pack_lengths([len(example.tokens) for example in examples], row_tokens)
    plan = Plan(row_tokens, rows)
    return lay_out(examples, plan, most if num_soft is None else num_soft, num_goals)


def lay_out(
    examples: Sequence[TokenExample], plan: Plan, num_soft: int = 0, num_goals: int = 0
) -> TokenBatch:
    """The batch of a plan over `examples`, checked.

    Raises:
      ValueError: an example has over `num_soft` alternatives or `num_goals` goals, or the plan does
        not hold.
    """
    num_rows, width = len(plan.rows), plan.width
    batch = TokenBatch(
        tokens=np.zeros((num_rows, width), np.int32),
        segments=np.zeros((num_rows, width), np.int32),
        positions=np.zeros((num_rows, width), np.int32),
        loss_weight=np.zeros((num_rows, width), np.float32),
        soft_ids=np.zeros((num_rows, width, num_soft), np.int32),
        soft_weights=np.zeros((num_rows, width, num_soft), np.float32),
        value_target=np.zeros((num_rows, width), np.float32),
        value_weight=np.zeros((num_rows, width), np.float32),
        goals=np.zeros((num_rows, width, num_goals), np.int8),
    )
    for row, places in enumerate(plan.rows):
        begin = 0
        for segment, place in enumerate(places, start=1):
            example = pad_example(examples[place], num_soft, num_goals)
            end = begin + len(example.tokens)
            if end > width:
                raise ValueError(f"row {row} of the plan holds over {width} tokens")
            for name, values in example._asdict().items():
                getattr(batch, name)[row, begin:end] = values
            batch.segments[row, begin:end] = segment
            batch.positions[row, begin:end] = np.arange(end - begin)
            begin = end
    check_batch(batch)
    return batch


def check_batch(batch: TokenBatch) -> None:
    """Checks what losses and attention rely on; for batches on the host.

    Raises:
      ValueError: shapes that do not fit together, segments that do not count 1, 2, ... from the
        left with the padding behind, positions that do not count within them, or a weight where
        there is nothing to learn.
    """
    shape = np.shape(batch.tokens)
    for name in ("segments", "positions", "loss_weight", "value_target", "value_weight"):
        if np.shape(getattr(batch, name)) != shape:
            raise ValueError(f"{name} has shape {np.shape(getattr(batch, name))}, tokens {shape}")
    soft_shape = np.shape(batch.soft_ids)
    if soft_shape[:2] != shape or np.shape(batch.soft_weights) != soft_shape:
        raise ValueError(f"soft labels have shape {soft_shape}, tokens {shape}")
    if np.shape(batch.goals)[:2] != shape:
        raise ValueError(f"goals has shape {np.shape(batch.goals)}, tokens {shape}")
    segments = np.asarray(batch.segments)
    before = np.pad(segments, ((0, 0), (1, 0)))[:, :-1]
    filled = segments > 0
    starts = filled & (segments != before)
    if ((segments != before) & (segments != before + 1) & filled).any() or (
        filled & (np.cumsum(~filled, 1) > 0)
    ).any():
        raise ValueError("segments must count 1, 2, ... from the left, the padding (0) behind")
    column = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    first = np.maximum.accumulate(np.where(starts, column, 0), axis=1)
    if (np.asarray(batch.positions) != np.where(filled, column - first, 0)).any():
        raise ValueError("positions must count from 0 within each segment, and be 0 in the padding")
    if np.asarray(batch.loss_weight)[starts | ~filled].any():
        raise ValueError("loss_weight must be 0 at the first token of a segment and in the padding")
    weights = batch.value_weight, batch.soft_weights, batch.goals
    if any(np.asarray(weight)[~filled].any() for weight in weights):
        raise ValueError("weights must be 0 in the padding")


def padding_share(batch: TokenBatch) -> float:
    """The share of the batch's tokens that are padding."""
    return float(np.mean(np.asarray(batch.segments) == 0))


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def _check_not_negative(**values: int) -> None:
    for name, value in values.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, but is {value}")
