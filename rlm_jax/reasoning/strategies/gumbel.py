"""Gumbel: tree search with sequential halving at the root; the default search.

Danihelka et al. 2022 (Gumbel MuZero). The root's children with the highest g + logit + sigma(q) are
visited equally often, then the better half of them, and so on; below the root the choice is
deterministic and makes visits follow softmax(logit + sigma(q)), with the mixed value for children
never visited. Unlike PUCT it does not lose accuracy as the budget grows (ReSCALE on GSM8K).

The visits of one halving round fall on different children of the root, hence on disjoint subtrees:
they are one batched call of the networks. 32 simulations over 16 children take 4 calls, 800 over 32
take 155. With values that play no part in the choice (value_scale 0) visit counts are exactly those
of `mctx.gumbel_muzero_policy`; otherwise a round's leaves are chosen by the values before it.

Deviations: an exhausted child of the root gives its turn to the next best; the root's children are
K * root_lanes sampled steps and their logits the log of the prior over them.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Float32, Int32
from rlm_jax.reasoning.operators.traversal import (
    complete_q,
    scale_completed_q,
    select_answer,
    visit_deficit,
)
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy
from rlm_jax.reasoning.structure import NO_NODE, Structure
from rlm_jax.reasoning.tree_search import (
    Siblings,
    State,
    TreeConfig,
    descend,
    find_first,
    init_state,
    look_below,
    make_request,
    update_tree,
)

_GUMBEL = 2**31 - 3  # A number that no node has.


@struct
class Extra:
    """gumbel: noise on the root's R children. served: simulations each was given. round: done."""

    gumbel: Float32[Array, "B R"]
    served: Int32[Array, "B R"]
    round: Int32[Array, "B"]


def make_gumbel(
    *,
    num_simulations: int = 32,
    max_considered: int = 16,
    gumbel_scale: float = 1.0,
    value_scale: float = 0.1,
    visit_offset: float = 50.0,
    rescale_q: bool = True,
    **tree: Any,
) -> Strategy:
    """The strategy with these settings; `tree` holds fields of `TreeConfig`.

    Args:
      max_considered: most children of the root that are compared, at least 1.
      gumbel_scale: 0 makes the search deterministic (for evaluation; Gumbel MuZero's g).
      value_scale, visit_offset, rescale_q: sigma, see `scale_completed_q`.

    Raises:
      ValueError: a setting out of range.
    """
    if max_considered < 1:
        raise ValueError(f"max_considered must be >= 1, got {max_considered}")
    for name, value in (("gumbel_scale", gumbel_scale), ("value_scale", value_scale)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    cfg = TreeConfig(num_simulations=num_simulations, **tree)
    considered = min(max_considered, cfg.num_root_children)
    rounds = plan_rounds(considered, num_simulations, cfg.num_lanes)
    scale = functools.partial(
        scale_q, value_scale=value_scale, visit_offset=visit_offset, rescale=rescale_q
    )

    def score(s: Siblings) -> Array:
        return visit_deficit(improve_prior(s, scale(s)), jnp.where(s.alive, s.visits, 0.0))

    settings: dict[str, Any] = {"cfg": cfg, "rounds": rounds, "scale": scale}
    return Strategy(
        name="gumbel",
        init=functools.partial(init, cfg=cfg, gumbel_scale=gumbel_scale),
        ask=functools.partial(ask, score_fn=score, **settings),
        tell=functools.partial(tell, cfg=cfg),
        answer=functools.partial(select_answer, rule=cfg.answer_rule),
        num_lanes=cfg.num_lanes,
        num_children=cfg.num_children,
        widths=plan_widths(rounds, cfg),
        count_lanes=functools.partial(count_lanes, cfg=cfg, rounds=rounds),
    )


def init(structure: Structure, keys: Keys, *, cfg: TreeConfig, gumbel_scale: float) -> State:
    """A tree whose only leaf is the root, or what was grown of it."""
    state = init_state(structure, keys, cfg=cfg)
    shape = (cfg.num_root_children,)
    draw = jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, _GUMBEL), shape))
    noise = gumbel_scale * draw(keys) if gumbel_scale else jnp.zeros(shape)
    empty = jnp.zeros_like(structure.num_nodes)
    served = jnp.broadcast_to(empty[:, None], (*empty.shape, *shape))
    return dataclasses.replace(state, extra=Extra(noise + 0.0 * served, served, empty))


def ask(
    state: State,
    structure: Structure,
    keys: Keys,
    *,
    cfg: TreeConfig,
    rounds: Int32[np.ndarray, "2 M R"],
    scale,
    score_fn,
    num_lanes: int | None = None,
) -> Request:
    """One halving round: a leaf below each of the best children of the root."""
    root = structure.num_nodes[:, None] * 0
    kids, siblings = look_below(state, structure, root, cfg, find_first(state, root))
    siblings = jax.tree.map(lambda array: array[:, 0], siblings)
    extra = state.extra
    width, visits = _this_round(rounds, siblings.alive, extra.round)
    score = extra.gumbel + _logits(siblings) + scale(siblings)
    turn = siblings.available & (extra.served == visits[:, None])
    turn = jnp.where(turn.any(-1, keepdims=True), turn, siblings.available)
    num_lanes = cfg.num_lanes if num_lanes is None else num_lanes
    lanes = min(num_lanes, score.shape[-1])
    chosen = _take_best(kids[:, 0], jnp.where(turn, score, -jnp.inf), lanes)
    serve = jnp.arange(lanes)[None] < jnp.minimum(width, turn.sum(-1))[:, None]
    serve &= state.first_child[:, :1] >= 0
    nodes = descend(
        state, structure, jnp.where(serve, chosen, NO_NODE), keys, cfg=cfg, score_fn=score_fn
    )
    nodes = jnp.pad(nodes, ((0, 0), (0, num_lanes - lanes)), constant_values=NO_NODE)
    return make_request(state, structure, nodes, cfg=cfg)


