"""Training examples: a sequence of tokens, and what is to be learned at each of them.

The one idea: every objective over tokens is a column. SFT is a loss weight per token; a search's
improved policy is a set of alternatives with weights in place of the one token; a value target
stands at the token whose hidden state the value is read at, and beside it what that state is worth
for every other goal. What an example does not teach has weight zero, so examples of all kinds share
rows, batches and one compiled step.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class TokenExample(NamedTuple):
    """One sequence of T tokens, up to M alternatives and G goals at each; see `make_example`.

    Attributes:
      tokens: [T] int32.
      loss_weight: [T] float32, weight of predicting `tokens[t]` from the tokens before it.
      soft_ids: [T, M] int32, alternatives to `tokens[t]`.
      soft_weights: [T, M] float32, their weights; where they sum to 0 the token is the label.
      value_target: [T] float32, what the value read at token t should be.
      value_weight: [T] float32, weight of that target.
      goals: [T, G] int8, of each goal that a problem may have: 1 where it can be reached from the
        state that the token completes, -1 where it cannot, 0 where that is not to be learned.
    """

    tokens: np.ndarray
    loss_weight: np.ndarray
    soft_ids: np.ndarray
    soft_weights: np.ndarray
    value_target: np.ndarray
    value_weight: np.ndarray
    goals: np.ndarray


def make_example(
    tokens: Sequence[int] | np.ndarray,
    *,
    num_prompt: int = 1,
    loss_weight: Sequence[float] | np.ndarray | None = None,
    soft_ids: Sequence[Sequence[int]] | np.ndarray | None = None,
    soft_weights: Sequence[Sequence[float]] | np.ndarray | None = None,
    value_target: Sequence[float] | np.ndarray | None = None,
    value_weight: Sequence[float] | np.ndarray | None = None,
    goals: np.ndarray | None = None,
) -> TokenExample:
    """Builds and checks one example.

    Args:
      tokens: the whole sequence, prompt included.
      num_prompt: without `loss_weight`, so many tokens at the beginning have weight 0 and the
        others weight 1.
      loss_weight: [T]; the first is 0, as nothing stands before the first token.
      soft_ids, soft_weights: [T, M], both or neither.
      value_target, value_weight: [T], both or neither.
      goals: [T, G] of -1, 0 and 1; by default there are none.

    Raises:
      ValueError: an empty sequence, a shape that does not fit, a negative id or weight, another
        number among the goals, or one that is not finite; names the field.
    """
    if (soft_ids is None) != (soft_weights is None):
        raise ValueError("soft_ids and soft_weights come together")
    if (value_target is None) != (value_weight is None):
        raise ValueError("value_target and value_weight come together")
    ids = _to_ids("tokens", tokens)
    if ids.ndim != 1 or not ids.size:
        raise ValueError(f"tokens must be one sequence that is not empty, not of shape {ids.shape}")
    zeros = np.zeros(ids.shape, np.float32)
    if loss_weight is None:
        if not 1 <= num_prompt <= len(ids):
            raise ValueError(f"num_prompt must lie in 1 to {len(ids)}, not {num_prompt}")
        loss_weight = (np.arange(len(ids)) >= num_prompt).astype(np.float32)
    example = TokenExample(
        tokens=ids,
        loss_weight=_to_floats("loss_weight", loss_weight),
        soft_ids=np.zeros((len(ids), 0), np.int32)
        if soft_ids is None
        else _to_ids("soft_ids", soft_ids),
        soft_weights=np.zeros((len(ids), 0), np.float32)
        if soft_weights is None
        else _to_floats("soft_weights", soft_weights),
        value_target=zeros
        if value_target is None
        else _to_floats("value_target", value_target, signed=True),
        value_weight=zeros if value_weight is None else _to_floats("value_weight", value_weight),
        goals=np.zeros((len(ids), 0), np.int8) if goals is None else _to_signs("goals", goals),
    )
    _check_shapes(example)
    if example.loss_weight[0]:
        raise ValueError(
            f"loss_weight[0] is {example.loss_weight[0]}: nothing stands before the first token"
        )
    return example


class TokenTable:
    """Many examples in few arrays, for data sets of millions: a source for `make_stream`.

    Examples come back as views of the arrays, with M and G as large as the largest of them.

    Raises:
      ValueError: there is no example.
    """

    def __init__(self, examples: Iterable[TokenExample]):
        examples = list(examples)
        if not examples:
            raise ValueError("a table of no examples")
        num_soft = max(example.soft_ids.shape[1] for example in examples)
        num_goals = max(example.goals.shape[1] for example in examples)
        padded = [pad_example(example, num_soft, num_goals) for example in examples]
        self._columns = TokenExample(*map(np.concatenate, zip(*padded, strict=True)))
        self._ends = np.cumsum([len(example.tokens) for example in examples])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> TokenExample:
        if not 0 <= index < len(self._ends):
            raise IndexError(f"example {index} of {len(self._ends)}")
        begin = self._ends[index - 1] if index else 0
        return TokenExample(*(column[begin : self._ends[index]] for column in self._columns))


def pad_example(example: TokenExample, num_soft: int, num_goals: int = 0) -> TokenExample:
    """The example with exactly `num_soft` alternatives a token, the added ones of weight 0, and
    exactly `num_goals` goals, of which the added ones are not to be learned.

    Raises:
      ValueError: it has more.
    """
    extra = num_soft - example.soft_ids.shape[1], num_goals - example.goals.shape[1]
    if extra[0] < 0:
        raise ValueError(
            f"an example has {example.soft_ids.shape[1]} alternatives a token; num_soft={num_soft}"
        )
    if extra[1] < 0:
        raise ValueError(f"an example has {example.goals.shape[1]} goals; num_goals={num_goals}")
    if not any(extra):
        return example
    soft, goals = (((0, 0), (0, missing)) for missing in extra)
    return example._replace(
        soft_ids=np.pad(example.soft_ids, soft),
        soft_weights=np.pad(example.soft_weights, soft),
        goals=np.pad(example.goals, goals),
    )


def cut_example(example: TokenExample, num_tokens: int) -> TokenExample:
    """The first `num_tokens` tokens of an example, and what is to be learned at these."""
    return TokenExample(*(column[:num_tokens] for column in example))


def _to_ids(name: str, values) -> np.ndarray:
    ids = np.asarray(values)
    if ids.size and ids.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole numbers, not {ids.dtype}")
    if ids.size and not 0 <= ids.min() <= ids.max() < 2**31:
        raise ValueError(f"{name} must lie in 0 to 2**31 - 1, not {ids.min()} to {ids.max()}")
    return ids.astype(np.int32)


def _to_floats(name: str, values, signed: bool = False) -> np.ndarray:
    floats = np.asarray(values, np.float32)
    if not np.isfinite(floats).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    if not signed and floats.size and floats.min() < 0:
        raise ValueError(f"{name} must not be negative, but holds {floats.min()}")
    return floats


def _to_signs(name: str, values) -> np.ndarray:
    signs = np.asarray(values)
    if signs.size and not np.isin(signs, (-1, 0, 1)).all():
        raise ValueError(f"{name} must be -1, 0 or 1, not {signs.min()} to {signs.max()}")
    return signs.astype(np.int8)


def _check_shapes(example: TokenExample) -> None:
    num_tokens = len(example.tokens)
    for name in ("loss_weight", "value_target", "value_weight"):
        shape = getattr(example, name).shape
        if shape != (num_tokens,):
            raise ValueError(f"{name} has shape {shape} beside {num_tokens} tokens")
    shapes = example.soft_ids.shape, example.soft_weights.shape
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or shapes[0][0] != num_tokens:
        raise ValueError(
            f"soft_ids and soft_weights have shapes {shapes[0]} and {shapes[1]} beside "
            f"{num_tokens} tokens"
        )
    if example.goals.ndim != 2 or len(example.goals) != num_tokens:
        raise ValueError(f"goals has shape {example.goals.shape} beside {num_tokens} tokens")
