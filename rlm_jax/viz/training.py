"""A training run to be watched: how far, how fast, how well, and a few of its trees (rich).

The one idea is that of `progress.py`: a snapshot of plain numbers and two forms of it, a bar that
is redrawn on a terminal and a line of plain text now and then anywhere else, so that the log of a
day stays short. Pace is that of the last minutes, not of the whole run, whose beginning compiles.
"""

import collections
import contextlib
import dataclasses
import datetime
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlm_jax.viz.text import RIGHT, UNKNOWN, WRONG, clean_text, render_tree

_WINDOW_SECONDS = 120.0
_REDRAW_SECONDS = 0.2
_BAR_WIDTH = 24
_NAME_CHARS = 40


@dataclasses.dataclass(frozen=True)
class TrainingProgress:
    """A snapshot: `step` of `num_steps` are done, with the metrics of late.

    steps_per_second, tokens_per_second: the pace of late; None before there is one.
    """

    step: int
    num_steps: int
    steps_per_second: float | None
    tokens_per_second: float | None
    metrics: Mapping[str, float | None]


class Pace:
    """Steps and tokens per second over the last minutes of a run."""

    def __init__(self, window_seconds: float = _WINDOW_SECONDS):
        self._window = window_seconds
        self._marks: collections.deque[tuple[float, int, float]] = collections.deque()

    def note(self, seconds: float, step: int, total_tokens: float) -> None:
        """Takes in where a run is at a time."""
        self._marks.append((seconds, step, total_tokens))
        # One mark before the window stays: a run of slow steps has a pace, too.
        while len(self._marks) > 2 and self._marks[1][0] <= seconds - self._window:
            self._marks.popleft()

    def rates(self) -> tuple[float | None, float | None]:
        """Steps and tokens per second, None before two marks differ in time."""
        if len(self._marks) < 2:
            return None, None
        (start, first, before), (end, last, after) = self._marks[0], self._marks[-1]
        if end <= start:
            return None, None
        return (last - first) / (end - start), (after - before) / (end - start)


