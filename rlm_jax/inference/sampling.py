"""Choosing a token from logits, and the log-probabilities of what was chosen.

Nothing here sorts the vocabulary or draws noise over it: truncated sampling works among the
top candidates, and untruncated sampling inverts the cumulative distribution in two levels with
one uniform number per row. Two log-probabilities come back: the model's (temperature 1, all of
the vocabulary), which priors and values use, and the behaviour's (what was really sampled from,
after temperature and truncation), which policy gradients need.

Filters apply in the order temperature, top-k, top-p, min-p, each on the distribution that the one
before left (spec A10, golden G41). Diverse beam search is arXiv 1610.02424 with one beam a group,
as x1 uses it (golden G40). Beams that displace one another are the business of `beam.py`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from rlm_jax.core.struct import struct
from rlm_jax.core.types import Array, Bool, Float32, Int32, Key

METHODS = ("sample", "greedy", "diverse_beam", "beam", "stochastic_beam")
NUM_ALTERNATIVES = 5
_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen.

    method: "sample"; "greedy"; "diverse_beam" (siblings are decoded in order, and each earlier
    sibling that took a token at the same place costs it `diversity`); "stochastic_beam" (siblings
    are a sample of whole steps without replacement) and "beam" (the likeliest steps), both of what
    temperature and truncation leave, best first, rows empty if there are fewer (`beam.py`).
    min_ratio in [0, 1): the likeliest steps ("beam") that are less likely than this share of the
    likeliest are given up, token by token, so that a sure policy writes few steps.
    temperature > 0.
    top_k: 0 for all. top_p in (0, 1]. min_p in [0, 1). max_candidates: how many of the likeliest
    tokens top-p and min-p may choose among when no top_k bounds them. no_repeats: a chain
    writes no step twice from one state, a tree none from one node (`tried.py`); not for beams.
    copy_returns: a step of a chain that takes earlier ones back spells a state that the chain has
    left, as it stands in its text (`copying.py`); not for beams.
    legal_only: steps are held to those that the task lists as legal (`allowed.py`). outcome_weight
    w: and their probabilities are multiplied by what the network for states says of the state
    behind each, to the power of w.
    return_bias: added to the logit of the token that a step of a chain begins with which takes
    earlier ones back (`DeviceTask.returns`): below 0 a chain goes back less readily. doubt_weight
    w: and w times the log-odds that its evaluator gives to the state being lost, behind every step
    but where the problem begins. 0: a chain goes by what the policy sees alone.
    """

    method: str = "sample"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    min_ratio: float = 0.0
    diversity: float = 1.0
    max_candidates: int = 64
    no_repeats: bool = False
    copy_returns: bool = False
    legal_only: bool = False
    outcome_weight: float = 0.0
    return_bias: float = 0.0
    doubt_weight: float = 0.0

    def __post_init__(self):
        accepted = {
            "method": (self.method in METHODS, f"one of {METHODS}"),
            "temperature": (self.temperature > 0, "> 0 (method 'greedy' for the argmax)"),
            "top_k": (self.top_k >= 0, ">= 0"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1]"),
            "min_p": (0 <= self.min_p < 1, "in [0, 1)"),
            "min_ratio": (
                0 <= self.min_ratio < 1 and (not self.min_ratio or self.method == "beam"),
                "in [0, 1), and 0 but for method 'beam'",
            ),
            "diversity": (self.diversity >= 0, ">= 0"),
            "max_candidates": (self.max_candidates >= 1, ">= 1"),
            "no_repeats": (
                not self.no_repeats or self.method in ("sample", "greedy"),
                "false, or method 'sample' or 'greedy'",
            ),
            "copy_returns": (
                not self.copy_returns or self.method in ("sample", "greedy"),
                "false, or method 'sample' or 'greedy'",
            ),
            "outcome_weight": (
                0 <= self.outcome_weight < math.inf
                and (not self.outcome_weight or self.legal_only),
                "a number >= 0, and 0 without legal_only",
            ),
            "return_bias": (math.isfinite(self.return_bias), "finite"),
            "doubt_weight": (0 <= self.doubt_weight < math.inf, "a number >= 0"),
        }
        for name, (holds, what) in accepted.items():
            if not holds:
                raise ValueError(f"sampling {name}={getattr(self, name)!r}: accepted is {what}")

    @property
    def repeats(self) -> bool:
        """Whether asking again from one place gives the same steps again."""
        return self.method in ("greedy", "beam", "diverse_beam") and not self.no_repeats

    @property
    def truncates(self) -> bool:
        """Whether anything but temperature shapes the distribution."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@struct
class Choice:
    """A token per row.

    logprob: under the model. behaviour_logprob: under the distribution it was drawn from.
    top_logprobs: those of the model's likeliest tokens, best first.
    """

    token: Int32[Array, "R"]
    logprob: Float32[Array, "R"]
    behaviour_logprob: Float32[Array, "R"]
    top_logprobs: Float32[Array, "R A"]


@struct
class Uncertainty:
    """How unsure the model is of a next token, or of many, summed up (spec B7).

    entropy: in nats. varentropy: the variance of the surprise -log p, in nats squared.
    """

    entropy: Float32[Array, "*R"]
    varentropy: Float32[Array, "*R"]


def choose_tokens(
    keys: Key[Array, "R"],
    logits: Float32[Array, "R V"],
    active: Bool[Array, "R"],
    cfg: SamplingConfig,
    *,
    num_siblings: int = 1,
) -> Choice:
    """One token for each row; siblings are `num_siblings` consecutive rows.

    `active` matters to diverse beam search alone: rows that have ended take no token from others.
    Beams, which change rows, are `beam.grow_beams`' to extend.
    """
    top, top_ids = top_tokens(logits, num_candidates(cfg, logits.shape[-1], num_siblings))
    norm = log_total(logits, top[:, 0])
    top_logprobs = top - norm[:, None]
    if cfg.method == "greedy":
        token, behaviour = top_ids[:, 0], jnp.zeros_like(norm)
    elif cfg.method == "diverse_beam":
        token = _diverse_tokens(top_logprobs, top_ids, active, cfg.diversity, num_siblings)
        behaviour = jnp.zeros_like(norm)
    elif cfg.truncates:
        token, behaviour = _sample_candidates(keys, logits, top, top_ids, cfg)
    else:
        token, behaviour = _sample_all(keys, logits / cfg.temperature)
    logprob = jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - norm
    return Choice(token, logprob, behaviour, top_logprobs[:, :NUM_ALTERNATIVES])


def as_by_model(choice: Choice, logits: Float32[Array, "R V"]) -> Choice:
    """A choice from other logits, with the model's log-probabilities by its own."""
    top, _ = top_tokens(logits, choice.top_logprobs.shape[-1])
    norm = log_total(logits, top[:, 0])
    logprob = jnp.take_along_axis(logits, choice.token[:, None], 1)[:, 0] - norm
    return dataclasses.replace(choice, logprob=logprob, top_logprobs=top - norm[:, None])


