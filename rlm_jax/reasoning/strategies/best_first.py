"""Best-first search: grow the open leaves of highest value, wherever in the tree they are.

Each round grows the W open leaves that the evaluator values most (spec A10, B12.17; A*-like; Tree
of Thoughts' search with a queue instead of levels, arXiv 2305.10601; OpenR, arXiv 2410.09671). No
statistics, no exploration: with an exact value the first solution found is a best one. Rules of the
sources as settings: `depth_bonus` leans towards deeper leaves (0: best-first; large: depth-first by
value, TS-LLM's DFS-V), `threshold` prunes what is valued below it (ToT's and TS-LLM's prune value),
`num_solutions` ends the search after so many finished ones.

Deviations: when nothing is open and the budget pays, the root is sampled anew (`resample`). Policy
and value are two opinions of one step: with `prior_weight` w the leaves are taken by the odds of
their value times the step's probability to the power of w (Levin tree search and PHS, arXiv
2103.11505, weigh a heuristic by the policy too, along the whole path).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool
from rlm_jax.reasoning.operators.evaluate import sibling_prior
from rlm_jax.reasoning.operators.structure import (
    generate,
    merge_children,
    put_children,
)
from rlm_jax.reasoning.operators.traversal import (
    ANSWER_RULES,
    AnswerRule,
    find_open,
    select_answer,
    stop_when_solved,
)
from rlm_jax.reasoning.protocol import Keys, Outcome, Request, Strategy
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure

# What is certain has odds all the same.
_LEAST_CHANCE = 1e-6


@struct
class State:
    """open: leaves that may still be grown."""

    open: Bool[Array, "B N"]


def make_best_first(
    *,
    num_lanes: int = 1,
    num_children: int = 4,
    max_depth: int = 16,
    depth_bonus: float = 0.0,
    prior_weight: float = 0.0,
    threshold: float | None = None,
    num_solutions: int | None = None,
    resample: bool = True,
    root_lanes: int = 1,
    merge_states: bool = False,
    answer_rule: AnswerRule = "weighted",
) -> Strategy:
    """The strategy with these settings.

    Args:
      num_lanes: W. num_children: K. max_depth: steps from the problem to the deepest node.
      depth_bonus: added to a leaf's value per step of its depth, for the choice alone.
      prior_weight: w of logit(value) + w log p(step), by which leaves are taken then; for values in
        [0, 1]. 0: by the value itself.
      threshold: unfinished steps valued below it are pruned at once; None prunes nothing.
      num_solutions: finished solutions at which the search ends; None: when budget or capacity do.
      resample: sample the root anew when nothing is open. root_lanes: lanes of K that it gets.
      merge_states: a step to a state that the structure holds already is merged with it
        (`merge_children`), and no state is grown twice; the expander names states by `state_key`.
      answer_rule: how the finished solutions vote, see `select_answer`.

    Raises:
      ValueError: a setting out of range.
    """
    numbers = {"num_lanes": num_lanes, "num_children": num_children, "max_depth": max_depth}
    numbers["root_lanes"] = root_lanes
    if num_solutions is not None:
        numbers["num_solutions"] = num_solutions
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be >= 1, got {number}")
    if root_lanes > num_lanes:
        raise ValueError(
            f"root_lanes={root_lanes} of num_lanes={num_lanes}: accepted is at most that"
        )
    for name, bonus in (("depth_bonus", depth_bonus), ("prior_weight", prior_weight)):
        if bonus < 0:
            raise ValueError(f"{name} must be >= 0, got {bonus}")
    if answer_rule not in ANSWER_RULES:
        raise ValueError(f"answer rule {answer_rule!r}: accepted are {ANSWER_RULES}")
    return Strategy(
        name="best_first",
        init=functools.partial(init, max_depth=max_depth),
        ask=functools.partial(
            ask,
            num_lanes=num_lanes,
            num_children=num_children,
            depth_bonus=depth_bonus,
            prior_weight=prior_weight,
            num_solutions=num_solutions,
            resample=resample,
            root_lanes=root_lanes,
        ),
        tell=functools.partial(
            tell, max_depth=max_depth, threshold=threshold, merge_states=merge_states
        ),
        answer=functools.partial(select_answer, rule=answer_rule),
        num_lanes=num_lanes,
        num_children=num_children,
    )


def init(structure: Structure, keys: Keys, *, max_depth: int) -> State:
    """The leaves that are open: the root alone, or those of what was grown."""
    del keys
    return State(find_open(structure, max_depth))


def ask(
    state: State,
    structure: Structure,
    keys: Keys,
    *,
    num_lanes: int,
    num_children: int,
    depth_bonus: float,
    prior_weight: float,
    num_solutions: int | None,
    resample: bool,
    root_lanes: int,
) -> Request:
    """K steps for each of the W best open leaves (ties: the one made first)."""
    del keys
    score = structure.value
    if prior_weight:
        odds = jax.scipy.special.logit(jnp.clip(score, _LEAST_CHANCE, 1 - _LEAST_CHANCE))
        score = odds + prior_weight * structure.logprob
    score += depth_bonus * structure.depth
    num_best = min(num_lanes, structure.capacity)
    score, nodes = jax.lax.top_k(jnp.where(state.open, score, -jnp.inf), num_best)
    nodes = jnp.where(jnp.isfinite(score), nodes, NO_NODE)
    nodes = jnp.pad(nodes, ((0, 0), (0, num_lanes - num_best)), constant_values=NO_NODE)
    at_root = state.open[:, :1]
    if resample:
        at_root |= ~state.open.any(-1, keepdims=True)
    # Only a fresh root is open, and then nothing else is.
    sampled = jnp.where(jnp.arange(num_lanes)[None] < root_lanes, 0, NO_NODE)
    nodes = jnp.where(at_root, sampled, nodes)
    nodes = stop_when_solved(structure, nodes.astype(jnp.int32), num_solutions)
    return Request(nodes, jnp.full_like(nodes, Operator.GENERATE), num_children)


def tell(
    state: State,
    structure: Structure,
    request: Request,
    outcome: Outcome,
    *,
    max_depth: int,
    threshold: float | None,
    merge_states: bool,
) -> tuple[State, Structure]:
    """Appends the steps: the grown leaves are closed, the new ones open."""
    if merge_states:
        structure, outcome = merge_children(structure, request, outcome)
    counted = request.grows[..., None] & outcome.valid & ~outcome.duplicate
    if threshold is not None:
        # Pruned before it takes part: its slot is taken, dead.
        counted &= outcome.terminal | (outcome.value >= threshold)
        outcome = dataclasses.replace(outcome, valid=outcome.valid & counted)
    prior = sibling_prior(request.nodes, outcome.logprob, outcome.length, counted)
    structure, slots = generate(structure, request, outcome, prior)
    rows = jnp.arange(request.nodes.shape[0])[:, None]
    at = jnp.where(request.grows, request.nodes, structure.capacity)
    opened = state.open.at[rows, at].set(False, mode="drop")
    depth = structure.depth[rows, jnp.maximum(request.nodes, 0)][..., None] + 1
    new = counted & ~outcome.terminal & (depth < max_depth)
    return State(put_children(opened, slots, new)), structure
