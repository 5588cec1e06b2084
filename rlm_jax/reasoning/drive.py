"""Two drivers for any strategy and any expander.

The compiled driver is one `lax.while_loop` over expand, tell and ask: nothing leaves the device
until every structure of the batch is done. The host driver is a Python loop over the same
functions, for expanders that are not JAX programs (remote models, tools). Both give equal
structures for equal keys: a node's randomness is its problem's key and its own index.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlm_jax.core.types import PyTree
from rlm_jax.reasoning.protocol import Expand, Keys, Request, State, Strategy, World
from rlm_jax.reasoning.structure import NO_NODE, Structure, tokens_left


def run_compiled(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    keys: Keys,
    world: World,
    structure: Structure,
    *,
    step_tokens: int = 1,
) -> tuple[Structure, World]:
    """Grows every structure until its strategy stops or its budget or capacity ends.

    Call it inside `jax.jit` with `world` donated; the loop carries it and writes it in place.

    Args:
      keys: [B], one key per problem.
      world: what the structure refers to (KV pages, tokens); the expander's own affair.
      structure: B structures, freshly made or half grown.
      step_tokens: the longest step, see `next_request`.
    """

    def body(carry):
        state, structure, world, request = carry
        outcome, world = expand(params, keys, world, structure, request)
        state, structure = strategy.tell(state, structure, request, outcome)
        request = next_request(strategy, state, structure, keys, step_tokens)
        return state, structure, world, request

    state = strategy.init(structure, keys)
    request = next_request(strategy, state, structure, keys, step_tokens)
    carry = (state, structure, world, request)
    carry = jax.lax.while_loop(lambda carry: carry[-1].active.any(), body, carry)
    return carry[1], carry[2]


def run_host(
    strategy: Strategy,
    expand: Expand,
    params: PyTree,
    keys: Keys,
    world: World,
    structure: Structure,
    on_round: Callable[[int, Structure], None] | None = None,
    *,
    step_tokens: int = 1,
) -> tuple[Structure, World]:
    """The same search with the loop on the host; `expand` may be any Python function.

    Args:
      on_round: called after each round with its number and the structure so far.
    """

    @jax.jit
    def ask(state, structure):
        return next_request(strategy, state, structure, keys, step_tokens)

    tell = jax.jit(strategy.tell)
    state = jax.jit(strategy.init)(structure, keys)
    num_rounds = 0
    while True:
        request = ask(state, structure)
        if not bool(request.active.any()):
            return structure, world
        outcome, world = expand(params, keys, world, structure, request)
        state, structure = tell(state, structure, request, outcome)
        num_rounds += 1
        if on_round is not None:
            on_round(num_rounds, structure)


def next_request(
    strategy: Strategy, state: State, structure: Structure, keys: Keys, step_tokens: int = 1
) -> Request:
    """What the strategy asks for, less what a structure can no longer hold or pay for.

    Lanes are served in order as long as the budget pays for whole steps of `step_tokens` in all of
    them; the first is served while it pays for a token of each child. So the end of a budget goes
    into few whole steps and not into many torn ones.
    """
    request = strategy.ask(state, structure, keys)
    place = jnp.cumsum(request.grows, -1)
    num_new = place * request.num_children
    left = tokens_left(structure)[:, None]
    room = structure.num_nodes[:, None] + num_new <= structure.capacity
    funds = num_new * step_tokens <= left
    funds |= (place == 1) & (request.num_children <= left)
    served = room & funds | ~request.grows
    return dataclasses.replace(request, nodes=jnp.where(served, request.nodes, NO_NODE))
