"""Searches compiled for TPU v5e and v5p on this machine: what their loops copy, move and share.

Pools far larger than anything else of the program make the memory figures speak: a second copy of
one of them would show. Skips where libtpu is not installed (Linux on x86-64 has it).
"""

import collections
import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import hlo
import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install libtpu"
)
# A mesh of data alone is compiled for v5p, and v5e for one that splits the model too.
SLOW = [
    pytest.param(case, marks=pytest.mark.slow) for case in ("v5e", "v5e-smollm2", "v5p-smollm2")
]
# Operations that hand a pool on: none of them moves a byte of it.
PASSING = {"bitcast", "conditional", "get-tuple-element", "parameter", "tuple", "while"}


@pytest.fixture(scope="module")
def compiled(root, tmp_path_factory):
    """case -> (HLO text, facts), each compiled once."""

    @functools.cache
    def compile_case(case):
        folder = tmp_path_factory.mktemp(case)
        program = pathlib.Path(__file__).with_name("tpu_compile.py")
        done = subprocess.run(
            [sys.executable, str(program), case, str(folder)],
            # Flags are those of XLA on CPU, and the TPU's compiler ends where it does not know one.
            env=os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": ""},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return (folder / "search.txt").read_text(), json.loads((folder / "facts.json").read_text())

    return compile_case


def _pool_type(facts):
    return f"bf16[{','.join(map(str, facts['pool_shape']))}]"


@pytest.mark.parametrize("case", ["v5p", "v5e-model", *SLOW])
def test_pools_are_written_in_place(compiled, case):
    """In the whole program nothing makes a pool but the writes of new pages, as many for each."""
    text, facts = compiled(case)
    pool = _pool_type(facts)
    inside = [one for one in hlo.loop_instructions(text) if pool in one.type]
    makers = [one for one in inside if one.op not in PASSING]
    # A fusion and the scatter in it.
    counts = collections.Counter(one.op for one in makers)
    assert counts.keys() == {"fusion", "scatter"}
    assert counts["fusion"] == counts["scatter"]
    assert counts["scatter"] % facts["num_pools"] == 0
    assert all("/scatter" in one.line for one in makers)
    everywhere = [one for one in hlo.instructions(text) if pool in one.type]
    assert {one.op for one in everywhere} <= PASSING | {"fusion", "scatter"}
    assert sum(one.op == "scatter" for one in everywhere) == counts["scatter"]


@pytest.mark.parametrize("case", ["v5p", "v5e-model", *SLOW])
def test_pools_are_donated_and_have_no_twin(compiled, case):
    text, facts = compiled(case)
    (pool_bytes,) = hlo.array_bytes(_pool_type(facts))
    assert facts["alias_bytes"] >= facts["num_pools"] * pool_bytes
    embedding = f"bf16[{facts['vocab_size']},"  # Fetched on chip, which is no affair of the pools.
    for one in hlo.copies(hlo.loop_instructions(text)):
        sizes = hlo.array_bytes(" ".join(re.findall(r"bf16\[[\d,]*\]", one.type)))
        assert max(sizes, default=0) < pool_bytes / 4 or embedding in one.type, one.line


@pytest.mark.parametrize("case", ["v5p", "v5e-model", *SLOW])
def test_what_a_round_holds_is_small_beside_the_pools(compiled, case):
    facts = compiled(case)[1]
    (pool_bytes,) = hlo.array_bytes(_pool_type(facts))
    assert facts["temp_bytes"] < facts["num_pools"] * pool_bytes / 2


@pytest.mark.parametrize("case", ["v5p", *SLOW])
def test_shards_of_a_batch_do_not_talk(compiled, case):
    assert hlo.collectives(compiled(case)[0]) == []


def test_a_split_model_talks_inside_its_group(compiled):
    found = hlo.collectives(compiled("v5e-model")[0])
    assert len(found) >= 4
    for _, groups in found:
        assert {tuple(sorted(group)) for group in groups} == {(0, 1), (2, 3)}


@pytest.mark.parametrize("case", ["v5p", "v5e-model", *SLOW])
def test_nothing_leaves_the_device(compiled, case):
    assert hlo.host_transfers(compiled(case)[0]) == []
