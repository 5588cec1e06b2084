"""The lines that evaluate.py leaves, cell by cell, and what of them can be set beside each other.

A search and best-of-N never spend the same tokens by themselves. So several N are measured, and
what best-of-N would have spent on a search's accuracy is read off the curve through them.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from rlm_jax.core.files import write_whole
from rlm_jax.evaluation.chains import CHAINS, Price, price_accuracy

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One strategy at one budget on one test set. num_chains: of a best-of-N row of `--best_of`."""

    split: str
    strategy: str
    max_expansions: int | None
    budget_tokens: int
    seed: int
    blind: bool = False
    num_chains: int | None = None

    @property
    def row(self) -> tuple[str, int | None]:
        """The strategy, and the chains it is to draw where the config does not say."""
        return self.strategy, self.num_chains

    @property
    def name(self) -> str:
        """Of its file."""
        strategy = self.strategy if self.num_chains is None else f"best_of_{self.num_chains}"
        budget = "all" if self.max_expansions is None else str(self.max_expansions)
        return f"{strategy}-{budget}-{self.budget_tokens}-{self.seed}"


def read_results(path: str | os.PathLike[str], needs: Sequence[str] = ()) -> list[Result]:
    """The lines of a file of results; none where there is no file yet.

    Args:
      needs: what every line must have.

    Raises:
      ValueError: a line that is no JSON object, or lacks what it must have, by its number.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return []
    results = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}: line {number}: not JSON") from None
        if not isinstance(result, dict):
            raise ValueError(f"{path}: line {number}: not a JSON object")
        missing = [name for name in needs if name not in result]
        if missing:
            raise ValueError(f"{path}: line {number}: lacks {', '.join(missing)}")
        results.append(result)
    return results


def read_cells(path: str | os.PathLike[str], needs: Sequence[str] = ()) -> dict[Cell, list[Result]]:
    """The lines of a file of results by their cells.

    Raises:
      ValueError: a line that is of no cell, or lacks something else it must have, by its number.
    """
    fields = dataclasses.fields(Cell)
    own = [field.name for field in fields if field.default is dataclasses.MISSING]
    cells: dict[Cell, list[Result]] = {}
    for one in read_results(path, (*own, *needs)):
        # Lines of earlier versions lack what came since, and that is at its default.
        cell = Cell(**{field.name: one[field.name] for field in fields if field.name in one})
        cells.setdefault(cell, []).append(one)
    return cells


def write_cell(path: str | os.PathLike[str], cell: Cell, lines: Sequence[Result]) -> None:
    """Appends the lines of a cell to a file of results, and takes out those that it had there."""
    path = pathlib.Path(path)
    cells = read_cells(path)
    if cells.pop(cell, None) is not None:
        kept = [line for others in cells.values() for line in others]
        with write_whole(path) as beside:
            beside.write_text(_write_lines(kept))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(_write_lines(lines))


def _write_lines(lines: Sequence[Result]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def name_row(result: Result) -> str:
    """A result's strategy as a table says it: `blind best of 8`."""
    chains = result.get("num_chains")
    name = result["strategy"] if chains is None else f"best of {chains}"
    return f"blind {name}" if result["blind"] else name


def price_by_chains(result: Result, results: Iterable[Result]) -> dict[str, Price]:
    """What best-of-N needs in tokens for the accuracy of a search, by how its chains are drawn.

    Args:
      results: those of `--best_of` with the search's model, seed and test set are the measurements.

    Returns:
      "together" and, where the task verifies itself, "in turn"; empty for what is no search of a
      network, and where nothing was measured.
    """
    if result["blind"] or result["strategy"] in CHAINS:
        return {}
    same = ("split", "model", "seed")
    measured = [
        other
        for other in results
        if other.get("num_chains") is not None
        and not other["blind"]
        and all(other[name] == result[name] for name in same)
    ]
    prices = {}
    for way, field in (("together", "generated_tokens"), ("in turn", "tokens_in_turn")):
        points = [(other[field], other["accuracy"]) for other in measured if field in other]
        if points:
            prices[way] = price_accuracy(points, result["accuracy"])
    return prices
