"""Rounds of learning by search beside rounds of more demonstrations, as a table over seeds.

A point is what improve.py measured of one seed's networks behind one round of one arm:

    seed, arm, round   of the networks; round 0, arm "start", is where both arms begin
    steps, seconds     of this round's training, without compiling and evaluation
    results            lines of evaluate.py; calibration: lines of its --calibration
    command            that made all points
"""

from collections.abc import Iterator, Sequence
from typing import Any

from rlm_jax.evaluation.intervals import wilson_interval
from rlm_jax.evaluation.results import name_row

Point = dict[str, Any]

TITLE = "Self-improvement"
HEAD = f"""## {TITLE}

Two arms go on from the same networks, as many seconds each: `search` learns from its own searches,
on problems without solutions; `more` goes on with the demonstrations that the networks know. A
figure is the mean over the seeds, in brackets Wilson's 95% interval over the problems of all of
them (the same problems for each: the interval is of seeds more than of problems), then each seed's
own. AUC and ECE are of the values of all states that the searches saw, behind 1 and 2 moves. Under
`:scarce_legal` chains and searches write legal lines alone, in training and here.
"""
_DEPTHS = (1, 2)


def write_improvement(*courses: Sequence[Point]) -> str:
    """The section of a page: a table for each course of improve.py."""
    return "\n".join([HEAD, *map(_write_course, courses)])


def _write_course(points: Sequence[Point]) -> str:
    """One row for each arm and round, means over the seeds."""
    searches = sorted({name_row(row) for row in points[0]["results"]} - {"greedy"})
    heads = ["round", "arm", "steps", "minutes since the start"]
    for name in ("greedy", *searches):
        heads += [f"{name}, %", "expansions", "tokens"]
    heads += [f"{name}, {depth}" for depth in _DEPTHS for name in ("AUC", "ECE")]
    lines = []
    for number, arm in sorted({(point["round"], point["arm"]) for point in points}):
        same = [point for point in points if (point["round"], point["arm"]) == (number, arm)]
        steps = _mean([point["steps"] for point in same])
        line = [str(number), arm, f"{steps:.0f}", f"{_minutes(points, arm, number):.1f}"]
        for name in ("greedy", *searches):
            line += _describe_accuracy(same, name)
        lines.append([*line, *_describe_values(same, searches)])
    rows = [heads, ["---"] * len(heads), *lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    first = points[0]["results"][0]
    limits = {row["max_expansions"] for row in points[0]["results"]} - {None}
    seeds = ", ".join(map(str, sorted({point["seed"] for point in points})))
    about = (
        f"{first['split']}, the first {first['n']} problems, at most {first['budget_tokens']} "
        f"tokens and, in searches, {', '.join(map(str, limits))} expansions; seeds {seeds}."
    )
    commands = dict.fromkeys(point["command"] for point in points)
    made_by = "\n".join(f"    python {command}" for command in commands)
    return f"{about}\n\n{table}\n\n{made_by}\n"


def _minutes(points: Sequence[Point], arm: str, number: int) -> float:
    """Of training in an arm up to a round, a mean over the seeds."""
    seeds = {point["seed"] for point in points}
    rounds = [p for p in points if p["arm"] == arm and 0 < p["round"] <= number]
    return sum(point["seconds"] for point in rounds) / len(seeds) / 60


def _describe_accuracy(points: Sequence[Point], name: str) -> Iterator[str]:
    rows = [row for point in points for row in point["results"] if name_row(row) == name]
    right, number = sum(round(r["accuracy"] * r["n"]) for r in rows), sum(r["n"] for r in rows)
    low, high = wilson_interval(right, number)
    seeds = ", ".join(f"{100 * row['accuracy']:.1f}" for row in rows)
    yield f"{100 * right / number:.1f} ({100 * low:.1f}-{100 * high:.1f}; {seeds})"
    yield f"{_mean([row['expansions'] for row in rows]):.1f}"
    yield f"{_mean([row['generated_tokens'] for row in rows]):.0f}"


def _describe_values(points: Sequence[Point], searches: Sequence[str]) -> Iterator[str]:
    for depth in _DEPTHS:
        for name in ("auc", "ece"):
            values = [
                row[name][0]
                for point in points
                for row in point["calibration"]
                if row["depth"] == depth and row["strategy"] in searches and row[name] is not None
            ]
            yield f"{_mean(values):.3f}" if values else "-"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
