"""What a language model's paths are worth: the evaluators behind `language.py` (Blueprint 4.3.4).

All values are in [0, 1] but for a value head or a `dead_value` of another range:
  confidence  mean token confidence of the path (Marco-o1, arXiv 2411.14405; spec B12.10)
  likelihood  exp of the path's mean token log-probability
  entropy     exp of minus the mean entropy of the policy's next-token distributions along the path:
              1 where it was sure of every token, 1 / V where it knew nothing (spec B7)
  varentropy  exp of minus the mean variance of their surprise: 1 where all that may come is equally
              likely, a sure token included; low where the likely stands beside much that is not
  consistency the share of the structure's finished solutions that state the same answer (rStar's
              terminal reward, arXiv 2408.06195); an unfinished path is worth 0 until one finishes
  p_yes       the policy's own P(yes) when asked whether the reasoning so far is right
  value_head  a value head on the state after the step (spec B3)
  state_value a network of its own, on what the task says the state is (`models/state_value.py`)
  state_lookahead the best that it says of the states one step on (`language_lookahead.py`)
  rollout     what comes of the path when the policy finishes it (`language_rollout.py`)
  none        0
A score of p_yes, value_head, state_value or state_lookahead judges one step; `aggregate` makes the
path's value of them. Several evaluators are mixed by weights: "value_head=0.5,rollout=0.5".
"""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float, Float32, Int32, Key, PyTree, UInt32
from rlm_jax.inference.attention import Context
from rlm_jax.inference.extend import extend, last_hidden, yes_probability
from rlm_jax.inference.sampling import Uncertainty
from rlm_jax.models.config import ModelConfig
from rlm_jax.models.params import Params
from rlm_jax.models.state_value import StateValue, apply_state_value
from rlm_jax.reasoning.language_lookahead import Ahead
from rlm_jax.reasoning.operators.evaluate import accumulate_score, self_consistency
from rlm_jax.reasoning.structure import Structure
from rlm_jax.tasks.device import DeviceTask
from rlm_jax.text.answers import AnswerState

EVALUATORS = (
    "confidence", "likelihood", "entropy", "varentropy", "consistency", "p_yes", "value_head",
    "state_value", "state_lookahead", "rollout", "none",
)  # fmt: skip
UNCERTAINTIES = ("entropy", "varentropy")
STATE_JUDGES = ("state_value", "state_lookahead")
STEP_SCORES = ("p_yes", "value_head", *STATE_JUDGES)
ValueFn = Callable[[PyTree, Array], Array]


@struct
class Judge:
    """The question behind evaluator "p_yes", as token ids.

    unfinished, finished: what follows a step that did not, or did, end the solution, [J] right
    padded; the lengths; yes_ids, no_ids: the tokens that say so.
    """

    unfinished: Int32[Array, "J"]
    finished: Int32[Array, "J"]
    unfinished_length: Int32[Array, ""]
    finished_length: Int32[Array, ""]
    yes_ids: Int32[Array, "Y"]
    no_ids: Int32[Array, "Z"]


@struct
class Paths:
    """R paths to be judged, R / B of each structure, in order.

    logprob, confidence: sums over the generated tokens. num_tokens: how many. hidden: the state
    after the last. terminal, answer_key: as in `Structure`. depth: its steps. above: the value of
    the path less its last step. ends: position behind the last token. fresh: worth judging at all.
    answers, task_state: where the answer's automaton and the task stand. keys: one per path.
    uncertainty: a sum like the first two; None if no evaluator of `UNCERTAINTIES` is in use.
    ahead: what lies one step on; None if no evaluator asks.
    """

    logprob: Float32[Array, "R"]
    confidence: Float32[Array, "R"]
    num_tokens: Int32[Array, "R"]
    hidden: Float[Array, "R D"]
    terminal: Bool[Array, "R"]
    answer_key: UInt32[Array, "R"]
    depth: Int32[Array, "R"]
    above: Float32[Array, "R"]
    ends: Int32[Array, "R"]
    fresh: Bool[Array, "R"]
    answers: AnswerState
    task_state: PyTree
    keys: Key[Array, "R"]
    uncertainty: Uncertainty | None = None
    ahead: Ahead | None = None


def parse_evaluator(evaluator: str | Mapping[str, float]) -> dict[str, float]:
    """The weight of each evaluator that a setting names: "confidence", "p_yes=1,rollout=3".

    Raises:
      ValueError: an unknown evaluator, one named twice, a weight that is no number or negative, or
        weights that are all 0.
    """
    pairs = (
        [item.partition("=")[::2] for item in evaluator.split(",")]
        if isinstance(evaluator, str)
        else list(evaluator.items())
    )
    weights: dict[str, float] = {}
    for name, weight in pairs:
        name = name.strip()
        if name not in EVALUATORS:
            raise ValueError(f"evaluator {name!r}: accepted are {', '.join(EVALUATORS)}")
        if name in weights:
            raise ValueError(f"evaluator {name!r} is named twice in {evaluator!r}")
        try:
            weights[name] = float(weight) if weight != "" else 1.0
        except (TypeError, ValueError):
            raise ValueError(f"evaluator weight {name}={weight!r}: accepted is a number") from None
        if not 0 <= weights[name] < math.inf:
            raise ValueError(f"evaluator weight {name}={weight!r}: accepted is a number >= 0")
    if not sum(weights.values()) > 0:
        raise ValueError(f"evaluator {evaluator!r}: its weights must sum to more than 0")
    return weights


