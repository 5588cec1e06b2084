"""Countdown demonstrations as shards of token examples, by number."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rlm_jax.data.demonstrations import tokenize_demonstration
from rlm_jax.data.examples import TokenExample
from rlm_jax.tasks.base import Problem
from rlm_jax.tasks.countdown import (
    MAX_NUMBER,
    NUM_NUMBERS,
    TARGETS,
    draw_solvable,
    make_problem,
    read,
    read_line,
)
from rlm_jax.tasks.countdown_corrections import correct_walks
from rlm_jax.tasks.countdown_demos import (
    demonstrate,
    demonstrate_openings,
    demonstrate_states,
    draw_moves,
)
from rlm_jax.tasks.countdown_lines import demonstrate_lines, demonstrate_tries
from rlm_jax.tasks.countdown_solvable import is_solvable
from rlm_jax.tasks.countdown_split import is_held_out, is_held_out_state, is_held_out_target
from rlm_jax.tasks.demonstrations import Demonstration
from rlm_jax.text.tokenizer import Tokenizer, load_tokenizer

PUZZLE_24_NUMBER = 13


@dataclasses.dataclass(frozen=True)
class CountdownMix:
    """What a shard is made of.

    Attributes:
      tokenizer: path of the tokenizer's file or folder.
      seed: of everything; another seed shares no problem on purpose.
      shard_examples: examples of a shard.
      sizes: numbers of a problem, at most 6, and their shares, which sum to 1.
      state_share: examples that are a state alone, behind one move of a problem of four numbers or
        more, and what it is worth: short, so that many of them are few tokens.
      line_share: of the others, examples that teach how lines end that begin at random, no more.
      try_share: of what is left, examples of problems without a solution (of two to four numbers)
        where every move is tried once. Long ones: 0.15 in configs/countdown.py's mix are 28% of the
        tokens, and rows have to hold 256 for all of them to be learned from.
      opening_share: of what is left, demonstrations that stop at the choice of the first move.
      small_share: problems of four numbers up to 13, as in Game of 24; a third have target 24.
      wrong_share, stray_share, max_wrong, return_weight, sharpness, num_goals: see `demonstrate`.
      keep_share, may_err: of chains that a network wrote, see `correct_walks`.
    """

    tokenizer: str
    seed: int
    shard_examples: int = 4096
    sizes: tuple[tuple[int, float], ...] = ((3, 0.05), (4, 0.85), (5, 0.1))
    state_share: float = 0.0
    line_share: float = 0.0
    try_share: float = 0.0
    opening_share: float = 0.4
    small_share: float = 0.1
    wrong_share: float = 0.2
    stray_share: float = 0.0
    max_wrong: int = 4
    return_weight: float = 1.0
    sharpness: float = 0.5
    keep_share: float = 0.0
    may_err: bool = False
    num_goals: int = 0

    def __post_init__(self):
        # A walk through seven numbers takes the solver seconds.
        check_sizes(self.sizes, max(NUM_NUMBERS))
        shares = ("state", "line", "try", "opening", "small", "wrong", "stray")
        weights = ("return_weight", "keep_share")
        check_shares(self, (*(f"{name}_share" for name in shares), *weights))
        if self.shard_examples < 1:
            raise ValueError(f"shard_examples must be >= 1, got {self.shard_examples}")


def check_sizes(sizes: Sequence[tuple[int, float]], most: int) -> None:
    """Raises ValueError unless `sizes` are 2 to `most` numbers, with shares that sum to 1."""
    if not all(2 <= size <= most for size, _ in sizes):
        raise ValueError(f"sizes={sizes}: accepted are 2 to {most} numbers")
    shares = [share for _, share in sizes]
    if not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"sizes={sizes}: accepted are shares from 0 to 1 that sum to 1")


def check_shares(mix: Any, names: Sequence[str]) -> None:
    """Raises ValueError unless each field in `names` lies in [0, 1]."""
    for name in names:
        if not 0 <= getattr(mix, name) <= 1:
            raise ValueError(f"{name} must lie in [0, 1], got {getattr(mix, name)}")


def make_shard(mix: CountdownMix, shard: int) -> list[TokenExample]:
    """The examples of one shard, shuffled; a pure function of its arguments."""
    tokenizer = _load(mix.tokenizer)
    rng = np.random.default_rng([mix.seed, shard])
    counts = rng.multinomial(mix.shard_examples, [share for _, share in mix.sizes])
    examples: list[TokenExample] = []
    for (size, _), count in zip(mix.sizes, counts, strict=True):
        num_small = rng.binomial(count, mix.small_share) if size == 4 else 0
        for number, highest in ((count - num_small, MAX_NUMBER), (num_small, PUZZLE_24_NUMBER)):
            for demonstration in _demonstrate(mix, rng, int(size), int(number), highest):
                examples.append(_tokenize(tokenizer, demonstration))
    return [examples[i] for i in rng.permutation(len(examples))]


def make_walks(
    mix: CountdownMix, shard: int, problems: Sequence[Problem], chains: Sequence[str]
) -> list[TokenExample]:
    """Examples of chains that a network wrote for solvable problems, labelled by the solver.

    A pure function of its arguments; problems on whose way a held-out one stands are left out.
    """
    tokenizer = _load(mix.tokenizer)
    rng = np.random.default_rng([mix.seed, 5, shard])
    examples: list[TokenExample] = []
    for size in sorted({len(problem.data[0]) for problem in problems}):
        rows = [i for i, problem in enumerate(problems) if len(problem.data[0]) == size]
        walks = correct_walks(
            rng,
            np.array([sorted(problems[i].data[0]) for i in rows]),
            np.array([problems[i].data[1] for i in rows]),
            [chains[i] for i in rows],
            sharpness=mix.sharpness,
            return_weight=mix.return_weight,
            keep_share=mix.keep_share,
            may_err=mix.may_err,
            num_goals=mix.num_goals,
        )
        examples += [_tokenize(tokenizer, walk) for walk in walks]
    return examples


def make_shards(mix: CountdownMix) -> Callable[[int], list[TokenExample]]:
    """`make_shard` of one mix, for `GeneratedSource`."""
    return functools.partial(make_shard, mix)


def draw_problems(
    rng: np.random.Generator, num_problems: int, sizes: Sequence[tuple[int, float]]
) -> list[Problem]:
    """Solvable problems that are not held out, without their solutions; `sizes` as in the mix."""
    counts = rng.multinomial(num_problems, [share for _, share in sizes])
    problems = []
    for (size, _), count in zip(sizes, counts, strict=True):
        numbers, targets = draw_solvable(
            rng,
            int(count),
            size,
            _training_targets(),
            admit_fn=lambda numbers, targets: ~is_held_out(numbers, targets),
        )
        for row, target in zip(numbers.tolist(), targets.tolist(), strict=True):
            problems.append(make_problem(tuple(row), target, f"countdown{size}-{len(problems)}"))
    return problems


def problem_key(notation: str) -> tuple[int, ...]:
    """The target and the sorted numbers of a problem in the task's notation."""
    target, numbers = notation.split(":")
    return (int(target), *sorted(map(int, numbers.split())))


