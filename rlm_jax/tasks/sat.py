"""3-SAT: find truth values that make every clause true (x1's synthetic domain; Blueprint, B11).

    Find truth values for x1, x2, x3, x4, x5 that make every clause true:
    (x1 or not x2 or x5) and (not x1 or x3 or not x4)
        ->      #### x1=True, x2=True, x3=True, x4=False, x5=False

Difficulty d in [0, 1] sets the number of clauses over 5 variables, int(5 * (1 + 3.4 d)): 5 to 22.
A clause has three different variables, each negated with probability 1/2. Clauses are drawn again
until they can be satisfied; after 10 draws in vain one clause is dropped.

Self-verifying: the clauses stand in the question. Levels: -1 no assignment, or one that names a
variable twice or one that does not exist; 0 a clause is false; 1 variables are missing, and no
clause is false yet; 2 every clause is true. Deviation from x1: any satisfying assignment counts,
not one published solution.
"""

import re
from collections.abc import Sequence

import numpy as np

from rlm_jax.tasks.answer_lines import find_answer_text
from rlm_jax.tasks.base import (
    Example,
    Gold,
    Message,
    Problem,
    Task,
    Verdict,
    grade,
    judge,
    make_chat,
)
from rlm_jax.tasks.dial import check_dial

NUM_VARIABLES = 5
MAX_DRAWS = 10

Clause = tuple[int, ...]
"""Literals: 3 stands for x3, -3 for not x3."""

INSTRUCTION = (
    "You solve satisfiability problems. Fix one variable per line and say why. "
    'Finish with the line "#### " followed by a value for every variable.'
)
EXAMPLE = (
    "Find truth values for x1, x2, x3 that make every clause true: "
    "(not x1 or x2 or x3) and (x1 or not x2 or x3) and (not x1 or not x2 or not x3)",
    "x1=True leaves x2 or x3, and not both.\n"
    "x2=True then needs not x3.\n"
    "x3=False: every clause is true.\n"
    "#### x1=True, x2=True, x3=False",
)