def needs_uncertainty(evaluator: str) -> bool:
    """Whether a setting names an evaluator of `UNCERTAINTIES`: decoding has to provide for it."""
    return not set(UNCERTAINTIES).isdisjoint(parse_evaluator(evaluator))


def needs_state_value(evaluator: str | Mapping[str, float]) -> bool:
    """Whether a setting names an evaluator that asks the network for states."""
    return not set(STATE_JUDGES).isdisjoint(parse_evaluator(evaluator))


def looks_ahead(evaluator: str | Mapping[str, float]) -> bool:
    """Whether a setting names an evaluator that reads the states one step on."""
    return "state_lookahead" in parse_evaluator(evaluator)


def needs_contexts(evaluator: str) -> bool:
    """Whether a setting names an evaluator that the policy forwards tokens for, behind a path."""
    return not {"p_yes", "rollout"}.isdisjoint(parse_evaluator(evaluator))


def write_evaluator(weights: Mapping[str, float]) -> str:
    """The setting that `parse_evaluator` reads."""
    if len(weights) == 1:
        return next(iter(weights))
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items())


def evaluate_paths(
    policy: Params,
    value_head: PyTree,
    judge: Judge | None,
    paths: Paths,
    structure: Structure,
    contexts: tuple[Context, ...],
    *,
    model: ModelConfig,
    evaluator: str,
    aggregate: str,
    value_fn: ValueFn | None,
    state_value: StateValue | None = None,
    task: DeviceTask | None = None,
) -> tuple[Float32[Array, "R"], Int32[Array, "R"]]:
    """Values of the paths by any evaluator but "rollout", and the tokens forwarded for each.

    Args:
      contexts: keys and values of all that stands before position `ends`.
      state_value, task: for evaluators of `STATE_JUDGES`, a network and what it is shown.
    """
    scored = jnp.zeros_like(paths.num_tokens)
    num_tokens = jnp.maximum(paths.num_tokens, 1).astype(jnp.float32)
    if evaluator == "confidence":
        return paths.confidence / num_tokens, scored
    if evaluator == "likelihood":
        return jnp.exp(paths.logprob / num_tokens), scored
    if evaluator in UNCERTAINTIES:
        return jnp.exp(-getattr(paths.uncertainty, evaluator) / num_tokens), scored
    if evaluator == "consistency":
        return _agreement(structure, paths), scored
    if evaluator == "none":
        return jnp.zeros_like(paths.logprob), scored
    if evaluator == "p_yes":
        score, scored = _ask_judge(policy, judge, paths, contexts, model)
    elif evaluator == "state_value":
        score, scored = _judge_states(state_value, task, paths)
    elif evaluator == "state_lookahead":
        score, scored = _judge_outcomes(state_value, task, paths)
    else:
        assert value_fn is not None
        score = value_fn(value_head, paths.hidden).astype(jnp.float32)
    return accumulate_score(paths.above, score, paths.depth, aggregate), scored


def _agreement(structure: Structure, paths: Paths) -> Float32[Array, "R"]:
    """Self-consistency of finished paths, themselves among the voters."""
    batch = structure.depth.shape[0]
    stated = paths.answer_key.reshape(batch, -1)
    finished = paths.terminal.reshape(batch, -1)
    votes = jnp.concatenate([structure.answer_key, stated], 1)
    voters = jnp.concatenate([structure.terminal & structure.alive, finished], 1)
    share = self_consistency(stated, votes, voters)
    return jnp.where(finished, share, 0.0).reshape(-1)


def _judge_states(
    network: StateValue | None, task: DeviceTask | None, paths: Paths
) -> tuple[Array, Array]:
    """What a network says of the task's states, and the items it read of each."""
    assert network is not None
    assert task is not None
    assert task.observe is not None
    seen = jax.vmap(task.observe)(paths.task_state)
    value = apply_state_value(network, seen.items, seen.goal)
    num_items = 1 + (seen.items >= 0).sum(axis=1, dtype=jnp.int32)
    return value, jnp.where(paths.fresh, num_items, 0)


def _judge_outcomes(
    network: StateValue | None, task: DeviceTask | None, paths: Paths
) -> tuple[Array, Array]:
    """The best of the states one step on; where the task lists none, the state as it is."""
    assert paths.ahead is not None
    value, num_items = _judge_states(network, task, paths)
    listed = paths.ahead.listed.any(1)
    return jnp.where(listed, paths.ahead.value.max(1), value), jnp.where(
        listed, paths.ahead.num_items, num_items
    )


def _ask_judge(policy, judge, paths, contexts, model) -> tuple[Array, Array]:
    """P(yes) to the judge's question, forwarded behind each path, and the tokens it took."""
    if judge is None:
        raise ValueError("evaluator 'p_yes' needs LanguageModel.judge")
    lengths = jnp.where(paths.terminal, judge.finished_length, judge.unfinished_length)
    lengths = jnp.where(paths.fresh, lengths, 0)
    asked = extend(
        policy,
        jnp.where(paths.terminal[:, None], judge.finished, judge.unfinished),
        lengths,
        cfg=model,
        contexts=contexts,
        starts=paths.ends,
    )
    hidden = last_hidden(asked.hidden, lengths)
    value = yes_probability(policy, hidden, judge.yes_ids, judge.no_ids, cfg=model)
    return value, lengths
