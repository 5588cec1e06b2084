"""UCT: Monte Carlo tree search by upper confidence bounds, without a prior.

Select by Q + c sqrt(ln N_p / N_c) (Kocsis and Szepesvari 2006; spec B12, golden G04). The sources
differ in c and in small offsets: c = sqrt(2) is UCB1, 1 LATS and RAP, 2 rStar, 0.7 sqrt(2)
ReST-MCTS*; LLaMA-Berry and MCTSr take c = 1.4 over ln(N_p + 1) / (N_c + 1e-5).
All else is `tree_search.py`. An unvisited child (judged on visit) comes before all others, unless
`unvisited` gives it a finite score of V + unvisited (ReST-MCTS*: 1).
"""

import math
from typing import Any

from rlm_jax.core.types import Array
from rlm_jax.reasoning.operators.traversal import uct_score
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import Siblings
from rlm_jax.reasoning.tree_search import make_tree_search


def make_uct(
    *,
    exploration: float = math.sqrt(2.0),
    parent_offset: float = 0.0,
    visit_offset: float = 0.0,
    unvisited: float = math.inf,
    **tree: Any,
) -> Strategy:
    """The strategy with these settings (see `uct_score`); `tree` holds fields of `TreeConfig`.

    Raises:
      ValueError: a setting out of range.
    """
    settings = {
        "exploration": exploration,
        "parent_offset": parent_offset,
        "visit_offset": visit_offset,
    }
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")

    def score(s: Siblings) -> Array:
        return uct_score(s.q, s.visits, s.node_visits, unvisited=unvisited, **settings)

    return make_tree_search("uct", TreeConfig(**tree), score)