_STATEMENT = re.compile(r"Find truth values for (x[0-9x, ]*) that make every clause true: ([^\n]*)")
_CLAUSE = re.compile(r"\(([^()]*)\)")
_LITERAL = re.compile(r"(not )?x([1-9][0-9]{0,3})")
_PAIR = re.compile(
    r"x([1-9][0-9]{0,3})\**\s*(?:=|:|is)\s*\**(true|false|t|f|1|0)(?!\w|\.\w)", re.IGNORECASE
)


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the clauses."""
    return make_chat(INSTRUCTION, EXAMPLE, problem.question)


def make_problem(num_variables: int, clauses: Sequence[Clause], id: str = "") -> Problem:
    """The question of `clauses`; `data` is (num_variables, clauses)."""
    names = ", ".join(f"x{i}" for i in range(1, num_variables + 1))
    joined = " and ".join(f"({' or '.join(map(_name_literal, clause))})" for clause in clauses)
    question = f"Find truth values for {names} that make every clause true: {joined}"
    return Problem(question, (num_variables, *map(tuple, clauses)), id)


def read_clauses(question: str) -> tuple[int, list[Clause]] | None:
    """The number of variables and the clauses of a question, or None when it states none."""
    found = _STATEMENT.findall(question)
    if not found:
        return None
    names, formula = found[-1]
    num_variables = len(names.split(","))
    if names != ", ".join(f"x{i}" for i in range(1, num_variables + 1)):
        return None
    clauses = []
    for inner in _CLAUSE.findall(formula):
        literals = [_LITERAL.fullmatch(word) for word in inner.split(" or ")]
        if not all(literals):
            return None
        clause = tuple(-int(m[2]) if m[1] else int(m[2]) for m in literals if m)
        if max(map(abs, clause)) > num_variables:
            return None
        clauses.append(clause)
    return (num_variables, clauses) if clauses else None


def parse_assignment(line: str) -> dict[int, bool] | None:
    """Values by variable on an answer line; None when there are none or they contradict."""
    values: dict[int, bool] = {}
    for name, value in _PAIR.findall(line):
        if int(name) in values:
            return None
        values[int(name)] = value.lower() in ("true", "t", "1")
    return values or None


def extract(text: str) -> str | None:
    """The assignment on the answer line in canonical form, or None."""
    line = find_answer_text(text)
    values = None if line is None else parse_assignment(line)
    return None if values is None else format_assignment(values)


def format_assignment(values: dict[int, bool]) -> str:
    """The one way to write an assignment: `x1=True, x2=False`, in order."""
    return ", ".join(f"x{name}={values[name]}" for name in sorted(values))


def verify(problem: Problem, gold: Gold, text: str) -> Verdict:
    """Checks the assignment that `text` ends on against every clause in the question."""
    del gold
    stated = read_clauses(problem.question)
    if stated is None:
        return judge(None, "the question states no clauses")
    num_variables, clauses = stated
    line = find_answer_text(text)
    values = None if line is None else parse_assignment(line)
    if values is None or max(values) > num_variables:
        return grade(-1, "no assignment of these variables on the answer line")
    for clause in clauses:
        if all(values.get(abs(x)) == (x < 0) for x in clause):
            return grade(0, f"({' or '.join(map(_name_literal, clause))}) is false")
    if len(values) < num_variables:
        return grade(1, f"{num_variables - len(values)} variables have no value")
    return grade(2, f"all {len(clauses)} clauses are true")


def solve(num_variables: int, clauses: Sequence[Clause]) -> dict[int, bool] | None:
    """Values that make every clause true, or None when there are none. Exact (DPLL)."""
    values: dict[int, bool] = {}
    trail: list[tuple[int, bool, bool]] = []
    while True:
        literal, forced = _choose(num_variables, clauses, values)
        if literal is None:
            return values
        if literal == 0:
            # Back to the last free choice that has not been turned round.
            while trail and trail[-1][2]:
                del values[trail.pop()[0]]
            if not trail:
                return None
            name, value, _ = trail.pop()
            values[name] = not value
            trail.append((name, not value, True))
        else:
            values[abs(literal)] = literal > 0
            trail.append((abs(literal), literal > 0, forced))


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` formulas that can be satisfied; the gold is one way to do so.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    examples = []
    for i in range(num_problems):
        rng = np.random.default_rng([seed, i])
        clauses, values = _draw_formula(rng, int(NUM_VARIABLES * (1 + 3.4 * difficulty)))
        problem = make_problem(NUM_VARIABLES, clauses, f"sat-{difficulty:g}-{seed}-{i}")
        examples.append((problem, Gold(format_assignment(values))))
    return examples


def _draw_formula(
    rng: np.random.Generator, num_clauses: int
) -> tuple[list[Clause], dict[int, bool]]:
    clauses: list[Clause] = []
    for _ in range(MAX_DRAWS):
        clauses = [_draw_clause(rng) for _ in range(num_clauses)]
        values = solve(NUM_VARIABLES, clauses)
        if values is not None:
            return clauses, values
    while (values := solve(NUM_VARIABLES, clauses)) is None:
        clauses.pop()
    return clauses, values


def _draw_clause(rng: np.random.Generator) -> Clause:
    names = rng.choice(NUM_VARIABLES, 3, replace=False) + 1
    return tuple((names * rng.choice([-1, 1], 3)).tolist())


def _choose(
    num_variables: int, clauses: Sequence[Clause], values: dict[int, bool]
) -> tuple[int | None, bool]:
    """The next literal to make true and whether a clause forces it; 0: a clause is false."""
    forced = 0
    for clause in clauses:
        if any(values.get(abs(x)) == (x > 0) for x in clause):
            continue
        free = [x for x in clause if abs(x) not in values]
        if not free:
            return 0, True
        if len(set(free)) == 1:
            forced = free[0]
    if forced:
        return forced, True
    free_names = (i for i in range(1, num_variables + 1) if i not in values)
    return next(free_names, None), False


def _name_literal(literal: int) -> str:
    return f"not x{-literal}" if literal < 0 else f"x{literal}"


TASK = Task("sat", 1, True, prompt, extract, verify, generate=generate)
