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
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.budget import Budget, zero_budget
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Bool, Float32, Int32, Shaped, UInt32

_READ_WINDOW = jax.lax.GatherDimensionNumbers(
    offset_dims=(2,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
)
_WRITE_WINDOW = jax.lax.ScatterDimensionNumbers(
    update_window_dims=(2,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
)
NO_NODE = -1
UNLIMITED = np.iinfo(np.int32).max


class Operator(enum.IntEnum):
    """Which operator made a node; in a request, which is to be applied (EVALUATE makes none)."""

    NONE = 0
    ROOT = 1
    GENERATE = 2
    REFINE = 3
    AGGREGATE = 4
    RESTRUCTURE = 5
    EVALUATE = 6


@struct
class Structure:
    """B reasoning structures of capacity N.

    parent: the node it was generated from, -1 for the root. more_parents: the P-1 others that a
      graph allows, -1 where there are none. (Apart, because in a tree a [B, N, 1] array would be
      copied in every round for its layout.)
    operator: the `Operator` that made the node.
    owner: the node whose payload this node belongs to (nesting), -1 at the top level.
    depth: steps from the problem; the root's is 0 unless it was once an inner node.
    span_start: position, in the node's own context, of its first token.
    span_length: tokens of the node's step (of the prompt, for the root).
    visits, value: search statistics; `value` is the backed-up value of the state after the step
      (the edge into it is worth reward + discount * value).
    model_value: what the evaluator said of the node alone.
    prior: the policy's weight on the step among its siblings.
    logprob: the policy's log-probability of the step (temperature 1, natural log).
    reward: reward of the edge into the node.
    answer_key: hash of the answer the path states so far, 0 where it states none.
    state_key: hash of the state the node stands for, 0 where the expander names none; equal keys
      are equal states (transpositions).
    created_at: tokens the structure had generated once this node was made.
    terminal: the step ends the solution. proven: a self-verifying task says it is right.
    alive: in use and not pruned; a merged duplicate is kept, dead, for the record.
    num_nodes: slots in use; they are the first ones.
    num_created: nodes ever made; more than num_nodes once a subtree was kept and the rest let go.
    dropped_tokens: tokens of the nodes let go.
    budget: what has been spent; token_limit, expansion_limit: the generated tokens and the
      expansions allowed.
    """

    parent: Int32[jax.Array, "B N"]
    more_parents: Int32[jax.Array, "B N Q"]
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
    state_key: UInt32[jax.Array, "B N"]
    created_at: Int32[jax.Array, "B N"]
    terminal: Bool[jax.Array, "B N"]
    proven: Bool[jax.Array, "B N"]
    alive: Bool[jax.Array, "B N"]
    num_nodes: Int32[jax.Array, "B"]
    num_created: Int32[jax.Array, "B"]
    dropped_tokens: Int32[jax.Array, "B"]
    budget: Budget
    token_limit: Int32[jax.Array, "B"]
    expansion_limit: Int32[jax.Array, "B"]

    @property
    def capacity(self) -> int:
        """N, the number of slots per structure."""
        return self.depth.shape[-1]

    @property
    def parents(self) -> Int32[jax.Array, "B N P"] | Int32[np.ndarray, "B N P"]:
        """All parents, -1 where there are fewer than P."""
        if self.more_parents.shape[-1] == 0:
            return self.parent[..., None]
        return jnp.concatenate([self.parent[..., None], self.more_parents], -1)


def make_structure(
    prompt_length: Int32[jax.Array, "B"],
    capacity: int,
    *,
    num_parents: int = 1,
    token_limit: Int32[jax.Array, "B"] | int = UNLIMITED,
    expansion_limit: Int32[jax.Array, "B"] | int = UNLIMITED,
) -> Structure:
    """B structures that hold only their root.

    Args:
      prompt_length: tokens of each root's prompt; every array is derived from it, so that the
        loop carries built on the result vary over a mesh as the batch does.
      capacity: N, at least 1.
      num_parents: P; 1 for chains and trees.
      token_limit, expansion_limit: generated tokens and expansions allowed per structure.

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
        parent=fill(NO_NODE, jnp.int32),
        more_parents=fill(NO_NODE, jnp.int32, num_parents - 1),
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
        state_key=fill(0, jnp.uint32),
        created_at=fill(0, jnp.int32),
        terminal=flag(),
        proven=flag(),
        alive=flag().at[:, 0].set(True),
        num_nodes=row + 1,
        num_created=row + 1,
        dropped_tokens=row + 0,
        budget=zero_budget(row),
        token_limit=row + jnp.asarray(token_limit, jnp.int32),
        expansion_limit=row + jnp.asarray(expansion_limit, jnp.int32),
    )


def at_nodes(
    array: Shaped[jax.Array, "B N ..."], nodes: Int32[jax.Array, "B L ..."]
) -> Shaped[jax.Array, "B L ..."]:
    """What an array holds at nodes; at the root for node -1.

    A single node is read twice: a gather of one index becomes a slice, which XLA reads anew
    wherever it is used, after the array was written too, and for that copies it in every round.
    """
    rows = jnp.arange(nodes.shape[0]).reshape(-1, *(1,) * (nodes.ndim - 1))
    safe = jnp.maximum(nodes, 0)
    if nodes.size == 1:
        safe = jnp.concatenate([safe, safe], 1)
    found = array.at[rows, safe].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return found[:, : nodes.shape[1]]


def peek_at(
    array: Shaped[jax.Array, "B N"], nodes: Int32[jax.Array, "B L"]
) -> Shaped[jax.Array, "B L"]:
    """`at_nodes` of what is used up before the array is written again: a single node is a slice."""
    if nodes.size == 1:
        return at_windows(array, jnp.maximum(nodes, 0), 1)[..., 0]
    return at_nodes(array, nodes)


def at_windows(
    array: Shaped[jax.Array, "B N"], first: Int32[jax.Array, "B L"], size: int
) -> Shaped[jax.Array, "B L K"]:
    """What an array holds at `size` nodes from each first one on; first + size <= N.

    One read for a window of neighbours. Of a single window it is a slice, so what is read must be
    used up before the array is written again (see `at_nodes`).
    """
    if first.size == 1:
        return jax.lax.dynamic_slice_in_dim(array, first[0, 0], size, axis=1)[:, None]
    return jax.lax.gather(
        array,
        _index_windows(first),
        _READ_WINDOW,
        (1, size),
        mode=jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS,
    )


def put_at(
    array: Shaped[jax.Array, "B N ..."],
    nodes: Int32[jax.Array, "B L"],
    values: Shaped[jax.Array, "B L ..."],
    *,
    add: bool = False,
) -> Shaped[jax.Array, "B N ..."]:
    """Writes values at nodes, or adds them to what is there; at node N, out of range, it does not.

    Args:
      nodes: all different but for N where values are written; those that are added add up.
    """
    if nodes.size == 1:
        return _put_slice(array, nodes[0, 0], lambda old: old + values if add else values)
    at = array.at[jnp.arange(nodes.shape[0])[:, None], nodes]
    return at.add(values, mode="drop") if add else at.set(values, mode="drop")


def revise_at(
    array: Shaped[jax.Array, "B N"],
    nodes: Int32[jax.Array, "B L"],
    revise_fn: Callable[[jax.Array], jax.Array],
) -> Shaped[jax.Array, "B N"]:
    """Writes what `revise_fn` makes of what is there; at node N, out of range, it does not.

    Args:
      nodes: all different but for N.
    """
    if nodes.size == 1:
        return _put_slice(array, nodes[0, 0], revise_fn)
    old = at_nodes(array, jnp.minimum(nodes, array.shape[1] - 1))
    return put_at(array, nodes, revise_fn(old))


def put_windows(
    array: Shaped[jax.Array, "B N"],
    first: Int32[jax.Array, "B L"],
    values: Shaped[jax.Array, "B L K"],
) -> Shaped[jax.Array, "B N"]:
    """Writes K values from each first node on, all of them or, where they do not fit, none."""
    if first.size == 1:
        return _put_slice(array, first[0, 0], lambda _: values[:, 0], values.shape[2])
    return jax.lax.scatter(
        array,
        _index_windows(first),
        values.astype(array.dtype),
        _WRITE_WINDOW,
        unique_indices=True,
        mode=jax.lax.GatherScatterMode.FILL_OR_DROP,
    )


def _index_windows(first):
    rows = jax.lax.broadcasted_iota(first.dtype, first.shape, 0)
    return jnp.stack([rows, first], -1)


def _put_slice(array, first, revise_fn, size=1):
    """A single window [1, K, ...], in place: a scatter of one looks at its bounds apart."""
    old = jax.lax.dynamic_slice_in_dim(array, first, size, axis=1)
    new = jnp.where(first <= array.shape[1] - size, revise_fn(old).astype(array.dtype), old)
    return jax.lax.dynamic_update_slice_in_dim(array, new, first, axis=1)


def tokens_left(structure: Structure) -> Int32[jax.Array, "B"]:
    """Generated tokens that each structure may still spend."""
    return jnp.maximum(structure.token_limit - structure.budget.generated_tokens, 0)


def path_to_root(structure: Structure, batch: int, node: int) -> list[int]:
    """Nodes from the root to `node` along first parents (host side)."""
    parents = np.asarray(structure.parent[batch])
    path = [int(node)]
    while parents[path[-1]] >= 0:
        path.append(int(parents[path[-1]]))
    return path[::-1]


def paths_up(
    structure: Structure, nodes: Int32[jax.Array, "B L"], num_nodes: int
) -> Int32[jax.Array, "B L P"]:
    """The first P = `num_nodes` nodes from each node to the root, itself first, along first
    parents; -1 behind the root, and everywhere for node -1."""

    def climb(node, _):
        above = at_nodes(structure.parent, node)
        return jnp.where(node > 0, above, NO_NODE), node

    _, path = jax.lax.scan(climb, nodes, length=num_nodes)
    return jnp.moveaxis(path, 0, -1)


def has_child(
    structure: Structure, among: Bool[jax.Array, "B N"] | None = None
) -> Bool[jax.Array, "B N"]:
    """Nodes with a living child, or with one that is `among` these."""
    rows = jnp.arange(structure.depth.shape[0])[:, None, None]
    among = structure.alive if among is None else among
    parents = jnp.where(among[..., None], structure.parents, NO_NODE)
    at = jnp.where(parents >= 0, parents, structure.capacity)
    return jnp.zeros_like(structure.alive).at[rows, at].set(True, mode="drop")


def frontier(structure: Structure) -> Bool[jax.Array, "B N"]:
    """Living nodes from which a path can still go on: childless and not terminal."""
    return structure.alive & ~structure.terminal & ~has_child(structure)


def subtree(structure: Structure, nodes: Int32[jax.Array, "B"]) -> Bool[jax.Array, "B N"]:
    """Each structure's node of `nodes` and everything below it, over any of several parents."""
    used = jnp.arange(structure.capacity)[None] < structure.num_nodes[:, None]
    top = (jnp.arange(structure.capacity)[None] == nodes[:, None]) & used
    rows = jnp.arange(nodes.shape[0])[:, None, None]
    real = structure.parents >= 0
    at = jnp.maximum(structure.parents, 0)

    def grow(carry):
        inside, _ = carry
        below = inside | (inside[rows, at] & real).any(-1)
        return below, (below != inside).any()

    return jax.lax.while_loop(lambda c: c[1], grow, (top, (top != top).any() | top.any()))[0]


def best_path(structure: Structure, batch: int) -> list[int]:
    """From the root down to a leaf, at each step to the living child of highest value (host)."""
    parents, alive = np.asarray(structure.parents[batch]), np.asarray(structure.alive[batch])
    value = np.asarray(structure.value[batch])
    path = [0]
    while True:
        below = np.flatnonzero(alive & (parents == path[-1]).any(-1))
        if not below.size:
            return path
        path.append(int(below[np.argmax(value[below])]))


def check(structure: Structure) -> None:
    """Verifies the invariants of every structure of a batch (host side).

    Raises:
      AssertionError: naming the invariant and the first structure that breaks it.
    """
    s = jax.tree.map(np.asarray, structure)
    index = np.arange(structure.capacity)[None]
    used = index < s.num_nodes[:, None]
    root = index == 0
    parents = np.asarray(s.parents)
    first = s.parent
    node_of = np.maximum(first, 0)
    parent_depth = np.take_along_axis(s.depth, node_of, 1)
    parent_end = np.take_along_axis(s.span_start + s.span_length, node_of, 1)
    parent_terminal = np.take_along_axis(s.terminal, node_of, 1)
    inner = used & ~root
    has_parent = parents >= 0
    tree_edge = inner & (s.operator == Operator.GENERATE)
    owner_of_parent = np.take_along_axis(s.owner, node_of, 1)
    parent_alive = np.take_along_axis(s.alive, node_of, 1)
    several = parents.shape[-1] > 1
    depths = s.depth[np.arange(len(parents))[:, None, None], parents]
    below_any = np.where(has_parent, depths, NO_NODE).max(-1) + 1
    rules = {
        "1 <= num_nodes <= N": (s.num_nodes >= 1) & (s.num_nodes <= structure.capacity),
        "the root has no parent and is alive": ~has_parent[:, 0].any(-1) & s.alive[:, 0],
        "every other node has a parent": (~inner | (first >= 0)).all(-1),
        "parents come before their children": (
            ~has_parent | (parents < index[..., None]) | ~used[..., None]
        ).all((-2, -1)),
        "free slots are empty": (used | (~s.alive & ~s.terminal & (first < 0))).all(-1),
        "depth is one more than the parent's": (
            ~inner | (s.depth == parent_depth + 1) | (several & (s.depth == below_any))
        ).all(-1),
        "parents differ": _all_differ(parents),
        "a generated step starts where its parent ends": (
            ~tree_edge | (s.span_start == parent_end)
        ).all(-1),
        "nothing grows below a terminal node": (~(inner & s.alive) | ~parent_terminal).all(-1),
        "a dead node has no living child": (~(inner & s.alive) | parent_alive).all(-1),
        "an owner is an earlier node": ((s.owner < index) & (s.owner >= NO_NODE) | ~used).all(-1),
        "a child belongs where its parent does": (~tree_edge | (s.owner == owner_of_parent)).all(
            -1
        ),
        "visits are counts": ((s.visits >= 0) & (s.visits == np.round(s.visits))).all(-1),
        "values are finite": np.isfinite(s.value).all(-1) & np.isfinite(s.model_value).all(-1),
        "the budget holds": (s.budget.generated_tokens <= s.token_limit)
        & (s.budget.expansions <= s.expansion_limit),
        "generated tokens are those of nodes and rollouts": s.budget.generated_tokens
        == np.where(inner, s.span_length, 0).sum(-1) + s.dropped_tokens + s.budget.rollout_tokens,
        "nodes made are kept or dropped": s.num_created >= s.num_nodes,
        "what is proven is a solution": (~s.proven | s.terminal).all(-1),
    }
    for rule, holds in rules.items():
        assert holds.all(), f"{rule}: broken in structure {int(np.argmin(holds))}"


def _all_differ(parents: np.ndarray) -> np.ndarray:
    """Whether no node lists a parent twice, per structure."""
    ordered = np.sort(parents, -1)
    same = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    return ~same.any((-2, -1))
