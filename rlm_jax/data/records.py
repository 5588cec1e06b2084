"""The schema of a stored reasoning structure, and the JSONL files that hold such records.

One JSON object per problem and line (Blueprint 2501.11223, A5's node and A8's trace in one). All
that training wants of a search - process labels, preference pairs, journeys - is derived from
records. Numbers are finite; what is unknown, NaN or infinite is null.

Record:
  version         int     `VERSION` of this schema
  id              str     the problem's id, unique in its file
  question        str
  answer          str?    the canonical answer the strategy chose; null when it found none
  correct         bool?   whether a verifier found it right; null when nothing could tell
  strategy        str     name of the strategy
  config          object  its settings, flat: scalars by name
  seed            int
  policy_version  str     which weights proposed the steps
  value_version   str?    which weights or rule judged them; null when nothing did
  budget          object  `BUDGET_FIELDS`, counts for this problem; `forwarded_tokens` is missing in
                          records older than it
  seconds         float   wall clock of the search
  nodes           array   nodes in topological order, the root first
  chosen          array   node ids from the root to the node that gave the answer; may be empty

Node:
  id              int     unique in the record
  parents         array   ids of earlier nodes, the main parent first; empty for the root
  op              str     operator that made it: root, generate, refine, aggregate, restructure
  owner           int?    id of the node whose payload it belongs to (nesting)
  depth           int     steps from the root along main parents
  text            str     what the step says; for the root, the prompt
  tokens          array   its token ids
  logprob         float?  natural log-probability of the step under the policy, temperature 1
  visits          int     times the search came through
  value           object  estimates by source, as {"model": 0.4, "search": 0.7}; null if unknown
  prior           float?  the policy's weight on the step among its siblings
  reward          float?  reward of the edge into the node
  terminal        bool    the step ends the solution
  alive           bool    false when pruned or merged into an equal sibling
  budget          int     tokens the structure had generated once the node was made
"""

import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

VERSION = 1
BUDGET_FIELDS = (
    "generated_tokens",
    "forwarded_tokens",
    "prefilled_tokens",
    "scored_tokens",
    "model_calls",
    "verifier_calls",
    "expansions",
)
_LATER_FIELDS = ("forwarded_tokens",)

Record = dict[str, Any]
Column = Sequence[Any] | np.ndarray


class NodeColumns(NamedTuple):
    """The N nodes of one structure, field by field, as lists or arrays; see the module.

    parents is [N, P] with -1 where there are fewer (or a list of lists), owner has -1 for none;
    value maps each source to its N estimates. A node's id is its position.
    """

    parents: Column
    op: Sequence[str]
    owner: Column
    depth: Column
    text: Sequence[str]
    tokens: Sequence[Sequence[int] | np.ndarray]
    logprob: Column
    visits: Column
    value: Mapping[str, Column]
    prior: Column
    reward: Column
    terminal: Column
    alive: Column
    budget: Column


def make_record(
    *,
    id: str,
    question: str,
    answer: str | None,
    correct: bool | None,
    strategy: str,
    config: Mapping[str, Any],
    seed: int,
    policy_version: str,
    value_version: str | None,
    budget: Mapping[str, Any],
    seconds: float,
    nodes: NodeColumns,
    chosen: Column,
) -> Record:
    """Builds one valid record out of plain Python and numpy values.

    Raises:
      ValueError: columns of different lengths, or a value that the schema does not allow.
    """
    lengths = {name: len(c) for name, c in nodes._asdict().items() if name != "value"}
    lengths |= {f"value.{source}": len(column) for source, column in nodes.value.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"node columns differ in length: {lengths}")
    record = {
        "version": VERSION,
        "id": id,
        "question": question,
        "answer": answer,
        "correct": None if correct is None else bool(correct),
        "strategy": strategy,
        "config": {name: _plain(value) for name, value in config.items()},
        "seed": int(seed),
        "policy_version": policy_version,
        "value_version": value_version,
        "budget": {name: _plain(value) for name, value in budget.items()},
        "seconds": _float(seconds),
        "nodes": [_make_node(nodes, i) for i in range(len(nodes.op))],
        "chosen": [int(node) for node in chosen],
    }
    validate_record(record)
    return record


