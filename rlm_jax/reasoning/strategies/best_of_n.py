"""Best-of-N: N independent chains, then a vote.

The chains grow side by side, one step a round, as N lanes of one structure: a lane asks for one
child of its chain's tip, and all start at the root. Votes: majority is self-consistency
(arXiv 2203.11171), weighted sums the values behind an answer, best takes the solution of highest
value (spec C3.2). One chain of this strategy is the greedy chain of `greedy.py`.
"""

import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Int32
from rlm_jax.reasoning.operators.structure import generate
from rlm_jax.reasoning.operators.traversal import ANSWER_RULES, AnswerRule, select_answer
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure

_FEW = 4


@struct
class State:
    """tips: the last node of each chain, [B, W]; -1 once the chain has ended."""

    tips: Int32[jax.Array, "B W"]


def init(structure: Structure, keys: Keys, *, num_chains: int) -> State:
    """All chains start at the root."""
    del keys
    root = jnp.zeros_like(structure.num_nodes)[:, None]
    return State(jnp.broadcast_to(root, (root.shape[0], num_chains)))


def ask(state: State, structure: Structure, keys: Keys, *, num_lanes: int | None = None) -> Request:
    """One step for every chain that has not ended."""
    del structure, keys
    tips = state.tips[:, :num_lanes]
    operator = jnp.full_like(tips, Operator.GENERATE)
    # Equal steps of two chains stay two nodes: merging them would bias the vote.
    return Request(tips, operator, num_children=1, distinct=False)


def tell(
    state: State, structure: Structure, request: Request, outcome: Outcome, *, max_depth: int
) -> tuple[State, Structure]:
    """Appends the steps and moves each tip onto its own."""
    structure, slots = generate(structure, request, outcome, jnp.ones_like(outcome.logprob))
    child = slots[..., 0]
    at = jnp.minimum(child, structure.capacity - 1)
    depth = jnp.take_along_axis(structure.depth, at, 1)
    goes_on = outcome.valid[..., 0] & ~outcome.terminal[..., 0] & (depth < max_depth)
    moved = jnp.where(goes_on, child, NO_NODE)
    # A chain that was not served this round waits where it is.
    served = request.nodes.shape[1]
    tips = jnp.where(request.active, moved, state.tips[:, :served])
    tips = jnp.concatenate([tips, state.tips[:, served:]], 1)
    # Chains that go on keep to the first lanes.
    order = jnp.argsort(tips < 0, axis=1, stable=True)
    return State(jnp.take_along_axis(tips, order, 1)), structure


def make_best_of_n(num_chains: int, max_depth: int, rule: AnswerRule = "majority") -> Strategy:
    """`num_chains` chains of at most `max_depth` steps, and the vote that picks one.

    Raises:
      ValueError: a number below 1 or an unknown rule.
    """
    if num_chains < 1 or max_depth < 1:
        raise ValueError(f"num_chains and max_depth must be >= 1, got {num_chains}, {max_depth}")
    if rule not in ANSWER_RULES:
        raise ValueError(f"answer rule {rule!r}: accepted are {ANSWER_RULES}")
    return Strategy(
        name="best_of_n",
        init=functools.partial(init, num_chains=num_chains),
        ask=ask,
        tell=functools.partial(tell, max_depth=max_depth),
        answer=functools.partial(select_answer, rule=rule),
        num_lanes=num_chains,
        num_children=1,
        # Chains end at different lengths: the last few do not pay for all.
        widths=(num_chains, -(-num_chains // _FEW)) if num_chains >= 2 * _FEW else (),
        count_lanes=count_lanes if num_chains >= 2 * _FEW else None,
    )


def count_lanes(state: State, structure: Structure) -> Int32[jax.Array, "B"]:
    """Chains that have not ended."""
    del structure
    return (state.tips >= 0).sum(-1).astype(jnp.int32)
