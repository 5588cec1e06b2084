"""PUCT: Monte Carlo tree search guided by the policy's prior over sampled steps.

Select by Q + c P sqrt(N_p)/(1 + N_c), expand the leaf with K sampled steps, evaluate all K at
once, back their mean up (AlphaMath, arXiv 2405.03553, constant c; TS-LLM, arXiv 2309.17179, the
AlphaZero form; spec B12.1, B12.7). Decisions where the sources differ or are silent:

- Children are evaluated when they are made, and each counts as one simulation for all its
  ancestors: the K values are there anyway, and visits stay sums of the children's.
- A finished solution is excluded from selection, as is a node at the depth limit and every node
  below which nothing is left to grow; the search goes on elsewhere until the budget ends, and
  never below a terminal node (x1's code ends the whole search there: spec B2, D7).
- W leaves a round: each selected leaf counts as a virtual visit for itself and its ancestors, and
  is closed to the other lanes of its round.
- Ties go to the lowest index, that is to the step sampled first.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import masked_argmax
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Bool, Float32, Int32
from rlm_jax.reasoning.operators.evaluate import step_prior
from rlm_jax.reasoning.operators.structure import generate
from rlm_jax.reasoning.operators.traversal import (
    ANSWER_RULES,
    AnswerRule,
    puct_score,
    select_answer,
)
from rlm_jax.reasoning.operators.update import backpropagate
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the search.

    num_children: K steps sampled per leaf. num_lanes: W leaves per structure and round.
    max_depth: steps from the root to the deepest node. exploration: c. base: None for a constant
    c, AlphaZero's c_b (19652) otherwise. length_power, normalise_prior: see `step_prior`.
    answer_rule: how the finished solutions vote.
    """

    num_children: int = 4
    num_lanes: int = 1
    max_depth: int = 16
    exploration: float = 1.25
    base: float | None = None
    length_power: float = 1.0
    normalise_prior: bool = True
    answer_rule: AnswerRule = "weighted"

    def __post_init__(self):
        for name in ("num_children", "num_lanes", "max_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"puct: {name} must be >= 1, got {getattr(self, name)}")
        if self.exploration < 0:
            raise ValueError(f"puct: exploration must be >= 0, got {self.exploration}")
        if self.answer_rule not in ANSWER_RULES:
            raise ValueError(f"answer rule {self.answer_rule!r}: accepted are {ANSWER_RULES}")


@struct
class State:
    """first_child: index of a node's first child (its K children are consecutive), -1 for a leaf.

    closed: nothing is left to grow at or below the node.
    """

    first_child: Int32[jax.Array, "B N"]
    closed: Bool[jax.Array, "B N"]


def init(structure: Structure) -> State:
    """A tree whose only leaf is the root."""
    return State(jnp.full_like(structure.depth, NO_NODE), jnp.zeros_like(structure.alive))


def ask(state: State, structure: Structure, keys: Keys, *, cfg: Config) -> Request:
    """Selects W leaves per structure, best first; -1 where fewer are open."""
    del keys
    nodes = jax.vmap(functools.partial(_select_leaves, cfg=cfg))(
        state.first_child,
        state.closed,
        structure.parents[..., 0],
        structure.value,
        structure.visits,
        structure.prior,
        structure.alive,
    )
    return Request(nodes, jnp.full_like(nodes, Operator.GENERATE), cfg.num_children)


def tell(
    state: State, structure: Structure, request: Request, outcome: Outcome, *, cfg: Config
) -> tuple[State, Structure]:
    """Appends the children, closes what cannot grow, and backs the new values up."""
    counted = request.active[..., None] & outcome.valid & ~outcome.duplicate
    prior = step_prior(
        outcome.logprob,
        outcome.length,
        counted,
        length_power=cfg.length_power,
        normalise=cfg.normalise_prior,
    )
    structure, slots = generate(structure, request, outcome, prior)
    rows = jnp.arange(slots.shape[0])[:, None]
    at = jnp.where(request.active, request.nodes, structure.capacity)
    first_child = state.first_child.at[rows, at].set(slots[..., 0], mode="drop")
    deepest = structure.depth >= cfg.max_depth
    used = jnp.arange(structure.capacity)[None] < structure.num_nodes[:, None]
    closed = state.closed | (used & (structure.terminal | ~structure.alive | deepest))
    close = functools.partial(_close_upwards, num_children=cfg.num_children)
    for lane in range(request.nodes.shape[1]):
        closed = jax.vmap(close)(
            closed, first_child, structure.parents[..., 0], request.nodes[:, lane]
        )
    total = jnp.where(counted, outcome.value, 0.0).sum(-1)
    count = counted.sum(-1).astype(jnp.float32)
    structure = backpropagate(structure, request.nodes, total, count)
    return State(first_child, closed), structure


def make_puct(cfg: Config) -> Strategy:
    """The strategy with these settings."""
    return Strategy(
        name="puct",
        init=init,
        ask=functools.partial(ask, cfg=cfg),
        tell=functools.partial(tell, cfg=cfg),
        answer=functools.partial(select_answer, rule=cfg.answer_rule),
        num_lanes=cfg.num_lanes,
        num_children=cfg.num_children,
    )


def _select_leaves(
    first_child: Int32[jax.Array, "N"],
    closed: Bool[jax.Array, "N"],
    parents: Int32[jax.Array, "N"],
    value: Float32[jax.Array, "N"],
    visits: Float32[jax.Array, "N"],
    prior: Float32[jax.Array, "N"],
    alive: Bool[jax.Array, "N"],
    *,
    cfg: Config,
) -> Int32[jax.Array, "W"]:
    """W leaves of one tree, one after the other under virtual visits."""

    def descend(closed, visits):
        def step(node):
            kids = first_child[node] + jnp.arange(cfg.num_children)
            scores = puct_score(
                value[kids],
                visits[kids],
                prior[kids],
                visits[node],
                exploration=cfg.exploration,
                base=cfg.base,
            )
            best, _ = masked_argmax(scores, ~closed[kids] & alive[kids])
            return kids[best]

        root = jnp.zeros_like(first_child[0])
        return jax.lax.while_loop(lambda node: first_child[node] >= 0, step, root)

    def lane(carry, _):
        closed, visits = carry
        leaf = descend(closed, visits)
        taken = jnp.where(closed[leaf], NO_NODE, leaf)
        closed = closed.at[leaf].set(True)
        above = jnp.where(taken >= 0, parents[leaf], NO_NODE)
        closed = _close_upwards(closed, first_child, parents, above, num_children=cfg.num_children)
        return (closed, _visit_upwards(visits, parents, taken)), taken

    _, nodes = jax.lax.scan(lane, (closed, visits), length=cfg.num_lanes)
    return nodes


def _close_upwards(closed, first_child, parents, node, *, num_children: int):
    """Closes `node` and its ancestors as far up as all the children of each are closed."""

    def climb(carry):
        node, closed = carry
        kids = first_child[node] + jnp.arange(num_children)
        done = (first_child[node] >= 0) & closed[kids].all()
        closed = closed.at[node].set(closed[node] | done)
        return jnp.where(done, parents[node], NO_NODE), closed

    return jax.lax.while_loop(lambda carry: carry[0] >= 0, climb, (node, closed))[1]


def _visit_upwards(visits, parents, node):
    """One virtual visit for `node` and each of its ancestors."""

    def climb(carry):
        node, visits = carry
        return parents[node], visits.at[node].add(1.0)

    return jax.lax.while_loop(lambda carry: carry[0] >= 0, climb, (node, visits))[1]
