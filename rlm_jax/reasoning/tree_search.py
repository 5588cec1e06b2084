"""Monte Carlo tree search, generic: what uct, puct, gumbel and td_mcts share (spec G-1).

A strategy is this search with a score of its own: select W leaves by the score, grow each by K
sampled steps, evaluate, back the values up. Decisions where the sources differ or are silent are
settings of `TreeConfig`; these hold for all:

- A node's K children are consecutive slots, and `open_leaves` counts what is left to grow at or
  below each node.
- W leaves a round: each lane passes as a virtual visit over its path and takes one open leaf away
  from it, for the lanes after it (`tree_descent.py`). Nothing of that is stored.
- Nothing ever grows below a terminal node or beyond max_depth.
- A node whose steps were all written and refused is a dead end: worth what they are, not what the
  evaluator thought of it.
- When nothing is left to grow and the budget pays, the root is sampled anew (`resample`): the old
  children, exhausted, keep their votes and statistics and leave the selection.

Judged at "expansion", the K children are evaluated when they are made, each counting as one visit
for all its ancestors (AlphaMath, TS-LLM, x1). Judged on "visit", a node is evaluated when it is
selected, as in MuZero: that is mctx's search, one simulation a leaf.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.order import zero_behind
from rlm_jax.core.types import Array, Float32, Int32
from rlm_jax.reasoning.operators.evaluate import mix_noise, sibling_prior, step_prior
from rlm_jax.reasoning.operators.structure import generate, merge_children, put_children
from rlm_jax.reasoning.operators.traversal import select_answer
from rlm_jax.reasoning.operators.update import Backup, add_to_paths, backpropagate
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, at_nodes, peek_at, put_at
from rlm_jax.reasoning.tree_config import TreeConfig
from rlm_jax.reasoning.tree_descent import ScoreFn, State, descend, descend_in_passes


def make_tree_search(name: str, cfg: TreeConfig, score_fn: ScoreFn) -> Strategy:
    """The strategy that descends by `score_fn`, W leaves a round under virtual visits."""

    def ask(state: State, structure: Structure, keys: Keys) -> Request:
        nodes = select_leaves(state, structure, keys, cfg=cfg, score_fn=score_fn)
        return make_request(state, structure, nodes, cfg=cfg)

    def tell(state: State, structure: Structure, request: Request, outcome: Outcome):
        return update_tree(state, structure, request, outcome, cfg=cfg)[:2]

    return Strategy(
        name=name,
        init=functools.partial(init_state, cfg=cfg),
        ask=ask,
        tell=tell,
        answer=functools.partial(select_answer, rule=cfg.answer_rule),
        num_lanes=cfg.num_lanes,
        num_children=cfg.num_children,
        # Rounds of roots alone spare the other lanes: compiled where those are most of a round.
        widths=(cfg.num_lanes, cfg.root_lanes) if cfg.num_lanes >= 4 * cfg.root_lanes else (),
    )


def init_state(structure: Structure, keys: Keys, *, cfg: TreeConfig) -> State:
    """The state of a structure: a root alone, or a tree that was grown by these rules before."""

    def bare():
        root = jnp.arange(structure.capacity) == 0
        ended = _has_ended(structure.terminal, structure.depth, cfg)
        again = _selectable_again(structure.terminal, cfg) | (cfg.judge == "visit")
        opened = (structure.alive & root & (~ended | again)).astype(jnp.int32)
        return jnp.full_like(structure.depth, NO_NODE), opened

    # A recount passes over all N slots again and again; few searches begin with a grown tree.
    grown = (structure.num_nodes > 1).any()
    first, opened = jax.lax.cond(grown, lambda: _recount(structure, cfg), bare)
    simulations = jnp.zeros_like(structure.num_nodes)
    return State(first, opened, simulations, _sample_root_noise(keys, cfg))


def select_leaves(
    state: State, structure: Structure, keys: Keys, *, cfg: TreeConfig, score_fn: ScoreFn
) -> Int32[Array, "B W"]:
    """W leaves per structure, best first, each under the virtual visits of those before it."""
    root = structure.num_nodes[:, None] * 0
    settings = {"cfg": cfg, "score_fn": score_fn}
    if cfg.num_lanes == 1:
        nodes = descend(state, structure, root, keys, **settings)
        return jnp.where(state.open_leaves[:, :1] > 0, nodes, NO_NODE)
    passes = jnp.minimum(state.open_leaves[:, 0], cfg.num_lanes)
    return descend_in_passes(
        state, structure, root, keys, passes, num_passes=cfg.num_lanes, **settings
    )[..., 0]


def make_request(
    state: State, structure: Structure, nodes: Int32[Array, "B W"], *, cfg: TreeConfig
) -> Request:
    """A request for selected leaves: the root comes first, and num_simulations is kept to."""
    lane = jnp.arange(nodes.shape[1], dtype=jnp.int32)[None]
    fresh = state.first_child[:, :1] < 0
    if cfg.resample:
        fresh |= state.open_leaves[:, :1] <= 0
    if cfg.num_simulations is not None:
        left = cfg.num_simulations - state.simulations[:, None]
        nodes = jnp.where(lane < left, nodes, NO_NODE)
        fresh &= left > 0
    terminal = peek_at(structure.terminal, nodes) & (nodes >= 0)
    if cfg.terminal == "stop":
        nodes = jnp.where(terminal.any(-1, keepdims=True), NO_NODE, nodes)
    nodes = jnp.where(fresh, jnp.where(lane < cfg.root_lanes, 0, NO_NODE), nodes)
    ended = _has_ended(terminal, peek_at(structure.depth, nodes), cfg)
    operator = jnp.where(ended & ~fresh, Operator.EVALUATE, Operator.GENERATE)
    return Request(nodes.astype(jnp.int32), operator.astype(jnp.int32), cfg.num_children)


def update_tree(
    state: State,
    structure: Structure,
    request: Request,
    outcome: Outcome,
    *,
    cfg: TreeConfig,
) -> tuple[State, Structure, Int32[Array, "B W"]]:
    """Appends the children, and backs values and open leaves up.

    Returns:
      The new state and structure, and the root's child at or above each requested node (-1: none).
    """
    if cfg.merge_states:
        structure, outcome = merge_children(structure, request, outcome)
    counted = request.grows[..., None] & outcome.valid & ~outcome.duplicate
    prior = _make_prior(request, outcome, counted, cfg, state.noise)
    on_visit = cfg.judge == "visit"
    structure, slots = generate(structure, request, outcome, prior, visits=1.0 - on_visit)
    lead = request.leads
    before = at_nodes(state.first_child, request.nodes)
    was_leaf = before < 0
    at = jnp.where(request.grows & lead, request.nodes, structure.capacity)
    first = slots[..., 0] + zero_behind(before)
    first_child = put_at(state.first_child, at, first)

    opening = counted
    if not on_visit:
        # Judged already: beyond that, only what can grow or be selected again is worth a visit.
        depth = at_nodes(structure.depth, request.nodes)[..., None] + 1
        again = _selectable_again(outcome.terminal, cfg)
        opening &= ~_has_ended(outcome.terminal, depth, cfg) | again
    closing = lead & was_leaf & request.grows
    if on_visit and cfg.terminal == "exclude":
        closing |= request.active & ~request.grows
    opened = opening.sum(-1).astype(jnp.int32) - closing.astype(jnp.int32)
    open_leaves = put_children(state.open_leaves, slots, opening.astype(jnp.int32))

    structure, count, total = _judge(structure, request, outcome, counted, lead, cfg)
    structure, open_leaves, top = backpropagate(
        structure,
        first_child,
        open_leaves,
        request.nodes,
        Backup(count, total, opened),
        num_children=cfg.num_root_children,
        rule=cfg.backup,
        discount=cfg.discount,
        learning_rate=cfg.learning_rate,
    )
    selected = request.active & (request.nodes > 0)
    simulations = state.simulations + selected.sum(-1, dtype=jnp.int32)
    state = State(first_child, open_leaves, simulations, state.noise, state.extra)
    return state, structure, top


_NOISE = 2**31 - 1  # A number that no node has: strategies draw from the problem's key too.


def _sample_root_noise(keys: Keys, cfg: TreeConfig) -> Float32[Array, "B R"] | None:
    """Dirichlet noise for the root's prior, None where the settings want none."""
    if cfg.root_noise == 0:
        return None
    alpha = jnp.full((cfg.num_root_children,), cfg.root_alpha)
    return jax.vmap(lambda key: jax.random.dirichlet(jax.random.fold_in(key, _NOISE), alpha))(keys)


