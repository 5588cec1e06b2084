"""PUCT: Monte Carlo tree search guided by the policy's prior over sampled steps.

Select by Q + c P sqrt(N_p) / (1 + N_c) (AlphaMath, arXiv 2405.03553, constant c; TS-LLM, arXiv
2309.17179, the AlphaZero form; spec B12.1, B12.7). All else is `tree_search.py`. Judged on visit,
with base 19652 and q "siblings", its visit counts are those of `mctx.muzero_policy`.
"""

from typing import Any

from rlm_jax.core.types import Array
from rlm_jax.reasoning.operators.traversal import puct_score, rescale_by_siblings
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import Siblings
from rlm_jax.reasoning.tree_search import make_tree_search

Q_SCALES = ("raw", "siblings")


def make_puct(
    *, exploration: float = 1.25, base: float | None = None, q: str = "raw", **tree: Any
) -> Strategy:
    """The strategy with these settings; `tree` holds fields of `TreeConfig`.

    Args:
      exploration: c. base: None for a constant c, AlphaZero's c_b (19652) otherwise.
      q: "raw" values, or rescaled to [0, 1] over the "siblings" and their parent (MuZero).

    Raises:
      ValueError: a setting out of range.
    """
    if exploration < 0:
        raise ValueError(f"exploration must be >= 0, got {exploration}")
    if base is not None and base <= 0:
        raise ValueError(f"base must be > 0 or None, got {base}")
    if q not in Q_SCALES:
        raise ValueError(f"q {q!r}: accepted are {Q_SCALES}")

    def score(s: Siblings) -> Array:
        value = s.q if q == "raw" else rescale_by_siblings(s.q, s.visits, s.alive, s.node_value)
        bonus = {"exploration": exploration, "base": base}
        return puct_score(value, s.visits, s.prior, s.node_visits, **bonus)

    return make_tree_search("puct", TreeConfig(**tree), score)
