"""Expert iteration: which searched solutions are worth imitating (STaR, RFT, ReST-EM; spec C2.1).

One idea: a record of a search holds many finished solutions; of those a verifier found right, the
distinct ones become supervised examples, at most so many a problem, so that easy problems, which
are solved in a hundred ways, do not crowd out the hard ones. Pure functions of records
(`data/records.py`), on the host; `read_examples` makes examples of files of records, which
`data.generated.mix_shards` mixes into the demonstrations of a training run.

Papers: RFT (Yuan et al. 2023, arXiv 2308.01825), whose gain grows with *distinct* solutions;
ReST-EM (Singh et al. 2023, 2312.06585), which caps the solutions a problem. Deviation: where there
are more than the cap, those of highest searched value are kept (x1's SFT option, spec B5), then the
shorter ones, instead of a random choice. What
a chain took back on its way stays in the example, as in Stream of Search (arXiv 2404.03683).
"""

import math
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from rlm_jax.data.examples import TokenExample, make_example
from rlm_jax.data.records import Record, read_records
from rlm_jax.tasks.base import Gold, Task
from rlm_jax.text.tokenizer import Tokenizer

# A path is the record's nodes from the root to the end of a solution.
Path = list[dict[str, Any]]
IsRight = Callable[[Record, Path], bool]
KeyFn = Callable[[Record, Path], Hashable]


class Solution(NamedTuple):
    """One example to imitate.

    problem: the problem's id. prompt: token ids of the root. steps: those of each step, ends of
    steps included. text: the steps' texts, joined.
    """

    problem: str
    prompt: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]
    text: str


def read_examples(
    paths: Sequence[str | os.PathLike[str]],
    *,
    task: Task,
    tokenizer: Tokenizer,
    held_out_fn: Callable[[str], bool],
    passes_fn: Callable[[str, str], bool],
    max_per_problem: int = 4,
) -> list[TokenExample]:
    """The right solutions in files of records, as examples of what to write behind their prompts.

    Every finished path is judged where the task verifies itself, else a record's own verdict
    speaks for its chosen one. Solutions with equal token ids are one. Those on whose way a test
    problem stands are left out.

    Args:
      paths: of solve.py's or evaluate.py's records, on problems that may be trained on.
      tokenizer: of the network that is to be trained.
      held_out_fn: whether a question belongs to a test set.
      passes_fn: (question, solution) -> whether a problem of a test set stands on its way.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line that is no record, a question that is held out, token ids of another
        tokenizer, or no right solution at all.
    """
    verify = make_verifier(task) if task.self_verifying else chosen_is_right

    def is_right(record: Record, path: Path) -> bool:
        return verify(record, path) and not passes_fn(record["question"], path_text(path))

    def read() -> Iterator[Record]:
        for path in paths:
            for record in read_records(path):
                if held_out_fn(record["question"]):
                    raise ValueError(
                        f"{path}: record {record['id']!r} is of a test problem, "
                        f"{record['question']!r:.80}: it is never trained on"
                    )
                root = record["nodes"][0]
                known = all(token < tokenizer.vocab_size for token in root["tokens"])
                if not known or tokenizer.decode(root["tokens"]) != root["text"]:
                    raise ValueError(
                        f"{path}: record {record['id']!r} was written with another tokenizer"
                    )
                yield record

    solutions = select_solutions(read(), max_per_problem=max_per_problem, is_right=is_right)
    if not solutions:
        raise ValueError(
            f"no right solution in {', '.join(map(str, paths))} that may be trained on"
        )
    return [make_solution_example(solution) for solution in solutions]


def make_solution_example(solution: Solution) -> TokenExample:
    """The prompt, of weight 0, and the steps, of weight 1."""
    steps = [token for step in solution.steps for token in step]
    return make_example([*solution.prompt, *steps], num_prompt=len(solution.prompt))


