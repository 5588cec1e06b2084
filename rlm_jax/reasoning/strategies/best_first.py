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

With `widen` a node writes its likeliest steps first and stays open for those it has not written
(partial expansion: Yoshizumi, Miura and Ishida 2000, A* with Partial Expansion for Large Branching
Factor Problems). A turn then goes to the best step *to come*, whose value nobody knows yet. What is
known: the odds that its node can be solved, which fall with every step that was written in vain,
as Bayes' rule has it where the policy's probabilities are those of the steps that lead to a
solution; and that the step is no likelier than the last one, nor than all that is left together.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32
from rlm_jax.reasoning.operators.evaluate import LEAST_CHANCE, log_odds, sibling_prior
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
from rlm_jax.reasoning.structure import NO_NODE, Operator, Structure, at_nodes, put_at

# Of nodes that are widened: the share of steps that are right where a node can be solved, and the
# probability of its likeliest step, before anything is known; and a rest not worth another step.
_RIGHT_SHARE = 0.3
_FIRST_STEP = 0.3
_SPENT = 0.01


@struct
class Unwritten:
    """Of each node, the probability of all steps that it has not written, and of its last one."""

    rest: Float32[Array, "B N"]
    last: Float32[Array, "B N"]


@struct
class State:
    """open: nodes that may still be grown. unwritten: None where a node is grown once."""

    open: Bool[Array, "B N"]
    unwritten: Unwritten | None = None


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
    widen: bool = False,
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
      widen: a node stays open for steps that it has not written; the expander is to write none
        twice (`sampling.no_repeats`). Needs a prior_weight.
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
    if widen and not prior_weight:
        raise ValueError("widen=True: accepted is a prior_weight > 0 with it, got 0")
    if answer_rule not in ANSWER_RULES:
        raise ValueError(f"answer rule {answer_rule!r}: accepted are {ANSWER_RULES}")
    return Strategy(
        name="best_first",
        init=functools.partial(init, max_depth=max_depth, widen=widen, num_children=num_children),
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


def init(
    structure: Structure, keys: Keys, *, max_depth: int, widen: bool, num_children: int
) -> State:
    """The nodes that are open: the root alone, or those of what was grown."""
    del keys
    leaves = find_open(structure, max_depth)
    if not widen:
        return State(leaves)
    index = jnp.arange(structure.capacity)[None]
    made = (index > 0) & (index < structure.num_nodes[:, None])
    written = made & (structure.span_length > 0)
    chance = jnp.where(written, jnp.exp(structure.logprob), 0.0)
    rows = jnp.arange(chance.shape[0])[:, None]
    parent = jnp.where(made, structure.parent, structure.capacity)
    rest = jnp.ones_like(chance).at[rows, parent].add(-chance, mode="drop")
    # The K children of a node's last request are its K last ones.
    newest = jnp.zeros_like(structure.parent).at[rows, parent].max(index, mode="drop")
    of_last = newest[..., None] - jnp.arange(num_children)
    of_last = jnp.maximum(of_last, 0)
    least = jnp.where(written, chance, 1.0)[rows[..., None], of_last].min(-1)
    more = written[rows[..., None], of_last].any(-1) & (rest > _SPENT)
    last = jnp.where(newest > 0, least, _FIRST_STEP)
    return State(leaves | ((newest > 0) & more & structure.alive), Unwritten(rest, last))


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
        score = log_odds(score) + prior_weight * structure.logprob
    if state.unwritten is not None:
        score = _score_next(state.unwritten, score, prior_weight)
    score += depth_bonus * structure.depth
    num_best = min(num_lanes, structure.capacity)
    score, nodes = jax.lax.top_k(jnp.where(state.open, score, -jnp.inf), num_best)
    nodes = jnp.where(jnp.isfinite(score), nodes, NO_NODE)
    nodes = jnp.pad(nodes, ((0, 0), (0, num_lanes - num_best)), constant_values=NO_NODE)
    at_root = state.open[:, :1] & (structure.num_nodes == 1)[:, None]
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
    at = jnp.where(request.grows, request.nodes, structure.capacity)
    opened = put_at(state.open, at, jnp.zeros_like(request.grows))
    depth = at_nodes(structure.depth, request.nodes)[..., None] + 1
    new = counted & ~outcome.terminal & (depth < max_depth)
    old = state.unwritten
    if old is None:
        return State(put_children(opened, slots, new)), structure
    written = request.grows[..., None] & (outcome.length > 0)
    chance = jnp.where(written, jnp.exp(outcome.logprob), 0.0)
    rest = put_at(old.rest, at, -chance.sum(-1), add=True)
    least = jnp.where(written, chance, 1.0).min(-1)
    last = put_at(old.last, at, least)
    more = written.any(-1) & (at_nodes(rest, request.nodes) > _SPENT)
    opened = put_at(state.open, at, more)
    return State(put_children(opened, slots, new), Unwritten(rest, last)), structure


def _score_next(unwritten: Unwritten, odds: Float32[Array, "B N"], prior_weight: float) -> Array:
    """Of each node's next step, what `odds` and the step's probability are of a step that stands.

    Args:
      odds: the logarithm of the odds that a node can be solved, before it wrote anything.
    """
    rest = jnp.maximum(unwritten.rest, LEAST_CHANCE)
    # The problem itself can be solved, whatever its steps have come to.
    solvable = jax.nn.sigmoid(odds + jnp.log(rest)).at[:, 0].set(1.0)
    right = jax.scipy.special.logit(jnp.maximum(_RIGHT_SHARE * solvable, LEAST_CHANCE))
    # A long step may be too unlikely for float32.
    least = jnp.finfo(jnp.float32).tiny
    return right + prior_weight * jnp.log(jnp.maximum(jnp.minimum(unwritten.last, rest), least))
