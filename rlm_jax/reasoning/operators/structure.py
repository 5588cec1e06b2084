"""Structure operators: what changes the topology (Blueprint 4.3.1).

`generate` appends the proposed steps as children, `prune` kills subtrees, `merge_equal` joins
children that reach a state the structure already holds, and `keep_subtree` makes an inner node the
root. Slots are given out in order, the same way wherever they are needed: the expander writes its
pages and tokens under the indices that `child_slots` names before `generate` runs. It frees the
pages of dead nodes by itself.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.budget import add_budgets
from rlm_jax.core.order import zero_behind
from rlm_jax.core.types import Array, Bool, Float32, Int32, UInt32
from rlm_jax.reasoning.protocol import Outcome, Request
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, at_nodes, put_windows, subtree


def child_slots(structure: Structure, request: Request) -> Int32[jax.Array, "B W K"]:
    """Indices that the children of a request will get; N (out of range) for idle lanes.

    Lanes that grow take K consecutive slots each, in lane order, from the first free one.
    """
    num_children = request.num_children
    before = jnp.cumsum(request.grows, -1) - request.grows
    start = structure.num_nodes[:, None] + before * num_children
    slots = start[..., None] + jnp.arange(num_children)
    return jnp.where(request.grows[..., None], slots, structure.capacity).astype(jnp.int32)


def child_numbers(structure: Structure, request: Request) -> Int32[jax.Array, "B W K"]:
    """How many nodes the structure had ever made before each child: what its randomness hangs on.

    They are the slots until a subtree is kept and its slots move.
    """
    moved = structure.num_created - structure.num_nodes
    return child_slots(structure, request) + moved[:, None, None]


def generate(
    structure: Structure,
    request: Request,
    outcome: Outcome,
    prior: Float32[jax.Array, "B W K"],
    *,
    visits: float = 1.0,
) -> tuple[Structure, Int32[jax.Array, "B W K"]]:
    """Appends the outcome's steps as children of the requested nodes.

    A child starts with the evaluator's value and `visits` visits: one where children are judged
    when they are made, none where they are judged on their first visit. A duplicate, and a lane
    that brought nothing, take their slot dead, so that the record shows what was paid for.

    Returns:
      The structure with the children and the cost in it, and the children's indices (N where a
      lane was idle).
    """
    slots = child_slots(structure, request)
    taken = jnp.broadcast_to(request.grows[..., None], slots.shape)
    alive = taken & outcome.valid & ~outcome.duplicate
    budget = add_budgets(structure.budget, outcome.cost)
    live = alive.astype(jnp.float32)
    num_new = taken.sum((1, 2)).astype(jnp.int32)

    def of_parent(array: Array) -> Array:
        return jnp.broadcast_to(at_nodes(array, request.nodes)[..., None], slots.shape)

    def write(array: Array, values: Array) -> Array:
        return put_children(array, slots, jnp.broadcast_to(values, slots.shape))

    above = of_parent(structure.span_length)
    answers = {
        "span_length": outcome.length + zero_behind(above),
        "value": outcome.value * live,
        "model_value": outcome.value * live,
        "logprob": outcome.logprob,
        "reward": outcome.reward,
        "answer_key": outcome.answer_key,
        "state_key": outcome.state_key,
        "terminal": outcome.terminal & alive,
        "proven": outcome.proven & outcome.terminal & alive,
    }
    fields = {"span_length": "length", "model_value": "value"}
    # Free slots hold 0: what is 0 for all children is there already.
    written = {
        name: write(getattr(structure, name), values)
        for name, values in answers.items()
        if fields.get(name, name) not in outcome.absent
    }
    if visits:
        written["visits"] = write(structure.visits, visits * live)
    return dataclasses.replace(
        structure,
        **written,
        parent=write(structure.parent, request.nodes[..., None]),
        operator=write(structure.operator, request.operator[..., None]),
        owner=write(structure.owner, of_parent(structure.owner)),
        depth=write(structure.depth, of_parent(structure.depth) + 1),
        span_start=write(structure.span_start, of_parent(structure.span_start) + above),
        prior=write(structure.prior, prior),
        created_at=write(structure.created_at, budget.generated_tokens[:, None, None]),
        alive=write(structure.alive, alive),
        num_nodes=structure.num_nodes + num_new,
        num_created=structure.num_created + num_new,
        budget=budget,
    ), slots


def put_children(array: Array, slots: Int32[jax.Array, "B W K"], values: Array) -> Array:
    """Writes values [B, W, K] at the slots of `child_slots` of an array [B, N].

    The K slots of a lane are one window: a write of W windows and not of W * K numbers.
    """
    return put_windows(array, slots[..., 0], values)


def prune(structure: Structure, nodes: Bool[jax.Array, "B N"]) -> Structure:
    """Kills the marked nodes and what was generated below them; the root stays.

    Dead nodes stay in the record. In a graph a node goes with the node it was generated from,
    whatever other parents it has: its context, hence its pages, hang on that one.
    """
    rows = jnp.arange(structure.depth.shape[0])[:, None]
    at = jnp.maximum(structure.parent, 0)
    root = jnp.arange(structure.capacity)[None] == 0

    def spread(carry):
        alive, _ = carry
        below = alive & (root | alive[rows, at])
        return below, (below != alive).any()

    alive = structure.alive & ~(nodes & ~root)
    alive, _ = jax.lax.while_loop(
        lambda carry: carry[1], spread, (alive, (alive != structure.alive).any())
    )
    return dataclasses.replace(
        structure, alive=alive, terminal=structure.terminal & alive, proven=structure.proven & alive
    )


def find_equal(
    structure: Structure, request: Request, keys: UInt32[jax.Array, "B W K"]
) -> Int32[jax.Array, "B W K"]:
    """The living node that stands for the same state as each proposed child, -1 for none.

    An ancestor of the requested node is no candidate: an edge to it would close a circle.
    """
    same = (keys[..., None] == structure.state_key[:, None, None, :]) & (keys[..., None] != 0)
    same &= structure.alive[:, None, None, :]
    index = jnp.arange(structure.capacity)

    def climb(carry):
        at, above = carry
        above |= at[..., None] == index
        return jnp.where(at >= 0, at_nodes(structure.parent, at), NO_NODE), above

    none = jnp.zeros((*request.nodes.shape, structure.capacity), bool) & (
        request.nodes[..., None] > structure.capacity
    )
    _, above = jax.lax.while_loop(lambda c: (c[0] >= 0).any(), climb, (request.nodes, none))
    same &= ~above[:, :, None]
    return jnp.where(same.any(-1), jnp.argmax(same, -1), NO_NODE).astype(jnp.int32)


def merge_equal(
    structure: Structure, request: Request, equal: Int32[jax.Array, "B W K"]
) -> Structure:
    """Gives each found node (`find_equal`) the requested node as one more parent.

    Where P leaves no room, or the edge is there already, the child is merged without an edge.
    Transpositions: the state is searched once, whatever path leads to it.
    """
    if structure.more_parents.shape[-1] == 0:
        return structure
    batch, num_lanes, num_children = equal.shape
    rows = jnp.arange(batch)

    def link(i, parents):
        lane = i // num_children
        node, parent = equal[:, lane, i % num_children], request.nodes[:, lane]
        own = parents[rows, jnp.maximum(node, 0)]
        free = own < 0
        place = jnp.argmax(free, -1)
        known = (own == parent[:, None]).any(-1)
        known |= structure.parent[rows, jnp.maximum(node, 0)] == parent
        wanted = (node >= 0) & free.any(-1) & ~known
        at = jnp.where(wanted & (parent < node), node, structure.capacity)
        return parents.at[rows, at, place].set(parent, mode="drop")

    parents = jax.lax.fori_loop(0, num_lanes * num_children, link, structure.more_parents)
    return dataclasses.replace(structure, more_parents=parents)


def merge_children(
    structure: Structure, request: Request, outcome: Outcome
) -> tuple[Structure, Outcome]:
    """Merges proposed children with living nodes of the same state, and with each other.

    A merged child counts as a duplicate; the node it equals gains an edge (`merge_equal`), unless
    that node is an ancestor: a step that leads back is dropped.
    """
    keys = jnp.where(outcome.valid & ~outcome.duplicate, outcome.state_key, 0)
    equal = find_equal(structure, request, keys)
    flat = keys.reshape(keys.shape[0], -1)
    same = (flat[:, :, None] == flat[:, None, :]) & (flat != 0)[:, :, None]
    twin = (same & jnp.tril(jnp.ones(same.shape[1:], bool), -1)).any(-1).reshape(keys.shape)
    living = jnp.where(structure.alive, structure.state_key, 0)[:, None, None]
    known = ((keys[..., None] == living) & (keys != 0)[..., None]).any(-1)
    duplicate = outcome.duplicate | known | twin
    structure = merge_equal(structure, request, equal)
    return structure, dataclasses.replace(outcome, duplicate=duplicate)


def keep_subtree(
    structure: Structure, nodes: Int32[jax.Array, "B"]
) -> tuple[Structure, Int32[jax.Array, "B N"]]:
    """Makes each structure's node of `nodes` the root and lets everything else go.

    Kept is what was generated below it; what only another parent joins to it goes (see `prune`).
    The kept nodes move to the first slots in their old order, siblings still side by side; what
    was spent stays spent. Give `take_nodes` the returned order to move what else goes by node.

    Args:
      nodes: living nodes; 0 keeps all.

    Returns:
      The structures, and for each new slot the old index (-1: free).
    """
    tree = dataclasses.replace(structure, more_parents=structure.more_parents[..., :0])
    kept = subtree(tree, nodes)
    order = jnp.argsort(~kept, axis=-1, stable=True).astype(jnp.int32)
    count = kept.sum(-1).astype(jnp.int32)
    order = jnp.where(jnp.arange(structure.capacity)[None] < count[:, None], order, NO_NODE)
    new_index = jnp.where(kept, jnp.cumsum(kept, -1) - 1, NO_NODE)
    inner = jnp.arange(structure.capacity)[None] > 0
    rows = jnp.arange(nodes.shape[0])[:, None, None]

    def rename(links: Array) -> Array:
        return jnp.where(links >= 0, new_index[rows, jnp.maximum(links, 0)], NO_NODE)

    lost = jnp.where(inner & ~kept, structure.span_length, 0).sum(-1)
    lost += jnp.where(
        nodes > 0, jnp.take_along_axis(structure.span_length, nodes[:, None], 1)[:, 0], 0
    )
    moved = dataclasses.replace(
        structure,
        parent=rename(structure.parent[..., None])[..., 0].astype(jnp.int32),
        more_parents=rename(structure.more_parents).astype(jnp.int32),
        owner=rename(structure.owner[..., None])[..., 0].astype(jnp.int32),
    )
    per_node = {name: getattr(moved, name) for name in _PER_NODE}
    empty = {name: NO_NODE if name in _LINKS else 0 for name in _PER_NODE}
    taken = {name: take_nodes(per_node[name], order, empty[name]) for name in _PER_NODE}
    taken["parent"] = taken["parent"].at[:, 0].set(NO_NODE)
    taken["more_parents"] = taken["more_parents"].at[:, 0].set(NO_NODE)
    taken["operator"] = taken["operator"].at[:, 0].set(Operator.ROOT)
    return dataclasses.replace(
        structure,
        **taken,
        num_nodes=count,
        dropped_tokens=structure.dropped_tokens + lost.astype(jnp.int32),
    ), order


_LINKS = ("parent", "more_parents", "owner")
_PER_NODE = tuple(
    field.name
    for field in dataclasses.fields(Structure)
    if field.name
    not in (
        "num_nodes",
        "num_created",
        "dropped_tokens",
        "budget",
        "token_limit",
        "expansion_limit",
    )
)


def take_nodes(array: Array, order: Int32[jax.Array, "B N"], empty: float | int = 0) -> Array:
    """Moves an array [B, N, ...] to the order of `keep_subtree`; free slots hold `empty`."""
    shape = order.shape + (1,) * (array.ndim - 2)
    moved = jnp.take_along_axis(array, jnp.maximum(order, 0).reshape(shape), 1)
    return jnp.where((order >= 0).reshape(shape), moved, jnp.asarray(empty, array.dtype))
