"""Training examples made while the training goes on: a source without an end to speak of.

The one idea: shard i is a pure function of i, so an endless generated data set is random access
like a stored one, stands still nowhere on disk, and a resumed run meets the same examples. The
next shard is made in a process of its own while the present one is trained on.
"""

import collections
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from rlm_jax.core.stopping import STOP_SIGNALS
from rlm_jax.data.examples import TokenExample, TokenTable

# More than any run reads: position, not count, is what a resumed run needs.
NUM_SHARDS = 1 << 20

MakeShard = Callable[[int], Iterable[TokenExample]]
T = TypeVar("T")


def mix_shards(
    make_shard: MakeShard, stored: TokenTable, *, share: float, seed: int
) -> Callable[[int], list[TokenExample]]:
    """Shards in which a share of the examples gives way to stored ones, drawn evenly.

    A function of the shard's number like `make_shard` itself, and of the same size; stored are the
    solutions that an earlier network found, say (`learning.expert_iteration.read_examples`).

    Raises:
      ValueError: share is outside of [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    return functools.partial(_mix_shard, make_shard, stored, share, seed)


def _mix_shard(
    make_shard: MakeShard, stored: TokenTable, share: float, seed: int, shard: int
) -> list[TokenExample]:
    rng = np.random.default_rng([seed, 4, shard])  # Not what the shard itself is drawn by.
    examples = list(make_shard(shard))
    for place in np.flatnonzero(rng.random(len(examples)) < share):
        examples[place] = stored[int(rng.integers(len(stored)))]
    return examples


class GeneratedSource:
    """Examples by number, made shard by shard; a source for `make_stream(..., shuffle=False)`.

    Args:
      make_shard: number of a shard -> its examples, always exactly `shard_examples`; a function of
        a module (or a `functools.partial` of one), since another process calls it.
      num_shards: how many there are, more than will be used.
      prefetch: make the next shard in another process.

    Raises:
      ValueError: a count below 1; while reading, a shard of another size.
    """

    def __init__(
        self, make_shard: MakeShard, *, num_shards: int, shard_examples: int, prefetch: bool = True
    ):
        if num_shards < 1 or shard_examples < 1:
            raise ValueError(f"num_shards={num_shards} and shard_examples={shard_examples}: >= 1")
        self._make_shard = make_shard
        self._num_shards = num_shards
        self._shard_examples = shard_examples
        self._held: dict[int, TokenTable] = {}
        self._coming: dict[int, concurrent.futures.Future[TokenTable]] = {}
        self._pool: concurrent.futures.Executor | None = None
        if prefetch:
            self._pool = _start_process()

    def __len__(self) -> int:
        return self._num_shards * self._shard_examples

    def __getitem__(self, index: int) -> TokenExample:
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        shard, place = divmod(index, self._shard_examples)
        if shard not in self._held:
            self._hold(shard)
        return self._held[shard][place]

    def close(self) -> None:
        """Ends the other process; for `contextlib.closing`."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _hold(self, shard: int) -> None:
        coming = self._coming.pop(shard, None)
        table = make_table(self._make_shard, shard) if coming is None else coming.result()
        if len(table) != self._shard_examples:
            raise ValueError(
                f"shard {shard} holds {len(table)} examples, expected {self._shard_examples}"
            )
        # The one before stays: examples that wait for their batch may come from it.
        self._held = {number: held for number, held in self._held.items() if number == shard - 1}
        self._held[shard] = table
        if self._pool is not None and shard + 1 < self._num_shards:
            self._coming = {shard + 1: self._pool.submit(make_table, self._make_shard, shard + 1)}


def make_table(make_shard: MakeShard, shard: int) -> TokenTable:
    """One shard's examples as a table, cheap to send between processes."""
    return TokenTable(make_shard(shard))


@contextlib.contextmanager
def make_ahead(
    make_fn: Callable[[int], T], start: int, num_ahead: int = 8
) -> Iterator[Iterator[T]]:
    """`make_fn(start)`, `make_fn(start + 1)` and so on without end, made in another process.

    Args:
      make_fn: a function of a module, or a `functools.partial` of one.
      num_ahead: how many are made, or being made, before they are asked for.
    """

    def results() -> Iterator[T]:
        for number in itertools.count(start + num_ahead):
            result = coming.popleft().result()
            coming.append(pool.submit(make_fn, number))
            yield result

    pool = _start_process()
    try:
        numbers = range(start, start + num_ahead)
        coming = collections.deque(pool.submit(make_fn, number) for number in numbers)
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_process() -> concurrent.futures.Executor:
    """A process that answers to this one alone.

    Ctrl-C in a terminal, and many a cluster's SIGTERM, reach every process of a group. They are for
    the one that trains to answer, which still needs what is being made to end its step. So they are
    held back in the other, from before it starts on, and it ends with this one instead.
    """
    # Not forked: the parent runs the threads of a compiled program.
    context = multiprocessing.get_context("spawn")
    multiprocessing.resource_tracker.ensure_running()  # Its start would let them through again.
    pool = concurrent.futures.ProcessPoolExecutor(
        1, mp_context=context, initializer=_end_with_parent
    )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        pool.submit(os.getpid)  # Which starts it, and it inherits the mask.
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return pool


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
