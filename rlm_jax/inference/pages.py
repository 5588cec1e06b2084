"""KV pages: a node owns the pages of its own tokens and lists those of its ancestors.

Keys and values of a step are written once, when the step is made, into pages of a few tokens
each; selecting a node copies nothing, and a deep path is a list of page numbers. Per layer there
is one array, page-major, so that a page is one contiguous write, of keys and values. Each
structure has its own range of P / B pages: what one search uses cannot depend on its neighbours,
and a shard of the batch holds the pages of its own structures.

A page is stored as rows of 128 numbers, [G, page, 2E] flattened. TPU keeps arrays in tiles of 8 by
128, and would lay out [P, G, page, E] with the pages innermost when E is 64: a search would turn
every pool around when it begins and when it ends. Pages of whole tiles (2 * G * page * E a multiple
of 1024) stay where they are; docs/design/004-sharding-and-tpu.md has the figures.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import static, struct
from rlm_jax.core.types import Array, Bool, Float, Int32
from rlm_jax.inference.attention import Context, split_caches
from rlm_jax.models.config import ModelConfig

NO_PAGE = -1
_LEAST_BUCKET = 128
_LANES = 128


@struct
class KVPages:
    """The page pool of B structures and the tables over it.

    pools: one array per layer; a page is [G, page, 2E], of each token the key and behind it the
    value, stored as rows of 128 numbers (as one row where they do not fill rows). fill: tokens in a
    page. start: position of a page's first token. prompt_table: the pages of each structure's
    prompt. table: the pages of a node's path below the root, its own last, -1 behind them;
    table_length: how many. owner: the node whose tokens a page holds, 0 for the prompt's, -1 for a
    free page. page_tokens: tokens a page holds. num_kv_heads: G.
    """

    pools: tuple[Float[Array, "P rows lanes"], ...]
    fill: Int32[Array, "P"]
    start: Int32[Array, "P"]
    prompt_table: Int32[Array, "B prompt_pages"]
    table: Int32[Array, "B N path_pages"]
    table_length: Int32[Array, "B N"]
    owner: Int32[Array, "P"]
    page_tokens: int = static()
    num_kv_heads: int = static()

    @property
    def pages_per_structure(self) -> int:
        """Size of each structure's range."""
        return self.fill.shape[0] // self.table.shape[0]


