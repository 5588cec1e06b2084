"""Reasoning trees and comparisons as terminal text (rich).

The one idea: a run of only children is a column, not a staircase. Indentation is spent on
branches alone, so that a chain of forty steps and the best of a tree of thousands both fit a
screen of 80 columns (what is drawn and what is folded: `outline.py`). Everything is legible
without colour, and text of a model can neither style the output nor drive the terminal.
"""

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from rlm_jax.viz.outline import (
    MIN_LINES,
    Fold,
    Node,
    Outline,
    branches_fold,
    outline_record,
)

CHOSEN, FINISHED, UNFINISHED, PRUNED, ELIDED = "▶", "✔", "…", "✂", "⋮"
TIMES = "\N{MULTIPLICATION SIGN}"
RIGHT, WRONG, UNKNOWN = "✔", "✘", "-"

_MIN_TEXT_WIDTH = 24
_MAX_CELL_WIDTH = 24
_LEGEND = {
    CHOSEN: "chosen path",
    FINISHED: "finished",
    UNFINISHED: "unfinished",
    PRUNED: "pruned",
    TIMES + "n": "n equal steps, merged",
}


def render_tree(
    record: Mapping[str, Any], *, max_lines: int = 40, width: int | None = None
) -> RenderableType:
    """Draws a record's structure; print it on a rich console.

    Args:
      record: a valid record, see `rlm_jax.data.records`.
      max_lines: lines to use at most, the legend's among them; the chosen path and then the best
        others are drawn, the rest is counted where it would stand.
      width: columns to use at most; the console's by default.

    Raises:
      ValueError: max_lines is below 4.
    """
    if max_lines < MIN_LINES + 1:
        raise ValueError(f"max_lines must be >= {MIN_LINES + 1}, not {max_lines}")
    rows = _lay_out(record, outline_record(record, max_lines - 1))
    return _TreeView(rows, _make_columns(record["nodes"][1:]), width)


