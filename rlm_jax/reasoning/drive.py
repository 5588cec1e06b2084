"""Drivers for any strategy and any expander.

The compiled driver is a `lax.while_loop` over expand, tell and ask: nothing leaves the device until
every structure of the batch is done, or a chunk of rounds is (`advance`), after which the host may
look, save, or hand finished slots to new problems. The host drivers are Python loops over the same
functions, for expanders that are not JAX programs (remote models, tools): `advance_host` and
`run_host` in step, `run_apart` with every structure at its own pace and many requests in flight.
All give equal structures for equal keys: a node's randomness is its problem's key and its own
number.
"""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.order import zero_behind
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32, Key, PyTree
from rlm_jax.reasoning.operators.traversal import share_votes
from rlm_jax.reasoning.protocol import Expand, Keys, Request, State, Strategy, World
from rlm_jax.reasoning.structure import NO_NODE, Structure, tokens_left
from rlm_jax.reasoning.trace import Trace, clear_rows, log_round, make_trace


@dataclasses.dataclass(frozen=True)
class Limits:
    """When a structure gets no more requests, beside the strategy's own end.

    step_tokens: the longest step, for the end of a budget (`serve_lanes`). proven: stop at the
    first solution that a self-verifying task proves. min_value: stop when a solution is worth at
    least that (ReST-MCTS*'s end gate: 0.9). min_share, min_solutions: stop when so large a share of
    the votes, value-weighted, of at least so many solutions goes to one answer. Tokens and
    expansions have their limits in the structure.
    """

    step_tokens: int = 1
    proven: bool = True
    min_value: float | None = None
    min_share: float | None = None
    min_solutions: int = 3

    def __post_init__(self):
        for name in ("step_tokens", "min_solutions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.min_share is not None and not 0 < self.min_share <= 1:
            raise ValueError(f"min_share must be in (0, 1] or None, got {self.min_share}")


@struct
class Search:
    """A running search: all that it needs to go on, here or after a restart.

    request: what is to be expanded next; a structure without any is done. proven: structures with a
    proven solution. rounds: rounds each structure took part in.
    """

    keys: Key[Array, "B"]
    structure: Structure
    state: PyTree
    world: PyTree
    request: Request
    proven: Bool[Array, "B"]
    rounds: Int32[Array, "B"]
    trace: Trace | None = None

    @property
    def running(self) -> Bool[Array, "B"]:
        """Structures that are not done."""
        return self.request.active.any(-1)


def start(
    strategy: Strategy,
    keys: Keys,
    world: World,
    structure: Structure,
    *,
    limits: Limits = Limits(),
    trace_rounds: int = 0,
) -> Search:
    """A search that has asked for its first round.

    Args:
      keys: [B], one key per problem.
      world: what the structure refers to (KV pages, tokens); the expander's own affair.
      structure: B structures, freshly made or half grown.
      trace_rounds: rounds of the operator log to keep, see `Trace`.
    """
    state = strategy.init(structure, keys)
    proven = structure.proven.any(-1)
    request = _ask(strategy, state, structure, keys, proven, limits)
    trace = make_trace(structure, request, trace_rounds) if trace_rounds else None
    rounds = structure.num_nodes * 0
    return Search(keys, structure, state, world, request, proven, rounds, trace)


def advance(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    search: Search,
    *,
    limits: Limits = Limits(),
    max_rounds: int | Array | None = None,
    min_finished: int | Array | None = None,
) -> Search:
    """Grows every structure until all are done, or for a chunk of the way.

    Call it inside `jax.jit` with `search` donated: the loop carries its world and writes it in
    place. A round of few lanes costs what those need, where the strategy knows several widths.

    Args:
      max_rounds: rounds after which to return. min_finished: structures that, once they finish
        during this call, make it return.
    """
    still = search.running

    def goes_on(carry):
        count, search = carry
        goes = search.running.any()
        if max_rounds is not None:
            goes &= count < max_rounds
        if min_finished is not None:
            goes &= (still & ~search.running).sum() < min_finished
        return goes

    def body(carry):
        count, search = carry
        search = _grow_in_width(strategy, expand, params, search)
        request = _ask(strategy, search.state, search.structure, search.keys, search.proven, limits)
        return count + 1, dataclasses.replace(search, request=request)

    return jax.lax.while_loop(goes_on, body, (still.sum() * 0, search))[1]


def replace_rows(
    strategy: Strategy,
    search: Search,
    rows: Int32[Array, "F"],
    keys: Keys,
    structure: Structure,
    world: World,
    *,
    limits: Limits = Limits(),
) -> Search:
    """Lets F new problems take rows of a running search; the others go on as they were.

    Args:
      rows: B leaves one out. keys: [F], of the new problems. structure, world: of the
        whole batch, the new problems in their rows already.
    """

    def put(array: Array, new: Array) -> Array:
        return array.at[rows].set(new, mode="drop")

    # Rows that are left out read some row or other, and write none.
    places = jnp.minimum(rows, structure.num_nodes.shape[0] - 1)
    fresh = strategy.init(jax.tree.map(lambda array: array[places], structure), keys)
    keys, state = jax.tree.map(put, (search.keys, search.state), (keys, fresh))
    trace = search.trace
    if trace is not None:
        trace = clear_rows(trace, rows, structure)
    proven = structure.proven.any(-1)
    return Search(
        keys=keys,
        structure=structure,
        state=state,
        world=world,
        request=_ask(strategy, state, structure, keys, proven, limits),
        proven=proven,
        rounds=put(search.rounds, jnp.zeros_like(rows)),
        trace=trace,
    )


def run_compiled(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    keys: Keys,
    world: World,
    structure: Structure,
    *,
    limits: Limits = Limits(),
) -> tuple[Structure, World]:
    """`start` and `advance` to the end. Call it inside `jax.jit` with `world` donated."""
    search = start(strategy, keys, world, structure, limits=limits)
    search = advance(strategy, expand, params, search, limits=limits)
    return search.structure, search.world


def advance_host(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    search: Search,
    on_round: Callable[[int, Structure], None] | None = None,
    *,
    limits: Limits = Limits(),
    max_rounds: int | None = None,
    min_finished: int | None = None,
) -> Search:
    """`advance` with the loop on the host; `expand` may be any Python function.

    Args:
      on_round: called after each round with its number and the structure so far.
    """
    tell_and_ask, _ = _host_functions(strategy, limits)
    still = np.asarray(search.running)
    num_rounds = 0
    while True:
        running = np.asarray(search.running)
        finished = (still & ~running).sum()
        enough = max_rounds is not None and num_rounds >= max_rounds
        if enough or not running.any() or (min_finished is not None and finished >= min_finished):
            return search
        outcome, world = expand(params, search.keys, search.world, search.structure, search.request)
        # Worlds of other expanders are no arrays: they go around what is compiled.
        search = tell_and_ask(dataclasses.replace(search, world=None), outcome)
        search = dataclasses.replace(search, world=world)
        num_rounds += 1
        if on_round is not None:
            on_round(num_rounds, search.structure)


def run_host(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    keys: Keys,
    world: World,
    structure: Structure,
    on_round: Callable[[int, Structure], None] | None = None,
    *,
    limits: Limits = Limits(),
) -> tuple[Structure, World]:
    """`start` and `advance_host` to the end."""
    _, begin = _host_functions(strategy, limits)
    search = dataclasses.replace(begin(keys, None, structure), world=world)
    search = advance_host(strategy, expand, params, search, on_round, limits=limits)
    return search.structure, search.world


def run_apart(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    keys: Keys,
    worlds: Sequence[Any],
    structure: Structure,
    on_round: Callable[[int, Structure], None] | None = None,
    *,
    in_flight: int,
    limits: Limits = Limits(),
) -> tuple[Structure, list[Any]]:
    """The host driver with every structure at its own pace, `in_flight` of them at a time.

    For expanders that wait (a remote model): a structure's next request goes out as soon as its
    own last one is answered. `expand` is called from several threads, with batches of one.

    Args:
      worlds: a world per structure, of any type. on_round: called with the structure's place in
        the batch and the structure, from its thread.

    Raises:
      ValueError: in_flight is below 1, or worlds are not as many as structures.
    """
    batch = structure.num_nodes.shape[0]
    if in_flight < 1:
        raise ValueError(f"in_flight must be >= 1, got {in_flight}")
    if len(worlds) != batch:
        raise ValueError(f"{len(worlds)} worlds for {batch} structures")

    def search_one(row: int) -> tuple[Structure, Any]:
        one = jax.tree.map(lambda array: array[row : row + 1], structure)

        def report(_: int, grown: Structure) -> None:
            if on_round is not None:
                on_round(row, grown)

        return run_host(
            strategy,
            expand,
            params,
            keys[row : row + 1],
            worlds[row],
            one,
            report,
            limits=limits,
        )

    with concurrent.futures.ThreadPoolExecutor(in_flight) as pool:
        done = list(pool.map(search_one, range(batch)))
    structures = [one for one, _ in done]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *structures)
    return joined, [world for _, world in done]


