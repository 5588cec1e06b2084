"""PrOntoQA: does a statement follow from rules about made-up kinds? (Saparov & He 2023, 2210.01240)

    Every zorble is a plimmer. Every plimmer is a quasket. Every quasket is not bitter. Every
    drindle is bitter. Sam is a zorble. True or false: Sam is bitter.
        ->      Sam is a zorble. Every zorble is a plimmer, so Sam is a plimmer.
                Every plimmer is a quasket, so Sam is a quasket.
                Every quasket is not bitter, so Sam is not bitter.
                #### False

Difficulty d in [0, 1] sets the number of modus-ponens hops, 2 + int(5 d). As many rules again about
kinds that the chain never reaches are mixed in, one of which says the opposite of its end. Half
of the answers are True. The words are our own.

Not self-verifying: of two answers one is right, so a search that may ask has been told. Levels:
-1 no answer, 0 wrong, 2 right.
"""

import itertools
from typing import NamedTuple

import numpy as np

from rlm_jax.tasks.base import Example, Gold, Message, Problem, Task, make_chat
from rlm_jax.tasks.dial import check_dial
from rlm_jax.tasks.truth import extract_truth, verify_truth

INSTRUCTION = (
    "You decide whether a statement follows from rules. Apply one rule per line. "
    'Finish with the line "#### True" or "#### False".'
)
_KINDS = (
    "zorble", "plimmer", "quasket", "drindle", "fennick", "glorvin", "hask", "jentle", "kroppit",
    "lundo", "mirvel", "noggin", "porrick", "ruddle", "sliff", "tandrel", "vosker", "wimble",
)  # fmt: skip
_PROPERTIES = ("bitter", "bright", "brown", "cold", "large", "loud", "quiet", "round", "sweet")
_NAMES = ("Alex", "Max", "Polly", "Rex", "Sally", "Sam", "Stella", "Wren")


class Rule(NamedTuple):
    """Every `kind` is `what`, a kind when `is_kind`; else it has or lacks the property `what`."""

    kind: str
    what: str
    is_kind: bool
    positive: bool = True


class Query(NamedTuple):
    """What is asked: `name`, of one kind, is or is not `what`."""

    name: str
    kind: str
    what: str
    positive: bool


def prompt(problem: Problem) -> list[Message]:
    """One worked example, then the rules."""
    return make_chat(INSTRUCTION, _make_example(), problem.question)


def make_problem(rules: tuple[Rule, ...], query: Query, id: str = "") -> Problem:
    """The question of `rules` in their order; `data` is (query, rules)."""
    said = " ".join(map(_say_rule, rules))
    question = (
        f"{said} {query.name} is a {query.kind}. True or false: "
        f"{_say(query.name, query.what, query.positive)}."
    )
    return Problem(question, (query, *rules), id)


def solve(rules: tuple[Rule, ...], query: Query) -> tuple[bool | None, list[Rule]]:
    """Whether the query holds, None when nothing follows, and the rules that lead there in order.

    Exact: forward chaining from the one kind that is known.
    """
    came_by: dict[str, tuple[Rule, ...]] = {query.kind: ()}
    kinds = [query.kind]
    for kind in kinds:
        for rule in rules:
            if rule.kind != kind:
                continue
            chain = (*came_by[kind], rule)
            if rule.what == query.what:
                return rule.positive == query.positive, list(chain)
            if rule.is_kind and rule.what not in came_by:
                came_by[rule.what] = chain
                kinds.append(rule.what)
    return None, []


def write_solution(problem: Problem) -> str:
    """A worked solution: one rule a line, then the answer.

    Raises:
      ValueError: the problem holds no rules, or nothing follows from them.
    """
    if not problem.data:
        raise ValueError(f"{problem.id}: no rules in the problem's data")
    query, rules = Query(*problem.data[0]), tuple(map(Rule._make, problem.data[1:]))
    holds, chain = solve(rules, query)
    if holds is None:
        raise ValueError(f"{problem.id}: nothing follows about {query.what}")
    lines = [
        f"{_say_rule(rule)[:-1]}, so {_say(query.name, _noun(rule), rule.positive)}."
        for rule in chain
    ]
    return "\n".join([f"{query.name} is a {query.kind}. {lines[0]}", *lines[1:], f"#### {holds}"])


def generate(seed: int, num_problems: int, difficulty: float) -> list[Example]:
    """Makes `num_problems` questions of 2 + int(5 * difficulty) hops.

    Raises:
      ValueError: difficulty outside [0, 1], or a negative seed or number of problems.
    """
    check_dial(seed, num_problems, difficulty)
    num_hops = 2 + int(5 * difficulty)
    examples = []
    for i in range(num_problems):
        rng = np.random.default_rng([seed, i])
        rules, query = _draw(rng, num_hops)
        problem = make_problem(rules, query, f"prontoqa-{difficulty:g}-{seed}-{i}")
        holds, _ = solve(rules, query)
        examples.append((problem, Gold(str(holds))))
    return examples


def _draw(rng: np.random.Generator, num_hops: int) -> tuple[tuple[Rule, ...], Query]:
    """A chain of `num_hops` rules and as many beside it, shuffled, and a question about its end."""
    kinds = [_KINDS[i] for i in rng.permutation(len(_KINDS))]
    chain, others = kinds[:num_hops], kinds[num_hops : 2 * num_hops]
    what, *properties = [_PROPERTIES[i] for i in rng.permutation(len(_PROPERTIES))]
    positive, asked = (bool(coin) for coin in rng.integers(2, size=2))
    rules = [Rule(a, b, True) for a, b in itertools.pairwise(chain)]
    rules.append(Rule(chain[-1], what, False, positive))
    # The first stranger says the opposite; the rest lead to kinds of the chain or to properties.
    rules.append(Rule(others[0], what, False, not positive))
    for i, kind in enumerate(others[1:]):
        if rng.integers(2):
            rules.append(Rule(kind, chain[int(rng.integers(num_hops))], True))
        else:
            is_so = bool(rng.integers(2))
            rules.append(Rule(kind, properties[i % len(properties)], False, is_so))
    name = _NAMES[int(rng.integers(len(_NAMES)))]
    shuffled = tuple(rules[i] for i in rng.permutation(len(rules)))
    return shuffled, Query(name, chain[0], what, asked)


def _make_example() -> tuple[str, str]:
    rules = (
        Rule("quasket", "bitter", False, positive=False),
        Rule("zorble", "plimmer", True),
        Rule("drindle", "bitter", False),
        Rule("plimmer", "quasket", True),
    )
    problem = make_problem(rules, Query("Sam", "zorble", "bitter", True))
    return problem.question, write_solution(problem)


def _noun(rule: Rule) -> str:
    return f"a {rule.what}" if rule.is_kind else rule.what


def _say_rule(rule: Rule) -> str:
    return _say(f"Every {rule.kind}", _noun(rule), rule.positive) + "."


def _say(who: str, what: str, positive: bool) -> str:
    return f"{who} is {'' if positive else 'not '}{what}"


TASK = Task("prontoqa", 1, False, prompt, extract_truth, verify_truth, generate=generate)
