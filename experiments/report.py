"""Writes docs/results.md from what evaluate.py left.

python experiments/report.py --results=RESULTS/results.jsonl --out=docs/results.md
"""

import json
import pathlib
from typing import Any

import launching
from absl import flags

_RESULTS = flags.DEFINE_string("results", None, "results.jsonl of evaluate.py.")
_OUT = flags.DEFINE_string("out", None, "The page to write.")
flags.adopt_module_key_flags(launching)

HEAD = """# Results

Written by `experiments/report.py` from what `experiments/evaluate.py` measured; not edited by hand.
Accuracy in %, with Wilson's 95% interval. `blind` is the same search over random legal moves,
without a network, at the same expansions. Tokens are generated tokens, a mean per problem.
"""


def main() -> None:
    """Reads, groups by test set and writes."""
    if not _RESULTS.value or not _OUT.value:
        raise ValueError("--results=FILE and --out=FILE are both needed")
    lines = pathlib.Path(_RESULTS.value).read_text().splitlines()
    results = [json.loads(line) for line in lines if line.strip()]
    parts = [HEAD]
    for split in dict.fromkeys(result["split"] for result in results):
        rows = [result for result in results if result["split"] == split]
        rows.sort(key=lambda row: (row["max_expansions"] or 0, row["strategy"], row["blind"]))
        parts.append(f"## {split}\n\n{_write_table(rows)}\n")
    commands = dict.fromkeys(result["command"] for result in results)
    parts.append("## Commands\n\n" + "\n".join(f"    python {one}" for one in commands) + "\n")
    pathlib.Path(_OUT.value).write_text("\n".join(parts))


def _write_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| strategy | expansions at most | n | accuracy | 95% | expansions | tokens | seed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval_95"]
        cells = (
            ("blind " if row["blind"] else "") + row["strategy"],
            row["max_expansions"] or "-",
            row["n"],
            f"{100 * row['accuracy']:.1f}",
            f"{100 * low:.1f}-{100 * high:.1f}",
            f"{row['expansions']:.1f}",
            "-" if row["blind"] else f"{row['generated_tokens']:.0f}",
            row["seed"],
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    launching.launch(main)