def tell(
    state: State, structure: Structure, request: Request, outcome: Outcome, *, cfg: TreeConfig
) -> tuple[State, Structure]:
    """Appends the children, backs values up and notes whose turn it was."""
    state, structure, top = update_tree(state, structure, request, outcome, cfg=cfg)
    rows = jnp.arange(request.nodes.shape[0])[:, None]
    extra = state.extra
    simulated = request.nodes > 0
    at = jnp.where(simulated, top - state.first_child[:, :1], extra.served.shape[1])
    served = extra.served.at[rows, at].add(1, mode="drop")
    sampled = (request.nodes == 0).any(-1)
    # Children sampled anew have had no turn.
    served = jnp.where(sampled[:, None], 0, served)
    extra = Extra(extra.gumbel, served, extra.round + simulated.any(-1))
    return dataclasses.replace(state, extra=extra), structure


def scale_q(siblings: Siblings, **settings: Any) -> Float32[Array, "*R K"]:
    """sigma(completed Q) of the children."""
    s = siblings
    q = complete_q(s.q, s.visits, s.prior, s.alive, s.node_model_value)
    return scale_completed_q(q, s.visits, s.alive, **settings)


def improve_prior(siblings: Siblings, scaled_q: Float32[Array, "*R K"]) -> Float32[Array, "*R K"]:
    """softmax(logit + sigma(completed Q)): the improved policy over the children."""
    return jax.nn.softmax(_logits(siblings) + scaled_q, where=siblings.alive, axis=-1)


def plan_rounds(
    max_considered: int, num_simulations: int, num_lanes: int
) -> Int32[np.ndarray, "2 M R"]:
    """The schedule of sequential halving, as rounds.

    Returns:
      For each number of considered children (0 to max_considered) and each round, how many of them
      to visit, at most num_lanes (0: it is over), and the visits they must have had.
    """
    plans = [
        _plan(considered, num_simulations, num_lanes) for considered in range(max_considered + 1)
    ]
    longest = max(len(plan) for plan in plans) + 1
    table = np.zeros((2, max_considered + 1, longest), np.int32)
    for considered, plan in enumerate(plans):
        table[:, considered, : len(plan)] = np.asarray(plan, np.int32).reshape(-1, 2).T
    return table


def plan_widths(rounds: Int32[np.ndarray, "2 M R"], cfg: TreeConfig) -> tuple[int, ...]:
    """Widths worth a loop of their own: those of the full schedule, and the root's."""
    planned = {int(width) for width in rounds[0, -1] if width > 0} | {cfg.root_lanes}
    return tuple(sorted(planned | {cfg.num_lanes}, reverse=True))


def _plan(considered: int, num_simulations: int, num_lanes: int) -> list[tuple[int, int]]:
    """(children, visits before) for each round, with `considered` children at first."""
    if considered == 0:
        return []
    if considered == 1:
        return [(1, visits) for visits in range(num_simulations)]
    phases = math.ceil(math.log2(considered))
    plan, left, visits, width = [], num_simulations, 0, considered
    while left > 0:
        for _ in range(max(1, num_simulations // (phases * width))):
            wanted = min(width, left)
            left -= wanted
            while wanted > 0:
                plan.append((min(wanted, num_lanes), visits))
                wanted -= num_lanes
            visits += 1
        width = max(2, width // 2)
    return plan


def count_lanes(
    state: State, structure: Structure, *, cfg: TreeConfig, rounds: Int32[np.ndarray, "2 M R"]
) -> Int32[Array, "B"]:
    """Lanes of the coming round."""
    root = structure.num_nodes[:, None] * 0
    _, siblings = look_below(state, structure, root, cfg, find_first(state, root))
    width, _ = _this_round(rounds, siblings.alive[:, 0], state.extra.round)
    fresh = (state.first_child[:, 0] < 0) | (state.open_leaves[:, 0] <= 0)
    return jnp.where(fresh, cfg.root_lanes, width)


def _this_round(rounds, alive, round_index):
    considered = jnp.minimum(alive.sum(-1), rounds.shape[1] - 1)
    at = jnp.minimum(round_index, rounds.shape[2] - 1)
    table = jnp.asarray(rounds)
    return table[0, considered, at], table[1, considered, at]


def _take_best(
    nodes: Int32[Array, "B R"], score: Float32[Array, "B R"], count: int
) -> Int32[Array, "B count"]:
    """The nodes of the highest scores, best first; of equal scores the first node.

    By counting who is better than whom: R is small, and a sort costs more than the whole round.
    """
    before = jnp.tril(jnp.ones((score.shape[1],) * 2, bool), -1)
    better = score[:, None, :] > score[:, :, None]
    better |= (score[:, None, :] == score[:, :, None]) & before
    place = better.sum(-1)
    taken = place[:, None, :] == jnp.arange(count)[None, :, None]
    return jnp.where(taken, nodes[:, None, :], 0).sum(-1).astype(jnp.int32)


def _logits(siblings):
    return jnp.log(jnp.maximum(siblings.prior, jnp.finfo(jnp.float32).tiny))