def is_held_out_question(question: str) -> bool:
    """Whether a puzzle in words or in notation is one that no training may see.

    Raises:
      ValueError: it is no puzzle of Countdown.
    """
    numbers, target = read(question).data
    return bool(is_held_out(np.sort(np.array([numbers])), np.array([target]))[0])


def passes_held_out(question: str, solution: str) -> bool:
    """Whether a chain of lines leaves, on its way, a state that no training may see.

    Raises:
      ValueError: the question is no puzzle of Countdown.
    """
    _, target = read(question).data
    lines = map(read_line, solution.split("\n"))
    states = [line.rest for line in lines if line is not None and line.rest is not None]
    return any(is_held_out_state(np.array([s]), np.array([target]))[0] for s in states)


def _training_targets() -> np.ndarray:
    targets = np.arange(TARGETS[0], TARGETS[1] + 1)
    return targets[~is_held_out_target(targets)]


def _demonstrate(
    mix: CountdownMix, rng: np.random.Generator, size: int, count: int, highest: int
) -> Iterator[Demonstration]:
    """`count` demonstrations; what is held out is drawn and left out again."""
    targets = _training_targets()
    if highest == PUZZLE_24_NUMBER:
        targets = np.concatenate([targets, np.full(len(targets) // 2, 24)])
    walk = functools.partial(
        demonstrate,
        sharpness=mix.sharpness,
        wrong_share=mix.wrong_share,
        stray_share=mix.stray_share,
        max_wrong=mix.max_wrong,
        return_weight=mix.return_weight,
    )
    num_states = rng.binomial(count, mix.state_share) if size > 3 and mix.state_share else 0
    num_lines = rng.binomial(count - num_states, mix.line_share) if mix.line_share else 0
    num_tries = rng.binomial(count - num_states - num_lines, mix.try_share) if mix.try_share else 0
    num_left = count - num_states - num_lines - num_tries
    num_openings = rng.binomial(num_left, mix.opening_share) if size > 3 else 0
    goals = {"num_goals": mix.num_goals}
    opening = functools.partial(demonstrate_openings, sharpness=mix.sharpness, **goals)
    for make, wanted in (
        (functools.partial(walk, **goals), num_left - num_openings),
        (opening, num_openings),
        (functools.partial(demonstrate_states, **goals), num_states),
        (demonstrate_lines, num_lines),
        (_demonstrate_tries, num_tries),
    ):
        made = 0
        while made < wanted:
            draw = draw_solvable(rng, wanted - made, size, targets, highest=highest)
            demonstrations = list(make(rng, *draw))
            yield from demonstrations
            made += len(demonstrations)


def _demonstrate_tries(
    rng: np.random.Generator, numbers: np.ndarray, targets: np.ndarray
) -> Iterator[Demonstration]:
    """`demonstrate_tries` of what some random moves leave of each problem: two to four numbers."""
    sizes = rng.choice((2, 3, 4), len(numbers), p=(0.1, 0.5, 0.4))
    # For its own target a problem of four numbers has a solution.
    others = rng.choice(_training_targets(), len(targets))
    for size in (2, 3, 4):
        states, wanted = numbers[sizes == size], others[sizes == size]
        while states.shape[1] > size and len(states):
            states = draw_moves(rng, states)
        if len(states):
            lost = ~is_solvable(states, wanted) & ~is_held_out(states, wanted)
            yield from demonstrate_tries(rng, states[lost], wanted[lost])


def _tokenize(tokenizer: Tokenizer, demonstration: Demonstration) -> TokenExample:
    eos_id = min(tokenizer.eos_ids)
    return tokenize_demonstration(demonstration, tokenizer.encode, eos_id, tokenizer.bos_id)


@functools.lru_cache(maxsize=1)
def _load(path: str) -> Tokenizer:
    return load_tokenizer(path)
