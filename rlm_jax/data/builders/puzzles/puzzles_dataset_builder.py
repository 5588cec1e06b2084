"""Problems that a task generates, as versioned data sets with held-out splits.

The one idea: the test split is drawn first, and is the same whatever the sizes of the other
splits; then validation; training problems come last, and one whose key was held out is drawn
again. Keys are the task's own notion of "the same problem" (Countdown: sorted numbers and target),
so no held-out problem is trained on in another order of its numbers either.

Problems are drawn in blocks of growing size, each with a seed of its own: the first n problems of
a split do not depend on how many there are.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy as np

from rlm_jax.data.builders.generated import build_generated
from rlm_jax.data.iterators import Source
from rlm_jax.data.overlap import exact_text
from rlm_jax.tasks.base import Example, Problem, Task

SPLITS = ("test", "validation", "train")  # in the order of drawing
FIRST_BLOCK_PROBLEMS, MAX_BLOCK_PROBLEMS = 64, 4096
# A task that gives nothing new in so many blocks has nothing new to give.
MAX_IDLE_BLOCKS = 10

KeyFn = Callable[[Problem], Hashable]


@dataclasses.dataclass(frozen=True)
class PuzzleSpec:
    """Which problems a data set holds.

    Attributes:
      task: the generator; `task.version` is the data set's.
      seed: of all splits.
      difficulty: in [0, 1], the task's dial.
      num_train, num_validation, num_test: problems of each split.
      key_fn: equal for problems that are the same; a named function.
      excluded: problems that stand in no split, a published test set say.
    """

    task: Task
    seed: int = 0
    difficulty: float = 0.5
    num_train: int = 10_000
    num_validation: int = 1_000
    num_test: int = 1_000
    key_fn: KeyFn = exact_text
    excluded: Sequence[Problem] = ()

    def __post_init__(self):
        if self.task.generate is None:
            raise ValueError(f"task {self.task.name} generates no problems")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, but is {self.seed}")
        if not 0.0 <= self.difficulty <= 1.0:
            raise ValueError(f"difficulty must lie in [0, 1], not {self.difficulty}")
        for split in SPLITS:
            if self.num_problems(split) < 0:
                raise ValueError(
                    f"num_{split} must not be negative, but is {self.num_problems(split)}"
                )
        if not self.key_fn.__name__.isidentifier():
            raise ValueError("key_fn names the data set: a function of its own, no lambda")

    def num_problems(self, split: str) -> int:
        """How many problems a split has."""
        return getattr(self, f"num_{split}")

    @property
    def name(self) -> str:
        """The name of the TFDS config: all that the problems depend on, but for the version."""
        sizes = "-".join(str(self.num_problems(split)) for split in reversed(SPLITS))
        parts = [self.task.name, f"d{self.difficulty!r}", f"s{self.seed}", sizes]
        if self.key_fn is not exact_text:
            parts.append(self.key_fn.__name__)
        if self.excluded:
            keys = sorted({repr(self.key_fn(problem)) for problem in self.excluded})
            parts.append("x" + hashlib.sha256("\n".join(keys).encode()).hexdigest()[:8])
        return "-".join(parts)


def generate_splits(spec: PuzzleSpec) -> dict[str, Iterator[Example]]:
    """The problems of every split, train as a generator that need not fit into memory.

    Held-out splits hold no problem twice. Training problems may repeat, as the task draws them.

    Raises:
      ValueError: the task has not so many different problems.
    """
    taken = {spec.key_fn(problem) for problem in spec.excluded}
    splits: dict[str, Iterator[Example]] = {}
    for split in SPLITS[:-1]:
        examples = list(_draw(spec, split, frozenset(taken), unique=True))
        taken |= {spec.key_fn(problem) for problem, _ in examples}
        splits[split] = iter(examples)
    splits["train"] = _draw(spec, "train", frozenset(taken), unique=False)
    return splits


def build_puzzles(spec: PuzzleSpec, data_dir: str | os.PathLike[str]) -> dict[str, Source]:
    """The splits of a data set of puzzles, made where they are not yet; empty ones are left out.

    Elements hold `id`, `question`, `answer` and `data`; `reading.to_example` makes examples.

    Raises:
      ValueError: the task has not so many different problems, an example that is no text and
        JSON, or tensorflow_datasets is not installed.
    """
    return build_generated(
        "puzzles",
        data_dir,
        lambda: {
            split: examples
            for split, examples in generate_splits(spec).items()
            if spec.num_problems(split)
        },
        config_name=spec.name,
        version=f"{spec.task.version}.0.0",
        description=f"{spec.task.name} at difficulty {spec.difficulty}, seed {spec.seed}",
    )


def _draw(
    spec: PuzzleSpec, split: str, taken: frozenset[Hashable], unique: bool
) -> Iterator[Example]:
    assert spec.task.generate is not None
    num_left, seen = spec.num_problems(split), set(taken)
    block = last_new = 0
    while num_left:
        if block - last_new >= MAX_IDLE_BLOCKS:
            raise ValueError(
                f"{spec.task.name} at difficulty {spec.difficulty} has too few different problems: "
                f"{num_left} of {spec.num_problems(split)} are missing in {split}"
            )
        sequence = np.random.SeedSequence([spec.seed, SPLITS.index(split), block])
        seed, size = int(sequence.generate_state(1)[0]), _block_size(block)
        block += 1
        for problem, gold in spec.task.generate(seed, size, spec.difficulty):
            key = spec.key_fn(problem)
            if key in seen:
                continue
            if unique:
                seen.add(key)
            last_new = block
            number = spec.num_problems(split) - num_left
            yield dataclasses.replace(problem, id=f"{spec.task.name}-{split}-{number}"), gold
            num_left -= 1
            if not num_left:
                return


def _block_size(block: int) -> int:
    return min(FIRST_BLOCK_PROBLEMS << min(block, 16), MAX_BLOCK_PROBLEMS)
