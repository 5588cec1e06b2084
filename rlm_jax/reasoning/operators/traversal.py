"""Traversal operators: which nodes to look at (Blueprint 4.3.2).

The scores by which a search descends, each a function of what is known of K siblings; what is to
be done with the Q of children that were never visited; `backtracks`, which names a search's returns
to earlier nodes; and `select_answer`, which picks the solution a structure answers with.
"""

import jax
import jax.numpy as jnp

from rlm_jax.core.masked import masked_argmax
from rlm_jax.core.types import Bool, Float32, Int32, UInt32
from rlm_jax.reasoning.protocol import Answer
from rlm_jax.reasoning.structure import NO_NODE, Structure, has_child

AnswerRule = str  # one of ANSWER_RULES
ANSWER_RULES = ("majority", "weighted", "best", "most_visited", "highest_value")
_WALKS = ("most_visited", "highest_value")
_TINY = 1e-8


def puct_score(
    value: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    prior: Float32[jax.Array, "*R K"],
    parent_visits: Float32[jax.Array, "*R"],
    *,
    exploration: float,
    base: float | None,
) -> Float32[jax.Array, "*R K"]:
    """Q + c(N_p) P sqrt(N_p) / (1 + N_c).

    Args:
      exploration: c. base: None gives the constant c (AlphaMath, golden G03); a number c_b makes
        it AlphaZero's c + log((N_p + c_b + 1) / c_b) (TS-LLM, golden G02).
    """
    factor = jnp.float32(exploration)
    if base is not None:
        factor = factor + jnp.log((parent_visits + base + 1.0) / base)
    bonus = factor * jnp.sqrt(parent_visits)
    return value + bonus[..., None] * prior / (1.0 + visits)


def uct_score(
    value: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    parent_visits: Float32[jax.Array, "*R"],
    *,
    exploration: float,
    parent_offset: float = 0.0,
    visit_offset: float = 0.0,
    unvisited: float = jnp.inf,
) -> Float32[jax.Array, "*R K"]:
    """Q + c sqrt(ln(N_p + o_p) / (N_c + o_c)) (golden G04).

    Args:
      exploration: c; sqrt(2) is UCB1, 1 LATS and RAP, 2 rStar, 0.7 sqrt(2) ReST-MCTS*.
      parent_offset, visit_offset: 1 and 1e-5 in LLaMA-Berry and MCTSr (c = 1.4).
      unvisited: what a child without a visit scores; finite to be compared, as V + unvisited, with
        its siblings (ReST-MCTS*: 1).
    """
    log = jnp.log(jnp.maximum(parent_visits + parent_offset, 1.0))[..., None]
    score = value + exploration * jnp.sqrt(log / jnp.maximum(visits + visit_offset, 1e-30))
    return jnp.where(visits > 0, score, value + unvisited)


def td_score(
    value: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    parent_visits: Float32[jax.Array, "*R"],
    *,
    c1: float,
    c2: float,
) -> Float32[jax.Array, "*R K"]:
    """x1's Q + sqrt(N_p - 1) / (1 + N_c) (c1 + log((N_p + c2) / c2)), without a prior (G01)."""
    factor = c1 + jnp.log((parent_visits + c2) / c2)
    bonus = factor * jnp.sqrt(jnp.maximum(parent_visits - 1.0, 0.0))
    return value + bonus[..., None] / (1.0 + visits)


def visit_deficit(
    weights: Float32[jax.Array, "*R K"], visits: Float32[jax.Array, "*R K"]
) -> Float32[jax.Array, "*R K"]:
    """weights - N / (1 + sum N): its argmax makes visits follow the weights, without chance.

    Gumbel MuZero's selection below the root (Danihelka et al. 2022, section 5).
    """
    return weights - visits / (1.0 + visits.sum(-1, keepdims=True))


def rescale_by_siblings(
    q: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    alive: Bool[jax.Array, "*R K"],
    node_value: Float32[jax.Array, "*R"],
) -> Float32[jax.Array, "*R K"]:
    """MuZero's Q in [0, 1], scaled over the visited siblings and the node; 0 where unvisited."""
    seen = alive & (visits > 0)
    known = jnp.where(seen, q, node_value[..., None])
    low = jnp.minimum(node_value, known.min(-1))[..., None]
    high = jnp.maximum(node_value, known.max(-1))[..., None]
    return (jnp.where(seen, q, low) - low) / jnp.maximum(high - low, _TINY)


