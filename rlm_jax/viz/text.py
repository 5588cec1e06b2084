"""Reasoning trees and comparisons as terminal text (rich).

The one idea: a run of only children is a column, not a staircase. Indentation is spent on
branches alone, so that a chain of forty steps and a tree of two hundred nodes both fit 80 columns.
Best paths come first; what does not fit is counted where it would stand, and steps that were
merged into an equal sibling are counted beside it. Everything is legible without colour, and text
of a model can neither style the output nor drive the terminal.
"""

import dataclasses
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

CHOSEN, FINISHED, UNFINISHED, PRUNED = "▶", "✔", "…", "✂"
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
    record: Mapping[str, Any], *, max_nodes: int = 200, width: int | None = None
) -> RenderableType:
    """Draws a record's structure; print it on a rich console.

    Args:
      record: a valid record, see `rlm_jax.data.records`.
      max_nodes: nodes drawn; the others are counted where they would stand.
      width: columns to use at most; the console's by default.

    Raises:
      ValueError: max_nodes is below 1.
    """
    if max_nodes < 1:
        raise ValueError(f"max_nodes must be >= 1, not {max_nodes}")
    nodes = {node["id"]: node for node in record["nodes"]}
    children = _sort_children(record, nodes)
    copies = _merge_copies(nodes, children)
    shown = _choose_nodes(record, nodes, max_nodes)
    rows = _lay_out(record, nodes, children, copies, shown)
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
    """One line of the picture: a node, or a count of folded ones."""

    guide: str
    mark: str
    text: str
    node: Mapping[str, Any] | None
    chosen: bool
    note: str = ""


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
    line.append(row.text, _style(row))
    line.truncate(max(room - len(row.note), 1), overflow="ellipsis")
    line.append(row.note, "dim")
    line.truncate(room, overflow="ellipsis")
    return line


def _draw_legend(rows: Sequence[_Row], width: int) -> Text:
    seen = {row.mark for row in rows if row.node} | (
        {CHOSEN} if any(r.chosen for r in rows) else set()
    )
    seen |= {TIMES + "n" for row in rows if TIMES in row.note}
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


def _score(node: Mapping[str, Any]) -> tuple[float, ...]:
    """Sorts nodes by how much a reader wants to see them."""
    values = [value for value in node["value"].values() if value is not None]
    return (
        node["alive"],
        node["visits"],
        values[-1] if values else 0.0,
        node["prior"] or 0.0,
        -node["id"],
    )


def _sort_children(record: Mapping[str, Any], nodes: Mapping[int, Any]) -> dict[int, list[int]]:
    """Children under their main parent: the chosen one first, then best first."""
    chosen = set(record["chosen"])
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in nodes.values():
        if node["parents"]:
            children[node["parents"][0]].append(node["id"])
    for family in children.values():
        family.sort(key=lambda node: (node in chosen, *_score(nodes[node])), reverse=True)
    return children


def _choose_nodes(record: Mapping[str, Any], nodes: Mapping[int, Any], max_nodes: int) -> set[int]:
    """The best whole paths that fit into `max_nodes`, the chosen one first."""
    chosen = set(record["chosen"])
    parents = {node["parents"][0] for node in nodes.values() if node["parents"]}
    leaves = [node for node in nodes if node not in parents]
    leaves.sort(
        key=lambda node: (
            node in chosen,
            nodes[node]["alive"],
            nodes[node]["terminal"],
            *_score(nodes[node]),
        ),
        reverse=True,
    )
    shown: set[int] = set()
    for leaf in leaves:
        if len(shown) == max_nodes:
            break
        path = []
        node: int | None = leaf
        while node is not None and node not in shown:
            path.append(node)
            node = nodes[node]["parents"][0] if nodes[node]["parents"] else None
        shown.update(path[::-1][: max_nodes - len(shown)])
    return shown


def _lay_out(
    record: Mapping[str, Any],
    nodes: Mapping[int, Any],
    children: Mapping[int, list[int]],
    copies: Mapping[int, int],
    shown: set[int],
) -> list[_Row]:
    """Rows in depth-first order; only a branch indents."""
    chosen = set(record["chosen"])
    sizes = _count_descendants(nodes, children)
    root = next(iter(nodes))
    rows: list[_Row] = []
    # A node to draw, the guide of its first line, and the guide of the lines below it.
    pending = [(root, "", "")]
    while pending:
        node, guide, below = pending.pop()
        if node < 0:
            rows.append(_Row(guide, "", _count_more(-node), None, False))
            continue
        family = [child for child in children[node] if child in shown]
        num_folded = sum(sizes[child] for child in children[node] if child not in shown)
        branches = len(family) > 1
        note = f"  {TIMES}{copies[node] + 1}" if node in copies else ""
        note += f"  {_count_more(num_folded)}" if num_folded and not branches else ""
        mark = "" if node == root else _mark(nodes[node], bool(children[node]))
        text = clean_text(record["question"]) if node == root else _describe(nodes[node])
        rows.append(_Row(guide, mark, text, nodes[node], node in chosen, note))
        if not branches:
            pending += [(child, below, below) for child in family]
            continue
        # A negative entry stands for that many folded nodes.
        entries = [*family, -num_folded] if num_folded else family
        pending.append((entries[-1], below + "└─ ", below + "   "))
        pending += [(child, below + "├─ ", below + "│  ") for child in entries[-2::-1]]
    return rows


def _count_more(num_nodes: int) -> str:
    return f"… {num_nodes} more node{'s' * (num_nodes > 1)}"


def _merge_copies(nodes: dict[int, Any], children: dict[int, list[int]]) -> dict[int, int]:
    """Takes out leaves that were merged into an equal sibling; counts them by that sibling."""
    copies: dict[int, int] = {}
    for family in children.values():
        living = {nodes[node]["text"]: node for node in family if nodes[node]["alive"]}
        for node in [node for node in family if not nodes[node]["alive"]]:
            twin = living.get(nodes[node]["text"])
            if twin is not None and not children[node]:
                family.remove(node)
                copies[twin] = copies.get(twin, 0) + 1
    kept = {node for family in children.values() for node in family} | {next(iter(nodes))}
    for node in [node for node in nodes if node not in kept]:
        del nodes[node], children[node]
    return copies


def _count_descendants(
    nodes: Mapping[int, Any], children: Mapping[int, list[int]]
) -> dict[int, int]:
    """Nodes of the subtree under each node, itself included."""
    sizes: dict[int, int] = {}
    for node in reversed(list(nodes)):
        sizes[node] = 1 + sum(sizes[child] for child in children[node])
    return sizes


def _mark(node: Mapping[str, Any], has_children: bool) -> str:
    if not node["alive"]:
        return PRUNED
    if node["terminal"]:
        return FINISHED
    return "" if has_children else UNFINISHED


def _describe(node: Mapping[str, Any]) -> str:
    text = clean_text(node["text"]) or "(empty step)"
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