def _recount(structure, cfg):
    """`first_child` and `open_leaves` of a tree that was grown before."""
    rows = jnp.arange(structure.depth.shape[0])[:, None]
    index = jnp.arange(structure.capacity)[None]
    parents = structure.parent
    inner = (index > 0) & (index < structure.num_nodes[:, None])
    # Blocks of K are aligned behind the root; the root's newest block is the one in use.
    block = 1 + (index - 1) // cfg.num_children * cfg.num_children
    at = jnp.where(inner, parents, structure.capacity)
    first = jnp.full_like(structure.depth, NO_NODE)
    first = first.at[rows, at].max(block.astype(jnp.int32), mode="drop")
    # It may have fewer lanes than it asked for; what was made together tells.
    oldest = first[:, :1] - cfg.num_root_children + cfg.num_children
    of_root = inner & (parents == 0) & (index >= oldest)
    made = jnp.where(of_root, structure.created_at, NO_NODE)
    newest = jnp.argmax(of_root & (made == made.max(-1, keepdims=True)), -1).astype(jnp.int32)
    first = first.at[:, 0].set(jnp.where(first[:, 0] >= 0, newest, NO_NODE))
    leaf = structure.alive & (first < 0) & ((parents != 0) | (index >= first[:, :1]))
    ended = _has_ended(structure.terminal, structure.depth, cfg)
    again = _selectable_again(structure.terminal, cfg)
    if cfg.judge == "visit":
        again |= structure.visits == 0
    leaf &= ~ended | again

    nodes = jnp.where(leaf, index, NO_NODE).astype(jnp.int32)
    opened = add_to_paths(structure, jnp.zeros_like(structure.depth), nodes, leaf)
    return first, opened


