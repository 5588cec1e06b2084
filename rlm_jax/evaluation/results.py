"""The lines that evaluate.py leaves, and what of them can be set beside each other.

A search and best-of-N never spend the same tokens by themselves. So several N are measured, and
what best-of-N would have spent on a search's accuracy is read off the curve through them.
"""

import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from rlm_jax.evaluation.chains import CHAINS, Price, price_accuracy

Result = dict[str, Any]


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """The lines of a file of results; none where there is no file yet."""
    path = pathlib.Path(path)
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


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
