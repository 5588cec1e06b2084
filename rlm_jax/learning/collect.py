"""From searched structures to training rows: paths with the search's preferences at every token.

The one idea: a path through a searched tree is a demonstration whose soft labels are the search's
improved policy. At each node the label of a token is how the siblings that agree with the path so
far go on, weighted by the improved policy (as `data.demonstrations` does it with a solver's right
steps), so one row teaches all siblings of all nodes on it. Half of the paths follow the improved
policy. Those lead to what was found, so the others lead to nodes drawn evenly from all that the
search looked into: without the lost ones among them every value would be learned to be high. A path
that leaves the search's choice teaches moves up to where it leaves.

What a value should be is read off the whole tree (`targets.value_tree`), or off the path alone, as
from a trajectory that was sampled (`returns.py`): then an outcome speaks for the states before it,
whatever else the search found there, and a path that was cut off counts for what the network
thought of its last state.

Everything has fixed shapes and stays on the device: the rows are `TokenBatch` rows for replay.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.data.packing import TokenBatch
from rlm_jax.learning.advantages import leads_to, path_advantages, tree_advantages
from rlm_jax.learning.distillation import IMPROVEMENTS, ImprovedPolicy, improve_policy
from rlm_jax.learning.returns import n_step_returns, td_lambda_returns
from rlm_jax.learning.targets import (
    VALUE_RULES,
    ValueTree,
    target_weights,
    trace_paths,
    value_tree,
)
from rlm_jax.reasoning.protocol import Keys
from rlm_jax.reasoning.structure import Structure

PATH_RULES = ("none", "monte_carlo", "n_step", "td_lambda")
POLICY_WEIGHTS = ("none", "advantage")
POLICY_NODES = ("all", "finished", "proven")
_PATH_KEY = 2**31 - 5  # A number that no node has.
_MOST_WEIGHT = 20.0  # As in Peng et al. 2019.


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """What becomes of a searched structure.

    num_paths: rows of each structure. row_tokens: tokens of a row; a longer path is left out.
    num_children: K, siblings compared at a node. max_depth: steps of a path.
    improvement, temperature, value_scale, visit_offset: see `improve_policy`. min_visits: visits a
    node needs to teach. value_rule, discount: see `value_tree`; the improved policy rests on it.

    path_rule: "none" takes the targets of values from that tree, too. "monte_carlo": the outcome of
    the path, where it has one; "n_step": what `path_steps` steps bring and the network's value
    behind them; "td_lambda": all of these mixed by `path_trace`, its step-level GAE plus the value.
    policy_weight: "advantage" weighs the labels of a step by exp(A / advantage_scale), at most 20,
    with the step's advantage in the tree (Algorithm 6; advantage-weighted regression, 1910.00177);
    "none" weighs all alike. policy_nodes: nodes that teach the policy; "finished" are those at or
    above the end of a solution (x1's pruning, spec B5), "proven" those at or above a right one
    (expert iteration). Values are learned along all of a path.
    """

    num_paths: int = 4
    row_tokens: int = 64
    num_children: int = 8
    max_depth: int = 8
    improvement: str = "completed_q"
    temperature: float = 1.0
    value_scale: float = 0.1
    visit_offset: float = 50.0
    min_visits: float = 2.0
    value_rule: str = "max"
    discount: float = 1.0
    path_rule: str = "none"
    path_steps: int = 1
    path_trace: float = 0.95
    policy_weight: str = "none"
    advantage_scale: float = 1.0
    policy_nodes: str = "all"

    def __post_init__(self):
        for name in ("num_paths", "row_tokens", "num_children", "max_depth", "path_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("temperature", "advantage_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a number > 0, got {getattr(self, name)}")
        if not (0 < self.discount <= 1 and 0 <= self.path_trace <= 1):
            raise ValueError(
                f"discount={self.discount} and path_trace={self.path_trace}: accepted is 0 to 1, "
                "a discount above 0"
            )
        for name, accepted in (
            ("path_rule", PATH_RULES),
            ("policy_weight", POLICY_WEIGHTS),
            ("policy_nodes", POLICY_NODES),
        ):
            if getattr(self, name) not in accepted:
                raise ValueError(f"{name} {getattr(self, name)!r}: accepted are {accepted}")
        if self.improvement not in IMPROVEMENTS:
            raise ValueError(f"improvement {self.improvement!r}: accepted are {IMPROVEMENTS}")
        if self.value_rule not in VALUE_RULES:
            raise ValueError(f"value_rule {self.value_rule!r}: accepted are {VALUE_RULES}")


def collect_rows(
    structure: Structure,
    tokens: Int32[Array, "B N S"],
    prompts: Int32[Array, "B T"],
    keys: Keys,
    *,
    cfg: CollectConfig,
) -> tuple[TokenBatch, Bool[Array, "rows"]]:
    """Rows [B * num_paths, row_tokens] of finished structures, and which of them teach anything.

    Args:
      structure: its `proven` nodes are the right solutions, all other ended paths are wrong.
      tokens: of every node's step (`World.tokens`). prompts: padded, T <= row_tokens.
      keys: of the structures.

    Raises:
      ValueError: prompts do not fit into a row.
    """
    if prompts.shape[1] > cfg.row_tokens:
        raise ValueError(f"prompts of {prompts.shape[1]} tokens in rows of {cfg.row_tokens}")
    rewards = structure.proven.astype(jnp.float32)
    tree = value_tree(structure, rewards, rule=cfg.value_rule, discount=cfg.discount)
    improved = improve_policy(
        structure,
        tree,
        num_children=cfg.num_children,
        rule=cfg.improvement,
        temperature=cfg.temperature,
        value_scale=cfg.value_scale,
        visit_offset=cfg.visit_offset,
        min_visits=cfg.min_visits,
    )
    paths = _draw_paths(structure, tree, improved, keys, cfg)
    if cfg.policy_nodes != "all":
        ends = structure.terminal if cfg.policy_nodes == "finished" else structure.proven
        teaches = improved.teaches & leads_to(structure, ends)
        improved = ImprovedPolicy(
            improved.children, jnp.where(teaches[..., None], improved.weights, 0.0), teaches
        )
    values = _target_values(structure, tree, rewards, paths, cfg)
    weights = _weigh_steps(structure, tree, paths, cfg)
    write = functools.partial(_write_row, cfg=cfg)
    of_paths = jax.vmap(write, (None, None, None, None, 0, 0, 0))
    rows, teaches = jax.vmap(of_paths)(structure, tokens, prompts, improved, values, weights, paths)

    def flatten(array: Array) -> Array:
        # Not -1: there are columns without entries.
        return array.reshape(array.shape[0] * array.shape[1], *array.shape[2:])

    return jax.tree.map(flatten, (rows, teaches))


def _target_values(
    structure: Structure,
    tree: ValueTree,
    rewards: Float32[Array, "B N"],
    paths: Int32[Array, "B R L"],
    cfg: CollectConfig,
) -> tuple[Float32[Array, "B R ends"], Float32[Array, "B R ends"]]:
    """Targets of the root and of each node of a path, and their weights; ends = L + 1.

    Anything behind the end of a path.
    """
    nodes = jnp.pad(jnp.maximum(paths, 0), ((0, 0), (0, 0), (1, 0)))
    rows = jnp.arange(paths.shape[0])[:, None, None]
    if cfg.path_rule == "none":
        weight = target_weights(structure, tree, min_visits=cfg.min_visits)
        return tree.value[rows, nodes], weight[rows, nodes]
    mask = paths >= 0
    length = mask.sum(-1, keepdims=True)
    last = jnp.take_along_axis(nodes, length, axis=-1)[..., 0]
    opinion = structure.model_value.astype(jnp.float32)
    finished = (structure.alive & structure.terminal)[rows[..., 0], last]
    bootstrap = jnp.where(finished, 0.0, opinion[rows[..., 0], last])
    gained, thought = rewards[rows, nodes[..., 1:]], opinion[rows, nodes[..., :-1]]
    path = (gained, thought, mask, bootstrap)
    if cfg.path_rule == "td_lambda":
        returns = td_lambda_returns(*path, discount=cfg.discount, trace=cfg.path_trace)
    else:
        num_steps = cfg.max_depth if cfg.path_rule == "monte_carlo" else cfg.path_steps
        returns = n_step_returns(*path, num_steps=num_steps, discount=cfg.discount)
    known = mask & (finished[..., None] | (cfg.path_rule != "monte_carlo"))
    # The last node is no state before a step: it is worth its outcome, if it has one.
    is_last = jnp.arange(nodes.shape[-1]) == length
    pad = ((0, 0), (0, 0), (0, 1))
    target = jnp.where(is_last, rewards[rows, nodes], jnp.pad(returns, pad))
    weight = jnp.where(is_last, finished[..., None], jnp.pad(known, pad))
    return target, weight.astype(jnp.float32)


def _weigh_steps(
    structure: Structure, tree: ValueTree, paths: Int32[Array, "B R L"], cfg: CollectConfig
) -> Float32[Array, "B R L"]:
    """What the labels of each step of a path count for."""
    if cfg.policy_weight == "none":
        return jnp.ones_like(paths, jnp.float32)
    flat = paths.reshape(paths.shape[0], -1)
    advantages = path_advantages(tree_advantages(structure, tree), flat).reshape(paths.shape)
    return jnp.minimum(jnp.exp(advantages / cfg.advantage_scale), _MOST_WEIGHT)


def _draw_paths(
    structure: Structure,
    tree: ValueTree,
    improved: ImprovedPolicy,
    keys: Keys,
    cfg: CollectConfig,
) -> Int32[Array, "B R L"]:
    """Nodes of num_paths paths from the root, -1 behind their ends.

    Even ones follow the improved policy, the first of them its best child; odd ones lead to a node
    that is no end and that the search looked below.
    """
    children = improved.children
    shown = (children >= 0) & improved.teaches[..., None]
    # A child that nobody judged (on its first visit) has no opinion to end a path with.
    judged = (structure.visits > 0) | structure.terminal
    shown &= judged[jnp.arange(len(children))[:, None, None], jnp.maximum(children, 0)]
    best = jnp.where(shown, jnp.log(jnp.maximum(improved.weights, 1e-30)), -jnp.inf)
    searched = target_weights(structure, tree, min_visits=cfg.min_visits) > 0
    searched &= ~structure.terminal & (structure.depth > structure.depth[:, :1])

    def walk(key: Array, children: Array, best: Array, noisy: bool) -> Array:
        def step(node: Array, depth: Array) -> tuple[Array, Array]:
            here = best[jnp.maximum(node, 0)]
            noise = jax.random.gumbel(jax.random.fold_in(key, depth), here.shape)
            choice = jnp.argmax(here + (noise if noisy else 0.0))
            goes_on = (node >= 0) & jnp.isfinite(here).any()
            child = jnp.where(goes_on, children[jnp.maximum(node, 0), choice], -1)
            return child, child

        return jax.lax.scan(step, children[0, 0] * 0, jnp.arange(cfg.max_depth))[1]

    def draw_node(key: Array, searched: Array) -> Array:
        noise = jax.random.gumbel(key, searched.shape)
        return jnp.where(
            searched.any(), jnp.argmax(jnp.where(searched, noise, -jnp.inf)), -1
        ).astype(jnp.int32)

    fold, paths = jax.vmap(jax.random.fold_in, (0, None)), []
    for number in range(cfg.num_paths):
        own = fold(fold(keys, _PATH_KEY), number)
        if number % 2:
            nodes = jax.vmap(draw_node)(own, searched)
            paths.append(trace_paths(structure, nodes, cfg.max_depth))
        else:
            walks = jax.vmap(functools.partial(walk, noisy=number > 0))
            paths.append(walks(own, children, best))
    return jnp.stack(paths, axis=1)


def _write_row(
    structure: Structure,
    tokens: Int32[Array, "N S"],
    prompt: Int32[Array, "T"],
    improved: ImprovedPolicy,
    values: tuple[Float32[Array, "ends"], Float32[Array, "ends"]],
    weights: Float32[Array, "L"],
    path: Int32[Array, "L"],
    *,
    cfg: CollectConfig,
) -> tuple[TokenBatch, Bool[Array, ""]]:
    """One structure's row for one path."""
    on_path = path >= 0
    nodes = jnp.maximum(path, 0)
    start = structure.span_start[nodes]
    length = jnp.where(on_path, structure.span_length[nodes], 0)
    prompt_length = structure.span_length[0]
    total = prompt_length + length.sum()
    offset = jnp.arange(tokens.shape[-1])
    # Places behind the row's end are dropped.
    place = jnp.where(offset < length[:, None], start[:, None] + offset, cfg.row_tokens)
    soft_ids, soft_weights = jax.vmap(_label_step, (0, 0, None, None, None))(
        nodes, jnp.maximum(structure.parent[nodes], 0), structure, tokens, improved
    )
    labelled = (soft_weights.sum(-1) > 0) & (offset < length[:, None])
    row = jnp.arange(cfg.row_tokens)
    known = row < prompt_length
    whole = jnp.where(known, jnp.pad(prompt, (0, cfg.row_tokens - prompt.shape[0])), 0)
    ends = jnp.concatenate([prompt_length[None] - 1, start + length - 1])
    ends = jnp.where(jnp.concatenate([jnp.ones(1, bool), on_path]), ends, cfg.row_tokens)
    fits = total <= cfg.row_tokens
    zeros = jnp.zeros(cfg.row_tokens, jnp.float32) + 0 * values[0][0]

    def put(array: Array, at: Array, new: Array) -> Array:
        return array.at[at].set(new, mode="drop")

    soft_shape = (cfg.row_tokens, soft_ids.shape[-1])
    value_weight = put(zeros, ends, values[1]) * fits
    loss_weight = put(zeros, place, labelled * weights[:, None]) * fits
    batch = TokenBatch(
        tokens=put(whole, place, tokens[nodes]),
        segments=(row < total).astype(jnp.int32),
        positions=jnp.where(row < total, row, 0),
        loss_weight=loss_weight,
        soft_ids=put(jnp.zeros(soft_shape, jnp.int32) + 0 * path[0], place, soft_ids),
        soft_weights=put(zeros[:, None] + jnp.zeros(soft_shape), place, soft_weights),
        value_target=put(zeros, ends, values[0]),
        value_weight=value_weight,
        # A search tells nothing of other goals than its own.
        goals=jnp.zeros((cfg.row_tokens, 0), jnp.int8) + 0 * path[0].astype(jnp.int8),
    )
    return batch, (loss_weight.sum() > 0) | (value_weight.sum() > 0)


def _label_step(
    node: Int32[Array, ""],
    parent: Int32[Array, ""],
    structure: Structure,
    tokens: Int32[Array, "N S"],
    improved: ImprovedPolicy,
) -> tuple[Int32[Array, "S K"], Float32[Array, "S K"]]:
    """How the siblings that agree with a step so far go on, at each of its tokens."""
    siblings = improved.children[parent]
    weights = improved.weights[parent]
    real = siblings >= 0
    words = tokens[jnp.maximum(siblings, 0)]
    lengths = jnp.where(real, structure.span_length[jnp.maximum(siblings, 0)], 0)
    same = words == tokens[node][None]
    # Agreement up to but without the token itself.
    agree = jnp.cumprod(jnp.pad(same, ((0, 0), (1, 0)))[:, :-1].at[:, 0].set(True), axis=1) > 0
    there = jnp.arange(words.shape[1])[None] < lengths[:, None]
    share = jnp.where(agree & there, weights[:, None], 0.0)
    total = share.sum(0)
    share = jnp.where(total > 0, share / jnp.where(total > 0, total, 1.0), 0.0)
    # A word is one label, whoever of the siblings says it.
    equal = (words[:, None] == words[None]) & ((share > 0)[:, None] & (share > 0)[None])
    earlier = jnp.tril(jnp.ones(equal.shape[:2], bool), -1)[..., None]
    together = jnp.where(equal, share[None], 0.0).sum(1)
    share = jnp.where((equal & earlier).any(1), 0.0, together)
    return words.T, share.T