def num_candidates(cfg: SamplingConfig, num_vocab: int, num_siblings: int) -> int:
    """How many of the likeliest tokens a method looks at, those that confidence needs included."""
    needed = NUM_ALTERNATIVES
    if cfg.method in ("diverse_beam", "beam"):
        # Siblings can keep num_siblings - 1 tokens from one of them, or all come from one beam.
        needed = max(needed, num_siblings)
    if cfg.method in ("sample", "beam", "stochastic_beam") and cfg.truncates:
        needed = max(needed, cfg.top_k or cfg.max_candidates)
    return min(needed, num_vocab)


def top_tokens(
    scores: Float32[Array, "R V"], num_top: int
) -> tuple[Float32[Array, "R C"], Int32[Array, "R C"]]:
    """The best scores and their token ids, best first."""
    # The barrier keeps uses that slice the result from turning it into a sort of the vocabulary.
    top, ids = jax.lax.optimization_barrier(jax.lax.top_k(scores, num_top))
    return top, ids


def filter_candidates(
    logprobs: Float32[Array, "R C"], cfg: SamplingConfig
) -> Float32[Array, "R C"]:
    """Log-probabilities after top-k, top-p and min-p, renormalised; -inf where filtered out.

    Args:
      logprobs: of the C likeliest tokens, best first, after temperature.
    """
    rank = jnp.arange(logprobs.shape[-1])
    if cfg.top_k > 0:
        logprobs = jnp.where(rank < cfg.top_k, logprobs, -jnp.inf)
        logprobs = jax.nn.log_softmax(logprobs, -1)
    if cfg.top_p < 1:
        probs = jnp.exp(logprobs)
        # A token stays if those before it do not yet reach the threshold: the first always does.
        before = jnp.cumsum(probs, -1) - probs
        logprobs = jnp.where(before < cfg.top_p, logprobs, -jnp.inf)
        logprobs = jax.nn.log_softmax(logprobs, -1)
    if cfg.min_p > 0:
        floor = logprobs[..., :1] + np.log(cfg.min_p)
        logprobs = jnp.where(logprobs >= floor, logprobs, -jnp.inf)
    return jax.nn.log_softmax(logprobs, -1)


