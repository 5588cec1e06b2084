"""Which steps of a record deserve a line, and what is said about all the others.

The one idea: whole paths compete for lines, best first. The chosen path comes before all others;
what hangs off a drawn step and lost is folded into one count there, so that drawn, merged and
folded steps always add up to the record. A path too long for its share of the lines keeps its two
ends and a count between them. Everything is a loop over nodes in their topological order: a chain
of any depth is no recursion.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# The fewest lines an elided path takes: its first step, the count between, its last step.
MIN_LINES = 3
# A path other than the chosen one takes at most this share of the lines that are left.
_SHARE = 3

Node = Mapping[str, Any]


class Fold(NamedTuple):
    """What is not drawn below a step.

    steps: nodes, merged copies among them. branches: subtrees they make up. best: highest value of
    a living one. solutions: living ones that end a solution. pruned: dead ones, copies of living
    ones apart.
    """

    steps: int = 0
    branches: int = 0
    best: float | None = None
    solutions: int = 0
    pruned: int = 0


class Gap(NamedTuple):
    """A stretch in the middle of a path: its own steps, and what hangs off them."""

    steps: int
    beside: Fold


@dataclasses.dataclass(frozen=True)
class Outline:
    """The drawn part of a record; ids are those of its nodes.

    nodes: the drawn nodes in topological order, the root first.
    children: drawn nodes under each drawn node, in drawing order: the chosen one, then best first.
    gaps: the stretch left out directly above a drawn node.
    folds: what is left out below a drawn node, beside its drawn children.
    copies: equal dead siblings that were merged into a drawn node.
    leaves: drawn nodes that have no child at all in the record.
    """

    nodes: dict[int, Node]
    children: dict[int, list[int]]
    gaps: dict[int, Gap]
    folds: dict[int, Fold]
    copies: dict[int, int]
    leaves: set[int]

    @property
    def root(self) -> int:
        """The id of the record's first node."""
        return next(iter(self.nodes))


def outline_record(record: Mapping[str, Any], max_lines: int) -> Outline:
    """Chooses what of a record to draw in at most `max_lines` lines.

    A drawn node is a line, and so is a gap, and so is the fold of a node that branches. The chosen
    path is drawn whole if it fits; each of its nodes stands below the one before it in the path,
    every other node below its main parent.

    Raises:
      ValueError: max_lines is below `MIN_LINES`.
    """
    if max_lines < MIN_LINES:
        raise ValueError(f"max_lines must be >= {MIN_LINES}, not {max_lines}")
    tree = _read_tree(record)
    shown, bottoms = _choose_nodes(tree, max_lines)
    folds = _sum_subtrees(tree)
    outline = Outline({n: tree.nodes[n] for n in tree.nodes if n in shown}, {}, {}, {}, {}, set())
    for node in outline.nodes:
        drawn = [child for child in tree.children[node] if child in shown or child in bottoms]
        hidden = [child for child in tree.children[node] if child not in drawn]
        outline.children[node] = [bottoms.get(child, child) for child in drawn]
        if hidden:
            outline.folds[node] = _add_folds(folds[child] for child in hidden)
        if node in tree.copies:
            outline.copies[node] = tree.copies[node]
        if not tree.children[node]:
            outline.leaves.add(node)
    for top, bottom in bottoms.items():
        outline.gaps[bottom] = _measure_gap(tree, folds, top, bottom)
    return outline


def value_of(node: Node) -> float | None:
    """A node's last known estimate: the search's own where there is one."""
    values = [value for value in node["value"].values() if value is not None]
    return values[-1] if values else None


def branches_fold(num_drawn: int, num_hidden: int) -> bool:
    """Whether the fold under a node is a line of its own and not a note beside the node."""
    return num_drawn > 1 and num_hidden > 0


class _Tree(NamedTuple):
    """A record as a tree: one parent each, children in drawing order, copies taken out."""

    nodes: dict[int, Node]
    parents: dict[int, int]
    children: dict[int, list[int]]
    copies: dict[int, int]
    chosen: Sequence[int]


def _read_tree(record: Mapping[str, Any]) -> _Tree:
    nodes = {node["id"]: node for node in record["nodes"]}
    parents = {node["id"]: node["parents"][0] for node in nodes.values() if node["parents"]}
    # A path through a graph need not follow main parents; the drawing follows the path.
    parents |= dict(zip(record["chosen"][1:], record["chosen"], strict=False))
    chosen = set(record["chosen"])
    children: dict[int, list[int]] = {node: [] for node in nodes}
    for node in nodes:
        if node in parents:
            children[parents[node]].append(node)
    for family in children.values():
        family.sort(key=lambda node: (node in chosen, *_score(nodes[node])), reverse=True)
    copies = _merge_copies(nodes, children, chosen)
    return _Tree(nodes, parents, children, copies, record["chosen"])


def _score(node: Node) -> tuple[float, ...]:
    """Sorts nodes by how much a reader wants to see them."""
    value = value_of(node)
    return (
        node["alive"],
        node["visits"],
        0.0 if value is None else value,
        node["prior"] or 0.0,
        -node["id"],
    )


