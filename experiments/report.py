"""Writes docs/results.md from what evaluate.py left.

python experiments/report.py --results=docs/results/results.jsonl --out=docs/results.md

Value calibration comes from the calibration.jsonl beside the results, where there is one, and
self-improvement from files of improve.py, where --improvement names them; without it the page keeps
what it says of that.
"""

import pathlib
from typing import Any

import launching
from absl import flags

from rlm_jax.evaluation.improvement import TITLE as IMPROVEMENT_TITLE
from rlm_jax.evaluation.improvement import write_improvement
from rlm_jax.evaluation.results import Result, name_row, price_by_chains, read_results

_RESULTS = flags.DEFINE_string("results", None, "results.jsonl of evaluate.py.")
_OUT = flags.DEFINE_string("out", None, "The page to write.")
_IMPROVEMENT = flags.DEFINE_list("improvement", [], "Each an improvement.jsonl of improve.py.")
flags.adopt_module_key_flags(launching)

# What the page says of each line.
_ROW_FIELDS = (
    "split", "strategy", "model", "max_expansions", "budget_tokens", "seed", "blind",
)  # fmt: skip
RESULT_FIELDS = (
    *_ROW_FIELDS, "n", "accuracy", "interval_95", "expansions", "generated_tokens", "command",
)  # fmt: skip
CALIBRATION_FIELDS = (
    *_ROW_FIELDS, "depth", "num_states", "num_solvable", "num_problems", "auc", "ece",
)  # fmt: skip
POINT_FIELDS = ("seed", "arm", "round", "steps", "seconds", "results", "calibration", "command")

HEAD = """# Results

Written by `experiments/report.py` from what `experiments/evaluate.py` measured; not edited by hand.
Accuracy in %, with Wilson's 95% interval. Tokens are generated tokens, a mean per problem.

- A search, and `best_of_n` without a number, stops at the first answer that its task proves right.
  `greedy` is one chain, and ends with a step that does not follow; `greedy_no_repeats` is one too,
  decoded so that from one state it writes no step twice, and where it goes back spells numbers that
  it left: nothing but its own text tells it what it tried and what it left, no verdict and no other
  chain. It goes on from what a step says is left, right or wrong, and back; its answer is what its
  right steps make, and nobody tells it which they are.
  `greedy_guided` is that chain with a value network beside the policy: where it gives the numbers
  that are left no chance, the chain goes back. No verdict here either.
  `greedy_controlled` is the guided chain held to the lines that the task lists as legal, each of
  them weighed by what the network for states says of the numbers that it would leave, before it is
  written; `best_first_controlled` and `best_first_widening_controlled` are those searches so
  decoded. The task gives the rules, no verdict and no answer. What the network reads for it is no
  token and no expansion, so compare these rows with the others by what they may use, not by tokens
  alone.
  `greedy_legal` is a chain without repeats where the task referees: a step that does not follow is
  refused, costs its tokens, and another one is written in its place; of legal steps the task says
  nothing.
  Expansions and tokens "at most" are the limits that were set, the other columns what was spent.
- `best of N` is N chains drawn independently, each to its own end: nothing stops early. Where the
  task verifies itself (Countdown, Game of 24) a problem counts as solved when any of the N is
  proven; elsewhere by the config's vote. Its tokens are those of all N; "in turn" are those of the
  same chains drawn one after another up to the first that is proven, the cheapest way there is to
  draw them.
- "best of N needs": the tokens at which best-of-N, of the same network, reaches the row's accuracy,
  in parentheses over the row's own tokens; drawn together, then in turn. Between the measured N it
  is interpolated, linear in the logarithm of tokens; `<` and `>` are bounds by the smallest and the
  largest N measured.
- Value networks write nothing: what they read is not among the tokens, nor is a prompt. "Read" is
  what evaluators read, in tokens, a mean per problem; a state of four numbers counts five, each
  time it is read. Rows of earlier versions do not say.
- `blind` is the same strategy over random legal moves, without a network, at the same expansions.
"""
CALIBRATION_HEAD = """## Value calibration

What the network said of each state that the search made, against the exact solver: can the numbers
that are left still make the target? AUC: the chance that a solvable state is valued above a lost
one (0.5 says nothing). ECE: mean distance of value and truth over ten bins of equal width. 95%
intervals by a bootstrap over problems. Moves: how many were made; states of one number, which need
no network, are left out.
"""