def next_request(
    strategy: Strategy,
    state: State,
    structure: Structure,
    keys: Keys,
    *,
    limits: Limits = Limits(),
    num_lanes: int | None = None,
    proven: Bool[Array, "B"] | None = None,
) -> Request:
    """What the strategy asks for, less what a structure has no use, room or budget for.

    Args:
      num_lanes: one of the strategy's widths. proven: structures with a proven solution, where that
        is known already.
    """
    if num_lanes is None:
        request = strategy.ask(state, structure, keys)
    else:
        request = strategy.ask(state, structure, keys, num_lanes=num_lanes)
    request = serve_lanes(request, structure, limits.step_tokens)
    proven = structure.proven.any(-1) if proven is None else proven
    settled = _is_settled(structure, proven, limits)
    nodes = jnp.where(settled[:, None], NO_NODE, request.nodes)
    return dataclasses.replace(request, nodes=nodes)


def serve_lanes(request: Request, structure: Structure, step_tokens: int) -> Request:
    """Drops lanes that the capacity cannot hold or the budget cannot pay.

    Lanes are served in order as long as the budget pays for whole steps of `step_tokens` in all of
    them; the first is served while it pays for a token of each child. So the end of a budget goes
    into few whole steps and not into many torn ones.
    """
    place = jnp.cumsum(request.grows, -1)
    num_new = place * request.num_children
    left = tokens_left(structure)[:, None]
    room = structure.num_nodes[:, None] + num_new <= structure.capacity
    funds = num_new * step_tokens <= left
    funds |= (place == 1) & (request.num_children <= left)
    room &= place <= (structure.expansion_limit - structure.budget.expansions)[:, None]
    served = room & funds | ~request.grows
    return dataclasses.replace(request, nodes=jnp.where(served, request.nodes, NO_NODE))


