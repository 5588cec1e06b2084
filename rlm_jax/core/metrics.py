"""Metrics as named sums and counts, added across microbatches, devices and hosts."""

from collections.abc import Mapping

import jax

from rlm_jax.core.masked import MaskedSum

Metrics = Mapping[str, MaskedSum]


def add_metrics(first: Metrics, second: Metrics) -> dict[str, MaskedSum]:
    """Adds metric by metric; both must hold the same names.

    Raises:
      ValueError: a name is in one and not in the other.
    """
    if first.keys() != second.keys():
        raise ValueError(f"metrics differ in names: {sorted(first.keys() ^ second.keys())}")
    return {name: jax.tree.map(lambda a, b: a + b, first[name], second[name]) for name in first}


def metric_means(metrics: Metrics) -> dict[str, float]:
    """The numbers to print or log; reads the device once."""
    means = jax.device_get({name: value.mean() for name, value in metrics.items()})
    return {name: float(mean) for name, mean in means.items()}