def _has_ended(terminal, depth, cfg):
    return terminal | (depth >= cfg.max_depth)


def _selectable_again(terminal, cfg):
    """Ended nodes that stay open once judged: every one, or solutions alone, or none."""
    if cfg.terminal == "revisit":
        return terminal | True
    return terminal if cfg.terminal == "stop" else terminal & False


def _make_prior(request, outcome, counted, cfg, noise):
    """The prior over each node's new children, with noise at the root if there is any."""
    steps = (outcome.logprob, outcome.length, counted)
    settings = {"length_power": cfg.length_power, "normalise": cfg.normalise_prior}
    if cfg.root_lanes == 1:
        prior = step_prior(*steps, **settings)
    else:
        prior = sibling_prior(request.nodes, *steps, **settings)
    if noise is None:
        return prior
    return mix_noise(prior, noise, counted & (request.nodes == 0)[..., None], cfg.root_noise)


def _judge(structure, request, outcome, counted, lead, cfg):
    """How many visits each lane backs up and what they are worth; notes what is now known of the
    nodes themselves: values judged on visit, and dead ends."""
    own = at_nodes(structure.model_value, request.nodes)
    # Steps all written and refused say what the node is worth, not what was thought of it.
    written = outcome.length > 0
    barren = lead & request.grows & written.any(-1) & ~outcome.valid.any(-1)
    value = outcome.reward + cfg.discount * outcome.value
    refused = jnp.where(written, value, 0.0).sum(-1) / jnp.maximum(written.sum(-1), 1)
    told = barren
    if cfg.judge == "visit":
        first_time = lead & (at_nodes(structure.visits, request.nodes) == 0)
        own = jnp.where(first_time, outcome.node_value, own)
        told |= first_time
    own = jnp.where(barren, refused, own)
    at = jnp.where(told, request.nodes, structure.capacity)
    noted = put_at(structure.model_value, at, own)
    structure = dataclasses.replace(structure, model_value=noted)
    count, total = lead.astype(jnp.float32), jnp.where(lead, own, 0.0)
    if cfg.judge == "expansion" and cfg.backup == "mean":
        # Each of the K values is a simulation of its own.
        many = request.grows & ~barren
        total = jnp.where(many, jnp.where(counted, value, 0.0).sum(-1), total)
        count = jnp.where(many, counted.sum(-1).astype(jnp.float32), count)
    return structure, count, total
