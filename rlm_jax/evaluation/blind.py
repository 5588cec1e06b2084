"""Countdown searched without a network: the row every result must stand beside.

The one idea: the same strategies run over an expander that proposes legal moves at random, each as
likely as another, and judges nothing. What a search finds then, it owes to the strategy and to the
size of the tree, and a network has to beat it at the same expansions.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.budget import zero_budget
from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Int32, PyTree
from rlm_jax.reasoning.drive import run_compiled
from rlm_jax.reasoning.operators.structure import child_numbers, child_slots
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy, make_outcome
from rlm_jax.reasoning.structure import UNLIMITED, Structure, make_structure
from rlm_jax.tasks.countdown_device import hash_numbers

MAX_NUMBERS = 6
_NONE = -1
_MAX_RESULT = 10**4
_UNKNOWN = 0.5


@struct
class Numbers:
    """What is left at each node: numbers [B, N, 6] falling, -1 behind them; targets [B]."""

    numbers: Int32[Array, "B N 6"]
    target: Int32[Array, "B"]


@struct
class BlindResult:
    """Of B problems: a solution was found, and the expansions it took."""

    solved: Bool[Array, "B"]
    expansions: Int32[Array, "B"]


def search_blindly(
    strategy: Strategy,
    problems: Sequence[tuple[Sequence[int], int]],
    *,
    num_nodes: int,
    max_expansions: int | None,
    seed: int,
) -> BlindResult:
    """Runs a strategy on problems (numbers, target) with random legal moves and no values.

    Compiles once for a strategy, a number of problems and of nodes, whatever else differs.

    Args:
      max_expansions: of each problem; None leaves the end to the nodes.

    Raises:
      ValueError: a problem of over six numbers.
    """
    size = max(len(numbers) for numbers, _ in problems)
    if size > MAX_NUMBERS:
        raise ValueError(f"a problem of {size} numbers: blind search takes up to {MAX_NUMBERS}")
    roots = np.full((len(problems), MAX_NUMBERS), _NONE, np.int32)
    for row, (numbers, _) in enumerate(problems):
        roots[row, : len(numbers)] = sorted(numbers, reverse=True)
    targets = np.array([target for _, target in problems], np.int32)
    most = UNLIMITED if max_expansions is None else max_expansions
    limits = np.full(len(problems), most, np.int32)
    run = _compile(strategy, len(problems), num_nodes)
    return run(jax.random.key(seed), roots, targets, limits)


@functools.lru_cache(maxsize=8)
def _compile(strategy: Strategy, num_problems: int, num_nodes: int) -> Callable[..., BlindResult]:
    key, row = jax.random.key(0), jax.ShapeDtypeStruct((num_problems,), jnp.int32)
    numbers = jax.ShapeDtypeStruct((num_problems, MAX_NUMBERS), jnp.int32)

    def run(key: Array, roots: Array, targets: Array, limits: Array) -> BlindResult:
        # Known zeros would be computed with while compiling, for minutes.
        structure = jax.lax.optimization_barrier(
            make_structure(targets * 0, num_nodes, expansion_limit=limits)
        )
        numbers = jnp.broadcast_to(roots[:, None], (num_problems, num_nodes, MAX_NUMBERS))
        keys = jax.random.split(key, num_problems)
        structure, _ = run_compiled(
            strategy, expand_blindly, (), keys, Numbers(numbers, targets), structure
        )
        return BlindResult(structure.proven.any(-1), structure.budget.expansions)

    return jax.jit(run).lower(key, numbers, row, row).compile()


def expand_blindly(
    params: PyTree, keys: Keys, world: Numbers, structure: Structure, request: Request
) -> tuple[Outcome, Numbers]:
    """K distinct legal moves of each requested node, drawn evenly without replacement."""
    del params
    slots = child_slots(structure, request)
    first = child_numbers(structure, request)[..., 0]
    nodes = jnp.maximum(request.nodes, 0)
    index = jnp.arange(nodes.shape[0])[:, None]

    def draw(key: Array, number: Array, numbers: Array, target: Array):
        states, legal = _list_moves(numbers)
        noise = jax.random.gumbel(jax.random.fold_in(key, number), legal.shape)
        scores, chosen = jax.lax.top_k(jnp.where(legal, noise, -jnp.inf), request.num_children)
        children = states[chosen]
        ended = children[:, 1] == _NONE
        solved = ended & (children[:, 0] == target)
        even = jnp.broadcast_to(-jnp.log(legal.sum().astype(jnp.float32)), scores.shape)
        return children, jnp.isfinite(scores), ended, solved, hash_numbers(children), even

    of_lanes = jax.vmap(jax.vmap(draw, (None, 0, 0, None)))
    children, made, ended, solved, state_key, logprob = of_lanes(
        keys, first, world.numbers[index, nodes], world.target
    )
    valid = made & request.grows[..., None] & (solved | ~ended)
    outcome = make_outcome(
        valid=valid,
        length=(made & request.grows[..., None]).astype(jnp.int32),
        logprob=jnp.where(made, logprob, 0.0),
        value=jnp.where(solved, 1.0, _UNKNOWN),
        terminal=ended,
        state_key=jnp.where(ended, 0, state_key),
        proven=solved,
        node_value=jnp.full(slots.shape[:2], _UNKNOWN),
        cost=dataclasses.replace(
            zero_budget(structure.num_nodes),
            generated_tokens=valid.sum((1, 2)).astype(jnp.int32),
            expansions=request.grows.sum(-1).astype(jnp.int32),
        ),
    )
    numbers = world.numbers.at[index[..., None], slots].set(children, mode="drop")
    return outcome, dataclasses.replace(world, numbers=numbers)


def _list_moves(numbers: Int32[Array, "6"]) -> tuple[Int32[Array, "A 6"], Bool[Array, "A"]]:
    """The states behind all moves of a state, and which of them are legal and new."""
    high, low = np.triu_indices(MAX_NUMBERS, 1)
    left, right = numbers[high], numbers[low]
    divisor = jnp.maximum(right, 1)
    results = jnp.stack([left + right, left - right, left * right, left // divisor])
    divides = (right > 0) & (left % divisor == 0)
    fits = left.astype(jnp.float32) * right < _MAX_RESULT
    always = jnp.ones_like(fits)
    legal = jnp.stack([always, always, fits, divides]) & (right != _NONE)
    keep = np.ones((len(high), MAX_NUMBERS), bool)
    keep[np.arange(len(high)), high] = keep[np.arange(len(high)), low] = False
    kept = jnp.where(jnp.asarray(keep), numbers, _NONE)
    states = jnp.broadcast_to(kept, (4, *kept.shape)).at[:, np.arange(len(high)), low].set(results)
    states = -jnp.sort(-states.reshape(-1, MAX_NUMBERS))
    # The same two numbers at other places make the same moves.
    same = (left[:, None] == left) & (right[:, None] == right)
    new = ~(same & np.tril(np.ones(same.shape, bool), -1)).any(-1)
    return states, (legal & new).reshape(-1)
