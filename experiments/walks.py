"""The phase of train.py in which the networks walk and the solver corrects them (DAgger).

A network that has seen nothing but the solver's walks does not know what to do behind its own
mistakes, since those of the demonstrations are others. So it writes chains for new problems, every
line of them is labelled with what the exact solver would have written there, and it learns from
these, mixed with demonstrations; then it writes the next chains (Ross, Gordon and Bagnell 2011,
arXiv 1011.0686; all chains are the learner's own). The chains are kept in the run's folder, in
plain text, so that a run that is resumed learns from the same ones.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from rlm_jax.core.files import write_whole
from rlm_jax.data.countdown import CountdownMix, draw_problems, make_shard, make_walks
from rlm_jax.data.examples import TokenExample, cut_example
from rlm_jax.data.generated import NUM_SHARDS, GeneratedSource
from rlm_jax.evaluation import solver
from rlm_jax.reasoning.structure import Structure
from rlm_jax.tasks import countdown
from rlm_jax.tasks.base import Problem


@dataclasses.dataclass(frozen=True)
class WalkSettings:
    """What a shard is made of: chains by the network, and demonstrations for the rest.

    mix: of the problems, and of the demonstrations. num_chains: written anew for each shard.
    num_shards: in which a chain is learned from, the one it was written for and those behind it.
    max_tokens: of an example; a longer chain is cut.
    """

    mix: CountdownMix
    num_chains: int
    num_shards: int
    max_tokens: int

    def __post_init__(self):
        for name in ("num_chains", "num_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_walks >= self.mix.shard_examples:
            raise ValueError(
                f"num_chains={self.num_chains} * num_shards={self.num_shards}: accepted is less "
                f"than shard_examples={self.mix.shard_examples}"
            )

    @property
    def num_walks(self) -> int:
        """Examples of a shard that are chains."""
        return self.num_chains * self.num_shards


def sample_chains(one: solver.Solver, problems: Sequence[Problem]) -> list[str]:
    """What the network writes for each problem, one chain for each."""
    encoded = [solver.encode(one, problem) for problem in problems]
    chains: list[str] = []
    # Attention costs what the longest chain of a batch measures: those of one begin together.
    for start in range(0, len(encoded), one.batch_size):
        group = encoded[start : start + one.batch_size]
        structure, world = jax.device_get(solver.search_batch(one, group))
        chains += [_read_chain(one, structure, world.tokens, row) for row in range(len(group))]
    return chains


def _read_chain(one: solver.Solver, structure: Structure, tokens: np.ndarray, row: int) -> str:
    """The steps of a structure that is one chain, the last one too where it does not follow."""
    lengths = structure.span_length[row]
    steps = [tokens[row, i, : lengths[i]].tolist() for i in range(1, structure.num_nodes[row])]
    return "".join(one.tokenizer.decode(step, skip_special=True) for step in steps)


@contextlib.contextmanager
def open_walks(
    settings: WalkSettings,
    folder: pathlib.Path,
    sample_fn: Callable[[Sequence[Problem]], list[str]],
) -> Iterator[GeneratedSource]:
    """Shards of corrected chains and demonstrations, each made when it is first asked for.

    Args:
      folder: where the chains of each shard are kept, and found again.
      sample_fn: problems -> chains, by the networks of the moment.
    """
    mix, num_chains = settings.mix, settings.num_chains
    num_walks = settings.num_walks
    folder.mkdir(parents=True, exist_ok=True)
    demonstrated = dataclasses.replace(mix, shard_examples=mix.shard_examples - num_walks)
    with contextlib.closing(
        GeneratedSource(
            functools.partial(_make_demonstrations, demonstrated),
            num_shards=NUM_SHARDS,
            shard_examples=demonstrated.shard_examples,
        )
    ) as demonstrations:

        def write_shard(shard: int) -> list[TokenExample]:
            path = folder / f"{shard:06}.jsonl"
            if not path.exists():
                rng = np.random.default_rng([mix.seed, 2, shard])
                problems = draw_problems(rng, num_chains, mix.sizes)
                named = [
                    dataclasses.replace(problem, id=f"{shard}/{number}")
                    for number, problem in enumerate(problems)
                ]
                _write(path, named, sample_fn(named))
            numbers = range(max(0, shard - settings.num_shards + 1), shard + 1)
            rows = [row for number in numbers for row in _read(folder / f"{number:06}.jsonl")]
            walks = make_walks(mix, shard, *zip(*rows, strict=True))
            # Some are left out, and the first shards have none behind them: others are repeated.
            examples = [cut_example(walk, settings.max_tokens) for walk in walks]
            examples = list(itertools.islice(itertools.cycle(examples), num_walks))
            first = shard * demonstrated.shard_examples
            examples += [demonstrations[first + i] for i in range(demonstrated.shard_examples)]
            order = np.random.default_rng([mix.seed, 3, shard]).permutation(len(examples))
            return [examples[i] for i in order]

        yield GeneratedSource(
            write_shard, num_shards=NUM_SHARDS, shard_examples=mix.shard_examples, prefetch=False
        )


def _make_demonstrations(mix: CountdownMix, shard: int) -> list[TokenExample]:
    """As `make_shard`, behind all shards of the phase before."""
    return make_shard(mix, NUM_SHARDS + shard)


def _write(path: pathlib.Path, problems: Sequence[Problem], chains: Sequence[str]) -> None:
    """Chains and their problems, a line each, whole or not at all."""
    with write_whole(path) as beside, beside.open("w", encoding="utf-8") as file:
        for problem, chain in zip(problems, chains, strict=True):
            file.write(json.dumps({"problem": countdown.notation(problem), "chain": chain}) + "\n")


def _read(path: pathlib.Path) -> list[tuple[Problem, str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(countdown.read(row["problem"]), row["chain"]) for row in rows]
