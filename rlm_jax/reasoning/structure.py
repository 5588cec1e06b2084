"""The reasoning structure: one node arena for chains, trees, graphs and nested structures.

A batch of B structures of at most N nodes each is one pytree of `[B, N]` arrays. Node 0 is the
root and holds the problem; every other node is one reasoning step. A node's parents have smaller
indices than the node itself, so a pass in index order is a pass in topological order. What the
nodes *say* (tokens, KV pages, hidden states) lives in the expander's world under the same indices,
so that every strategy can be written, and tested, without a language model.

Blueprint (arXiv 2501.11223) sections 4.2-4.3: chain (every node has at most one child), tree
(P=1 parent), graph (P>1) and nested (`owner`) structures are values of this one type.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.budget import Budget, zero_budget
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Bool, Float32, Int32, UInt32

NO_NODE = -1
UNLIMITED = np.iinfo(np.int32).max


class Operator(enum.IntEnum):
    """Which operator made a node."""

    NONE = 0
    ROOT = 1
    GENERATE = 2
    REFINE = 3
    AGGREGATE = 4
    RESTRUCTURE = 5


@struct
class Structure:
    """B reasoning structures of capacity N.

    parents: indices of the parents, -1 where there are fewer than P.
    operator: the `Operator` that made the node.
    owner: the node whose payload this node belongs to (nesting), -1 at the top level.
    depth: steps from the root.
    span_start: position, in the node's own context, of its first token.
    span_length: tokens of the node's step (of the prompt, for the root).
    visits, value: search statistics; `value` is the backed-up value of the edge into the node.
    model_value: what the evaluator said when the node was made.
    prior: the policy's weight on the step among its siblings.
    logprob: the policy's log-probability of the step (temperature 1, natural log).
    reward: reward of the edge into the node.
    answer_key: hash of the answer the path states so far, 0 where it states none.
    created_at: tokens the structure had generated once this node was made.
    terminal: the step ends the solution.
    alive: in use and not pruned; a merged duplicate is kept, dead, for the record.
    num_nodes: slots in use; they are the first ones.
    budget: what has been spent; token_limit: the generated tokens allowed.
    """

    parents: Int32[jax.Array, "B N P"]
    operator: Int32[jax.Array, "B N"]
    owner: Int32[jax.Array, "B N"]
    depth: Int32[jax.Array, "B N"]
    span_start: Int32[jax.Array, "B N"]
    span_length: Int32[jax.Array, "B N"]
    visits: Float32[jax.Array, "B N"]
    value: Float32[jax.Array, "B N"]
    model_value: Float32[jax.Array, "B N"]
    prior: Float32[jax.Array, "B N"]
    logprob: Float32[jax.Array, "B N"]
    reward: Float32[jax.Array, "B N"]
    answer_key: UInt32[jax.Array, "B N"]
    created_at: Int32[jax.Array, "B N"]
    terminal: Bool[jax.Array, "B N"]
    alive: Bool[jax.Array, "B N"]
    num_nodes: Int32[jax.Array, "B"]
    budget: Budget
    token_limit: Int32[jax.Array, "B"]

    @property
    def capacity(self) -> int:
        """N, the number of slots per structure."""
        return self.depth.shape[-1]


def make_structure(
    prompt_length: Int32[jax.Array, "B"],
    capacity: int,
    *,
    num_parents: int = 1,
    token_limit: Int32[jax.Array, "B"] | int = UNLIMITED,
) -> Structure:
    """B structures that hold only their root.

    Args:
      prompt_length: tokens of each root's prompt; every array is derived from it, so that the
        loop carries built on the result vary over a mesh as the batch does.
      capacity: N, at least 1.
      num_parents: P; 1 for chains and trees.
      token_limit: generated tokens allowed per structure.

    Raises:
      ValueError: capacity or num_parents is below 1.
    """
    if capacity < 1 or num_parents < 1:
        raise ValueError(f"capacity and num_parents must be >= 1, got {capacity}, {num_parents}")
    prompt_length = jnp.asarray(prompt_length, jnp.int32)
    row = jnp.zeros_like(prompt_length)

    def fill(value, dtype, *extra):
        base = row.reshape(row.shape + (1,) * (1 + len(extra))).astype(dtype)
        return jnp.broadcast_to(base, (*row.shape, capacity, *extra)) + jnp.asarray(value, dtype)

    def flag():
        return jnp.broadcast_to((row != 0)[:, None], (*row.shape, capacity))

    return Structure(
        parents=fill(NO_NODE, jnp.int32, num_parents),
        operator=fill(Operator.NONE, jnp.int32).at[:, 0].set(Operator.ROOT),
        owner=fill(NO_NODE, jnp.int32),
        depth=fill(0, jnp.int32),
        span_start=fill(0, jnp.int32),
        span_length=fill(0, jnp.int32).at[:, 0].set(prompt_length),
        visits=fill(0, jnp.float32),
        value=fill(0, jnp.float32),
        model_value=fill(0, jnp.float32),
        prior=fill(0, jnp.float32).at[:, 0].set(1.0),
        logprob=fill(0, jnp.float32),
        reward=fill(0, jnp.float32),
        answer_key=fill(0, jnp.uint32),
        created_at=fill(0, jnp.int32),
        terminal=flag(),
        alive=flag().at[:, 0].set(True),
        num_nodes=row + 1,
        budget=zero_budget(row),
        token_limit=row + jnp.asarray(token_limit, jnp.int32),
    )


def tokens_left(structure: Structure) -> Int32[jax.Array, "B"]:
    """Generated tokens that each structure may still spend."""
    return jnp.maximum(structure.token_limit - structure.budget.generated_tokens, 0)


def path_to_root(structure: Structure, batch: int, node: int) -> list[int]:
    """Nodes from the root to `node` along first parents (host side)."""
    parents = np.asarray(structure.parents[batch, :, 0])
    path = [int(node)]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]


def check(structure: Structure) -> None:
    """Verifies the invariants of every structure of a batch (host side).

    Raises:
      AssertionError: naming the invariant and the first structure that breaks it.
    """
    s = jax.tree.map(np.asarray, structure)
    index = np.arange(structure.capacity)[None]
    used = index < s.num_nodes[:, None]
    root = index == 0
    parents = s.parents
    first = parents[..., 0]
    node_of = np.maximum(first, 0)
    parent_depth = np.take_along_axis(s.depth, node_of, 1)
    parent_end = np.take_along_axis(s.span_start + s.span_length, node_of, 1)
    parent_terminal = np.take_along_axis(s.terminal, node_of, 1)
    inner = used & ~root
    has_parent = parents >= 0
    tree_edge = inner & (s.operator == Operator.GENERATE)
    rules = {
        "1 <= num_nodes <= N": (s.num_nodes >= 1) & (s.num_nodes <= structure.capacity),
        "the root has no parent and is alive": ~has_parent[:, 0].any(-1) & s.alive[:, 0],
        "every other node has a parent": (~inner | (first >= 0)).all(-1),
        "parents come before their children": (
            ~has_parent | (parents < index[..., None]) | ~used[..., None]
        ).all((-2, -1)),
        "free slots are empty": (used | (~s.alive & ~s.terminal & (first < 0))).all(-1),
        "depth is one more than the parent's": (~inner | (s.depth == parent_depth + 1)).all(-1),
        "a generated step starts where its parent ends": (
            ~tree_edge | (s.span_start == parent_end)
        ).all(-1),
        "nothing grows below a terminal node": (~(inner & s.alive) | ~parent_terminal).all(-1),
        "an owner is a used node": ((s.owner < s.num_nodes[:, None]) & (s.owner >= -1)).all(-1),
        "visits are counts": ((s.visits >= 0) & (s.visits == np.round(s.visits))).all(-1),
        "values are finite": np.isfinite(s.value).all(-1) & np.isfinite(s.model_value).all(-1),
        "the budget holds": s.budget.generated_tokens <= s.token_limit,
        "generated tokens are the tokens of the nodes": s.budget.generated_tokens
        == np.where(inner, s.span_length, 0).sum(-1),
    }
    for rule, holds in rules.items():
        assert holds.all(), f"{rule}: broken in structure {int(np.argmin(holds))}"
