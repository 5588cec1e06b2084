"""Lines of results: their names, and what best-of-N would have cost."""

import json

import pytest

from rlm_jax.evaluation.chains import Price
from rlm_jax.evaluation.results import (
    Cell,
    name_row,
    price_by_chains,
    read_cells,
    read_results,
    write_cell,
)


def make(strategy="best_first", accuracy=0.8, tokens=150.0, **fields):
    line = {
        "split": "countdown4-inputs",
        "strategy": strategy,
        "model": "m",
        "seed": 0,
        "blind": False,
        "num_chains": None,
        "accuracy": accuracy,
        "generated_tokens": tokens,
    }
    return line | fields


CHAINS = [
    make("best_of_n", 0.6, 100.0, num_chains=8, tokens_in_turn=50.0),
    make("best_of_n", 0.9, 400.0, num_chains=32, tokens_in_turn=80.0),
]


def test_a_search_is_priced_both_ways():
    prices = price_by_chains(make(accuracy=0.75), CHAINS)
    assert prices["together"].tokens == pytest.approx(200)
    assert prices["in turn"].tokens == pytest.approx((50 * 80) ** 0.5)
    assert price_by_chains(make(accuracy=0.95), CHAINS)["together"] == Price(400.0, ">")
    plain = [make("best_of_n", 0.6, 100.0, num_chains=8)]
    assert price_by_chains(make(accuracy=0.6), plain) == {"together": Price(100.0)}


@pytest.mark.parametrize("other", [{"model": "n"}, {"seed": 1}, {"split": "game24"}])
def test_only_like_is_measured_by_like(other):
    assert price_by_chains(make(**other), CHAINS) == {}


def test_what_is_no_search_of_a_network_has_no_price():
    for row in (make("greedy"), make(blind=True), *CHAINS):
        assert price_by_chains(row, CHAINS) == {}
    blind = [{**row, "blind": True} for row in CHAINS]
    assert price_by_chains(make(), [*blind, make(), make("best_of_n")]) == {}


def test_rows_have_names():
    assert name_row(make()) == "best_first"
    assert name_row({**CHAINS[0], "blind": True}) == "blind best of 8"
    old = make("greedy", blind=True)
    del old["num_chains"]
    assert name_row(old) == "blind greedy"


def test_results_come_back_from_their_file(tmp_path):
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAINS) + "\n")
    assert read_results(path) == CHAINS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[]", "line 2: not a JSON object"),
        ('{"split": "s", "seed": 0}', "line 2: lacks strategy, max_expansions, budget_tokens, n$"),
    ],
)
def test_a_line_that_is_no_result_is_named(tmp_path, line, message):
    path = tmp_path / "results.jsonl"
    path.write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match=rf"results\.jsonl: {message}"):
        read_cells(path, ("n",))


def test_a_cell_is_written_in_place_of_what_it_had(tmp_path):
    path = tmp_path / "out" / "results.jsonl"
    one, other = (Cell("game24", "greedy", None, 64, seed) for seed in (0, 1))
    write_cell(path, one, [make("greedy", split="game24", max_expansions=None, budget_tokens=64)])
    (old,) = read_results(path)
    # As earlier versions wrote it.
    del old["num_chains"], old["blind"]
    path.write_text(json.dumps(old) + "\n")
    second = old | {"seed": 1}
    write_cell(path, other, [second, second])
    assert read_cells(path) == {one: [old], other: [second, second]}
    write_cell(path, one, [old | {"accuracy": 0.9}])
    assert read_results(path) == [second, second, old | {"accuracy": 0.9}]
    write_cell(path, other, [])
    assert list(read_cells(path)) == [one]
    assert [file.name for file in path.parent.iterdir()] == ["results.jsonl"]