def render_summary(records: Iterable[Mapping[str, Any]]) -> RenderableType:
    """A table with one row per strategy: what it answered and what it cost.

    Where a strategy has several records their costs are summed and answers are counted.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["strategy"], []).append(record)
    single = all(len(group) == 1 for group in groups.values())
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("strategy")
    table.add_column("answer" if single else "answered")
    table.add_column("correct", no_wrap=True)
    for name in ("generated\ntokens", "model\ncalls", "seconds", "tokens/s"):
        table.add_column(name, justify="right", vertical="bottom", no_wrap=True)
    for strategy, group in groups.items():
        tokens = sum(record["budget"]["generated_tokens"] for record in group)
        calls = sum(record["budget"]["model_calls"] for record in group)
        seconds = sum(record["seconds"] for record in group)
        table.add_row(
            _make_cell(strategy),
            _make_cell(_describe_answer(group[0])) if single else _count_answers(group),
            _describe_verdict(group[0]) if single else _count_right(group),
            f"{tokens:,}",
            f"{calls:,}",
            f"{seconds:.1f}",
            f"{tokens / seconds:.1f}" if seconds > 0 else UNKNOWN,
        )
    return table


def clean_text(text: str, max_chars: int = 500) -> str:
    """`text` on one line, with whatever could steer a terminal made visible.

    Whitespace runs become one space; control, format and unassigned characters (escape sequences,
    direction overrides) become U+FFFD.
    """
    line = " ".join(text[: 4 * max_chars].split())[:max_chars]
    return "".join("\ufffd" if unicodedata.category(c)[0] == "C" else c for c in line)


class _Row(NamedTuple):
    """One line of the picture: a node, or a count of folded ones.

    notes: the same remark in several lengths, the fullest first.
    """

    guide: str
    mark: str
    text: str
    node: Mapping[str, Any] | None
    chosen: bool
    notes: Sequence[str] = ("",)


class _Column(NamedTuple):
    title: str
    cells: Mapping[int, str]
    width: int

    def cell(self, node: Mapping[str, Any] | None) -> str:
        return self.cells.get(node["id"], "") if node else ""


@dataclasses.dataclass(frozen=True)
class _TreeView:
    """Rows and columns, fitted to whatever width the console has when it prints them."""

    rows: Sequence[_Row]
    columns: Sequence[_Column]
    width: int | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width = min(options.max_width, self.width or options.max_width)
        columns = list(self.columns)
        while columns and width - _total_width(columns) < _MIN_TEXT_WIDTH:
            columns.pop()
        room = width - _total_width(columns)
        lines = [_draw_row(row, room) for row in self.rows]
        used = max(line.cell_len for line in lines)
        root = self.rows[0].node
        for row, line in zip(self.rows, lines, strict=True):
            line.pad_right(used - line.cell_len)
            for column in columns:
                # The root has no statistics worth a reader's eye: its line carries the titles.
                cell = column.title if row.node is root else column.cell(row.node)
                style = "dim" if row.node is root else _style(row)
                line.append(f"  {cell:>{column.width}}", style)
            line.rstrip()
            yield line
        yield _draw_legend(self.rows, width)


def _draw_row(row: _Row, room: int) -> Text:
    guide = row.guide
    # Deep branching must leave the words some room: the outer guides give way.
    if len(guide) > room // 2:
        guide = "⋯" + guide[-(room // 2) + 1 :]
    line = Text(no_wrap=True)
    line.append(f"{CHOSEN} " if row.chosen else "  ", _style(row))
    line.append(guide, "dim")
    line.append(f"{row.mark} " if row.mark else "", _style(row))
    free = room - line.cell_len
    line.append(row.text, _style(row))
    note = _choose_note(row, free)
    line.truncate(max(room - len(note), 1), overflow="ellipsis")
    line.append(note, "dim")
    line.truncate(room, overflow="ellipsis")
    return line


def _choose_note(row: _Row, free: int) -> str:
    """The fullest note beside which the text is whole, or keeps half of the `free` columns."""
    wanted = min(cell_len(row.text), free // 2)
    fitting = (note for note in row.notes if wanted + len(note) <= free)
    return next(fitting, row.notes[-1])


def _draw_legend(rows: Sequence[_Row], width: int) -> Text:
    seen = {row.mark for row in rows if row.node} | (
        {CHOSEN} if any(r.chosen for r in rows) else set()
    )
    seen |= {TIMES + "n" for row in rows if TIMES in row.notes[0]}
    parts = [f"{mark} {meaning}" for mark, meaning in _LEGEND.items() if mark in seen]
    legend = Text("   ".join(parts), "dim", no_wrap=True)
    legend.truncate(width, overflow="ellipsis")
    return legend


def _style(row: _Row) -> str:
    if row.node is None or not row.node["alive"]:
        return "dim"
    return "bold green" if row.chosen else ""


def _total_width(columns: Sequence[_Column]) -> int:
    return sum(column.width + 2 for column in columns)


def _make_columns(nodes: Sequence[Mapping[str, Any]]) -> list[_Column]:
    """The statistics that say something: not absent, not the same everywhere, not said before."""
    nodes = [node for node in nodes if node["alive"] or node["visits"]]
    sources = dict.fromkeys(source for node in nodes for source in node["value"])
    fields = {"visits": {node["id"]: node["visits"] for node in nodes}}
    for source in sources:
        fields[clean_text(source, 12)] = {n["id"]: n["value"].get(source) for n in nodes}
    fields["prior"] = {node["id"]: node["prior"] for node in nodes}
    columns = []
    for title, values in fields.items():
        if len({value for value in values.values() if value is not None}) < 2:
            continue
        cells = {
            node: str(value) if isinstance(value, int) else f"{value:.2f}"
            for node, value in values.items()
            if value is not None
        }
        if all(cells != column.cells for column in columns):
            columns.append(_Column(title, cells, max(len(title), *map(len, cells.values()))))
    return columns


def _lay_out(record: Mapping[str, Any], outline: Outline) -> list[_Row]:
    """Rows in depth-first order; only a branch indents."""
    chosen = set(record["chosen"])
    rows: list[_Row] = []
    # A node to draw, the guide of its first line, and the guide of the lines below it. A negative
    # entry, -1 - node, stands for the fold of that node.
    pending = [(outline.root, "", "")]
    while pending:
        node, guide, below = pending.pop()
        if node < 0:
            rows.append(_Row(guide, "", "", None, False, _describe_fold(outline.folds[-1 - node])))
            continue
        if node in outline.gaps:
            gap = outline.gaps[node]
            text = f"{ELIDED} {gap.steps} steps"
            notes = _space_notes("", _describe_fold(gap.beside))
            rows.append(_Row(guide, "", text, None, node in chosen, notes))
            guide = below
        family = outline.children[node]
        fold_line = branches_fold(len(family), node in outline.folds)
        rows.append(_make_row(record, outline, node, guide, fold_line))
        if len(family) < 2:
            pending += [(child, below, below) for child in family]
            continue
        entries = [*family, -1 - node] if fold_line else family
        pending.append((entries[-1], below + "└─ ", below + "   "))
        pending += [(child, below + "├─ ", below + "│  ") for child in entries[-2::-1]]
    return rows


def _make_row(
    record: Mapping[str, Any], outline: Outline, node: int, guide: str, fold_line: bool
) -> _Row:
    fields = outline.nodes[node]
    root = node == outline.root
    mark = "" if root else _mark(fields, node not in outline.leaves)
    text = clean_text(record["question"]) if root else _describe(fields)
    copies = f"{TIMES}{outline.copies[node] + 1}" if node in outline.copies else ""
    folded = ("",)
    if node in outline.folds and not fold_line:
        folded = _describe_fold(outline.folds[node])
    chosen = node in record["chosen"]
    return _Row(guide, mark, text, fields, chosen, _space_notes(copies, folded))


def _space_notes(copies: str, folded: Sequence[str]) -> list[str]:
    return ["".join(f"  {part}" for part in (copies, note) if part) for note in folded]


def _describe_fold(fold: Fold) -> tuple[str, ...]:
    """What is folded, from the fullest wording to the shortest; the count is in each."""
    if not fold.steps:
        return ("",)
    count = f"{UNFINISHED} {fold.steps} more step{'s' * (fold.steps > 1)}"
    branches = f" in {fold.branches} branches" if 1 < fold.branches < fold.steps else ""
    facts = [] if fold.best is None else [f"best {fold.best:.2f}"]
    if fold.solutions:
        facts.append(f"{fold.solutions} solution{'s' * (fold.solutions > 1)}")
    if fold.pruned:
        facts.append(f"{fold.pruned} pruned")
    wordings = [", ".join([count, *facts[:length]]) for length in range(len(facts), -1, -1)]
    full = ", ".join([count + branches, *facts])
    return tuple(dict.fromkeys([full, *wordings, f"{UNFINISHED} {fold.steps}"]))


def _mark(node: Node, has_children: bool) -> str:
    if not node["alive"]:
        return PRUNED
    if node["terminal"]:
        return FINISHED
    return "" if has_children else UNFINISHED


def _describe(node: Mapping[str, Any]) -> str:
    # A slot is paid for with its siblings, whether its step was written or not.
    text = clean_text(node["text"]) or ("(empty step)" if node["tokens"] else "(not written)")
    if node["op"] == "generate":
        return text
    sources = f" of {len(node['parents'])}" if len(node["parents"]) > 1 else ""
    return f"{clean_text(node['op'])}{sources}: {text}"


def _make_cell(text: str) -> Text:
    """A cell that is cut, not wrapped, where the table gets too wide."""
    cell = Text(clean_text(text), no_wrap=True, overflow="ellipsis")
    cell.truncate(_MAX_CELL_WIDTH, overflow="ellipsis")
    return cell


def _describe_answer(record: Mapping[str, Any]) -> str:
    return UNKNOWN if record["answer"] is None else record["answer"]


def _describe_verdict(record: Mapping[str, Any]) -> Text:
    if record["correct"] is None:
        return Text(UNKNOWN)
    return Text(f"{RIGHT} yes", "green") if record["correct"] else Text(f"{WRONG} no", "red")


def _count_answers(group: Sequence[Mapping[str, Any]]) -> str:
    return f"{sum(record['answer'] is not None for record in group)} of {len(group)}"


def _count_right(group: Sequence[Mapping[str, Any]]) -> str:
    judged = [record["correct"] for record in group if record["correct"] is not None]
    return f"{sum(judged)} of {len(judged)}" if judged else UNKNOWN
