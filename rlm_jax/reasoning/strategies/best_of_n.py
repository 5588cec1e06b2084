"""Best-of-N: N independent chains, then a vote.

The chains grow side by side, one step a round, as N lanes of one structure: a lane asks for one
child of its chain's tip, and all start at the root. A step that the task refuses, as it does not
follow, ends its chain; or the chain stays where it is and writes another, as a referee has a move
against the rules taken back without a word on the legal ones. Votes: majority is self-consistency
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
    """tips: the last node of each chain, [B, W]; -1 once the chain has ended.
    refused: steps of each chain that its task refused, [B, W].
    """

    tips: Int32[jax.Array, "B W"]
    refused: Int32[jax.Array, "B W"]


def init(structure: Structure, keys: Keys, *, num_chains: int) -> State:
    """All chains start at the root."""
    del keys
    none = jnp.zeros_like(structure.num_nodes)[:, None]
    none = jnp.broadcast_to(none, (none.shape[0], num_chains))
    return State(tips=none, refused=none)


def ask(state: State, structure: Structure, keys: Keys, *, num_lanes: int | None = None) -> Request:
    """One step for every chain that has not ended."""
    del structure, keys
    tips = state.tips[:, :num_lanes]
    operator = jnp.full_like(tips, Operator.GENERATE)
    # Equal steps of two chains stay two nodes: merging them would bias the vote.
    return Request(tips, operator, num_children=1, distinct=False)


def tell(
    state: State,
    structure: Structure,
    request: Request,
    outcome: Outcome,
    *,
    max_depth: int,
    max_refused: int,
) -> tuple[State, Structure]:
    """Appends the steps and moves each tip onto its own."""
    structure, slots = generate(structure, request, outcome, jnp.ones_like(outcome.logprob))
    child = slots[..., 0]
    at = jnp.minimum(child, structure.capacity - 1)
    depth = jnp.take_along_axis(structure.depth, at, 1)
    goes_on = outcome.valid[..., 0] & ~outcome.terminal[..., 0] & (depth < max_depth)
    moved = jnp.where(goes_on, child, NO_NODE)
    served = request.nodes.shape[1]
    before = jax.tree.map(lambda array: array[:, :served], state)
    refused = request.active & ~outcome.valid[..., 0] & (outcome.length[..., 0] > 0)
    times = before.refused + refused
    moved = jnp.where(refused & (times <= max_refused), request.nodes, moved)
    # A chain that was not served this round waits where it is.
    new = State(jnp.where(request.active, moved, before.tips), times)
    state = jax.tree.map(lambda old, now: jnp.concatenate([now, old[:, served:]], 1), state, new)
    # Chains that go on keep to the first lanes.
    order = jnp.argsort(state.tips < 0, axis=1, stable=True)
    return jax.tree.map(lambda array: jnp.take_along_axis(array, order, 1), state), structure


def make_best_of_n(
    num_chains: int, max_depth: int, rule: AnswerRule = "majority", max_refused: int = 0
) -> Strategy:
    """`num_chains` chains of at most `max_depth` steps, and the vote that picks one.

    Args:
      max_refused: how often a chain may write another step where its task refused one; 0: never.

    Raises:
      ValueError: a number below 1, `max_refused` below 0 or an unknown rule.
    """
    if num_chains < 1 or max_depth < 1:
        raise ValueError(f"num_chains and max_depth must be >= 1, got {num_chains}, {max_depth}")
    if max_refused < 0:
        raise ValueError(f"max_refused must be >= 0, got {max_refused}")
    if rule not in ANSWER_RULES:
        raise ValueError(f"answer rule {rule!r}: accepted are {ANSWER_RULES}")
    return Strategy(
        name="best_of_n",
        init=functools.partial(init, num_chains=num_chains),
        ask=ask,
        tell=functools.partial(tell, max_depth=max_depth, max_refused=max_refused),
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
