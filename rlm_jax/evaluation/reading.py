"""What finished structures say: their answers, their texts, and their nodes as a record has them.

Gold answers play no part here.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from rlm_jax.data.records import BUDGET_FIELDS, NodeColumns
from rlm_jax.reasoning.protocol import Strategy
from rlm_jax.reasoning.structure import Operator, Structure, path_to_root
from rlm_jax.tasks.base import Task
from rlm_jax.text.tokenizer import Tokenizer


class Finding(NamedTuple):
    """What one structure says.

    answer: the canonical one, None where it found none. solution: what the path to it tells.
    chosen: the nodes of that path. nodes, budget: as in a record.
    """

    answer: str | None
    solution: str
    chosen: list[int]
    nodes: NodeColumns
    budget: dict[str, int]


def read_findings(
    strategy: Strategy,
    task: Task,
    tokenizer: Tokenizer,
    structure: Structure,
    tokens: np.ndarray,
    prompts: Mapping[int, Sequence[int]],
    tell: Callable[[int, Sequence[int]], str],
) -> dict[int, Finding]:
    """The findings of finished rows.

    Args:
      structure, tokens: of the whole batch, on the host. prompts: token ids by row, of those rows
        that are finished. tell: a row and the token ids of a path -> the solution that it tells.
    """
    ids, names = np.full(structure.depth.shape, -1, np.int32), {}
    for row in prompts:
        # Where the task checked the steps, a solution that is not proven is refuted.
        checked = structure.budget.verifier_calls[row] > 0
        refuted = np.asarray(structure.terminal[row] & ~structure.proven[row] & checked)
        _name_answers(
            task, functools.partial(tell, row), structure, tokens, row, refuted, ids, names
        )
    best = jax.device_get(jax.jit(strategy.answer)(structure, ids)).node
    findings = {}
    for row, prompt in prompts.items():
        node = int(best[row])
        solution = path_tokens(structure, tokens, row, max(node, 0))
        findings[row] = Finding(
            answer=names.get((row, node)),
            solution=tell(row, solution),
            chosen=path_to_root(structure, row, node) if node >= 0 else [],
            nodes=_node_columns(tokenizer, prompt, structure, tokens, row),
            budget={name: int(getattr(structure.budget, name)[row]) for name in BUDGET_FIELDS},
        )
    return findings


def path_tokens(structure: Structure, tokens: np.ndarray, row: int, node: int) -> list[int]:
    """Generated token ids from below the root to `node`."""
    ids: list[int] = []
    for step in path_to_root(structure, row, node)[1:]:
        ids += [int(t) for t in tokens[row, step, : structure.span_length[row, step]]]
    return ids


def _name_answers(
    task: Task,
    tell: Callable[[Sequence[int]], str],
    structure: Structure,
    tokens: np.ndarray,
    row: int,
    refuted: np.ndarray,
    ids: np.ndarray,
    names: dict[tuple[int, int], str],
) -> None:
    """Gives equal ids to equal answers among a structure's leaves, and keeps their wording."""
    known: dict[str, int] = {}
    alive = np.flatnonzero(structure.alive[row])
    inner = set(structure.parent[row, alive].tolist())
    for node in alive:
        if node == 0 or node in inner or refuted[node]:
            continue
        path = path_tokens(structure, tokens, row, int(node))
        answer = task.extract(tell(path))
        if answer is not None:
            ids[row, node] = known.setdefault(answer, len(known))
            names[row, int(node)] = answer


def _node_columns(
    tokenizer: Tokenizer, prompt: Sequence[int], structure: Structure, tokens: np.ndarray, row: int
) -> NodeColumns:
    count = int(structure.num_nodes[row])

    def column(name: str) -> np.ndarray:
        return getattr(structure, name)[row, :count]

    lengths = column("span_length")
    steps = [[int(t) for t in tokens[row, node, : lengths[node]]] for node in range(1, count)]
    texts = [tokenizer.decode(step, skip_special=True) for step in steps]
    return NodeColumns(
        parents=np.asarray(structure.parents[row, :count]),
        op=[Operator(op).name.lower() for op in column("operator")],
        owner=column("owner"),
        depth=column("depth"),
        text=[tokenizer.decode(list(prompt)), *texts],
        tokens=[prompt, *steps],
        logprob=column("logprob"),
        visits=column("visits"),
        value={"model": column("model_value"), "search": column("value")},
        prior=column("prior"),
        reward=column("reward"),
        terminal=column("terminal"),
        alive=column("alive"),
        budget=column("created_at"),
    )
