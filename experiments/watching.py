"""How a search is getting on, for the programs here: a bar, a table, or lines in a log."""

import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rlm_jax.data.records import Record
from rlm_jax.evaluation import solver
from rlm_jax.viz import progress


def say(console: Console, line: str) -> None:
    """Prints a line as it is: never styled, and never broken where a file takes the output."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Watch:
    """A bar, or a table of what is running."""

    def __init__(self, console: Console, name: str, num_problems: int, *, rounds: bool):
        """rounds: show every look at the searches, as a table or as lines; else a bar alone."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console = console
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.bar.add_task(name, total=num_problems, status="")
        self.table = Live(console=console, transient=True)
        self.rounds = rounds
        self.in_table = rounds and console.is_terminal
        self.live = self.table if self.in_table else self.bar
        self.num_problems, self.num_done, self.tokens = num_problems, 0, 0
        self.started = 0.0

    def start(self) -> None:
        """The clock runs from here: compilation is not the search's pace."""
        self.say("searching")
        self.started = self.started or time.monotonic()

    def say(self, status: str) -> None:
        self.bar.update(self.task, status=status)

    def count(self, record: Record) -> None:
        self.num_done += 1
        self.tokens += record["budget"]["generated_tokens"]
        self.bar.advance(self.task)

    def look(self, items: Sequence[solver.Encoded], search: Any, places: Sequence[int]) -> None:
        """Called after each chunk of rounds."""
        rows = [row for row, place in enumerate(places) if place >= 0]
        now = progress.measure_progress(
            jax.tree.map(lambda array: np.asarray(array)[rows], search.structure),
            [items[places[row]].problem.id for row in rows],
            rounds=np.asarray(search.rounds)[rows],
            running=np.asarray(search.running)[rows],
            problems_done=self.num_done,
            num_problems=self.num_problems,
            earlier_tokens=self.tokens,
            seconds=time.monotonic() - self.started,
        )
        if self.in_table:
            self.table.update(progress.render_progress(now))
        elif self.rounds:
            say(self.console, progress.format_progress(now))
        else:
            self.say(f"round {now.rounds.max()}, {now.total_tokens} tokens")
