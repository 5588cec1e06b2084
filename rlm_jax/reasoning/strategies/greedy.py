"""Greedy chain: one step after the other, each the expander's single proposal.

Chain of thought (arXiv 2201.11903; Blueprint Table 1, CoT: generate alone). With a greedy sampler
it is the deterministic baseline that every search is held against. It is best-of-1, so the
functions are those of `best_of_n.py`; there is one solution, hence nothing to vote on.
"""

from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.strategies.best_of_n import make_best_of_n


def make_greedy(max_depth: int, max_refused: int = 0) -> Strategy:
    """One chain of at most `max_depth` steps, and `max_refused` that its task refuses.

    Raises:
      ValueError: max_depth is below 1, max_refused below 0.
    """
    chain = make_best_of_n(1, max_depth, rule="best", max_refused=max_refused)
    return chain._replace(name="greedy")
