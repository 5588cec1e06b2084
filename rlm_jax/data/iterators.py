"""Shuffled, sharded and resumable streams of examples, and of batches made from them.

The one idea: the stream is random access. grain computes the shuffled place of the i-th example
of an endless run of epochs, so a position is one whole number, and the state of a batch iterator
is the next position and those of the examples that were read and still wait for their batch. It is
plain JSON, a few hundred numbers at most, and stands in a checkpoint; a new process that sets it
goes on with exactly the batches that would have followed.

No worker process and no thread: on a few cores they take from the network what they give.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np

from rlm_jax.data.examples import TokenExample
from rlm_jax.data.packing import Layout, TokenBatch, lay_out

VERSION = 1
TOO_LONG = ("raise", "drop")


@runtime_checkable
class Source(Protocol):
    """Examples by number: a list, a `TokenTable`, or a TFDS data source."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Stream:
    """One host's examples in the order of training; made by `make_stream`.

    Attributes:
      examples: the i-th example, epochs one behind the other.
      num_examples: how many there are; None without end.
      epoch_examples: how many make one epoch on this host.
      options: what the order depends on, in JSON.
    """

    examples: Source
    num_examples: int | None
    epoch_examples: int
    options: dict[str, Any]


def make_stream(
    source: Source,
    *,
    seed: int,
    shard_index: int = 0,
    num_shards: int = 1,
    num_epochs: int | None = None,
    shuffle: bool = True,
    make_example: Callable[[Any], Any] | None = None,
) -> Stream:
    """Shuffles a source, anew in every epoch, and takes one host's share of it.

    The shares of one epoch are disjoint and equally large; up to `num_shards - 1` examples, others
    in every epoch, are left out of it.

    Args:
      source: examples by number.
      seed: of the order; any other seed gives an unrelated one.
      shard_index: this host, `jax.process_index()`.
      num_shards: all hosts, `jax.process_count()`.
      num_epochs: passes through the source; None goes on without end.
      shuffle: without, the order is the source's in every epoch.
      make_example: applied to what the source holds (to tokenize it, say); must be a pure
        function, or a run that is resumed differs from one that is not.

    Raises:
      ValueError: a bad option, fewer examples than shards, or grain is not installed.
    """
    if seed < 0:
        raise ValueError(f"seed must not be negative, but is {seed}")
    if not 0 <= shard_index < num_shards:
        raise ValueError(f"shard_index {shard_index} is not one of {num_shards} shards")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, not {num_epochs}")
    if len(source) < num_shards:
        raise ValueError(f"{len(source)} examples are too few for {num_shards} shards")
    try:
        import grain
    except ImportError as error:
        raise ValueError("data iterators need grain: pip install 'rlm_jax[train]'") from error
    dataset = grain.MapDataset.source(cast(Any, source))
    if shuffle:
        # grain reseeds epoch e by seed + e: hashed, neighbouring seeds share no epoch.
        dataset = dataset.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    num_used = len(source) - len(source) % num_shards
    dataset = dataset.slice(slice(shard_index, num_used, num_shards)).repeat(num_epochs)
    if make_example is not None:
        dataset = dataset.map(make_example)
    epoch_examples = num_used // num_shards
    return Stream(
        examples=dataset,
        num_examples=None if num_epochs is None else num_epochs * epoch_examples,
        epoch_examples=epoch_examples,
        options={
            "num_source_examples": len(source),
            "seed": seed,
            "shard_index": shard_index,
            "num_shards": num_shards,
            "num_epochs": num_epochs,
            "shuffle": shuffle,
        },
    )


class Counts(NamedTuple):
    """What an iterator has done since its beginning, restarts included.

    Attributes:
      batches: that were returned.
      examples: in them.
      dropped: examples that were left out because they were too long.
      tokens: in the batches, without padding.
      slots: places for tokens in the batches.
    """

    batches: int = 0
    examples: int = 0
    dropped: int = 0
    tokens: int = 0
    slots: int = 0

    @property
    def padding_share(self) -> float:
        """The share of all places that hold padding."""
        return 1 - self.tokens / self.slots if self.slots else 0.0


