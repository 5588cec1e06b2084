"""Step beam search: W partial solutions side by side, the best steps of all go on.

Every beam samples K next steps, the evaluator's values rank all W * K of them together, and the
best W go on (spec C3.3, G-5; Snell et al., arXiv 2408.03314; AlphaMath's SBS(B1, B2) with B1 = W
beams and B2 = K children, arXiv 2405.03553). The root is sampled by all beams at first: N = W * K
first steps, or by `root_lanes` of them. Finished solutions leave the beam and stay in the
structure, where they vote; a candidate that is dropped, and a beam that lost all its candidates, is
pruned, which frees its pages.

Deviations: finished solutions are never dropped. Where search-and-learn copies beams to refill N,
missing beams leave their lanes idle. A beam that the end of a budget left unserved competes with
the new steps. How the steps of a solution make its value (last, min, prod) is the evaluator's
affair.
"""

import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32
from rlm_jax.reasoning.operators.evaluate import sibling_prior
from rlm_jax.reasoning.operators.structure import generate, prune, put_children
from rlm_jax.reasoning.operators.traversal import (
    ANSWER_RULES,
    AnswerRule,
    find_open,
    select_answer,
    stop_when_solved,
    was_grown,
)
from rlm_jax.reasoning.operators.update import add_to_paths
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, at_nodes

DROPPED = ("prune", "keep")


@struct
class State:
    """beams: what goes on, best first, -1 where there is none. width: how many may go on.

    leaves: living leaves at or below each node, by which `prune` finds dead ends.
    """

    beams: Int32[Array, "B W"]
    width: Int32[Array, "B"]
    leaves: Int32[Array, "B N"]


def make_beam(
    *,
    beam_width: int = 4,
    num_children: int = 4,
    max_depth: int = 16,
    root_lanes: int | None = None,
    shrink: bool = False,
    dropped: str = "prune",
    num_solutions: int | None = None,
    answer_rule: AnswerRule = "weighted",
) -> Strategy:
    """The strategy with these settings.

    Args:
      beam_width: W. num_children: K. max_depth: steps from the problem to the deepest node.
      root_lanes: beams that sample the root; None: all of them.
      shrink: finished solutions among the best W take their place in the beam with them
        (AlphaMath); otherwise the best W unfinished ones go on (search-and-learn).
      dropped: what becomes of other unfinished candidates, "prune" or "keep" (for the record).
      num_solutions: finished solutions at which the search ends; None: when nothing goes on.
      answer_rule: how the finished solutions vote, see `select_answer`.

    Raises:
      ValueError: a setting out of range.
    """
    numbers = {"beam_width": beam_width, "num_children": num_children, "max_depth": max_depth}
    root_lanes = beam_width if root_lanes is None else root_lanes
    numbers["root_lanes"] = root_lanes
    if num_solutions is not None:
        numbers["num_solutions"] = num_solutions
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    if root_lanes > beam_width:
        raise ValueError(
            f"root_lanes={root_lanes} of beam_width={beam_width}: accepted is at most that"
        )
    if dropped not in DROPPED:
        raise ValueError(f"dropped {dropped!r}: accepted are {DROPPED}")
    if answer_rule not in ANSWER_RULES:
        raise ValueError(f"answer rule {answer_rule!r}: accepted are {ANSWER_RULES}")
    return Strategy(
        name="beam",
        init=functools.partial(
            init,
            beam_width=beam_width,
            root_lanes=root_lanes,
            max_depth=max_depth,
            shrink=shrink,
        ),
        ask=functools.partial(ask, num_children=num_children, num_solutions=num_solutions),
        tell=functools.partial(tell, max_depth=max_depth, shrink=shrink, dropped=dropped),
        answer=functools.partial(select_answer, rule=answer_rule),
        num_lanes=beam_width,
        num_children=num_children,
    )


