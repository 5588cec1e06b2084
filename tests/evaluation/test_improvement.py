"""The table of self-improvement, by hand."""

from rlm_jax.evaluation.improvement import write_improvement


def make_point(seed, arm, number, accuracy, auc):
    cell = {"split": "s", "n": 100, "budget_tokens": 64, "blind": False, "num_chains": None}
    cost = {"expansions": 2.0, "generated_tokens": 30.0 + seed}
    values = {"strategy": "best_first", "depth": 1, "auc": auc, "ece": [0.25, 0.2, 0.3]}
    return {
        "seed": seed, "arm": arm, "round": number, "steps": 10 * number, "seconds": 30.0,
        "results": [
            {**cell, **cost, "strategy": "greedy", "accuracy": accuracy, "max_expansions": None},
            {**cell, **cost, "strategy": "best_first", "accuracy": 1.0, "max_expansions": 8},
        ],
        "calibration": [values, {**values, "strategy": "greedy", "auc": [0.1, 0.0, 0.2]}],
        "command": "improve.py",
    }  # fmt: skip


def test_rows_are_means_over_the_seeds():
    points = [
        make_point(0, "start", 0, 0.1, [0.5, 0.4, 0.6]),
        make_point(1, "start", 0, 0.3, None),
        *(make_point(s, "search", n, 0.1 * n, [0.5 + s / 4, 0, 1]) for s in (0, 1) for n in (1, 2)),
    ]
    page = write_improvement(points)
    head, _, *rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    found = [dict(zip(head, row, strict=True)) for row in rows]
    assert [(row["| round"], row["arm"]) for row in found] == [
        ("| 0", "start"), ("| 1", "search"), ("| 2", "search"),
    ]  # fmt: skip
    assert found[0]["greedy, %"] == "20.0 (15.0-26.1; 10.0, 30.0)"
    assert [row["minutes since the start"] for row in found] == ["0.0", "0.5", "1.0"]
    assert [row["AUC, 1"] for row in found] == ["0.500", "0.625", "0.625"]
    assert found[0]["ECE, 1"] == "0.250"
    assert found[0]["AUC, 2"] == "-"
    assert rows[1].count("30") == 2  # Tokens, of both strategies.
    assert (
        "the first 100 problems, at most 64 tokens and, in searches, 8 expansions; seeds 0, 1."
        in page
    )
    assert page.endswith("    python improve.py\n")
