"""bench.py on a tiny model: its lines, its exact counts, its errors, and an absent other side."""

import json
import sys

import pytest
from running import run_program

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
    assert sft["weights"] == 2_018_240
    assert sft["ratio"] == pytest.approx(sft["ours"] / sft["other"], rel=1e-3)
    assert 0 < sft["ratio"] < 1
    # Every operation belongs somewhere, and most of the time to the networks.
    assert sum(step["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert step["shares"]["networks"] == step["ours"] > 0.5
    assert min(step["shares"].values()) > 0
    assert step["search_tokens"] > 0


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
