"""How well values tell states that can still be solved from lost ones.

Two questions: are solvable states ranked above lost ones (AUC, the chance that a solvable state's
value is the higher one, half of it for ties), and does a value of 0.7 mean 70% (ECE, the expected
calibration error over bins of equal width; Guo et al. 2017, arXiv 1706.04599). States of one
problem resemble each other, so intervals come from a bootstrap that draws whole problems.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

NUM_BINS = 10
NUM_RESAMPLES = 1000


class Judged(NamedTuple):
    """A state, how it was valued, and the truth. problem: its problem's id. depth: moves made."""

    problem: str
    depth: int
    value: float
    solvable: bool


class Estimate(NamedTuple):
    """A statistic with its 95% interval; NaN where it is not defined."""

    value: float
    low: float
    high: float


class Calibration(NamedTuple):
    """The calibration of states of one depth; depth None: of all.

    num_states, num_solvable, num_problems: what it rests on.
    """

    depth: int | None
    num_states: int
    num_solvable: int
    num_problems: int
    auc: Estimate
    ece: Estimate


def area_under_roc(
    values: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Chance that a true item's value beats a false one's: values [n], labels [n] -> [].

    Args:
      weights: [..., n], how often each item counts; one AUC for each row of them. None: once.

    Returns:
      [...]; NaN where all labels are equal.
    """
    if weights is None:
        weights = np.ones(len(values))
    _, level = np.unique(values, return_inverse=True)
    num_levels = int(level.max(initial=-1)) + 1
    true = _add_up(weights * labels, level, num_levels)
    false = _add_up(weights * ~labels, level, num_levels)
    below = np.cumsum(false, -1) - false / 2
    pairs = true.sum(-1) * false.sum(-1)
    with np.errstate(invalid="ignore"):
        return np.asarray((true * below).sum(-1) / np.where(pairs > 0, pairs, np.nan))


def calibration_error(
    values: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray | None = None,
    num_bins: int = NUM_BINS,
) -> np.ndarray:
    """Mean distance of value and truth, bin by bin: values [n] in [0, 1], labels [n] -> [].

    Values are binned by equal width, a border belonging to the bin above it; each bin counts by
    its items.

    Args:
      weights: as in `area_under_roc`.

    Raises:
      ValueError: a value outside of [0, 1].
    """
    if len(values) and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(f"values from {values.min()} to {values.max()}: accepted are 0 to 1")
    if weights is None:
        weights = np.ones(len(values))
    place = np.minimum((values * num_bins).astype(int), num_bins - 1)
    gap = _add_up(weights * (values - labels), place, num_bins)
    total = weights.sum(-1)
    return np.asarray(np.abs(gap).sum(-1) / np.where(total > 0, total, np.nan))


def summarize(judged: Iterable[Judged], seed: int = 0) -> list[Calibration]:
    """Calibration depth by depth, and of all states behind the first move (depth None) at last.

    Args:
      seed: of the bootstrap.
    """
    judged = list(judged)
    depths = sorted({one.depth for one in judged})
    parts = [[one for one in judged if depth in (None, one.depth)] for depth in (*depths, None)]
    return [
        _summarize(depth, part, seed)
        for depth, part in zip((*depths, None), parts, strict=True)
        if part
    ]


def _summarize(depth: int | None, judged: Sequence[Judged], seed: int) -> Calibration:
    values = np.array([one.value for one in judged], float)
    labels = np.array([one.solvable for one in judged], bool)
    _, problem = np.unique([one.problem for one in judged], return_inverse=True)
    num_problems = int(problem.max()) + 1
    rng = np.random.default_rng(seed)
    aucs, eces = [], []
    # A few at a time: all at once would be hundreds of megabytes.
    for _ in range(0, NUM_RESAMPLES, 50):
        drawn = rng.multinomial(num_problems, np.full(num_problems, 1 / num_problems), 50)
        weights = drawn[:, problem].astype(float)
        aucs.append(area_under_roc(values, labels, weights))
        eces.append(calibration_error(values, labels, weights))
    return Calibration(
        depth=depth,
        num_states=len(judged),
        num_solvable=int(labels.sum()),
        num_problems=num_problems,
        auc=_estimate(area_under_roc(values, labels), np.concatenate(aucs)),
        ece=_estimate(calibration_error(values, labels), np.concatenate(eces)),
    )


def _estimate(value: np.ndarray, resampled: np.ndarray) -> Estimate:
    """The percentile interval over the resamples in which the statistic is defined."""
    defined = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or not len(defined):
        return Estimate(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(defined, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


def _add_up(weights: np.ndarray, place: np.ndarray, num_places: int) -> np.ndarray:
    """Sums of weights [..., n] by their place [n]: [..., num_places]."""
    rows = weights.reshape(-1, weights.shape[-1])
    sums = [np.bincount(place, row, minlength=num_places) for row in rows]
    return np.reshape(sums, (*weights.shape[:-1], num_places))