def make_verifier(task: Task) -> IsRight:
    """Judges any finished path by its task, which needs the record's question alone for it.

    Raises:
      ValueError: the task does not verify itself, or cannot read its own questions.
    """
    if not task.self_verifying or task.read is None:
        raise ValueError(f"task {task.name} cannot verify answers from their questions alone")
    read = task.read

    def is_right(record: Record, path: Path) -> bool:
        return task.verify(read(record["question"]), Gold(), path_text(path)).correct is True

    return is_right


def select_solutions(
    records: Iterable[Record],
    *,
    max_per_problem: int = 4,
    is_right: IsRight | None = None,
    key_fn: KeyFn | None = None,
) -> list[Solution]:
    """The distinct right solutions of searched problems, best first within each problem.

    Records of one problem, of several seeds or rounds, are taken together: those of one id and one
    question, as ids of different files may be the same. Problems come in the order of their first
    record.

    Args:
      is_right: judges a finished path of a record; None trusts the record's own verdict, which
        speaks for its chosen solution alone.
      key_fn: solutions of one problem with equal keys are one; None: equal token ids
        (`make_answer_key` gives one by answers).

    Raises:
      ValueError: max_per_problem is below 1.
    """
    if max_per_problem < 1:
        raise ValueError(f"max_per_problem must be >= 1, got {max_per_problem}")
    is_right = is_right or chosen_is_right
    key_fn = key_fn or token_key
    found: dict[tuple[str, str], dict[Hashable, tuple[tuple[float, int], Solution]]] = {}
    for record in records:
        kept = found.setdefault((record["id"], record["question"]), {})
        for path in finished_paths(record):
            if not is_right(record, path):
                continue
            rank, solution = _rank(path), _make_solution(record, path)
            key = key_fn(record, path)
            if key not in kept or rank < kept[key][0]:
                kept[key] = rank, solution
    return [
        solution
        for kept in found.values()
        for _, solution in sorted(kept.values(), key=lambda pair: pair[0])[:max_per_problem]
    ]


def finished_paths(record: Record) -> list[Path]:
    """Paths to the living terminal nodes in order, and the chosen one, which may be unfinished.

    They run along main parents, the chosen one as the record has it.
    """
    nodes = {node["id"]: node for node in record["nodes"]}
    chosen = [nodes[number] for number in record["chosen"]]
    ends = [node for node in record["nodes"] if node["terminal"] and node["alive"]]
    if len(chosen) > 1 and not any(end is chosen[-1] for end in ends):
        ends.append(chosen[-1])
    paths = []
    for end in ends:
        path = [end]
        while path[-1]["parents"]:
            path.append(nodes[path[-1]["parents"][0]])
        paths.append(chosen if chosen and end is chosen[-1] else path[::-1])
    return [path for path in paths if len(path) > 1]


def chosen_is_right(record: Record, path: Path) -> bool:
    """Whether the path is the chosen one and a verifier found the record's answer right."""
    return record["correct"] is True and [node["id"] for node in path] == record["chosen"]


def token_key(record: Record, path: Path) -> Hashable:
    """The token ids of the steps, wherever one step ends and the next begins."""
    del record
    return tuple(token for node in path[1:] for token in node["tokens"])


def make_answer_key(extract: Callable[[str], str | None]) -> KeyFn:
    """A key by the canonical answer that a solution states (`Task.extract` of its text); a path
    that states none is told apart by its tokens."""

    def key(record: Record, path: Path) -> Hashable:
        answer = extract(path_text(path))
        return token_key(record, path) if answer is None else answer

    return key


def path_text(path: Path) -> str:
    """What a path's steps say, without the prompt."""
    return "".join(node["text"] for node in path[1:])


def _rank(path: Path) -> tuple[float, int]:
    """Smaller is better: higher searched value, then fewer tokens."""
    value = path[-1]["value"].get("search")
    length = sum(len(node["tokens"]) for node in path[1:])
    return (math.inf if value is None else -value, length)


def _make_solution(record: Record, path: Path) -> Solution:
    steps = tuple(tuple(node["tokens"]) for node in path[1:])
    return Solution(record["id"], tuple(path[0]["tokens"]), steps, path_text(path))
