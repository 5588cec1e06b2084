import itertools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlm_jax.data.examples import TokenTable, make_example
from rlm_jax.data.iterators import BatchIterator, make_batches, make_stream
from rlm_jax.data.packing import Bucketed, Packed

PACKED = Packed(num_rows=3, row_tokens=16)
BUCKETED = Bucketed((4, 8, 16), batch_tokens=32)


def make_source(num_examples, max_tokens=16):
    """Example i is the token i+1, as often as a fixed rule says."""
    lengths = [1 + (7 * i * i + i) % max_tokens for i in range(num_examples)]
    return [make_example([i + 1] * n) for i, n in enumerate(lengths)]


def numbers_in(batch):
    """Which examples a batch holds, each once."""
    starts = (batch.segments > 0) & (batch.positions == 0)
    return (batch.tokens[starts] - 1).tolist()


def assert_equal(batch, other):
    for array, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize("layout", [PACKED, BUCKETED], ids=["packed", "bucketed"])
def test_a_restart_continues_with_the_same_batches(layout):
    source = make_source(20)
    undisturbed = make_batches(source, layout, seed=5)
    batches, states = [], [undisturbed.get_state()]
    for _ in range(25):
        batches.append(next(undisturbed))
        states.append(json.loads(json.dumps(undisturbed.get_state())))
    assert undisturbed.epoch > 3  # epoch borders lie within
    for begin in range(0, len(states), 2):
        resumed = make_batches(source, layout, seed=5)
        resumed.set_state(states[begin])
        assert resumed.get_state() == states[begin]
        for batch in batches[begin : begin + 3]:
            assert_equal(next(resumed), batch)
    assert resumed.counts == undisturbed.counts


def test_a_state_may_be_set_on_a_running_iterator():
    batches = make_batches(make_source(20), PACKED, seed=1)
    first, state, later = next(batches), batches.get_state(), [next(batches) for _ in range(4)]
    batches.set_state(state)
    for batch in later:
        assert_equal(next(batches), batch)
    assert numbers_in(first) != numbers_in(later[0])


PROGRAM = """
import json, sys
from rlm_jax.data.examples import make_example
from rlm_jax.data.iterators import make_batches
from rlm_jax.data.packing import Packed
lengths = [1 + (7 * i * i + i) % 16 for i in range(20)]
source = [make_example([i + 1] * n) for i, n in enumerate(lengths)]
batches = make_batches(source, Packed(num_rows=3, row_tokens=16), seed=5)
batches.set_state(json.loads(sys.argv[1]))
print(json.dumps([next(batches).tokens.tolist() for _ in range(5)]))
"""


def test_a_new_process_continues_with_the_same_batches(root):
    batches = make_batches(make_source(20), PACKED, seed=5)
    for _ in range(4):
        next(batches)
    state = json.dumps(batches.get_state())
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, state], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [next(batches).tokens.tolist() for _ in range(5)]


@settings(max_examples=20, deadline=None)
@given(
    num_examples=st.integers(1, 30),
    num_epochs=st.integers(1, 3),
    layout=st.sampled_from([PACKED, BUCKETED]),
    seed=st.integers(0, 2**40),
)
def test_epochs_that_end_hold_every_example_as_often(num_examples, num_epochs, layout, seed):
    source = make_source(num_examples)
    batches = make_batches(TokenTable(source), layout, seed=seed, num_epochs=num_epochs)
    seen = [number for batch in batches for number in numbers_in(batch)]
    assert sorted(seen) == sorted(list(range(num_examples)) * num_epochs)
    with pytest.raises(StopIteration):
        next(batches)
    assert batches.counts.examples == len(seen)
    assert batches.counts.tokens == num_epochs * sum(len(e.tokens) for e in source)
    assert batches.epoch == num_epochs


def order_of(num_examples, count, **options):
    stream = make_stream(list(range(num_examples)), **options)
    return [stream.examples[i] for i in range(count)]


def test_every_epoch_has_an_order_of_its_own():
    order = order_of(50, 200, seed=0)
    epochs = [order[i : i + 50] for i in range(0, 200, 50)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(50))] * 4
    assert len(set(map(tuple, epochs))) == 4
    assert order == order_of(50, 200, seed=0)
    assert order_of(50, 100, seed=0, shuffle=False) == list(range(50)) * 2
    # Not those of the neighbouring seeds, shifted.
    for seed in (1, 2):
        other = order_of(50, 200, seed=seed)
        assert not {tuple(other[i : i + 50]) for i in range(0, 200, 50)} & set(map(tuple, epochs))


