"""How the benchmarks measure: two sides in turn (A/B/A/B), on a machine that is quiet if it can be.

A ratio of two times means something when both sides met the same machine, so they alternate, and
the best call of each counts (medians beside it). Each side may take a given time in all: what is
slow is called less often, at least once. What takes less than a few milliseconds is called several
times in a row, and each call is its share of that: what the runtime takes to begin and end one call
is not what is compared.
"""

import dataclasses
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

QUIET_SHARE = 0.1
_SHORT_SECONDS = 0.5
_ROW_SECONDS = 4e-3
_LONGEST_ROW = 64
_MOST_TURNS = 20


@dataclasses.dataclass(frozen=True)
class Patience:
    """How much time to take.

    repeats: timed calls of each side, more if they are short. side_seconds: no side is called again
    once its calls took so long. quiet_seconds: longest wait for a quiet machine.
    """

    repeats: int = 5
    side_seconds: float = 60.0
    quiet_seconds: float = 20.0


class Paired(NamedTuple):
    """Seconds of each call, ours and the other's, and what share of the machine was busy before."""

    ours: list[float]
    other: list[float]
    busy: float | None


class Prepared(NamedTuple):
    """A call whose arguments are made anew each time, outside of the clock (they are donated)."""

    prepare: Callable[[], tuple[Any, ...]]
    call: Callable[..., Any]


Call = Callable[[], Any] | Prepared


class Compiled(NamedTuple):
    """A program with its arguments bound, and what its compilation took and its memory is."""

    call: Callable[[], Any]
    seconds: float
    memory: Any


def compile_call(fn: Callable[..., Any], *args: Any) -> Compiled:
    """Compiles `fn` ahead of time for `args`."""
    lowered = jax.jit(fn).lower(*args)
    started = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - started
    return Compiled(lambda: compiled(*args), seconds, compiled.memory_analysis())


def program_bytes(memory: Any) -> int:
    """Everything a compiled program holds at once: arguments, results and temporaries."""
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return held - memory.alias_size_in_bytes


def time_once(call: Call, row: int = 1) -> float:
    """Seconds of one call, its arrays waited for: of `row` calls the mean, if none is prepared."""
    if isinstance(call, Prepared):
        args = jax.block_until_ready(call.prepare())
        started = time.perf_counter()
        jax.block_until_ready(call.call(*args))
        return time.perf_counter() - started
    started = time.perf_counter()
    jax.block_until_ready([call() for _ in range(row)])
    return (time.perf_counter() - started) / row


def time_pair(ours: Call, other: Call | None, patience: Patience) -> Paired:
    """Calls both sides in turn; the first call of each warms up, and counts if it is the only one.

    Args:
      other: None where there is no other side.
    """
    busy = wait_until_quiet(patience.quiet_seconds)
    sides: list[tuple[Call | None, list[float]]] = [(ours, []), (other, [])]
    spent = [0.0, 0.0]
    for turn in range(1 + _MOST_TURNS * patience.repeats):
        for side, (call, seconds) in enumerate(sides):
            # Short calls are many, so that one of them meets a machine that is free.
            allowed = patience.side_seconds
            if turn > patience.repeats:
                allowed = min(allowed, _SHORT_SECONDS)
            if call is not None and (not seconds or spent[side] < allowed):
                started = time.perf_counter()
                seconds.append(time_once(call, _row_length(seconds)))
                spent[side] += time.perf_counter() - started
    mine, theirs = (seconds[1:] or seconds for _, seconds in sides)
    return Paired(mine, theirs, busy)


def _row_length(seconds: list[float]) -> int:
    """Calls in a row, by what the calls before took; the first one stands alone."""
    if not seconds:
        return 1
    return max(1, min(_LONGEST_ROW, int(_ROW_SECONDS / max(min(seconds), 1e-9))))


def describe_pair(
    times: Paired, amount: float, other_amount: float | None = None
) -> dict[str, Any]:
    """Work per second: fields of a case. `ratio` is ours over the other's, above 1 we are faster.

    Args:
      amount: of work in one call. other_amount: where the other's calls do not do the same.
    """
    other_amount = other_amount or amount
    ours = amount / min(times.ours)
    other = other_amount / min(times.other) if times.other else None
    return {
        "ours": ours,
        "other": other,
        "ratio": ours / other if other else None,
        "ours_median": amount / statistics.median(times.ours),
        "other_median": other_amount / statistics.median(times.other) if times.other else None,
        "calls": [len(times.ours), len(times.other)],
        "machine_busy_before": times.busy,
    }


def wait_until_quiet(max_seconds: float) -> float | None:
    """Waits for a machine less than 10% busy; the last share seen, None where none can be read."""
    deadline = time.monotonic() + max_seconds
    while True:
        busy = busy_share()
        if busy is None or busy < QUIET_SHARE or time.monotonic() >= deadline:
            return busy
        time.sleep(0.75)


def busy_share() -> float | None:
    """Share of the processors that was at work in a quarter second in which we are not."""

    def read() -> tuple[int, int]:
        fields = [int(x) for x in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return sum(fields), fields[3] + fields[4]

    try:
        before = read()
        time.sleep(0.25)
        after = read()
    except OSError:
        return None
    total = after[0] - before[0]
    return 1.0 - (after[1] - before[1]) / total if total else None