def token_uncertainty(logits: Float32[Array, "R V"]) -> Uncertainty:
    """Of the distribution over all tokens, at temperature 1; tokens at -inf have no part in it."""
    logprobs = logits - jax.nn.logsumexp(logits, -1, keepdims=True)
    probs = jnp.exp(logprobs)
    # The surprise of what never happens counts for nothing, and 0 * inf for no number.
    surprise = jnp.where(probs > 0, -logprobs, 0.0)
    entropy = (probs * surprise).sum(-1)
    varentropy = (probs * (surprise - entropy[:, None]) ** 2).sum(-1)
    return Uncertainty(entropy, varentropy)


def token_confidence(
    chosen_logprob: Float32[Array, "*R"], top_logprobs: Float32[Array, "*R A"]
) -> Float32[Array, "*R"]:
    """Marco-o1's confidence of one token: its probability among it and its top alternatives.

    Args:
      chosen_logprob: log-probability of the chosen token.
      top_logprobs: those of the A (5 in the paper) likeliest tokens. If the chosen one is not
        among them it takes the place of the last, as the paper counts it with its alternatives.
    """
    among = (top_logprobs <= chosen_logprob[..., None]).any(-1)
    last = jnp.where(among, top_logprobs[..., -1], chosen_logprob)
    top = jnp.concatenate([top_logprobs[..., :-1], last[..., None]], -1)
    return jnp.exp(chosen_logprob - jax.nn.logsumexp(top, -1))


def log_total(
    logits: Float32[Array, "R V"], largest: Float32[Array, "R"], temperature: float = 1.0
) -> Float32[Array, "R"]:
    """log sum exp(logits / temperature), in one pass over the vocabulary: the largest is known."""
    above = jnp.where(jnp.isfinite(largest), largest, 0.0)
    total = jnp.exp((logits - above[:, None]) / temperature).sum(-1)
    return jnp.log(total) + above / temperature


def _sample_candidates(keys, logits, top, top_ids, cfg):
    norm = log_total(logits, top[:, 0], cfg.temperature)
    logprobs = filter_candidates(top / cfg.temperature - norm[:, None], cfg)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logprobs.shape[-1:]))(keys)
    pick = jnp.argmax(logprobs + noise, -1)[:, None]
    token = jnp.take_along_axis(top_ids, pick, 1)[:, 0]
    return token, jnp.take_along_axis(logprobs, pick, 1)[:, 0]


def _sample_all(keys, logits):
    """Inverts the cumulative distribution: first over blocks of the vocabulary, then inside one."""
    rows, num_vocab = logits.shape
    num_blocks = -(-num_vocab // _BLOCK)
    norm = jax.nn.logsumexp(logits, -1)
    pad = ((0, 0), (0, num_blocks * _BLOCK - num_vocab))
    probs = jnp.pad(jnp.exp(logits - norm[:, None]), pad).reshape(rows, num_blocks, _BLOCK)
    mass = jnp.cumsum(probs.sum(-1), -1)
    uniform = jax.vmap(lambda key: jax.random.uniform(key))(keys)
    # Scaled to the mass there is, so that rounding cannot point past the end.
    target = (uniform * mass[:, -1])[:, None]
    block = jnp.minimum((mass <= target).sum(-1), num_blocks - 1)
    inside = jnp.take_along_axis(probs, block[:, None, None], 1)[:, 0]
    before = jnp.take_along_axis(mass, block[:, None], 1) - inside.sum(-1, keepdims=True)
    cumulative = jnp.cumsum(inside, -1)
    offset = (cumulative <= jnp.maximum(target - before, 0.0)).sum(-1)
    # Rounding may point past the block's mass: stay on its last token of any probability.
    last = _BLOCK - 1 - jnp.argmax((inside > 0)[:, ::-1], -1)
    token = (block * _BLOCK + jnp.minimum(offset, last)).astype(jnp.int32)
    return token, jnp.take_along_axis(logits, token[:, None], 1)[:, 0] - norm


def _diverse_tokens(logprobs, ids, active, diversity, num_siblings):
    """Siblings choose in order; a token costs `diversity` for each earlier one that chose it."""
    logprobs = logprobs.reshape(-1, num_siblings, logprobs.shape[-1])
    ids = ids.reshape(logprobs.shape)
    active = active.reshape(-1, num_siblings)
    chosen = []
    for sibling in range(num_siblings):
        penalty = sum(
            (ids[:, sibling] == chosen[earlier][:, None]) & active[:, earlier, None]
            for earlier in range(sibling)
        )
        scores = logprobs[:, sibling] - diversity * penalty
        best = jnp.argmax(scores, -1)[:, None]
        chosen.append(jnp.take_along_axis(ids[:, sibling], best, 1)[:, 0])
    return jnp.stack(chosen, 1).reshape(-1)