def _merge_copies(
    nodes: dict[int, Node], children: dict[int, list[int]], chosen: set[int]
) -> dict[int, int]:
    """Takes out dead leaves that equal a sibling, a living one if there is; counts them by it."""
    copies: dict[int, int] = {}
    for family in children.values():
        twins = {nodes[n]["text"]: n for n in reversed(family) if nodes[n]["alive"]}
        kept = []
        for node in family:
            dead_leaf = not (nodes[node]["alive"] or children[node] or node in chosen)
            twin = twins.setdefault(nodes[node]["text"], node) if dead_leaf else node
            if twin != node:
                copies[twin] = copies.get(twin, 0) + 1
            else:
                kept.append(node)
        family[:] = kept
    drawable = {node for family in children.values() for node in family} | {next(iter(nodes))}
    for node in [node for node in nodes if node not in drawable]:
        del nodes[node], children[node]
    return copies


def _choose_nodes(tree: _Tree, max_lines: int) -> tuple[set[int], dict[int, int]]:
    """The drawn nodes, and the gaps between them: the last drawn node by the first hidden one."""
    path = list(tree.chosen) or [next(iter(tree.nodes))]
    alone = all(len(family) < 2 for family in tree.children.values())
    # A path that is elided anyway leaves a quarter of the lines to the others, if that is of use.
    spare = 0 if alone or len(path) <= max_lines or max_lines // 4 < MIN_LINES else max_lines // 4
    shown, bottoms, inside = set(), {}, set()
    lines_left = max_lines - _draw_path(path, max_lines - spare, shown, bottoms, inside)
    for leaf in _rank_leaves(tree):
        path = []
        node = leaf
        while node not in shown and node not in inside:
            path.append(node)
            node = tree.parents[node]
        if not path or node in inside:
            continue
        limit = max(MIN_LINES, lines_left // _SHARE)
        cost = min(len(path), limit) + _fold_cost(tree, node, shown, bottoms)
        if cost > lines_left:
            # A lesser path that is shorter might fit, but would pass for the next best.
            break
        _draw_path(path[::-1], limit, shown, bottoms, inside)
        lines_left -= cost
    _unfold_single_leaves(tree, shown, bottoms)
    return shown, bottoms


def _draw_path(
    path: Sequence[int], limit: int, shown: set[int], bottoms: dict[int, int], inside: set[int]
) -> int:
    """Adds a path, without its middle where it is longer than `limit` lines; returns its lines."""
    if len(path) <= limit:
        shown.update(path)
        return len(path)
    num_last = (limit - 1) // 2
    start, end = limit - 1 - num_last, len(path) - num_last
    shown.update(path[:start], path[end:])
    bottoms[path[start]] = path[end]
    inside.update(path[start:end])
    return limit


def _fold_cost(tree: _Tree, node: int, shown: set[int], bottoms: Mapping[int, int]) -> int:
    """How the lines for a node's own fold change when one more of its children is drawn."""
    family = tree.children[node]
    drawn = sum(child in shown or child in bottoms for child in family)
    after = branches_fold(drawn + 1, len(family) - drawn - 1)
    return after - branches_fold(drawn, len(family) - drawn)


def _unfold_single_leaves(tree: _Tree, shown: set[int], bottoms: Mapping[int, int]) -> None:
    """Draws a step where the line that folds it would say no more than itself."""
    for node in list(shown):
        family = tree.children[node]
        hidden = [child for child in family if child not in shown and child not in bottoms]
        single = len(hidden) == 1 and not tree.children[hidden[0]]
        if single and branches_fold(len(family) - 1, 1):
            shown.add(hidden[0])


def _rank_leaves(tree: _Tree) -> list[int]:
    """Ends of paths, the ones worth reading first: solutions, then what was visited and valued."""
    leaves = [node for node in tree.nodes if not tree.children[node]]

    def rank(leaf: int) -> tuple[float, ...]:
        node = tree.nodes[leaf]
        return node["alive"], node["terminal"], *_score(node)

    return sorted(leaves, key=rank, reverse=True)


def _sum_subtrees(tree: _Tree) -> dict[int, Fold]:
    """A fold of the subtree under each node, itself included."""
    folds: dict[int, Fold] = {}
    for node in reversed(tree.nodes):
        fields = tree.nodes[node]
        alive = fields["alive"]
        own = Fold(
            steps=1 + tree.copies.get(node, 0),
            best=value_of(fields) if alive else None,
            solutions=int(alive and fields["terminal"]),
            pruned=0 if alive else 1 + tree.copies.get(node, 0),
        )
        below = (folds[child] for child in tree.children[node])
        folds[node] = _add_folds([own, *below])._replace(branches=1)
    return folds


def _add_folds(folds: Iterable[Fold]) -> Fold:
    folds = list(folds)
    return Fold(
        steps=sum(fold.steps for fold in folds),
        branches=sum(fold.branches for fold in folds),
        best=max((fold.best for fold in folds if fold.best is not None), default=None),
        solutions=sum(fold.solutions for fold in folds),
        pruned=sum(fold.pruned for fold in folds),
    )


def _measure_gap(tree: _Tree, folds: Mapping[int, Fold], top: int, bottom: int) -> Gap:
    beside = []
    stretch = list(_walk_up(tree, tree.parents[bottom], top))
    above = {bottom, *stretch}
    for node in stretch:
        beside += [folds[child] for child in tree.children[node] if child not in above]
        if node in tree.copies:
            beside.append(Fold(steps=tree.copies[node], branches=tree.copies[node]))
    return Gap(len(stretch), _add_folds(beside))


def _walk_up(tree: _Tree, node: int, top: int) -> Iterator[int]:
    while node != top:
        yield node
        node = tree.parents[node]
    yield top