class BatchIterator:
    """Batches of a stream of `TokenExample`, by a layout; resumable at every batch.

    A stream that ends is laid out to its last example, with rows of padding where the last
    batches are not full.

    Args:
      stream: from `make_stream`.
      layout: `Packed` or `Bucketed`.
      too_long: what becomes of examples longer than the layout's rows: "raise" or "drop", which
        counts them.

    Raises:
      ValueError: another `too_long`; while iterating, an example that is too long.
    """

    def __init__(self, stream: Stream, layout: Layout, *, too_long: str = "raise"):
        if too_long not in TOO_LONG:
            raise ValueError(f"too_long {too_long!r}; accepted: {', '.join(TOO_LONG)}")
        self._stream = stream
        self._layout = layout
        self._too_long = too_long
        self._next = 0
        self._waiting: list[int] = []  # positions in the stream, ascending
        self._num_passed_over = 0  # of those waiting
        self._examples: dict[int, TokenExample] = {}
        self.counts = Counts()

    def __iter__(self) -> "BatchIterator":
        return self

    def __next__(self) -> TokenBatch:
        begin = self._next
        while missing := self._layout.num_missing(self._lengths()):
            end = self._next + missing
            if self._stream.num_examples is not None:
                end = min(end, self._stream.num_examples)
            if self._next == end:
                break
            if not self._waiting and self._next - begin >= self._stream.epoch_examples:
                raise ValueError(
                    f"every example of an epoch is longer than {self._layout.max_tokens} tokens"
                )
            while self._next < end:
                self._read()
        if not self._waiting:
            raise StopIteration
        plan = self._layout.plan(self._lengths(), self._num_passed_over)
        examples = [self._examples[i] for i in self._waiting]
        batch = lay_out(examples, plan, self._layout.num_soft, self._layout.num_goals)
        self._count(batch, sum(map(len, plan.rows)))
        placed = {self._waiting[place] for row in plan.rows for place in row}
        self._waiting = [i for i in self._waiting if i not in placed]
        self._num_passed_over = len(self._waiting)
        self._examples = {i: self._examples[i] for i in self._waiting}
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands, as JSON can hold it."""
        return {
            "version": VERSION,
            "options": self._options(),
            "next": self._next,
            "waiting": list(self._waiting),
            "passed_over": self._num_passed_over,
            "counts": self.counts._asdict(),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where another iterator of the same stream and layout stood.

        Raises:
          ValueError: the state is of another version, stream or layout, or no state at all.
        """
        if not isinstance(state, dict) or state.get("version") != VERSION:
            raise ValueError(f"no state of a batch iterator, version {VERSION}: {state!r:.80}")
        if set(state) != set(self.get_state()):
            raise ValueError(f"a batch iterator's state has other fields: {sorted(state)}")
        for name, value in self._options().items():
            if state["options"].get(name) != value:
                raise ValueError(
                    f"the state is of an iterator with {name}={state['options'].get(name)!r}; "
                    f"this one has {value!r}"
                )
        self._next, self._waiting = int(state["next"]), [int(i) for i in state["waiting"]]
        self._num_passed_over = int(state["passed_over"])
        self._examples = {i: self._stream.examples[i] for i in self._waiting}
        self.counts = Counts(**state["counts"])

    @property
    def epoch(self) -> float:
        """Passes through the host's share so far, by examples read."""
        return self._next / self._stream.epoch_examples

    def _lengths(self) -> list[int]:
        return [len(self._examples[i].tokens) for i in self._waiting]

    def _options(self) -> dict[str, Any]:
        return {
            **self._stream.options,
            "layout": repr(self._layout),
            "too_long": self._too_long,
        }

    def _read(self) -> None:
        example = self._stream.examples[self._next]
        length = len(example.tokens)
        if length <= self._layout.max_tokens:
            self._waiting.append(self._next)
            self._examples[self._next] = example
        elif self._too_long == "raise":
            raise ValueError(
                f"example {self._next} of the stream has {length} tokens; rows have "
                f"{self._layout.max_tokens} (too_long='drop' leaves such examples out)"
            )
        else:
            self.counts = self.counts._replace(dropped=self.counts.dropped + 1)
        self._next += 1

    def _count(self, batch: TokenBatch, num_examples: int) -> None:
        counts = self.counts
        self.counts = counts._replace(
            batches=counts.batches + 1,
            examples=counts.examples + num_examples,
            tokens=counts.tokens + int(np.count_nonzero(batch.segments)),
            slots=counts.slots + batch.segments.size,
        )


def make_batches(
    source: Source,
    layout: Layout,
    *,
    seed: int,
    too_long: str = "raise",
    **options: Any,
) -> BatchIterator:
    """`make_stream` and `BatchIterator` in one call; `options` are those of `make_stream`."""
    return BatchIterator(make_stream(source, seed=seed, **options), layout, too_long=too_long)