@contextlib.contextmanager
def watch_training(
    num_steps: int,
    *,
    console: Console | None = None,
    seconds_between_lines: float = 30.0,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator["TrainingDisplay"]:
    """Shows a run on `console` (stderr by default) until the block ends.

    Args:
      num_steps: the step at which the run ends.
      seconds_between_lines: where no terminal is, time between two lines; at least 10.

    Raises:
      ValueError: num_steps is below 1, or the lines would be too many.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, not {num_steps}")
    if seconds_between_lines < 10:
        raise ValueError(f"seconds_between_lines must be >= 10, not {seconds_between_lines}")
    console = Console(stderr=True) if console is None else console
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        interval = seconds_between_lines if live is None else _REDRAW_SECONDS
        display = TrainingDisplay(num_steps, console, live, interval, clock)
        stack.callback(display.finish)
        yield display


class TrainingDisplay:
    """Where a run says how it goes; made by `watch_training`."""

    def __init__(
        self,
        num_steps: int,
        console: Console,
        live: Live | None,
        interval: float,
        clock: Callable[[], float],
    ):
        self._num_steps = num_steps
        self._console, self._live = console, live
        self._interval, self._clock = interval, clock
        self._pace = Pace()
        self._metrics: dict[str, float | None] = {}
        self._total_tokens = 0.0
        self._step: int | None = None
        self._shown_step: int | None = None
        self._shown_at = -math.inf

    def update(
        self, step: int, *, num_tokens: float = 0, metrics: Mapping[str, Any] | None = None
    ) -> None:
        """Says that `step` steps are done; cheap enough for every step.

        Args:
          num_tokens: of the steps since the last call.
          metrics: numbers on the host; those not named keep their last value.
        """
        now = self._clock()
        self._step = step
        self._total_tokens += num_tokens
        self._metrics |= {
            name: None if value is None else float(value) for name, value in (metrics or {}).items()
        }
        self._pace.note(now, step, self._total_tokens)
        if now - self._shown_at >= self._interval:
            self._show(now)

    def print(self, renderable: RenderableType) -> None:
        """Prints above the bar, or as plain text where there is none: an event, or trees."""
        text = isinstance(renderable, str)
        self._console.print(
            Text(renderable) if text else renderable, soft_wrap=self._live is None and text
        )

    def finish(self) -> None:
        """Shows where the run ended, if that is not the last thing shown."""
        if self._step is not None and self._step != self._shown_step:
            self._show(self._clock())

    def snapshot(self) -> TrainingProgress:
        """How the run goes now."""
        return TrainingProgress(
            self._step or 0, self._num_steps, *self._pace.rates(), dict(self._metrics)
        )

    def _show(self, now: float) -> None:
        self._shown_at, self._shown_step = now, self._step
        progress = self.snapshot()
        if self._live is None:
            self._console.print(Text(format_training(progress)), soft_wrap=True)
        else:
            self._live.update(render_training(progress), refresh=True)


def format_training(progress: TrainingProgress) -> str:
    """One line of plain text."""
    share = f"{_share(progress):.0%}"
    parts = [f"step {progress.step:,}/{progress.num_steps:,} ({share})", *_describe_pace(progress)]
    return ", ".join([*parts, *_describe_metrics(progress)])


def render_training(progress: TrainingProgress) -> RenderableType:
    """A bar with the pace beside it and the metrics below, for a terminal."""
    steps = f"step {progress.step:,}/{progress.num_steps:,}"
    bar = ProgressBar(progress.num_steps, min(progress.step, progress.num_steps), _BAR_WIDTH)
    row = Table.grid(padding=(0, 2, 0, 0))
    pace = "   ".join([f"{_share(progress):.0%}", *_describe_pace(progress)])
    row.add_row(Text(steps, "bold", no_wrap=True), bar, Text(pace, overflow="ellipsis"))
    metrics = Text("   ".join(_describe_metrics(progress)), "dim")
    return Group(row, metrics) if progress.metrics else row


def seconds_left(progress: TrainingProgress) -> float | None:
    """The time the steps left will take at the pace of late; None before there is one."""
    left = progress.num_steps - progress.step
    if left <= 0:
        return 0.0
    return left / progress.steps_per_second if progress.steps_per_second else None


def draw_trees(
    records: Iterable[Mapping[str, Any]],
    *,
    max_trees: int = 3,
    max_lines: int = 12,
    width: int = 100,
) -> str:
    """The first few records as plain text for a log, each a heading and its folded tree.

    Args:
      records: valid ones, see `rlm_jax.data.records`.
      max_lines: of a tree, at least 4; its best paths are drawn and the rest is counted.
      width: columns.
    """
    file = io.StringIO()
    console = Console(file=file, width=width, color_system=None, force_terminal=False)
    for number, record in zip(range(max_trees), records, strict=False):
        if number:
            console.print()
        heading = Text(_describe_record(record))
        heading.truncate(width, overflow="ellipsis")
        console.print(heading)
        console.print(render_tree(record, max_lines=max_lines))
    return "".join(line.rstrip() + "\n" for line in file.getvalue().splitlines())


def _describe_record(record: Mapping[str, Any]) -> str:
    answer = UNKNOWN if record["answer"] is None else clean_text(record["answer"], 60)
    verdict = {True: f" {RIGHT}", False: f" {WRONG}", None: ""}[record["correct"]]
    tokens = record["budget"]["generated_tokens"]
    name = clean_text(record["id"], _NAME_CHARS)
    return f"{name}: {answer}{verdict} ({clean_text(record['strategy'])}, {tokens:,} tokens)"


def _share(progress: TrainingProgress) -> float:
    """The part that is done; not 100% before all of it is."""
    share = min(max(progress.step / progress.num_steps, 0.0), 1.0)
    return math.floor(100 * share) / 100


def _describe_pace(progress: TrainingProgress) -> list[str]:
    parts = []
    if progress.steps_per_second:
        parts.append(f"{_format_number(progress.steps_per_second)} steps/s")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tokens/s")
    left = seconds_left(progress)
    time_left = UNKNOWN if left is None else str(datetime.timedelta(seconds=round(left)))
    return [*parts, f"{time_left} left"]


def _describe_metrics(progress: TrainingProgress) -> list[str]:
    return [
        f"{clean_text(name, _NAME_CHARS)} {_format_number(value)}"
        for name, value in progress.metrics.items()
    ]


def _format_number(value: float | None) -> str:
    """Four digits; large numbers whole."""
    if value is None or not math.isfinite(value):
        return UNKNOWN if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
