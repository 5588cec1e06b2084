"""The tasks of the reasoning-gym package, through one adapter (Stojanovski et al., 2505.24760).

    make_examples("leg_counting", seed=1, num_problems=2, config={"max_animals": 3})
        question: "Your task is to count how many legs there are in total ... 2 tigers, 1 crab"
        answer:   <answer>18</answer>

The one idea: the gold is the package's own entry as JSON, with its data set and config, and the
verdict is the package's own `score_answer` of that entry, so nothing is graded twice. JSON knows
no tuples and only texts as keys, so both are written tagged and come back as they were.

Right means a score of 1; partial scores stay in the verdict's reason. Some of the package's
scorers parse an answer with sympy, which can run code that is hidden in it: judge only texts of
your own models. Needs the package: pip install 'rlm_jax[reasoning_gym]'.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from rlm_jax.tasks.answer_lines import find_answer_text
from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, Verdict, judge
from rlm_jax.tasks.dial import check_dial

INSTRUCTION = (
    "You solve puzzles. Think in short steps, one per line, then give the final answer, and "
    "nothing else, between <answer> and </answer>."
)
RESERVED = ("seed", "size")
MAX_ANSWER_CHARS = 20_000

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def prompt(problem: Problem) -> list[Message]:
    """The puzzle behind one instruction; puzzles bring their own examples."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": problem.question},
    ]


def make_examples(
    name: str, seed: int, num_problems: int, config: Mapping[str, Any] | None = None
) -> list[Example]:
    """The first `num_problems` entries of the data set `name` under a seed.

    Args:
      config: the data set's own settings, difficulty among them; JSON values.

    Raises:
      ValueError: the package is missing, the data set is unknown, it refuses the config, or an
        entry holds what JSON cannot; a negative seed or number of problems.
    """
    check_dial(seed, num_problems, 0.0)
    if num_problems == 0:
        return []
    config = dict(config or {})
    reserved = [key for key in RESERVED if key in config]
    if reserved:
        raise ValueError(f"config has {', '.join(reserved)}: those are arguments of their own")
    dataset = _create(name, config, seed, num_problems)
    examples = []
    for i in range(num_problems):
        entry = dataset[i]
        gold = {"dataset": name, "config": _pack(name, config), "entry": _pack(name, entry)}
        problem = Problem(entry["question"], id=f"reasoning_gym-{name}-{seed}-{i}")
        examples.append((problem, Gold(json.dumps(gold))))
    return examples


def extract(text: str) -> str | None:
    """What stands in the last `<answer>` tags, which may be many lines; else the answer line."""
    tagged = _ANSWER.findall(text)
    answer = tagged[-1] if tagged else find_answer_text(text)
    return (answer or "").strip() or None


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Scores the answer in `text` by the data set's own `score_answer`.

    Raises:
      ValueError: the package is missing, or the gold was not made by `make_examples`.
    """
    if gold.answer is None:
        return judge(None, "no gold entry to score by")
    try:
        fields = json.loads(gold.answer)
        name, config = fields["dataset"], json.dumps(fields["config"])
        entry = _unpack(fields["entry"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{problem.id}: the gold is no reasoning-gym entry ({error!r})") from None
    answer = extract(text)
    if answer is None:
        return judge(False, "no answer in the text")
    if len(answer) > MAX_ANSWER_CHARS:
        return judge(False, f"an answer of over {MAX_ANSWER_CHARS} characters")
    try:
        score = float(_load_scorer(name, config).score_answer(answer, entry))
    except Exception as error:  # a scorer may raise anything at all on a text it did not expect
        return judge(False, f"{name} cannot score {answer[:40]!r} ({type(error).__name__})")
    return judge(score >= 1.0, f"{name} scores {answer[:40]!r} {score:g}")


@functools.lru_cache(maxsize=64)
def _load_scorer(name: str, config: str) -> Any:
    return _create(name, _unpack(json.loads(config)), 0, 1)


def _create(name: str, config: dict[str, Any], seed: int, size: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"the task {name!r} needs reasoning-gym: pip install 'rlm_jax[reasoning_gym]'"
        ) from error
    try:
        return reasoning_gym.create_dataset(name, seed=seed, size=size, **config)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(f"reasoning-gym data set {name!r} with {config}: {error}") from error


def _pack(name: str, value: Any) -> Any:
    """A JSON value that `_unpack` turns back into `value`, tuples and keys included."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_pack(name, item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_pack(name, item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[_pack(name, k), _pack(name, v)] for k, v in value.items()]}
    raise ValueError(f"reasoning-gym data set {name!r}: {type(value).__name__} is no JSON value")


def _unpack(value: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    if isinstance(value, dict):
        ((kind, items),) = value.items()
        if kind == "tuple":
            return tuple(map(_unpack, items))
        return {_unpack(k): _unpack(v) for k, v in items}
    return value


TASK = Task("reasoning_gym", 1, False, prompt, extract, verify)