def validate_record(record: object) -> None:
    """Checks an object against the schema.

    Raises:
      ValueError: the first field that is missing, unknown or wrong, by its path.
    """
    record = _check_fields(record, _RECORD, "record")
    if record["version"] != VERSION:
        raise ValueError(f"record.version: {record['version']!r} is not {VERSION}")
    for name, value in record["config"].items():
        _check(value, _SCALAR, f"record.config.{name}")
    _check_fields(
        record["budget"], dict.fromkeys(BUDGET_FIELDS, _COUNT), "record.budget", _LATER_FIELDS
    )
    depths: dict[int, int] = {}
    for i, node in enumerate(record["nodes"]):
        _check_node(node, depths, f"record.nodes[{i}]")
    parents = {node["id"]: node["parents"] for node in record["nodes"]}
    above = None
    for i, node in enumerate(record["chosen"]):
        name = f"record.chosen[{i}]"
        _check(node, _INT, name)
        if node not in parents:
            raise ValueError(f"{name}: no node has the id {node}")
        if (above is not None or parents[node]) and above not in parents[node]:
            raise ValueError(f"{name}: node {node} is not a child of {above}")
        above = node


def list_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is no longer as it was, for an error: `seed=0 (now 1)` of every name in `now`."""
    return [
        f"{name}={then.get(name)!r} (now {value!r})"
        for name, value in now.items()
        if then.get(name) != value
    ]


class RecordWriter:
    """Appends records to a file, each whole or not at all.

    A record is one write followed by a flush to disk, so that what was written survives Ctrl-C and
    power loss. On opening, a torn last line (the trace of a crash) is cut away.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        check_fn: Callable[[object], None] = validate_record,
    ):
        """Opens `path`, made with its folders where they are missing.

        Args:
          check_fn: raises ValueError for what is no line of this file.
        """
        self.path, self._check_fn = pathlib.Path(path), check_fn
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._mend()

    def write(self, record: Record) -> None:
        """Appends one record.

        Raises:
          ValueError: the record breaks the schema; nothing is written.
          OSError: the disk refused it; the file is as it was before.
        """
        self._check_fn(record)
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        size = os.fstat(self._file).st_size
        written = os.write(self._file, line)
        if written != len(line):
            os.ftruncate(self._file, size)
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written")
        os.fsync(self._file)

    def close(self) -> None:
        """Closes the file; closing twice does no harm."""
        if self._file >= 0:
            os.close(self._file)
        self._file = -1

    def __enter__(self) -> "RecordWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _mend(self) -> None:
        with open(self.path, "rb") as file:
            start, tail = 0, b""
            for line in file:
                start, tail = start + len(tail), line
        if not tail or tail.endswith(b"\n"):
            return
        if _parse(tail) is None:
            os.ftruncate(self._file, start)
        else:
            os.write(self._file, b"\n")


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yields the records of a file in order; a torn last line is left out.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line that is no valid record, by its number.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            record = _parse(line)
            if record is None:
                if not line.endswith(b"\n"):
                    return
                raise ValueError(f"{path}: line {number}: not JSON")
            try:
                validate_record(record)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: {error}") from None
            yield record


def finished_ids(path: str | os.PathLike[str]) -> set[str]:
    """Ids of the problems whose records a file holds; none when there is no file yet."""
    if not os.path.exists(path):
        return set()
    return {record["id"] for record in read_records(path)}


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _make_node(nodes: NodeColumns, i: int) -> dict[str, Any]:
    owner = int(nodes.owner[i])
    return {
        "id": i,
        "parents": [int(parent) for parent in nodes.parents[i] if parent >= 0],
        "op": str(nodes.op[i]),
        "owner": owner if owner >= 0 else None,
        "depth": int(nodes.depth[i]),
        "text": nodes.text[i],
        "tokens": [int(token) for token in nodes.tokens[i]],
        "logprob": _float(nodes.logprob[i]),
        "visits": int(nodes.visits[i]),
        "value": {source: _float(column[i]) for source, column in nodes.value.items()},
        "prior": _float(nodes.prior[i]),
        "reward": _float(nodes.reward[i]),
        "terminal": bool(nodes.terminal[i]),
        "alive": bool(nodes.alive[i]),
        "budget": int(nodes.budget[i]),
    }


def _float(value: Any) -> float | None:
    """A finite float or None; float32 by its own shortest digits (0.1, not 0.10000000149)."""
    if value is None or not math.isfinite(value):
        return None
    return float(str(value)) if isinstance(value, np.floating) else float(value)


