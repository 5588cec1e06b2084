"""bench.py on a tiny model: its lines, its exact counts, its errors, and an absent other side."""

import json
import sys

import pytest
from running import ROOT, run_program

SMALL = (
    "--config=configs/smollm2.py:smoke",
    "--suite=decode",
    "--context=12",
    "--new_tokens=4",
    "--repeats=2",
    "--dtypes=float32,int8",
)


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The lines of a run, from the screen and from the file."""
    out = tmp_path_factory.mktemp("bench") / "lines.jsonl"
    done = run_program("bench.py", *SMALL, "--rows=1,3", "--only_ours", f"--out={out}")
    assert done.status == 0, done.err
    assert out.read_text() == done.out
    return [json.loads(line) for line in done.out.splitlines()]


@pytest.mark.slow
def test_every_case_has_its_fields(lines):
    names = [line["case"] for line in lines]
    assert names[:2] == ["decode_float32_1", "decode_float32_3"]
    assert names[2:4] == ["decode_int8_1", "decode_int8_3"]
    assert len(names) == 10
    for line in lines:
        assert {"case", "ours", "other", "ratio", "unit"} <= line.keys()


@pytest.mark.slow
def test_decode_cases_report_roofs_and_a_missing_side_as_null(lines):
    for line in lines[:4]:
        assert line["ours"] > 0
        assert line["other"] is None
        assert line["ratio"] is None
        assert "only_ours" in line["other_is"]
        assert line["bandwidth_roof_share"] > 0
        assert line["matmul_roof_share"] > 0


@pytest.mark.slow
def test_no_token_is_forwarded_twice_and_pages_are_full_enough(lines):
    counts = {(line["case"], line["strategy"]): line for line in lines[4:]}
    for strategy in ("best_of_n", "puct"):
        forwarded = counts["forwarded_ratio", strategy]
        assert forwarded["ours"] == forwarded["other"] > 0
        assert forwarded["ratio"] == 1.0
        assert 1.0 <= counts["kv_bytes_per_node", strategy]["ratio"] <= 1.35
        assert 0 < counts["row_utilisation", strategy]["ratio"] <= 1


@pytest.mark.slow
def test_a_python_without_torch_is_told_of_and_costs_nothing_else(smollm2_gguf, lines):
    """The other side answers its errors; ours is measured all the same."""
    del lines
    import bench_decode

    with bench_decode.SideProcess(sys.executable, bench_decode.OTHER_SCRIPT) as other:
        note = bench_decode.load_other(other, str(smollm2_gguf), "float32")
    assert note is not None
    assert "--other_python" in note


@pytest.mark.slow
def test_training_is_held_against_products_and_profiled():
    pytest.importorskip("grain")
    done = run_program(
        "bench.py",
        "--suite=train",
        "--config=configs/countdown.py:smoke",
        "--config.train.begin_with=package:countdown",
        "--repeats=1",
        "--quiet_seconds=0",
    )
    assert done.status == 0, done.err
    sft, step = map(json.loads, done.out.splitlines())
    assert sft["weights"] == 3_343_488
    assert sft["ratio"] == pytest.approx(sft["ours"] / sft["other"], rel=1e-3)
    assert 0 < sft["ratio"] < 1
    # Every operation belongs somewhere, and most of the time to the networks.
    assert sum(step["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert step["shares"]["networks"] == step["ours"] > 0.5
    assert min(step["shares"].values()) > 0
    assert step["search_tokens"] > 0


# As XLA's CPU backend writes them: a conditional by another name, and operations without a place.
HLO = """
%branch.1 (p: f32[4]) -> f32[4] {
  %gather.5 = f32[4]{0} gather(%p, %i), metadata={op_name="jit(f)/cond/branch_1_fun/gather"}
  ROOT %copy.4 = f32[4]{0} copy(%gather.5)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %dot.1 = f32[4,1]{1,0} dot(%a, %w), lhs_contracting_dims={0}
  %fusion.2 = f32[4]{0} fusion(%dot.1, %a), kind=kLoop, metadata={op_name="jit(f)/transformer/add"}
  %cond.3 = (f32[4]{0}, /*index=1*/f32[4]{0}) conditional(%c, %fusion.2, %fusion.2), \
branch_computations={%branch.0, %branch.1}, metadata={op_name="jit(f)/cond"}
  ROOT %muon.6 = f32[4]{0} add(%g, %g), metadata={op_name="jit(f)/optimizer/add"}
}
"""


def test_the_time_of_a_program_is_shared_by_where_its_operations_come_from(monkeypatch):
    pytest.importorskip("grain")
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))
    import bench_train

    places = bench_train.place_operations(HLO)
    spent = (("dot.1", 3.0), ("fusion.2", 1.0), ("cond.3", 9.0), ("gather.5", 2.0))
    spent += (("copy.4", 1.0), ("muon.6", 0.5), ("unheard.of", 0.5))
    shares, others = bench_train.share_operations(spent, places)
    # A product belongs to what needs it, a copy to what it copies, and a container to nothing.
    assert shares == {"networks": 4 / 8, "optimizer": 0.5 / 8, "search": 3.5 / 8}
    assert others == {
        "cond/branch_1_fun/gather": 3 / 8,
        "jit(f)/optimizer/add": 0.5 / 8,
        "unheard.of": 0.5 / 8,
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--suite=speed",), "--suite=speed: accepted are decode"),
        ((), "--suite=None: accepted are decode"),
        (("--suite=decode", "--rows=0"), "--rows=0: accepted are numbers >= 1"),
        (("--suite=decode", "--rows=two"), "--rows=two: accepted are whole numbers"),
        (("--suite=decode", "--new_tokens=1"), "new_tokens"),
        (("--suite=train",), "the config has no `train`"),
        (("--suite=train", "--config=configs/countdown.py:smoke", "--only=all"), "are sft, step"),
    ],
)
def test_wrong_flags_are_one_line(flags, message):
    done = run_program("bench.py", *flags)
    assert done.status == 2
    assert message in done.err
    assert len(done.err.splitlines()) == 1