def _grow_in_width(strategy, expand, params, search) -> Search:
    """Expands the request with as few lanes as it has, tells the strategy and clears the request.

    Each width is a loop of at most one turn: a `switch` would copy what it passes through, pools
    and all, and a loop does not. What a turn leaves as it is, the compiler computes before the
    loops, for all widths: hence the request that is used up.
    """
    widths = strategy.widths or (strategy.num_lanes,)
    if len(widths) == 1:
        return _grow(strategy, expand, params, search, widths[0])
    needed = _columns(search.request)

    def grow(width, carry):
        search = _grow(strategy, expand, params, carry[1], width)
        served = dataclasses.replace(
            search.request,
            nodes=jnp.full_like(search.request.nodes, NO_NODE),
            operator=jnp.zeros_like(search.request.operator),
        )
        return carry[0] & False, dataclasses.replace(search, request=served)

    carry = (needed > 0, search)
    for width, narrower in zip(widths, (*widths[1:], 0), strict=True):
        fits = (needed <= width) & (needed > narrower)
        carry = jax.lax.while_loop(
            lambda carry, fits=fits: carry[0] & fits, functools.partial(grow, width), carry
        )
    return carry[1]


def _grow(strategy, expand, params, search, width) -> Search:
    """One round of the first `width` lanes; the request is left as it was."""
    asked = search.request
    request = asked
    if width < strategy.num_lanes:
        request = dataclasses.replace(
            asked, nodes=asked.nodes[:, :width], operator=asked.operator[:, :width]
        )
    outcome, world = expand(params, search.keys, search.world, search.structure, request)
    # The expander reads what is about to be written.
    behind = zero_behind(outcome.logprob.astype(jnp.float32).sum((1, 2)))[:, None]
    request = dataclasses.replace(request, nodes=request.nodes + behind)
    return dataclasses.replace(_tell(strategy, search, request, outcome), world=world)