def _plain(value: Any) -> Any:
    """A JSON scalar of a Python, numpy or 0-d array value."""
    if hasattr(value, "__array__"):
        value = np.asarray(value)[()]
    if isinstance(value, float | np.floating):
        return _float(value)
    return value.item() if isinstance(value, np.generic) else value


class _Kind(NamedTuple):
    name: str
    types: tuple[type, ...]
    minimum: int | None = None


_STR = _Kind("a string", (str,))
_STR_OR_NULL = _Kind("a string or null", (str, type(None)))
_BOOL = _Kind("true or false", (bool,))
_BOOL_OR_NULL = _Kind("true, false or null", (bool, type(None)))
_INT = _Kind("a whole number", (int,))
_COUNT = _Kind("a whole number >= 0", (int,), 0)
_COUNT_OR_NULL = _Kind("a whole number >= 0, or null", (int, type(None)), 0)
_SECONDS = _Kind("a finite number >= 0", (int, float), 0)
_FLOAT_OR_NULL = _Kind("a finite number or null", (int, float, type(None)))
_SCALAR = _Kind("a string, number, true, false or null", (str, int, float, bool, type(None)))
_OBJECT = _Kind("an object", (dict,))
_ARRAY = _Kind("an array", (list,))

_RECORD = {
    "version": _INT,
    "id": _STR,
    "question": _STR,
    "answer": _STR_OR_NULL,
    "correct": _BOOL_OR_NULL,
    "strategy": _STR,
    "config": _OBJECT,
    "seed": _INT,
    "policy_version": _STR,
    "value_version": _STR_OR_NULL,
    "budget": _OBJECT,
    "seconds": _SECONDS,
    "nodes": _ARRAY,
    "chosen": _ARRAY,
}
_NODE = {
    "id": _COUNT,
    "parents": _ARRAY,
    "op": _STR,
    "owner": _COUNT_OR_NULL,
    "depth": _COUNT,
    "text": _STR,
    "tokens": _ARRAY,
    "logprob": _FLOAT_OR_NULL,
    "visits": _COUNT,
    "value": _OBJECT,
    "prior": _FLOAT_OR_NULL,
    "reward": _FLOAT_OR_NULL,
    "terminal": _BOOL,
    "alive": _BOOL,
    "budget": _COUNT,
}


def _check_node(node: object, depths: dict[int, int], name: str) -> None:
    """Checks one node against those before it, and adds its depth to theirs."""
    node = _check_fields(node, _NODE, name)
    if node["id"] in depths:
        raise ValueError(f"{name}.id: {node['id']} is taken by an earlier node")
    for i, parent in enumerate(node["parents"]):
        _check(parent, _COUNT, f"{name}.parents[{i}]")
        if parent not in depths:
            raise ValueError(f"{name}.parents[{i}]: {parent} is not the id of an earlier node")
    if bool(node["parents"]) != bool(depths):
        raise ValueError(f"{name}.parents: the first node, and no other, is without parents")
    expected = depths[node["parents"][0]] + 1 if node["parents"] else 0
    if node["depth"] != expected:
        raise ValueError(f"{name}.depth: {node['depth']} is not {expected}, one below its parent")
    for i, token in enumerate(node["tokens"]):
        _check(token, _COUNT, f"{name}.tokens[{i}]")
    for source, value in node["value"].items():
        _check(value, _FLOAT_OR_NULL, f"{name}.value.{source}")
    depths[node["id"]] = node["depth"]


def _check_fields(
    value: object, fields: Mapping[str, _Kind], name: str, may_lack: Sequence[str] = ()
) -> dict[str, Any]:
    _check(value, _OBJECT, name)
    assert isinstance(value, dict)
    for field, kind in fields.items():
        if field in value:
            _check(value[field], kind, f"{name}.{field}")
        elif field not in may_lack:
            raise ValueError(f"{name}.{field}: missing")
    for field in value:
        if field not in fields:
            raise ValueError(f"{name}.{field}: unknown field")
    return value


def _check(value: object, kind: _Kind, name: str) -> None:
    fits = isinstance(value, kind.types) and (not isinstance(value, bool) or bool in kind.types)
    if fits and isinstance(value, float):
        fits = math.isfinite(value)
    if fits and kind.minimum is not None and isinstance(value, int | float):
        fits = value >= kind.minimum
    if not fits:
        raise ValueError(f"{name}: {str(value)[:80]!r} is not {kind.name}")
