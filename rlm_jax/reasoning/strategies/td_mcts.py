"""TD-MCTS: the search of x1, the Blueprint's own tool (arXiv 2501.11223, Algorithm 1; spec B2).

Select by q' + sqrt(N_p - 1) / (1 + N_c) (c1 + log((N_p + c2) / c2)) without a prior; M sampled
children, each one visit and the value model's q; backup q <- (1 - a) q + a g sum N_c q_c / sum N_c
up to and including the root, N <- N + 1. Where Algorithm 1, x1's code and sense disagree:

- D1 the root is backed up too (code); at its first selection exploration is exactly 0.
- D2 iterations end at the limit *and* at a terminal selection. D3 a child's q is its own.
- D4 q' is q scaled from [value_low, value_high] to [0, 1] (code, from [-1, 1]); 0 and 1 take q as
  it is (paper, where exploration is twice as strong against q).
- D5, D6 the answer is the terminal node of highest value (paper), not a walk by the exploring
  score; the walks are other `answer_rule`s.
- D7 `terminal`: "stop" ends the search when a terminal is selected (code, and the default here);
  "exclude" and "revisit" go on.
- D8, D9 are about training, not about the search. D10 rewards enter as r + g q; selection, in which
  x1 does not discount, sees r + q.

Alone among the tree searches its defaults are x1's: two children, one leaf a round, no resampling.
"""

from typing import Any

from rlm_jax.core.types import Array
from rlm_jax.reasoning.operators.traversal import td_score
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import Siblings
from rlm_jax.reasoning.tree_search import make_tree_search

DEFAULTS = {
    "num_children": 2,
    "backup": "td",
    "discount": 0.96,
    "learning_rate": 1.0,
    "terminal": "stop",
    "resample": False,
    "answer_rule": "best",
}


def make_td_mcts(
    *,
    c1: float = 1.25,
    c2: float = 19652.0,
    value_low: float = -1.0,
    value_high: float = 1.0,
    **tree: Any,
) -> Strategy:
    """The strategy with these settings; `tree` holds fields of `TreeConfig` over `DEFAULTS`.

    Raises:
      ValueError: a setting out of range.
    """
    if c1 < 0 or c2 <= 0:
        raise ValueError(f"c1 must be >= 0 and c2 > 0, got {c1}, {c2}")
    if not value_low < value_high:
        raise ValueError(f"value_low must be < value_high, got {value_low}, {value_high}")
    width = value_high - value_low

    def score(s: Siblings) -> Array:
        q = (s.undiscounted - value_low) / width
        return td_score(q, s.visits, s.node_visits, c1=c1, c2=c2)

    return make_tree_search("td_mcts", TreeConfig(**{**DEFAULTS, **tree}), score)