def count_pages(num_tokens: int, page_tokens: int) -> int:
    """Pages that `num_tokens` tokens of one node take."""
    return -(-num_tokens // page_tokens)


def pages_for_search(
    num_prompt_tokens: int,
    num_steps: int,
    longest_step_tokens: int,
    num_step_tokens: int,
    page_tokens: int,
) -> int:
    """Pages that always suffice for a prompt and `num_steps` steps of `num_step_tokens` in all.

    Every step leaves less than one page unfilled and is no longer than the longest.
    """
    full = num_steps * count_pages(longest_step_tokens, page_tokens)
    spread = count_pages(num_step_tokens, page_tokens) + num_steps
    return count_pages(num_prompt_tokens, page_tokens) + min(full, spread)


def make_pages(
    cfg: ModelConfig,
    like: Int32[Array, "B"],
    *,
    num_nodes: int,
    num_pages: int,
    num_prompt_pages: int,
    num_path_pages: int,
    page_tokens: int,
    dtype,
) -> KVPages:
    """An empty pool for B structures; arrays derive from `like` to vary over a mesh as it does.

    Args:
      num_pages: pages of one structure's range. num_path_pages: the longest path below a root.
    """
    batch = like.shape[0]
    zero = (like * 0).astype(jnp.int32)

    def of_batch(value, *shape):
        base = zero.reshape(batch, *(1 for _ in shape))
        return jnp.broadcast_to(base, (batch, *shape)) + jnp.int32(value)

    flat = of_batch(0, num_pages).reshape(-1)
    size = cfg.num_kv_heads * page_tokens * 2 * cfg.head_dim
    lanes = size if size % _LANES else _LANES
    shape = (batch * num_pages, size // lanes, lanes)
    empty = jnp.broadcast_to(flat.reshape(-1, 1, 1).astype(dtype), shape)
    first = jnp.arange(batch, dtype=jnp.int32)[:, None] * num_pages
    in_prompt = (jnp.arange(num_pages) < num_prompt_pages).astype(jnp.int32)
    return KVPages(
        pools=tuple(empty + 0 for _ in range(cfg.num_layers)),
        fill=flat,
        start=flat + 0,  # A buffer of its own: both are donated.
        prompt_table=of_batch(0, num_prompt_pages) + first + jnp.arange(num_prompt_pages),
        table=of_batch(NO_PAGE, num_nodes, num_path_pages),
        table_length=of_batch(0, num_nodes),
        owner=(of_batch(NO_PAGE, num_pages) + in_prompt).reshape(-1),
        page_tokens=page_tokens,
        num_kv_heads=cfg.num_kv_heads,
    )


def write_prompts(
    pages: KVPages,
    rows: Int32[Array, "F"],
    caches: tuple[Float[Array, "F G T K"], ...],
    lengths: Int32[Array, "F"],
) -> KVPages:
    """Gives F rows of the pool to new prompts: all else they held is free again.

    Args:
      rows: which structures, B to leave one out. caches: of the prefilled prompts; T is a whole
        number of pages.
    """
    batch, per_row, num_prompt = (
        pages.table.shape[0],
        pages.pages_per_structure,
        pages.prompt_table.shape[1],
    )
    ids = pages.prompt_table[jnp.minimum(rows, batch - 1)]
    ids = jnp.where((rows < batch)[:, None], ids, NO_PAGE)
    begin = jnp.arange(num_prompt, dtype=jnp.int32)[None] * pages.page_tokens
    fill = jnp.clip(lengths[:, None] - begin, 0, pages.page_tokens)
    pages = _write(pages, caches, ids, fill, jnp.broadcast_to(begin, ids.shape))
    empty = jnp.where(jnp.arange(per_row) < num_prompt, 0, NO_PAGE).astype(jnp.int32)
    owner = pages.owner.reshape(batch, per_row).at[rows].set(empty, mode="drop")
    return dataclasses.replace(
        pages,
        owner=owner.reshape(-1),
        table=pages.table.at[rows].set(NO_PAGE, mode="drop"),
        table_length=pages.table_length.at[rows].set(0, mode="drop"),
    )


def write_steps(
    pages: KVPages,
    caches: tuple[Float[Array, "R G S K"], ...],
    *,
    parents: Int32[Array, "B C"],
    slots: Int32[Array, "B C"],
    starts: Int32[Array, "B C"],
    lengths: Int32[Array, "B C"],
    keep: Bool[Array, "B C"],
) -> KVPages:
    """Gives each new node pages for its own tokens and lists them behind its parent's.

    Args:
      caches: of the R = B*C new steps; S is a whole number of pages.
      parents, slots: nodes the steps grew from, and the new nodes' indices (out of range: none).
      starts, lengths: position of each step's first token and its number of tokens.
      keep: steps worth storing; the others take no pages.
    """
    batch, width = slots.shape
    size = pages.page_tokens
    per_step = caches[0].shape[2] // size
    need = jnp.where(keep, -(-lengths // size), 0)
    before = jnp.cumsum(need, -1) - need
    offset = jnp.arange(per_step, dtype=jnp.int32)
    taken = offset < need[..., None]
    free = _first_free(pages, width * per_step)
    ids = jnp.take_along_axis(free, (before[..., None] + offset).reshape(batch, -1), 1)
    ids = jnp.where(taken, ids.reshape(taken.shape), NO_PAGE)
    fill = jnp.clip(lengths[..., None] - offset * size, 0, size)
    starts = starts[..., None] + offset * size
    pages = _write(pages, caches, ids, fill, starts)

    rows = jnp.arange(batch)[:, None]
    above = pages.table[rows, parents]
    count = pages.table_length[rows, parents]
    place = jnp.where(taken, count[..., None] + offset, pages.table.shape[-1])
    lanes = jnp.arange(width)[None, :, None]
    listed = above.at[rows[..., None], lanes, place].set(ids, mode="drop")
    return dataclasses.replace(
        pages,
        table=pages.table.at[rows, slots].set(listed, mode="drop"),
        table_length=pages.table_length.at[rows, slots].set(count + need, mode="drop"),
        owner=pages.owner.at[jnp.where(taken, ids, pages.owner.shape[0])].set(
            jnp.broadcast_to(slots[..., None], ids.shape), mode="drop"
        ),
    )


def release_pages(pages: KVPages, alive: Bool[Array, "B N"]) -> KVPages:
    """Frees the pages of dead nodes; what descends from a dead node must be dead too."""
    owner = pages.owner.reshape(alive.shape[0], -1)
    kept = jnp.take_along_axis(alive, jnp.maximum(owner, 0), 1)
    owner = jnp.where(kept, owner, NO_PAGE)
    return dataclasses.replace(pages, owner=owner.reshape(-1))


def keep_pages(pages: KVPages, nodes: Int32[Array, "B"], order: Int32[Array, "B N"]) -> KVPages:
    """Follows `keep_subtree`: each structure's node of `nodes` becomes its root.

    The pages of the path to it now belong to the root; those of nodes let go are free.

    Args:
      order: for each new slot the old index, -1 for a free one.
    """
    batch, size = order.shape
    rows = jnp.arange(batch)[:, None]
    old = pages.owner.reshape(batch, -1)
    new_index = jnp.full((batch, size), NO_PAGE, jnp.int32)
    index = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), order.shape)
    new_index = new_index.at[rows, jnp.where(order >= 0, order, size)].set(index, mode="drop")
    owner = jnp.where(old > 0, jnp.take_along_axis(new_index, jnp.maximum(old, 0), 1), old)
    owner = owner.reshape(-1)
    path = pages.table[rows[:, 0], nodes]
    owner = owner.at[jnp.where(path >= 0, path, owner.shape[0])].set(0, mode="drop")
    taken = jnp.maximum(order, 0)
    table = jnp.where((order >= 0)[..., None], pages.table[rows, taken], NO_PAGE)
    length = jnp.where(order >= 0, pages.table_length[rows, taken], 0)
    return dataclasses.replace(pages, owner=owner, table=table, table_length=length)


def gather_prompts(pages: KVPages) -> Context:
    """The prompts as one context, a group per structure."""
    return _gather(pages, pages.prompt_table)


def gather_paths(
    pages: KVPages, nodes: Int32[Array, "B W"], num_pages: int | None = None
) -> Context:
    """The steps from below the root down to each node, a group per node, in lane order.

    Args:
      num_pages: pages to gather per node, at least the longest of their lists (default: room for
        any).
    """
    rows = jnp.arange(nodes.shape[0])[:, None]
    table = pages.table[rows, nodes][..., :num_pages]
    return _gather(pages, table.reshape(-1, table.shape[-1]))


def path_buckets(pages: KVPages) -> tuple[int, ...]:
    """Numbers of pages that `gather_paths` is compiled for, ascending: a quarter, a half, all.

    Below `_LEAST_BUCKET` tokens a shorter context saves nothing worth another program.
    """
    longest = pages.table.shape[-1]
    least = count_pages(_LEAST_BUCKET, pages.page_tokens)
    return tuple(sorted({min(max(-(-longest // share), least), longest) for share in (4, 2, 1)}))


def _first_free(pages: KVPages, count: int) -> Int32[Array, "B count"]:
    """The lowest free pages of each structure's range; past them, pages that are in use."""
    free = pages.owner.reshape(pages.table.shape[0], -1) < 0
    size = free.shape[1]
    rank = jnp.where(free, size - jnp.arange(size, dtype=jnp.int32), 0)
    _, found = jax.lax.top_k(rank, min(count, size))
    found = jnp.pad(found, ((0, 0), (0, count - found.shape[1])))
    return found + jnp.arange(free.shape[0], dtype=jnp.int32)[:, None] * size


def _gather(pages: KVPages, table: Int32[Array, "X C"]) -> Context:
    ids = jnp.maximum(table, 0)
    offset = jnp.arange(pages.page_tokens, dtype=jnp.int32)
    valid = (table >= 0)[..., None] & (offset < pages.fill[ids][..., None])
    positions = pages.start[ids][..., None] + offset

    def take(pool):
        some = pool[ids].reshape(*ids.shape, pages.num_kv_heads, pages.page_tokens, -1)
        some = some.transpose(0, 2, 1, 3, 4)
        return some.reshape(*some.shape[:2], -1, some.shape[-1])

    # Apart, as half a product costs less where rows are not padded.
    keys, values = split_caches([take(pool) for pool in pages.pools])
    return Context(
        keys=keys,
        values=values,
        positions=positions.reshape(ids.shape[0], -1),
        valid=valid.reshape(ids.shape[0], -1),
    )


def _write(pages, caches, ids, fill, starts):
    """Puts rows of tokens [R, G, S, 2E] into pages `ids` [..., S / page]; skips negative ones."""
    flat = ids.reshape(-1)
    flat = jnp.where(flat >= 0, flat, pages.fill.shape[0])

    def put(pool, rows):
        split = rows.reshape(*rows.shape[:2], -1, pages.page_tokens, rows.shape[-1])
        split = split.transpose(0, 2, 1, 3, 4).reshape(-1, *pool.shape[1:]).astype(pool.dtype)
        return pool.at[flat].set(split, mode="drop")

    return dataclasses.replace(
        pages,
        pools=tuple(map(put, pages.pools, caches)),
        fill=pages.fill.at[flat].set(fill.reshape(-1), mode="drop"),
        start=pages.start.at[flat].set(starts.reshape(-1), mode="drop"),
    )
