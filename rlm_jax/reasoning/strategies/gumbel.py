"""Gumbel: tree search with sequential halving at the root; the default search.

Danihelka et al. 2022 (Gumbel MuZero). The root's children with the highest g + logit + sigma(q) are
visited equally often, then the better half of them, and so on; below the root the choice is
deterministic and makes visits follow softmax(logit + sigma(q)), with the mixed value for children
never visited. Unlike PUCT it does not lose accuracy as the budget grows (ReSCALE on GSM8K).

The visits of one halving round fall on different children of the root, hence on disjoint subtrees:
they are one batched call of the networks. 32 simulations over 16 children take 4 calls, 800 over 32
take 155. With values that play no part in the choice (value_scale 0) visit counts are exactly those
of `mctx.gumbel_muzero_policy`; otherwise a round's leaves are chosen by the values before it.

Late rounds visit few children and leave lanes idle. `visits_per_round` fills them with several
visits of each child, told apart by virtual visits: 128 simulations over 16 children in 16 lanes
take 9 calls and not 31. The halving stays what it is; below the root such visits do not know each
other's values.

A search whose budget ends before its simulations do has compared children and gone nowhere with the
best of them. With `fit_budget` the halving is planned for the simulations that the budget pays for,
at the mean price of an expansion so far, over as few children as those allow for.

Deviations: an exhausted child of the root gives its turn to the next best; the root's children are
K * root_lanes sampled steps and their logits the log of the prior over them.
"""

import dataclasses
import functools
import itertools
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
from rlm_jax.reasoning.structure import NO_NODE, Structure, at_nodes, tokens_left
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import (
    ScoreFn,
    Siblings,
    State,
    descend,
    descend_in_passes,
    find_first,
    look_below,
)
from rlm_jax.reasoning.tree_search import init_state, make_request, update_tree

_GUMBEL = 2**31 - 3  # A number that no node has.
_MOST_HORIZONS = 32


@struct
class Extra:
    """gumbel: noise on the root's R children. served: simulations each was given."""

    gumbel: Float32[Array, "B R"]
    served: Int32[Array, "B R"]