def complete_q(
    q: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    prior: Float32[jax.Array, "*R K"],
    alive: Bool[jax.Array, "*R K"],
    node_model_value: Float32[jax.Array, "*R"],
) -> Float32[jax.Array, "*R K"]:
    """Q, and for unvisited children the mixed value (Danihelka et al. 2022, appendix D).

    The mixed value weighs the network's value of the node against the visited children's Q, these
    by prior: (v + sum N * sum pQ / sum p) / (1 + sum N).
    """
    seen = alive & (visits > 0)
    weight = jnp.where(seen, jnp.maximum(prior, jnp.finfo(jnp.float32).tiny), 0.0)
    mean = (weight * jnp.where(seen, q, 0.0)).sum(-1) / jnp.maximum(
        weight.sum(-1), jnp.finfo(jnp.float32).tiny
    )
    total = jnp.where(seen, visits, 0.0).sum(-1)
    mixed = (node_model_value + total * mean) / (1.0 + total)
    return jnp.where(seen, q, mixed[..., None])


def scale_completed_q(
    q: Float32[jax.Array, "*R K"],
    visits: Float32[jax.Array, "*R K"],
    alive: Bool[jax.Array, "*R K"],
    *,
    value_scale: float,
    visit_offset: float,
    rescale: bool = True,
) -> Float32[jax.Array, "*R K"]:
    """(visit_offset + max N) value_scale Q, with Q first rescaled to [0, 1] over the siblings."""
    if rescale:
        low = jnp.where(alive, q, jnp.inf).min(-1, keepdims=True)
        high = jnp.where(alive, q, -jnp.inf).max(-1, keepdims=True)
        q = (q - low) / jnp.maximum(high - low, _TINY)
    most = jnp.where(alive, visits, 0.0).max(-1, keepdims=True)
    return jnp.where(alive, (visit_offset + most) * value_scale * q, 0.0)


