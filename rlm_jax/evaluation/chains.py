"""What best-of-N cost: its chains out of a record, and the price of an accuracy by chains alone.

The one idea: N chains drawn side by side hold the cheaper way to draw them, too. Where a task
verifies itself, one may draw chain after chain and stop at the first that is proven; what that
takes can be read off the same chains. A search has to be compared with both.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rlm_jax.data.records import Record

# Strategies whose structures are chains; the others make trees.
CHAINS = (
    "greedy", "greedy_no_repeats", "greedy_guided", "greedy_controlled", "greedy_legal",
    "best_of_n",
)  # fmt: skip


class Chain(NamedTuple):
    """One of a record's chains: the tokens it took, what it says, and whether it came to an end."""

    tokens: int
    text: str
    finished: bool


class Price(NamedTuple):
    """Tokens that an accuracy costs; `bound` is "<" or ">" where no measurement lies beyond."""

    tokens: float
    bound: str = ""


def read_chains(record: Record) -> list[Chain]:
    """The chains of a record of `CHAINS`, in the order of their first steps.

    A step that the task refused costs its tokens, and is part of what a chain says where the chain
    ends with it; a first step of its kind is a chain of its own.

    Raises:
      ValueError: a node besides the root has more than one living child: the record is of a tree.
    """
    below: dict[int, list[dict[str, Any]]] = {}
    for node in record["nodes"][1:]:
        below.setdefault(node["parents"][0], []).append(node)
    root = record["nodes"][0]["id"]
    chains = []
    for first in below.get(root, []):
        steps, tokens = [first], len(first["tokens"])
        while steps[-1]["id"] in below:
            children = below[steps[-1]["id"]]
            living = [child for child in children if child["alive"]]
            if len(living) > 1:
                raise ValueError(
                    f"record {record['id']!r}: node {steps[-1]['id']} has {len(living)} "
                    "children; the steps of chains have one"
                )
            tokens += sum(len(child["tokens"]) for child in children)
            steps.append((living or children)[-1])
        chains.append(
            Chain(
                tokens=tokens,
                text="".join(step["text"] for step in steps),
                finished=steps[-1]["terminal"] and steps[-1]["alive"],
            )
        )
    return chains


def count_tokens_in_turn(chains: Sequence[Chain], is_right: Callable[[str], bool]) -> int:
    """Tokens of the chains drawn one after another, up to the first that is finished and right."""
    spent = 0
    for chain in chains:
        spent += chain.tokens
        if chain.finished and is_right(chain.text):
            break
    return spent


def price_accuracy(measured: Sequence[tuple[float, float]], accuracy: float) -> Price:
    """Tokens at which measurements (tokens, accuracy) reach an accuracy.

    Between two of them the accuracy is taken to be linear in the logarithm of the tokens, and more
    tokens never to be worth less. Beyond the first and the last the price is a bound.

    Raises:
      ValueError: nothing was measured.
    """
    if not measured:
        raise ValueError("no measurements to price an accuracy by")
    best, points = -math.inf, []
    for tokens, reached in sorted(measured):
        if reached > best:
            best = reached
            points.append((tokens, reached))
    if accuracy <= points[0][1]:
        return Price(points[0][0], "" if accuracy == points[0][1] else "<")
    for (cheap, low), (dear, high) in itertools.pairwise(points):
        if accuracy <= high:
            share = (accuracy - low) / (high - low)
            return Price(math.exp(math.log(cheap) * (1 - share) + math.log(dear) * share))
    return Price(max(tokens for tokens, _ in measured), ">")