def _tell(strategy, search, request, outcome) -> Search:
    """The search with an outcome in it; its request and its world are left as they were."""
    state, structure = strategy.tell(search.state, search.structure, request, outcome)
    solved = outcome.proven & outcome.terminal & outcome.valid & ~outcome.duplicate
    trace = search.trace
    if trace is not None:
        trace = log_round(
            trace, search.rounds, search.request, outcome, search.structure, structure
        )
    return dataclasses.replace(
        search,
        structure=structure,
        state=state,
        proven=search.proven | solved.any((1, 2)),
        rounds=search.rounds + search.running,
        trace=trace,
    )


def _ask(strategy, state, structure, keys, proven, limits) -> Request:
    """`next_request` of as few lanes as the round has, padded to W."""
    count_lanes = strategy.count_lanes
    if count_lanes is None:
        return next_request(strategy, state, structure, keys, limits=limits, proven=proven)
    widths = strategy.widths

    def ask(width):
        request = next_request(
            strategy, state, structure, keys, limits=limits, num_lanes=width, proven=proven
        )
        spare = ((0, 0), (0, strategy.num_lanes - width))
        return dataclasses.replace(
            request,
            nodes=jnp.pad(request.nodes, spare, constant_values=NO_NODE),
            operator=jnp.pad(request.operator, spare),
        )

    def rest():
        request = jax.eval_shape(branches[-1])
        idle = jnp.broadcast_to(structure.num_nodes[:, None] * 0, request.nodes.shape)
        return dataclasses.replace(request, nodes=idle + NO_NODE, operator=idle)

    most = count_lanes(state, structure).max()
    branches = [functools.partial(ask, width) for width in widths]
    if len(widths) == 1:
        return branches[0]()
    # Where nobody asks any more, nothing is looked at.
    place = (most <= jnp.asarray((*widths[1:], 0))).sum()
    return jax.lax.switch(place, [*branches, rest])


def _columns(request: Request) -> Int32[Array, ""]:
    """Lanes up to the last active one of any structure."""
    index = jnp.arange(1, request.nodes.shape[1] + 1, dtype=jnp.int32)
    return jnp.where(request.active, index, 0).max()


def _is_settled(structure: Structure, proven: Bool[Array, "B"], limits: Limits) -> Bool[Array, "B"]:
    """Structures whose answer needs no more search."""
    settled = proven & limits.proven
    if limits.min_value is None and limits.min_share is None:
        return settled
    solved = structure.terminal & structure.alive
    if limits.min_value is not None:
        settled |= (solved & (structure.value >= limits.min_value)).any(-1)
    if limits.min_share is not None:
        enough = solved.sum(-1) >= limits.min_solutions
        share = share_votes(structure.answer_key, jnp.where(solved, structure.value, 0.0))
        settled |= enough & (share >= limits.min_share)
    return settled


@functools.cache
def _host_functions(strategy: Strategy, limits: Limits):
    """Jitted parts of a host search: searches of one shape share their programs."""

    def tell_and_ask(search, outcome):
        search = _tell(strategy, search, search.request, outcome)
        request = _ask(strategy, search.state, search.structure, search.keys, search.proven, limits)
        return dataclasses.replace(search, request=request)

    return jax.jit(tell_and_ask), jax.jit(functools.partial(start, strategy, limits=limits))
