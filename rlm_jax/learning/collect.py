"""From searched structures to training rows: paths with the search's preferences at every token.

The one idea: a path through a searched tree is a demonstration whose soft labels are the search's
improved policy. At each node the label of a token is how the siblings that agree with the path so
far go on, weighted by the improved policy (as `data.demonstrations` does it with a solver's right
steps), so one row teaches all siblings of all nodes on it. Half of the paths follow the improved
policy and half the policy's own samples, so that values are learned where the policy really goes;
a path that leaves the search's choice teaches up to where it leaves.

Everything has fixed shapes and stays on the device: the rows are `TokenBatch` rows for replay.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.data.packing import TokenBatch
from rlm_jax.learning.distillation import IMPROVEMENTS, ImprovedPolicy, improve_policy
from rlm_jax.learning.targets import VALUE_RULES, target_weights, value_tree
from rlm_jax.reasoning.protocol import Keys
from rlm_jax.reasoning.structure import Structure

_PATH_KEY = 2**31 - 5  # A number that no node has.


@dataclasses.dataclass(frozen=True)
class CollectConfig:
    """What becomes of a searched structure.

    num_paths: rows of each structure. row_tokens: tokens of a row; a longer path is left out.
    num_children: K, siblings compared at a node. max_depth: steps of a path.
    improvement, temperature, value_scale, visit_offset: see `improve_policy`. min_visits: visits a
    node needs to teach. value_rule: see `value_tree`.
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

    def __post_init__(self):
        for name in ("num_paths", "row_tokens", "num_children", "max_depth"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
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
    tree = value_tree(structure, rewards, rule=cfg.value_rule)
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
    values = (tree.value, target_weights(structure, tree, min_visits=cfg.min_visits))
    paths = _draw_paths(structure, improved, keys, cfg)
    write = functools.partial(_write_row, cfg=cfg)
    of_paths = jax.vmap(write, (None, None, None, None, None, 0))
    rows, teaches = jax.vmap(of_paths)(structure, tokens, prompts, improved, values, paths)
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), (rows, teaches))


def _draw_paths(
    structure: Structure, improved: ImprovedPolicy, keys: Keys, cfg: CollectConfig
) -> Int32[Array, "B R L"]:
    """Nodes of num_paths walks from the root, -1 behind their ends.

    Even walks follow the improved policy, the first of them its best child; odd ones the prior.
    """
    children = improved.children
    real = children >= 0
    index = jnp.arange(children.shape[0])[:, None, None]
    prior = jnp.where(real, structure.prior[index, jnp.maximum(children, 0)], 0.0)
    best = jnp.log(jnp.maximum(improved.weights, 1e-30))
    own = jnp.where(real, jnp.log(jnp.maximum(prior, 1e-30)), -jnp.inf)
    own = jnp.where(improved.teaches[..., None], own, -jnp.inf)
    best = jnp.where(real & improved.teaches[..., None], best, -jnp.inf)

    def walk(key: Array, children: Array, best: Array, own: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(key, _PATH_KEY), number)
        scores = jnp.where(number % 2 == 0, best, own)
        noisy = number > 0

        def step(node: Array, depth: Array) -> tuple[Array, Array]:
            noise = jax.random.gumbel(jax.random.fold_in(key, depth), scores.shape[1:])
            here = scores[jnp.maximum(node, 0)]
            choice = jnp.argmax(here + jnp.where(noisy, noise, 0.0))
            goes_on = (node >= 0) & jnp.isfinite(here).any()
            child = jnp.where(goes_on, children[jnp.maximum(node, 0), choice], -1)
            return child, child

        return jax.lax.scan(step, children[0, 0] * 0, jnp.arange(cfg.max_depth))[1]

    numbers = jnp.arange(cfg.num_paths)
    of_all = jax.vmap(walk, (None, None, None, None, 0))
    return jax.vmap(of_all, (0, 0, 0, 0, None))(keys, children, best, own, numbers)


def _write_row(
    structure: Structure,
    tokens: Int32[Array, "N S"],
    prompt: Int32[Array, "T"],
    improved: ImprovedPolicy,
    values: tuple[Float32[Array, "N"], Float32[Array, "N"]],
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
    all_nodes = jnp.concatenate([nodes[:1] * 0, nodes])
    fits = total <= cfg.row_tokens
    zeros = jnp.zeros(cfg.row_tokens, jnp.float32) + 0 * values[0][0]

    def put(array: Array, at: Array, new: Array) -> Array:
        return array.at[at].set(new, mode="drop")

    soft_shape = (cfg.row_tokens, soft_ids.shape[-1])
    value_weight = put(zeros, ends, values[1][all_nodes]) * fits
    loss_weight = put(zeros, place, labelled.astype(jnp.float32)) * fits
    batch = TokenBatch(
        tokens=put(whole, place, tokens[nodes]),
        segments=(row < total).astype(jnp.int32),
        positions=jnp.where(row < total, row, 0),
        loss_weight=loss_weight,
        soft_ids=put(jnp.zeros(soft_shape, jnp.int32) + 0 * path[0], place, soft_ids),
        soft_weights=put(zeros[:, None] + jnp.zeros(soft_shape), place, soft_weights),
        value_target=put(zeros, ends, values[0][all_nodes]),
        value_weight=value_weight,
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
    return words.T, share.T