def main() -> None:
    """Reads, groups by test set and model, and writes."""
    if not _RESULTS.value or not _OUT.value:
        raise ValueError("--results=FILE and --out=FILE are both needed")
    path = pathlib.Path(_RESULTS.value)
    results = _read("results", path, RESULT_FIELDS)
    parts = [HEAD]
    for title, rows in _group(results):
        parts.append(f"## {title}\n\n{_write_table(rows)}\n")
    calibrations = read_results(path.with_name("calibration.jsonl"), CALIBRATION_FIELDS)
    if calibrations:
        parts.append(CALIBRATION_HEAD)
    for title, rows in _group(calibrations):
        parts.append(f"### {title}\n\n{_write_calibration(rows)}\n")
    if _IMPROVEMENT.value:
        courses = [
            _read("improvement", pathlib.Path(name), POINT_FIELDS) for name in _IMPROVEMENT.value
        ]
        parts.append(write_improvement(*courses))
    elif kept := _read_section(pathlib.Path(_OUT.value), IMPROVEMENT_TITLE):
        parts.append(kept)
    commands = dict.fromkeys(result["command"] for result in results)
    parts.append("## Commands\n\n" + "\n".join(f"    python {one}" for one in commands) + "\n")
    pathlib.Path(_OUT.value).write_text("\n".join(parts))


def _read_section(page: pathlib.Path, title: str) -> str:
    """A section of a page that was written before, empty where there is none."""
    text = page.read_text() if page.exists() else ""
    sections = [part for part in text.split("\n## ") if part.startswith(f"{title}\n")]
    return f"## {sections[0]}" if sections else ""


def _read(flag: str, path: pathlib.Path, needs: tuple[str, ...]) -> list[Result]:
    """The lines of the file that a flag names.

    Raises:
      ValueError, FileNotFoundError: there is none, or it is of another kind.
    """
    if not path.exists():
        raise FileNotFoundError(f"--{flag}={path}: there is no such file")
    try:
        return read_results(path, needs)
    except ValueError as error:
        raise ValueError(f"--{flag}={error}") from None


def _group(rows: list[Result]) -> list[tuple[str, list[Result]]]:
    """Rows of one test set and model; where there are several models, the title names it."""
    several = len({row["model"] for row in rows}) > 1
    groups: dict[str, list[Result]] = {}
    for row in rows:
        title = f"{row['split']}, {row['model']}" if several else row["split"]
        groups.setdefault(title, []).append(row)
    return list(groups.items())


def _order(row: Result) -> tuple[Any, ...]:
    chains = row.get("num_chains") or 0
    return (row["max_expansions"] or 0, row["strategy"], chains, row["blind"], row["budget_tokens"])


def _write_table(rows: list[Result]) -> str:
    heads = (
        "strategy", "expansions at most", "tokens at most", "n", "accuracy", "95%", "expansions",
        "tokens", "read", "best of N needs", "seed",
    )  # fmt: skip
    lines = []
    for row in sorted(rows, key=_order):
        low, high = row["interval_95"]
        lines.append(
            (
                name_row(row),
                row["max_expansions"] or "-",
                "-" if row["blind"] else row["budget_tokens"],
                row["n"],
                f"{100 * row['accuracy']:.1f}",
                f"{100 * low:.1f}-{100 * high:.1f}",
                f"{row['expansions']:.1f}",
                _write_tokens(row),
                _write_read(row),
                _write_prices(row, rows),
                row["seed"],
            )
        )
    return _lay_out(heads, lines)


def _write_tokens(row: Result) -> str:
    if row["blind"]:
        return "-"
    tokens = f"{row['generated_tokens']:.0f}"
    in_turn = row.get("tokens_in_turn")
    return tokens if in_turn is None else f"{tokens}; in turn {in_turn:.0f}"


def _write_read(row: Result) -> str:
    read = row.get("scored_tokens")
    return "-" if read is None or row["blind"] else f"{read:.0f}"


def _write_prices(row: Result, rows: list[Result]) -> str:
    """`430 (2.9x); in turn 120 (0.8x)`."""
    said = []
    for way, price in price_by_chains(row, rows).items():
        times = price.tokens / max(row["generated_tokens"], 1e-9)
        text = f"{price.bound}{price.tokens:.0f} ({price.bound}{times:.1f}x)"
        said.append(text if way == "together" else f"{way} {text}")
    return "; ".join(said) or "-"


def _write_calibration(rows: list[Result]) -> str:
    heads = (
        "strategy", "expansions at most", "tokens at most", "moves", "states", "solvable",
        "problems", "AUC", "ECE", "seed",
    )  # fmt: skip
    lines = [
        (
            name_row(row),
            row["max_expansions"] or "-",
            row["budget_tokens"],
            "all" if row["depth"] is None else row["depth"],
            row["num_states"],
            f"{100 * row['num_solvable'] / row['num_states']:.0f}%",
            row["num_problems"],
            _write_estimate(row["auc"]),
            _write_estimate(row["ece"]),
            row["seed"],
        )
        for row in sorted(rows, key=_order)
    ]
    return _lay_out(heads, lines)


def _write_estimate(estimate: list[float] | None) -> str:
    if estimate is None:
        return "-"
    value, low, high = estimate
    return f"{value:.3f} ({low:.3f}-{high:.3f})"


def _lay_out(heads: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    rows = [heads, ("---",) * len(heads), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    launching.launch(main)
