"""Countdown (Stream of Search's game, arXiv 2404.03683) as versioned data sets, held out by rule.

The one idea: what is held out is a rule on the problem itself (`tasks.countdown_split`), so the
training problems of any seed and number keep clear of every test set. The tests are those of
`data.splits`, whatever the seed: "test_inputs" (sets of numbers that no training sees) and, of four
numbers, "test_targets" (targets that none sees). Of three numbers there is a training split alone.

    from rlm_jax.data.builders.build import build
    from rlm_jax.data.builders.reading import to_example

    splits = build("countdown", DATA_DIR, size=4, num_train=100_000)
    problem, gold = to_example(splits["train"][0])

or, on a command line, `python -m rlm_jax.data.builders.build countdown DATA_DIR --size=4`. Training
problems are drawn in blocks, each with a seed of its own: the first n do not depend on how many
there are. They may repeat, as the draw has it. `experiments/train.py` needs none of this: it makes
its problems, with every right line, as it goes.
"""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator

import numpy as np

from rlm_jax.data.builders.generated import build_generated
from rlm_jax.data.countdown import draw_problems
from rlm_jax.data.iterators import Source
from rlm_jax.data.splits import load_split
from rlm_jax.tasks import countdown
from rlm_jax.tasks.base import Example, Gold

# Rises with the draw of training problems; the task's version counts before it.
DRAW_VERSION = 0
BLOCK_PROBLEMS = 1024
_TESTS = {
    3: {},
    4: {"test_inputs": "countdown4-inputs", "test_targets": "countdown4-targets"},
    5: {"test_inputs": "countdown5"},
    6: {"test_inputs": "countdown6"},
}


@dataclasses.dataclass(frozen=True)
class CountdownSpec:
    """Which problems a data set holds.

    Attributes:
      seed: of the training problems.
      size: numbers of a problem.
      num_train: training problems.
    """

    seed: int = 0
    size: int = 4
    num_train: int = 10_000

    def __post_init__(self):
        if self.size not in countdown.NUM_NUMBERS:
            sizes = ", ".join(map(str, countdown.NUM_NUMBERS))
            raise ValueError(f"size {self.size!r}: accepted are {sizes}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, but is {self.seed}")
        if self.num_train < 1:
            raise ValueError(f"num_train must be at least 1, but is {self.num_train}")

    @property
    def name(self) -> str:
        """The name of the TFDS config: all that the problems depend on, but for the version."""
        return f"n{self.size}-s{self.seed}-{self.num_train}"


def generate_splits(spec: CountdownSpec) -> dict[str, Iterable[Example]]:
    """The problems of every split, train as a generator that need not fit into memory."""
    tests = {split: load_split(name).examples for split, name in _TESTS[spec.size].items()}
    return {"train": _draw(spec), **tests}


def build_countdown(spec: CountdownSpec, data_dir: str | os.PathLike[str]) -> dict[str, Source]:
    """The splits of a data set of Countdown, made where they are not yet.

    Elements hold `id`, `question`, `answer` (empty: any right expression is one) and `data`, the
    numbers and the target; `reading.to_example` makes examples.

    Raises:
      ValueError: tensorflow_datasets is not installed.
    """
    return build_generated(
        "countdown",
        data_dir,
        functools.partial(generate_splits, spec),
        config_name=spec.name,
        version=f"{countdown.TASK.version}.{DRAW_VERSION}.0",
        description=f"Countdown of {spec.size} numbers, seed {spec.seed}",
        homepage="https://github.com/kanishkg/stream-of-search",
    )


def _draw(spec: CountdownSpec) -> Iterator[Example]:
    for start in range(0, spec.num_train, BLOCK_PROBLEMS):
        rng = np.random.default_rng([spec.seed, spec.size, start])
        problems = draw_problems(rng, BLOCK_PROBLEMS, ((spec.size, 1.0),))
        for number, problem in enumerate(problems[: spec.num_train - start], start):
            yield dataclasses.replace(problem, id=f"countdown{spec.size}-train-{number}"), Gold()