@settings(max_examples=12, deadline=None)
@given(num_shards=st.integers(1, 5), extra=st.integers(0, 20), seed=st.integers(0, 9))
def test_shards_share_every_epoch_among_them(num_shards, extra, seed):
    num_examples = num_shards + extra
    size = num_examples // num_shards
    shards = [
        order_of(num_examples, 3 * size, seed=seed, shard_index=i, num_shards=num_shards)
        for i in range(num_shards)
    ]
    for epoch in range(3):
        seen = list(itertools.chain(*(s[epoch * size : (epoch + 1) * size] for s in shards)))
        assert len(set(seen)) == len(seen) == size * num_shards
        if num_examples % num_shards == 0:
            assert sorted(seen) == list(range(num_examples))


def test_examples_made_from_what_the_source_holds():
    texts = ["ab", "c", "def"]
    batches = make_batches(
        texts,
        Packed(num_rows=1, row_tokens=8),
        seed=0,
        num_epochs=1,
        make_example=lambda text: make_example(list(text.encode())),
    )
    tokens = next(batches).tokens[0]
    assert sorted(bytes(tokens[tokens > 0].tolist()).decode()) == sorted("".join(texts))


def test_examples_that_are_too_long_are_dropped_with_a_count_or_raise():
    source = make_source(20, max_tokens=20)
    num_long = sum(len(example.tokens) > 16 for example in source)
    assert num_long > 1
    batches = make_batches(source, PACKED, seed=0, num_epochs=2, too_long="drop")
    seen = [number for batch in batches for number in numbers_in(batch)]
    assert batches.counts.dropped == 2 * num_long
    short = [i for i, example in enumerate(source) if len(example.tokens) <= 16]
    assert sorted(seen) == sorted(short * 2)
    with pytest.raises(ValueError, match=r"has (17|18|19|20) tokens; rows have 16"):
        list(make_batches(source, PACKED, seed=0, num_epochs=2))

    with pytest.raises(ValueError, match="every example of an epoch is longer than 3"):
        next(make_batches([make_example([1] * 4)] * 3, Packed(2, 3), seed=0, too_long="drop"))


@pytest.mark.parametrize("layout", [Packed(16, 64), Bucketed((8, 16, 24, 32), 1024)])
def test_little_is_padding(layout):
    rng = np.random.default_rng(0)
    source = TokenTable(make_example([1] * int(n)) for n in rng.integers(5, 33, 600))
    batches = make_batches(source, layout, seed=0)
    for _ in range(15):
        next(batches)
    assert batches.counts.slots == 15 * 1024 or isinstance(layout, Bucketed)
    assert batches.counts.padding_share < (0.02 if isinstance(layout, Packed) else 0.25)


def test_nobody_waits_for_ever():
    # Only one example fits into a row, and 32 fits beside no other: the hard case.
    source = TokenTable(make_example([1] * n) for n in [32] + [33] * 99)
    batches = make_batches(source, Packed(8, 64, slack=0.5), seed=0)
    oldest = -1
    for _ in range(40):
        next(batches)
        waiting = batches.get_state()["waiting"]
        assert len(waiting) < 30
        assert waiting[0] > oldest  # the one that waited longest is in every batch
        oldest = waiting[0]


def test_a_state_of_something_else_is_refused():
    source = make_source(20)
    state = make_batches(source, PACKED, seed=5).get_state()

    def resume(state, source=source, layout=PACKED, **options):
        make_batches(source, layout, **({"seed": 5} | options)).set_state(state)

    resume(state)
    for options, message in [
        ({"seed": 6}, "seed=5; this one has 6"),
        ({"num_shards": 2}, "num_shards=1"),
        ({"source": source[:-1]}, "num_source_examples=20"),
        ({"layout": BUCKETED}, "layout"),
        ({"too_long": "drop"}, "too_long='raise'"),
        ({"num_epochs": 3}, "num_epochs=None"),
    ]:
        with pytest.raises(ValueError, match=message):
            resume(state, **options)
    with pytest.raises(ValueError, match="version 1"):
        resume(state | {"version": 2})
    with pytest.raises(ValueError, match="other fields"):
        resume({k: v for k, v in state.items() if k != "waiting"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed"),
        ({"shard_index": 2, "num_shards": 2}, "shard_index 2"),
        ({"num_shards": 9}, "4 examples are too few for 9"),
        ({"num_epochs": 0}, "num_epochs"),
    ],
)
def test_bad_streams_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_stream(make_source(4), **({"seed": 0} | options))
    with pytest.raises(ValueError, match="accepted: raise, drop"):
        BatchIterator(make_stream(make_source(4), seed=0), PACKED, too_long="cut")


def test_without_grain_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(ValueError, match=r"grain: pip install 'rlm_jax\[train\]'"):
        make_stream([1, 2], seed=0)
