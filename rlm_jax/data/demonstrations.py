"""From demonstrations in text to examples in tokens, with a soft label wherever steps part.

The one idea: where several steps are right, the label of a token is how the right steps that
agree with the tokens so far go on (a Rao-Blackwellised cross-entropy): one demonstration teaches
all of them, and a token that cannot differ stays a hard label.
"""

from collections.abc import Callable, Sequence

import numpy as np

from rlm_jax.data.examples import TokenExample, make_example
from rlm_jax.tasks.demonstrations import Demonstration


def tokenize_demonstration(
    demonstration: Demonstration,
    encode: Callable[[str], list[int]],
    eos_id: int,
    bos_id: int | None,
) -> TokenExample:
    """Tokens and labels of a demonstration.

    A step that is not among the right ones teaches the right ones up to where it leaves them and
    nothing from there. Values stand at the last token of the prompt and of each step, goals at the
    one before it, which the last token, a separator, can look back at.

    Args:
      encode: text -> ids, without special tokens.
      eos_id: ends a finished demonstration, as part of its last step.
    """
    tokens = ([] if bos_id is None else [bos_id]) + encode(demonstration.prompt)
    weights = [0.0] * len(tokens)
    soft: dict[int, tuple[list[int], list[float]]] = {}
    values = {len(tokens) - 1: demonstration.value}
    known_goals = {len(tokens) - 2: demonstration.goals}
    for index, step in enumerate(demonstration.steps):
        is_last = demonstration.finished and index == len(demonstration.steps) - 1
        tail = [eos_id] if is_last else []
        ids = encode(step.text) + tail
        right = [(encode(text) + tail, weight) for text, weight in step.choices]
        for place, (token, label) in enumerate(zip(ids, label_tokens(ids, right), strict=True)):
            if label and list(label) != [token]:
                soft[len(tokens)] = (list(label), list(label.values()))
            weights.append((1.0 if place else step.weight) if label else 0.0)
            tokens.append(token)
        values[len(tokens) - 1] = step.value
        known_goals[len(tokens) - 2] = step.goals
    num_soft = max((len(ids) for ids, _ in soft.values()), default=0)
    soft_ids = np.zeros((len(tokens), num_soft), np.int32)
    soft_weights = np.zeros((len(tokens), num_soft), np.float32)
    for position, (ids, shares) in soft.items():
        soft_ids[position, : len(ids)], soft_weights[position, : len(ids)] = ids, shares
    target, known = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), np.float32)
    for position, value in values.items():
        if value is not None:
            target[position], known[position] = value, 1.0
    num_goals = max((len(row) for row in known_goals.values() if row is not None), default=0)
    goals = np.zeros((len(tokens), num_goals), np.int8)
    for position, row in known_goals.items():
        if row is not None:
            goals[position] = row
    return make_example(
        tokens,
        loss_weight=weights,
        soft_ids=soft_ids,
        soft_weights=soft_weights,
        value_target=target,
        value_weight=known,
        goals=goals,
    )


def label_tokens(
    ids: Sequence[int], right: Sequence[tuple[Sequence[int], float]]
) -> list[dict[int, float]]:
    """How the right steps that agree with `ids` so far go on, at each position; weights sum to 1.

    Empty where none agrees any more.
    """
    labels = []
    for position, token in enumerate(ids):
        label: dict[int, float] = {}
        for other, weight in right:
            if len(other) > position:
                label[other[position]] = label.get(other[position], 0.0) + weight
        total = sum(label.values())
        labels.append({other: weight / total for other, weight in label.items()})
        right = [
            (other, w) for other, w in right if list(other[position : position + 1]) == [token]
        ]
    return labels