def make_gumbel(
    *,
    num_simulations: int = 32,
    max_considered: int = 16,
    visits_per_round: int = 1,
    fit_budget: bool = False,
    gumbel_scale: float = 1.0,
    value_scale: float = 0.1,
    visit_offset: float = 50.0,
    rescale_q: bool = True,
    **tree: Any,
) -> Strategy:
    """The strategy with these settings; `tree` holds fields of `TreeConfig`.

    Args:
      max_considered: most children of the root that are compared, at least 1.
      visits_per_round: most visits of one child in one round, as far as num_lanes reach.
      fit_budget: plan for what the budget pays for, where that is less than num_simulations.
      gumbel_scale: 0 makes the search deterministic (for evaluation; Gumbel MuZero's g).
      value_scale, visit_offset, rescale_q: sigma, see `scale_completed_q`.

    Raises:
      ValueError: a setting out of range.
    """
    for name, value in (("max_considered", max_considered), ("visits_per_round", visits_per_round)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    for name, value in (("gumbel_scale", gumbel_scale), ("value_scale", value_scale)):
        if value < 0:
            raise ValueError(f"{name} must be >= 0, got {value}")
    cfg = TreeConfig(num_simulations=num_simulations, **tree)
    considered = min(max_considered, cfg.num_root_children)
    sizes = (considered, num_simulations, cfg.num_lanes, visits_per_round)
    rounds = plan_horizons(*sizes) if fit_budget else plan_rounds(*sizes)[None]
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
    empty = jnp.zeros_like(structure.num_nodes)[:, None]
    served = jnp.broadcast_to(empty, (*structure.num_nodes.shape, *shape))
    return dataclasses.replace(state, extra=Extra(noise + 0.0 * served, served))


def ask(
    state: State,
    structure: Structure,
    keys: Keys,
    *,
    cfg: TreeConfig,
    rounds: Int32[np.ndarray, "T 3 M S"],
    scale,
    score_fn: ScoreFn,
    num_lanes: int | None = None,
) -> Request:
    """One halving round: leaves below each of the best children of the root."""
    num_lanes = cfg.num_lanes if num_lanes is None else num_lanes
    root = structure.num_nodes[:, None] * 0
    if num_lanes < _narrowest(rounds, cfg):
        # Rounds of so few lanes are the root's own.
        nobody = jnp.broadcast_to(root + NO_NODE, (root.shape[0], num_lanes))
        return make_request(state, structure, nobody, cfg=cfg)
    kids, siblings = look_below(state, structure, root, cfg, find_first(state, root))
    siblings = jax.tree.map(lambda array: array[:, 0], siblings)
    extra = state.extra
    width, visits, passes = _this_round(rounds, structure, siblings.alive, state.simulations)
    score = extra.gumbel + _logits(siblings) + scale(siblings)
    turn = siblings.available & (extra.served == visits[:, None])
    turn = jnp.where(turn.any(-1, keepdims=True), turn, siblings.available)
    lanes = min(num_lanes, score.shape[-1])
    chosen = _take_best(kids[:, 0], jnp.where(turn, score, -jnp.inf), lanes)
    serve = jnp.arange(lanes)[None] < jnp.minimum(width, turn.sum(-1))[:, None]
    serve &= state.first_child[:, :1] >= 0
    chosen = jnp.where(serve, chosen, NO_NODE)
    settings = {"cfg": cfg, "score_fn": score_fn}
    if rounds[:, 2].max() == 1:
        nodes = descend(state, structure, chosen, keys, **settings)
        nodes = jnp.pad(nodes, ((0, 0), (0, num_lanes - lanes)), constant_values=NO_NODE)
    else:
        # As many visits of each as all of them have leaves for, if all have their turn.
        leaves = jnp.where(serve, at_nodes(state.open_leaves, chosen), num_lanes)
        passes = jnp.where(serve.sum(-1) < width, 1, jnp.minimum(passes, leaves.min(-1)))
        shapes = [shape for shape in _list_shapes(rounds) if shape[0] * shape[1] <= num_lanes]
        nodes = _descend_in_shapes(
            state, structure, chosen, keys, width, passes, shapes, num_lanes, **settings
        )
    return make_request(state, structure, nodes, cfg=cfg)


def tell(
    state: State, structure: Structure, request: Request, outcome: Outcome, *, cfg: TreeConfig
) -> tuple[State, Structure]:
    """Appends the children, backs values up and notes whose turn it was."""
    state, structure, top = update_tree(state, structure, request, outcome, cfg=cfg)
    extra = state.extra
    child = state.first_child[:, :1, None] + jnp.arange(extra.served.shape[1])
    below = (top[..., None] == child) & (request.nodes > 0)[..., None]
    served = extra.served + below.sum(1)
    sampled = (request.nodes == 0).any(-1)
    # Children sampled anew have had no turn.
    served = jnp.where(sampled[:, None], 0, served)
    return dataclasses.replace(state, extra=Extra(extra.gumbel, served)), structure


def scale_q(siblings: Siblings, **settings: Any) -> Float32[Array, "*R K"]:
    """sigma(completed Q) of the children."""
    s = siblings
    # A virtual visit brought no value yet.
    visits = s.visits - s.virtual
    q = complete_q(s.q, visits, s.prior, s.alive, s.node_model_value)
    return scale_completed_q(q, visits, s.alive, **settings)


def improve_prior(siblings: Siblings, scaled_q: Float32[Array, "*R K"]) -> Float32[Array, "*R K"]:
    """softmax(logit + sigma(completed Q)): the improved policy over the children."""
    return jax.nn.softmax(_logits(siblings) + scaled_q, where=siblings.alive, axis=-1)


def plan_rounds(
    max_considered: int, num_simulations: int, num_lanes: int, visits_per_round: int = 1
) -> Int32[np.ndarray, "3 M S"]:
    """The schedule of sequential halving, cut into rounds.

    Returns:
      For each number of considered children (0 to max_considered) and of simulations done (0 to
      num_simulations), what the coming round does: how many children it visits, at most num_lanes
      (0: it is over), the visits they must have had, and how many it gives each of them.
    """
    table = np.zeros((3, max_considered + 1, num_simulations + 1), np.int32)
    for considered in range(1, max_considered + 1):
        done = visits = 0
        for width, alike in itertools.groupby(_plan_levels(considered, num_simulations)):
            most = min(visits_per_round, max(num_lanes // width, 1))
            for levels in range(len(list(alike)), 0, -1):
                level = table[:, considered, done : done + width]
                level[0] = np.minimum(np.arange(width, 0, -1), num_lanes)
                # Within a level every round gives one visit, and so does the first: to a leaf.
                level[1:] = [[visits], [1]]
                if visits > 0:
                    level[2, 0] = min(most, levels)
                done, visits = done + width, visits + 1
    return table


def plan_horizons(
    max_considered: int, num_simulations: int, num_lanes: int, visits_per_round: int = 1
) -> Int32[np.ndarray, "T 3 M S"]:
    """`plan_rounds` for each of `list_horizons`; the last one is that of all simulations.

    Fewer simulations compare fewer children: as many as all halvings can visit once.
    """
    tables = []
    for horizon in list_horizons(num_simulations):
        most = max_considered
        while horizon < num_simulations and most > 1 and most * _count_phases(most) > horizon:
            most = 2 ** (_count_phases(most) - 1)
        table = np.zeros((3, max_considered + 1, num_simulations + 1), np.int32)
        rows = np.minimum(np.arange(max_considered + 1), most)
        own = plan_rounds(most, horizon, num_lanes, visits_per_round)
        table[:, :, : horizon + 1] = own[:, rows]
        tables.append(table)
    return np.stack(tables)


def list_horizons(num_simulations: int) -> list[int]:
    """Numbers of simulations to have a plan for, at most 32 of them, rising to all."""
    count = min(num_simulations, _MOST_HORIZONS)
    return [-(-num_simulations * (1 + index) // count) for index in range(count)]


def plan_widths(rounds: Int32[np.ndarray, "T 3 M S"], cfg: TreeConfig) -> tuple[int, ...]:
    """Lanes worth a loop of their own: those of the full schedule, and the root's."""
    planned = {width * passes for width, passes in _list_shapes(rounds)}
    return tuple(sorted(planned | {cfg.root_lanes, cfg.num_lanes}, reverse=True))


def _plan_levels(considered: int, num_simulations: int) -> list[int]:
    """Children visited once more, level by level, with `considered` children at first."""
    if considered == 1:
        return [1] * num_simulations
    phases = _count_phases(considered)
    levels, left, width = [], num_simulations, considered
    while left > 0:
        for _ in range(max(1, num_simulations // (phases * width))):
            levels.append(min(width, left))
            left -= levels[-1]
            if left == 0:
                break
        width = max(2, width // 2)
    return levels


def _count_phases(considered: int) -> int:
    return math.ceil(math.log2(considered))


def _list_shapes(rounds: Int32[np.ndarray, "T 3 M S"]) -> list[tuple[int, int]]:
    """(children, visits of each) of the rounds where as many as can be are considered."""
    width, _, passes = rounds[-1, :, -1]
    found, done = set(), 0
    while width[done] > 0:
        shape = int(width[done]), int(passes[done])
        found.add(shape)
        done += shape[0] * shape[1]
    return sorted(found, reverse=True)


def _narrowest(rounds: Int32[np.ndarray, "T 3 M S"], cfg: TreeConfig) -> int:
    """The fewest lanes that a round of the full schedule has, if they are more than the root's.

    Rounds of fewer, where fewer children are left to consider, are asked for with so many.
    """
    fewest = min(width * passes for width, passes in _list_shapes(rounds))
    return fewest if fewest > cfg.root_lanes else 0


def count_lanes(
    state: State, structure: Structure, *, cfg: TreeConfig, rounds: Int32[np.ndarray, "T 3 M S"]
) -> Int32[Array, "B"]:
    """Lanes of the coming round; 0 where all simulations are done."""
    root = structure.num_nodes[:, None] * 0
    _, siblings = look_below(state, structure, root, cfg, find_first(state, root))
    width, _, passes = _this_round(rounds, structure, siblings.alive[:, 0], state.simulations)
    fresh = (state.first_child[:, 0] < 0) | (state.open_leaves[:, 0] <= 0)
    lanes = jnp.where(fresh, cfg.root_lanes, jnp.maximum(width * passes, _narrowest(rounds, cfg)))
    return jnp.where(state.simulations < rounds.shape[3] - 1, lanes, 0)


def _this_round(rounds, structure, alive, simulations):
    considered = jnp.minimum(alive.sum(-1), rounds.shape[2] - 1)
    at = jnp.minimum(simulations, rounds.shape[3] - 1)
    if rounds.shape[0] == 1:
        return tuple(jnp.asarray(rounds[0])[:, considered, at])
    horizons = list_horizons(rounds.shape[3] - 1)
    paid = _count_paid(structure, simulations, horizons[-1])
    plan = (jnp.asarray(horizons) < paid[:, None]).sum(-1)
    return tuple(jnp.moveaxis(jnp.asarray(rounds)[plan, :, considered, at], -1, 0))


def _count_paid(structure, simulations, most):
    """Simulations done and those that the rest of the budget pays for, one at least."""
    spent = structure.budget
    price = spent.generated_tokens / jnp.maximum(spent.expansions, 1)
    left = tokens_left(structure) / jnp.maximum(price, 1.0)
    left = jnp.minimum(left, structure.expansion_limit - spent.expansions)
    left = jnp.clip(left, 1, most).astype(jnp.int32)
    return jnp.minimum(simulations + left, most)


def _descend_in_shapes(
    state: State,
    structure: Structure,
    chosen: Int32[Array, "B L"],
    keys: Keys,
    width: Int32[Array, "B"],
    passes: Int32[Array, "B"],
    shapes: list[tuple[int, int]],
    num_lanes: int,
    **settings: Any,
) -> Int32[Array, "B W"]:
    """The leaves of `passes` visits of each of `width` chosen nodes, pass after pass.

    Descents cost what their lanes are, so there is a program for each shape (nodes, passes) that
    rounds have, and one for batches whose structures are at different points of the schedule.
    """
    shapes = [*shapes, (chosen.shape[1], num_lanes)]

    def descend_in(shape):
        lanes, most = shape
        leaves = descend_in_passes(
            state, structure, chosen[:, :lanes], keys, passes, num_passes=most, **settings
        )
        index = jnp.arange(num_lanes)
        each = jnp.maximum(width, 1)[:, None]
        at = jnp.minimum(index // each * lanes + index % each, lanes * most - 1)
        nodes = jnp.take_along_axis(leaves.reshape(leaves.shape[0], -1), at, 1)
        return jnp.where(index < (width * passes)[:, None], nodes, NO_NODE)

    widest, longest = width.max(), passes.max()
    fits = jnp.stack([(widest <= lanes) & (longest <= most) for lanes, most in shapes])
    branches = [functools.partial(descend_in, shape) for shape in shapes]
    return jax.lax.switch(jnp.argmax(fits), branches)


def _take_best(
    nodes: Int32[Array, "B R"], score: Float32[Array, "B R"], count: int
) -> Int32[Array, "B count"]:
    """The nodes of the highest scores, best first; of equal scores the first node.

    By counting who is better than whom: R is small, and a sort costs more than the whole round.
    """
    if count == 1:
        return jnp.take_along_axis(nodes, jnp.argmax(score, -1, keepdims=True), 1)
    before = jnp.tril(jnp.ones((score.shape[1],) * 2, bool), -1)
    better = score[:, None, :] > score[:, :, None]
    better |= (score[:, None, :] == score[:, :, None]) & before
    place = better.sum(-1)
    taken = place[:, None, :] == jnp.arange(count)[None, :, None]
    return jnp.where(taken, nodes[:, None, :], 0).sum(-1).astype(jnp.int32)


def _logits(siblings):
    return jnp.log(jnp.maximum(siblings.prior, jnp.finfo(jnp.float32).tiny))