def visit_policy(
    visits: Float32[jax.Array, "*R K"], temperature: float
) -> Float32[jax.Array, "*R K"]:
    """N^(1/t) / sum N^(1/t) (AlphaZero, TS-LLM's MCTS-alpha; golden G54); all 0 without a visit.

    Args:
      temperature: t; 0 takes the most visited, shared by equals.

    Raises:
      ValueError: the temperature is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be >= 0, got {temperature}")
    # Relative to the most visited, so that a small temperature does not overflow.
    share = visits / jnp.maximum(visits.max(-1, keepdims=True), 1.0)
    weight = (share == 1.0).astype(visits.dtype) if temperature == 0 else share ** (1 / temperature)
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), _TINY)


def was_grown(structure: Structure) -> Bool[jax.Array, "B N"]:
    """Nodes that children were made of, living or dead."""
    rows = jnp.arange(structure.depth.shape[0])[:, None]
    at = jnp.where(structure.parent >= 0, structure.parent, structure.capacity)
    return jnp.zeros_like(structure.alive).at[rows, at].set(True, mode="drop")


def find_open(structure: Structure, max_depth: int) -> Bool[jax.Array, "B N"]:
    """Living nodes that a search may still grow: never grown, not terminal, above max_depth."""
    ended = structure.terminal | (structure.depth >= max_depth)
    return structure.alive & ~ended & ~was_grown(structure)


def stop_when_solved(
    structure: Structure, nodes: Int32[jax.Array, "B W"], num_solutions: int | None
) -> Int32[jax.Array, "B W"]:
    """The nodes, or -1 where so many solutions are finished already; None: however many are."""
    if num_solutions is None:
        return nodes
    finished = (structure.alive & structure.terminal).sum(-1, keepdims=True)
    return jnp.where(finished < num_solutions, nodes, NO_NODE)


def backtracks(
    parents: Int32[jax.Array, "B N"], before: Int32[jax.Array, "B"], nodes: Int32[jax.Array, "B"]
) -> Bool[jax.Array, "B"]:
    """Whether going on at `nodes` leaves the path of the node grown before: it is not below it."""
    rows = jnp.arange(nodes.shape[0])

    def climb(carry):
        at, below = carry
        below |= at == before
        return jnp.where(at >= 0, parents[rows, jnp.maximum(at, 0)], NO_NODE), below

    _, below = jax.lax.while_loop(
        lambda carry: (carry[0] >= 0).any(), climb, (nodes, nodes < NO_NODE)
    )
    return (nodes >= 0) & (before >= 0) & ~below


def select_answer(
    structure: Structure, answer_ids: Int32[jax.Array, "B N"], rule: AnswerRule
) -> Answer:
    """The solution to answer with, out of the finished ones; gold answers play no part.

    "majority" takes the answer most finished solutions give, "weighted" the one with the largest
    sum of values, "best" the finished solution of highest value (x1's paper). Ties go to the answer
    seen first, and the solution of highest value stands for its answer. "most_visited" and
    "highest_value" walk down from the root instead, to the child of most visits or highest value
    each time (spec B2, D6). Solutions that are proven right stand before all others, and before
    what a walk finds: the best of them answers then. Where nothing finished, the unfinished leaves
    compete; where no leaf states an answer, the leaf of highest value wins.

    Args:
      answer_ids: in [0, N), equal for nodes whose paths state the same answer; negative for none.
    """
    leaf = structure.alive & ~has_child(structure)
    stated = leaf & (answer_ids >= 0)
    finished = stated & structure.terminal
    tiers = [leaf & structure.proven, finished, stated, leaf & structure.terminal, leaf]
    pool = leaf
    for tier in reversed(tiers):
        pool = jnp.where(tier.any(-1, keepdims=True), tier, pool)
    votes = structure.value
    if rule not in ("best", *_WALKS):
        weight = jnp.where(pool, 1.0 if rule == "majority" else structure.value, 0.0)
        # Paths without an answer cannot vote together: each stands for itself.
        votes = jnp.where(answer_ids >= 0, count_votes(answer_ids, weight), structure.value)
    first, found = masked_argmax(votes, pool)
    walks = jnp.zeros_like(found)
    if rule in _WALKS:
        walks = ~tiers[0].any(-1)
        end = _walk(structure, structure.visits if rule == "most_visited" else structure.value)
        first = jnp.where(walks, end, first)
        found = jnp.where(walks, jnp.take_along_axis(leaf, end[:, None], 1)[:, 0], found)
    chosen = jnp.take_along_axis(answer_ids, first[:, None], 1)
    agree = pool & (answer_ids == chosen) & (chosen >= 0)
    itself = jnp.arange(leaf.shape[-1])[None] == first[:, None]
    agree = jnp.where(agree.any(-1, keepdims=True), agree, itself)
    node = jnp.where(walks, first, masked_argmax(structure.value, agree)[0])
    score = jnp.take_along_axis(votes, first[:, None], 1)[:, 0]
    share = agree.sum(-1) / jnp.maximum(pool.sum(-1), 1)
    return Answer(jnp.where(found, node, NO_NODE), score, share.astype(jnp.float32))


def count_votes(
    answer_ids: Int32[jax.Array, "B N"], weight: Float32[jax.Array, "B N"]
) -> Float32[jax.Array, "B N"]:
    """For each node, the summed weight of all nodes with its answer; 0 without an answer."""
    rows = jnp.arange(answer_ids.shape[0])[:, None]
    at = jnp.where(answer_ids >= 0, answer_ids, answer_ids.shape[1])
    sums = jnp.zeros_like(weight).at[rows, at].add(weight, mode="drop")
    return jnp.where(answer_ids >= 0, sums[rows, jnp.maximum(answer_ids, 0)], 0.0)


def share_votes(
    answer_keys: UInt32[jax.Array, "B N"], weight: Float32[jax.Array, "B N"]
) -> Float32[jax.Array, "B"]:
    """The largest share of the positive weight that goes to one answer key; 0 names no answer."""
    weight = jnp.maximum(weight, 0.0)
    keys, weight = jax.lax.sort((answer_keys, weight), num_keys=1)
    new = jnp.concatenate([keys[:, :1] == keys[:, :1], keys[:, 1:] != keys[:, :-1]], 1)
    group = jnp.cumsum(new, -1) - 1
    sums = count_votes(jnp.where(keys != 0, group, NO_NODE).astype(jnp.int32), weight)
    return sums.max(-1) / jnp.maximum(weight.sum(-1), 1e-30)


def _walk(structure: Structure, score: Float32[jax.Array, "B N"]) -> Int32[jax.Array, "B"]:
    """From the root to a leaf, each time to the living child of highest score, whichever of its
    parents the walk comes from."""
    inner = has_child(structure)
    index = jnp.arange(structure.capacity)[None]

    def step(node):
        of_node = (structure.parents == node[:, None, None]).any(-1)
        below = structure.alive & of_node & (index > 0)
        best, _ = masked_argmax(score, below)
        here = jnp.take_along_axis(inner, node[:, None], 1)[:, 0]
        return jnp.where(here, best, node)

    def goes_on(node):
        return jnp.take_along_axis(inner, node[:, None], 1).any()

    return jax.lax.while_loop(goes_on, step, structure.num_nodes * 0)
