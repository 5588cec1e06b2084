"""Chains of the network, corrected: shards are made once, kept, and found again."""

import importlib
import sys

import numpy as np
import pytest
from running import ROOT

from configs import countdown as countdown_config
from rlm_jax.data.countdown import CountdownMix
from rlm_jax.evaluation import build
from rlm_jax.tasks import countdown
from rlm_jax.text.tokenizer import load_tokenizer
from rlm_jax.text.train_tokenizer import train_puzzle_tokenizer

pytest.importorskip("grain")
NUM_CHAINS, SHARD = 16, 24


@pytest.fixture(scope="module")
def walks():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "experiments"))
        yield importlib.import_module("walks")
    sys.modules.pop("walks", None)


@pytest.fixture
def settings(walks, tmp_path):
    path = tmp_path / "tokenizer.model"
    train_puzzle_tokenizer(path, bare_numbers=False)
    mix = CountdownMix(str(path), 3, shard_examples=SHARD, sizes=((3, 0.5), (4, 0.5)))
    return walks.WalkSettings(mix, NUM_CHAINS, num_shards=1, max_tokens=24)


def test_a_shard_is_sampled_once_and_is_the_same_again(walks, settings, tmp_path):
    asked = []

    def sample(problems):
        asked.append({problem.id: countdown.notation(problem) for problem in problems})
        # The solver's own answer, behind a line that is taken back.
        return [_write_detour(*problem.data) for problem in problems]

    with walks.open_walks(settings, tmp_path / "chains", sample) as source:
        first = [source[i] for i in range(2 * SHARD)]
    assert [len(ids) for ids in asked] == [NUM_CHAINS, NUM_CHAINS]
    assert len({*asked[0], *asked[1]}) == 2 * NUM_CHAINS
    with walks.open_walks(settings, tmp_path / "chains", pytest.fail) as source:
        again = [source[i] for i in range(2 * SHARD)]
    for one, other in zip(first, again, strict=True):
        for here, there in zip(one, other, strict=True):
            np.testing.assert_array_equal(here, there)
    tokenizer = load_tokenizer(settings.mix.tokenizer)
    texts = [tokenizer.decode(example.tokens.tolist(), skip_special=True) for example in first]
    prompts = {prompt for shard in asked for prompt in shard.values()}
    walked = [i for i, text in enumerate(texts) if text.split("\n")[0].strip() in prompts]
    assert len(walked) >= 2 * NUM_CHAINS
    assert max(len(first[i].tokens) for i in walked) == 24
    assert sum(texts[i].count(":") > 1 for i in walked) >= NUM_CHAINS


def _write_detour(numbers: tuple[int, ...], target: int) -> str:
    low, high, *rest = sorted(numbers)
    total = low + high
    there = " ".join(map(str, sorted([total, *rest])))
    back = " ".join(map(str, sorted(numbers)))
    return f"{high} + {low} = {total} ; {there}\n: {back}\n"


def test_chains_are_what_the_network_writes(walks):
    """One chain for each problem, in their order, of lines that a verifier can read."""
    config = countdown_config.get_config().to_dict()
    config["greedy"]["max_depth"] = 6
    plan = build.plan_strategy(config, "greedy")
    policy = build.load_policy(config["model"])
    one = build.build_solver(config, plan, policy, seed=0, batch_size=4)
    problems = [
        countdown.make_problem(numbers, target, str(number))
        for number, (numbers, target) in enumerate(
            [((2, 3, 4), 24), ((1, 2, 3), 6), ((4, 5, 6, 9), 24), ((7, 8, 1), 14), ((5, 5, 5), 15)]
        )
    ]
    chains = walks.sample_chains(one, problems)
    for problem, chain in zip(problems, chains, strict=True):
        line = countdown.read_line(chain.split("\n")[0])
        assert line is not None
        assert isinstance(countdown.follow([sorted(problem.data[0])], line), list)