def init(
    structure: Structure,
    keys: Keys,
    *,
    beam_width: int,
    root_lanes: int,
    max_depth: int,
    shrink: bool,
) -> State:
    """Beams at the root, or at the best leaves of what was grown; each finished one shrinks."""
    del keys
    index = jnp.arange(structure.capacity, dtype=jnp.int32)[None]
    nodes = jnp.broadcast_to(index, structure.alive.shape)
    leaf = structure.alive & ~was_grown(structure)
    finished = (structure.alive & structure.terminal).sum(-1).astype(jnp.int32)
    width = jnp.maximum(beam_width - finished * shrink, 0)
    goes_on = find_open(structure, max_depth) & (index > 0)
    beams, _ = _pick(nodes, structure.value, goes_on, width, beam_width)
    at_root = jnp.where(jnp.arange(beam_width) < root_lanes, 0, NO_NODE)
    beams = jnp.where(structure.num_nodes[:, None] <= 1, at_root, beams)
    leaves = add_to_paths(structure, structure.depth * 0, jnp.where(leaf, nodes, NO_NODE), leaf)
    return State(beams, width, leaves)


def ask(
    state: State,
    structure: Structure,
    keys: Keys,
    *,
    num_children: int,
    num_solutions: int | None,
) -> Request:
    """K steps for every beam."""
    del keys
    nodes = stop_when_solved(structure, state.beams, num_solutions)
    return Request(nodes, jnp.full_like(nodes, Operator.GENERATE), num_children)


def tell(
    state: State,
    structure: Structure,
    request: Request,
    outcome: Outcome,
    *,
    max_depth: int,
    shrink: bool,
    dropped: str,
) -> tuple[State, Structure]:
    """Appends the steps, picks the beams that go on and prunes the others."""
    counted = request.grows[..., None] & outcome.valid & ~outcome.duplicate
    prior = sibling_prior(request.nodes, outcome.logprob, outcome.length, counted)
    structure, slots = generate(structure, request, outcome, prior)
    batch, num_beams = state.beams.shape
    # The root waits only where nothing was served at all.
    waits = (state.beams >= 0) & ~request.active
    waits &= (state.beams > 0) | ~request.active.any(-1, keepdims=True)

    def join(of_beams: Array, of_steps: Array) -> Array:
        return jnp.concatenate([of_beams, of_steps.reshape(batch, -1)], 1)

    fits = join(waits, counted if shrink else counted & ~outcome.terminal)
    value = join(at_nodes(structure.value, state.beams), outcome.value)
    best, chosen = _pick(join(state.beams, slots), value, fits, state.width, num_beams)
    ended = at_nodes(structure.terminal, best) & (best >= 0)
    beams = jnp.where(ended | (at_nodes(structure.depth, best) >= max_depth), NO_NODE, best)
    width = state.width - ended.sum(-1).astype(jnp.int32) * shrink
    if dropped == "keep":
        return State(beams, width, state.leaves), structure

    steps = chosen[:, num_beams:].reshape(slots.shape)
    kept = counted & (steps | outcome.terminal)
    # A beam was one leaf; its kept steps take its place. One that waits and is chosen stays one.
    change = kept.sum(-1) - (request.grows | waits & ~chosen[:, :num_beams])
    leaves = put_children(state.leaves, slots, kept)
    leaves = add_to_paths(structure, leaves, state.beams, change)
    return State(beams, width, leaves), prune(structure, leaves <= 0)


def _pick(
    nodes: Int32[Array, "B M"],
    value: Float32[Array, "B M"],
    fits: Bool[Array, "B M"],
    width: Int32[Array, "B"],
    num_beams: int,
) -> tuple[Int32[Array, "B W"], Bool[Array, "B M"]]:
    """The `width` best of the nodes that fit, best first (ties: the first), and which they are."""
    num_best = min(num_beams, nodes.shape[1])
    score, at = jax.lax.top_k(jnp.where(fits, value, -jnp.inf), num_best)
    real = (jnp.arange(num_best)[None] < width[:, None]) & jnp.isfinite(score)
    rows = jnp.arange(nodes.shape[0])[:, None]
    chosen = jnp.zeros_like(fits).at[rows, at].set(real)
    best = jnp.where(real, nodes[rows, at], NO_NODE)
    spare = ((0, 0), (0, num_beams - num_best))
    return jnp.pad(best, spare, constant_values=NO_NODE), chosen
