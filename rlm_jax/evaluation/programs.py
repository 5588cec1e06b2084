"""What a solver compiles for prompts of one width: open a batch, admit problems, go on searching.

The rows of a batch stand in groups that share nothing: one group without a mesh, one per shard of
the batch on a mesh. A group has seats, a quarter of its rows: so many new problems are prefilled
at once, whoever of them comes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlm_jax.core.types import PyTree
from rlm_jax.reasoning.drive import (
    Limits,
    Search,
    advance,
    advance_host,
    replace_rows,
    start,
)
from rlm_jax.reasoning.language import LanguageConfig, LanguageModel, admit, make_expand, make_world
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.sharding import (
    abstract_outputs,
    count_shards,
    place_batch,
    shard_search,
)

_REFILLS = 4  # Finished rows are handed on when a quarter of their group is.


class Seats(NamedTuple):
    """New problems and the rows they take, arrays [G * F] of G groups with F seats each.

    rows: within the group; B / G leaves a seat empty. prompts: [G * F, T], right-padded. limits,
    expansions: tokens that may be generated, and nodes that may be expanded.
    """

    rows: Any
    keys: Any
    prompts: Any
    lengths: Any
    limits: Any
    expansions: Any


class Programs(NamedTuple):
    """What a bucket compiles to.

    width: of its prompts. num_groups, num_seats: G, and F of each. like: the search in shapes.
    open() -> a search without problems. admit(lm, search, seats) -> the search with new problems.
    advance(lm, search, enough) -> the search one chunk on, or up to the round in which `enough[g]`
    structures of each group g have finished.
    """

    width: int
    num_groups: int
    num_seats: int
    like: PyTree
    open: Callable[[], Search]
    admit: Callable[[LanguageModel, Search, Seats], Search]
    advance: Callable[[LanguageModel, Search, list[int]], Search]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What programs are compiled for. driver, mesh, chunk_rounds: see `Solver`.

    trace_rounds: rounds of the operator log, 0 for none.
    """

    language: LanguageConfig
    strategy: Strategy
    limits: Limits
    batch_size: int
    width: int
    driver: str
    chunk_rounds: int
    trace_rounds: int
    mesh: Mesh | None

    @property
    def num_groups(self) -> int:
        """Parts of the batch that share nothing."""
        return 1 if self.mesh is None else count_shards(self.mesh)

    @property
    def num_seats(self) -> int:
        """Seats of a group: a divisor of its rows."""
        rows = self.batch_size // self.num_groups
        most = -(-rows // _REFILLS)
        return max(size for size in range(1, most + 1) if rows % size == 0)


def compile_programs(lm: LanguageModel, shape: Shape) -> Programs:
    """Compiles ahead of the clock."""
    keys = _place(shape, jnp.broadcast_to(jax.random.key(0), (shape.batch_size,)))
    seats = _abstract_seats(shape)
    open_batch, admit_rows = _spread(shape, _make_open(shape)), _spread(shape, _make_admit(shape))
    opened = jax.jit(open_batch).lower(lm, keys).compile()
    layout = None
    if shape.mesh is not None and shape.mesh.shape["model"] > 1:
        # Prefilling shows how the partitioner wants the pools: by heads. All are to agree on it.
        trial = jax.jit(admit_rows).lower(lm, seats, abstract_outputs(opened)).compile()
        layout = jax.tree.map(lambda array: array.sharding, abstract_outputs(trial))
        opened = jax.jit(open_batch, out_shardings=layout).lower(lm, keys).compile()
    like = abstract_outputs(opened)
    admitted = jax.jit(admit_rows, donate_argnums=2, out_shardings=layout)
    admitted = admitted.lower(lm, seats, like).compile()

    def admit_fn(lm: LanguageModel, search: Search, seats: Seats) -> Search:
        return admitted(lm, _place(shape, seats), search)

    compiled = shape.driver == "compiled"
    advance_fn = _compile_advance(lm, shape, like, layout) if compiled else _host(shape, layout)
    return Programs(
        width=shape.width,
        num_groups=shape.num_groups,
        num_seats=shape.num_seats,
        like=like,
        open=lambda: opened(lm, keys),
        admit=admit_fn,
        advance=advance_fn,
    )


def _make_open(shape):
    def open_batch(lm, keys):
        none = jax.random.key_data(keys)[..., 0].astype(jnp.int32) * 0
        structure, world = make_world(lm, none, shape.width, cfg=shape.language)
        # All constants, and XLA would take seconds to sort them while it compiles.
        structure = jax.lax.optimization_barrier(structure)
        return start(
            shape.strategy,
            keys,
            world,
            structure,
            limits=shape.limits,
            trace_rounds=shape.trace_rounds,
        )

    return open_batch


def _make_admit(shape):
    def admit_rows(lm, seats, search):
        structure, world = admit(
            lm,
            search.structure,
            search.world,
            seats.rows,
            seats.prompts,
            seats.lengths,
            seats.limits,
            seats.expansions,
            cfg=shape.language,
        )
        return replace_rows(
            shape.strategy, search, seats.rows, seats.keys, structure, world, limits=shape.limits
        )

    return admit_rows


def _compile_advance(lm, shape, like, layout):
    expand = make_expand(shape.language)

    def advance_chunk(lm, enough, search):
        return advance(
            shape.strategy,
            expand,
            lm,
            search,
            limits=shape.limits,
            max_rounds=shape.chunk_rounds,
            min_finished=enough[0],
        )

    enough = _place(shape, jnp.zeros(shape.num_groups, jnp.int32))
    chunk = jax.jit(_spread(shape, advance_chunk), donate_argnums=2, out_shardings=layout)
    chunk = chunk.lower(lm, enough, like).compile()

    def advance_fn(lm: LanguageModel, search: Search, enough: list[int]) -> Search:
        return chunk(lm, _place(shape, np.asarray(enough, np.int32)), search)

    return advance_fn


def _host(shape, layout):
    step = jax.jit(_spread(shape, make_expand(shape.language)), donate_argnums=2)

    def advance_fn(lm: LanguageModel, search: Search, enough: list[int]) -> Search:
        search = advance_host(
            shape.strategy,
            step,
            lm,
            search,
            limits=shape.limits,
            max_rounds=shape.chunk_rounds,
            min_finished=min(enough),
        )
        return _place(shape, search) if layout is None else jax.device_put(search, layout)

    return advance_fn


def _spread(shape: Shape, fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    return fn if shape.mesh is None else shard_search(fn, shape.mesh)


def _place(shape: Shape, tree: PyTree) -> PyTree:
    return tree if shape.mesh is None else place_batch(shape.mesh, tree)


def _abstract_seats(shape: Shape) -> Seats:
    seats = shape.num_groups * shape.num_seats
    number = np.zeros(seats, np.int32)
    prompts = np.zeros((seats, shape.width), np.int32)
    keys = jnp.broadcast_to(jax.random.key(0), (seats,))
    return _place(shape, Seats(number, keys, prompts, number, number, number))
