"""Countdown: exact solver, chains of lines, the checker on the device, and what is held out."""

import functools
import itertools
import random
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlm_jax.tasks import countdown, countdown_device, countdown_split, game24
from rlm_jax.tasks.base import Gold
from rlm_jax.tasks.countdown_corrections import correct_walks
from rlm_jax.tasks.countdown_demos import demonstrate, demonstrate_openings, demonstrate_states
from rlm_jax.tasks.countdown_lines import MAX_TRIES, demonstrate_lines, demonstrate_tries
from rlm_jax.tasks.countdown_solver import count_below, count_solutions, list_moves
from rlm_jax.tasks.countdown_walks import write_move
from rlm_jax.tasks.expressions import parse
from rlm_jax.text.tokenizer import ByteTokenizer


def _count(numbers: list[int], target: int) -> int:
    """Move sequences by brute force, one recursion a move."""
    if len(numbers) == 1:
        return int(numbers[0] == target)
    total, seen = 0, set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        high, low = max(numbers[i], numbers[j]), min(numbers[i], numbers[j])
        if (high, low) in seen:
            continue
        seen.add((high, low))
        rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
        results = [high + low, high - low, high * low]
        if low and high % low == 0:
            results.append(high // low)
        total += sum(_count([*rest, result], target) for result in results)
    return total


@pytest.mark.parametrize("size", [2, 3, 4])
def test_solutions_are_counted_as_by_brute_force(size):
    rng = np.random.default_rng(size)
    states = np.sort(rng.integers(1, 12, (120, size)), axis=1)
    targets = rng.integers(1, 40, 120)
    found = count_solutions(states, targets)
    assert found.tolist() == [
        _count(s, t) for s, t in zip(states.tolist(), targets.tolist(), strict=True)
    ]
    assert 0 < (found > 0).sum() < 120


def test_five_numbers_are_counted_through_distinct_states():
    rng = np.random.default_rng(5)
    states, targets = np.sort(rng.integers(1, 10, (4, 5)), axis=1), np.array([24, 36, 50, 97])
    expected = [_count(s, t) for s, t in zip(states.tolist(), targets.tolist(), strict=True)]
    assert count_solutions(states, targets).tolist() == expected


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_any_number_of_rows_has_moves(size, rows):
    states = np.sort(np.random.default_rng(0).integers(1, 20, (rows, size)), axis=1)
    moves, below = count_below(states, np.full(rows, 24))
    assert below.shape == (rows, 2 * size * (size - 1))
    assert moves.states.shape == (*below.shape, size - 1)


def test_solve_gives_an_expression_or_nothing():
    rng = np.random.default_rng(1)
    for _ in range(60):
        numbers = tuple(int(n) for n in rng.integers(1, 20, 4))
        target = int(rng.integers(10, 101))
        expression = countdown.solve(numbers, target)
        assert (expression is not None) == (_count(list(numbers), target) > 0)
        if expression is not None:
            assert parse(expression).value == target
            assert sorted(parse(expression).numbers) == sorted(numbers)


def test_generated_problems_are_solvable_and_seeded():
    for difficulty, size in ((0.0, 3), (0.34, 4), (0.67, 5)):
        examples = countdown.generate(3, 4, difficulty)
        assert examples == countdown.generate(3, 4, difficulty)
        for problem, gold in examples:
            numbers, target = problem.data
            assert len(numbers) == size
            assert 10 <= target <= 100
            assert gold == Gold()
            assert countdown.solve(numbers, target) is not None
    with pytest.raises(ValueError, match=r"difficulty must be in \[0, 1\], not 2"):
        countdown.generate(0, 1, 2.0)


PROBLEM = countdown.make_problem((4, 4, 7, 10), 24)
CHAIN = "10 - 4 = 6 ; 4 6 7\n7 - 6 = 1 ; 1 4\n"


@pytest.mark.parametrize(
    ("text", "correct", "reason"),
    [
        ("#### (10 - 4) * 4 * 7", False, "168"),
        ("#### 10 * 4 - 4 * 7 = 24", False, "12"),
        ("10 - 4 = 6 ; 4 6 7\n6 * 4 = 24 ; 7 24\n", False, "7 24 are left"),
        ("10 - 4 = 6 ; 4 6 7\n6 * 7 = 42 ; 4 42\n42 - 4 = 38", False, "38, not on 24"),
        ("10 - 4 = 7 ; 4 7 7", False, "is wrong"),
        ("10 - 5 = 5 ; 4 5 7", False, "no 5 left"),
        ("10 - 4 = 6 ; 6 7", False, "what is left is 4 6 7"),
        ("10 - 4 = 6", False, "does not say"),
        ("10 - 4 = 6 ; 4 6 7\n: 4 6 7\n", False, "no way back"),
        ("10 - 4 = 6 ; 4 6 7\n: 4 4 7\n", False, "4 4 7 was not left before"),
        ("10 - 4 = 6 ; 4 6 7\n: 4 4 7 10\n6 * 4 = 24 ; 7 24", False, "no 6 left"),
        ("10 - 4 = 6 ; 4 6 7\n: 4 4 7 10\n", False, "4 4 7 10 are left"),
        ("no idea", False, "no expression and no chain"),
        ("", False, "no expression"),
    ],
)
def test_wrong_answers_are_told_why(text, correct, reason):
    verdict = countdown.TASK.verify(PROBLEM, Gold(), text)
    assert verdict.correct is correct
    assert reason in verdict.reason


def test_chains_and_expressions_are_right():
    problem = countdown.make_problem((3, 5, 6, 8), 24)
    text = "6 - 5 = 1 ; 1 3 8\n3 * 1 = 3 ; 3 8\n8 * 3 = 24"
    assert countdown.TASK.verify(problem, Gold(), text).correct
    expression = countdown.TASK.extract(text)
    assert expression == "8 * (3 * (6 - 5))"
    assert countdown.TASK.verify(problem, Gold(), f"#### {expression} = 24").correct
    assert countdown.TASK.extract("6 - 5 = 1 ; 1 3 8\n") is None
    twins = game24.make_problem((3, 5, 6, 8))
    assert game24.TASK.verify(twins, Gold(), text).correct
    assert game24.TASK.extract(text) == expression
    assert game24.TASK.notation(twins) == countdown.TASK.notation(problem) == "24 : 3 5 6 8"


def test_chains_go_back_and_what_they_took_back_is_no_answer():
    text = (
        "10 + 4 = 14 ; 4 7 14\n14 - 7 = 7 ; 4 7\n: 4 7 14\n4 + 7 = 11 ; 11 14\n"
        ": 4 4 7 10\n10 - 4 = 6 ; 4 6 7\n7 - 6 = 1 ; 1 4\n: 4 6 7\n7 * 4 = 28 ; 6 28\n: 4 6 7\n"
    )
    assert countdown.TASK.extract(text) is None
    solved = text + ": 4 4 7 10\n10 * 4 = 40 ; 4 7 40\n40 / 4 = 10 ; 7 10\n10 + 7 = 17"
    problem = countdown.make_problem((4, 4, 7, 10), 17)
    assert countdown.TASK.verify(problem, Gold(), solved).correct
    assert countdown.TASK.extract(solved) == "((10 * 4) / 4) + 7"
    # Back over two levels at once; the results that were taken back are not there any more.
    twice = "10 + 4 = 14 ; 4 7 14\n14 - 7 = 7 ; 4 7\n: 4 4 7 10\n7 + 4 = 11 ; 4 10 11\n"
    assert not countdown.TASK.verify(problem, Gold(), twice + ": 4 7 14\n").correct


@pytest.mark.parametrize(
    "text", ["24 : 4 4 7 10", "Make 24 out of 4, 4, 7 and 10.", "4 4 7 10 = 24", " 4,4,7,10 -> 24 "]
)
def test_a_person_types_a_puzzle(text):
    assert countdown.read(text).data == ((4, 4, 7, 10), 24)
    assert game24.read(text).data == (4, 4, 7, 10)


def test_an_expression_too_long_to_be_one_is_wrong():
    """The canonical form, which has spaces, is longer than what was read."""
    long = "#### " + "+".join("1" * 60)
    verdict = countdown.verify(countdown.make_problem((1, 1), 60), Gold(), long)
    assert verdict.correct is False
    assert "longer than 200 characters" in verdict.reason


def test_what_is_no_puzzle_is_told():
    assert game24.read("4 4 7 10").data == (4, 4, 7, 10)
    for text in ("", "24", "24 : 4", "24 : four", "4 4 7 10"):
        with pytest.raises(ValueError, match="is no puzzle"):
            countdown.read(text)
    for text in ("25 : 4 4 7 10", "24 : 4 7 10", "4 7 8 x", "4 7 8"):
        with pytest.raises(ValueError, match="no Game of 24"):
            game24.read(text)


def test_rows_of_a_file_hold_numbers_and_a_target():
    problem, _ = countdown.read_row({"numbers": [4, 4, 7, 10], "target": 24}, 3)
    assert (problem.data, problem.id) == (((4, 4, 7, 10), 24), "countdown-3")
    assert countdown.read_row({"question": "24 : 4 4 7 10"}, 1) is None
    puzzle, _ = game24.read_row({"numbers": [4, 4, 7, 10]}, 3)
    assert (puzzle.data, puzzle.id) == ((4, 4, 7, 10), "game24-3")
    assert game24.read_row({}, 1) is None
    for bad, message in (
        ({"numbers": [4], "target": 2}, "two numbers or more"),
        ({"numbers": "4 4", "target": 2}, "no list"),
        ({"numbers": [4, 4]}, "None is no whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            countdown.read_row(bad, 1)
    for bad in ({"numbers": [4, 4, 7]}, {"numbers": [4, 4, 7, 10], "target": 25}):
        with pytest.raises(ValueError, match="no Game of 24"):
            game24.read_row(bad, 1)


@pytest.mark.parametrize("bad", [-1, 1.5, True, 10**6, "4", None])
def test_problems_hold_whole_numbers(bad):
    with pytest.raises(ValueError, match="whole number"):
        countdown.read_row({"numbers": [4, bad], "target": 24}, 1)


def _left_behind(text: str) -> list[int]:
    """The numbers that are left behind a line, or behind the second half of one."""
    return sorted(map(int, re.split("[;:=]", text)[-1].split()))


def test_demonstrations_say_what_is_right():
    rng = np.random.default_rng(2)
    targets = np.array([24, 36, 51])
    numbers, wanted = countdown.draw_solvable(rng, 60, 4, targets)
    options = {"wrong_share": 0.5, "sharpness": 0.5, "stray_share": 0.5, "max_wrong": 5}
    walks = demonstrate(rng, numbers, wanted, **options)
    clean = ~countdown_split.is_held_out(numbers, wanted)
    assert len(walks) == clean.sum()
    num_lost = [sum(step.value == 0 for step in walk.steps) for walk in walks]
    assert {n for n, walk in zip(num_lost, walks, strict=True) if walk.finished} == set(range(5))
    assert all(n >= 5 for n, walk in zip(num_lost, walks, strict=True) if not walk.finished)
    for walk, state, target in zip(walks, numbers[clean], wanted[clean], strict=True):
        problem = countdown.make_problem(tuple(state.tolist()), int(target))
        text = "".join(step.text for step in walk.steps)
        verdict = countdown.TASK.verify(problem, Gold(), text)
        assert verdict.correct is walk.finished
        assert walk.finished or "are left" in verdict.reason
        lines = text.split("\n")
        assert len(set(lines)) >= len(lines) - text.count("\n:"), "the same line was tried again"
        for step in walk.steps:
            assert sum(weight for _, weight in step.choices) == pytest.approx(1)
            # A wrong move is a choice and what follows from it: only the choice is wrong.
            is_right = step.text in [text for text, _ in step.choices]
            assert is_right == (step.value is not None)
            if step.value is not None:
                left = _left_behind(step.text)
                alive = count_solutions(np.array([left]), np.array([target]))[0] > 0
                assert alive == bool(step.value)
    openings = demonstrate_openings(rng, numbers, wanted, sharpness=0.5)
    whole = {walk.prompt: walk for walk in walks}
    for opening in openings:
        first = whole[opening.prompt].steps[0]
        shares: dict[str, float] = {}
        for text, weight in first.choices:
            shares[text.split(" =")[0]] = weight
        assert dict(opening.steps[0].choices) == pytest.approx(shares)


@pytest.mark.parametrize("size", [3, 4, 5])
def test_states_say_what_else_they_make(size):
    """Every goal of every state against its number of solutions; what is held out is not said."""
    rng = np.random.default_rng(size)
    numbers, wanted = countdown.draw_solvable(rng, 12, size, np.array([24, 36, 51]))
    clean = ~countdown_split.is_held_out(numbers, wanted)
    numbers, wanted = numbers[clean], wanted[clean]
    walks = demonstrate(
        rng, numbers, wanted, wrong_share=0.5, sharpness=0.5, num_goals=countdown.NUM_GOALS
    )
    goals = np.arange(countdown.NUM_GOALS)
    said = goals % 10 != 3
    for walk in walks:
        target, state = (part.split() for part in walk.prompt.split(":"))
        told = [(sorted(map(int, state)), walk.goals, None)]
        for step in walk.steps:
            if step.value is None:
                assert step.goals is None
                continue
            told.append((_left_behind(step.text), step.goals, step.value))
        for left, signs, value in told:
            counts = count_solutions(np.array([left] * len(goals)), goals)
            expected = np.where(counts > 0, 1, -1) * said
            if tuple(left) in countdown_split.HARD_24:
                expected[24] = 0
            np.testing.assert_array_equal(signs, expected)
            if value is not None:
                assert signs[int(target[0])] in (0, 1 if value else -1)
    again = correct_walks(
        rng,
        numbers,
        wanted,
        ["".join(step.text for step in walk.steps) for walk in walks],
        sharpness=0.5,
        num_goals=countdown.NUM_GOALS,
    )
    for walk, other in zip(walks, again, strict=True):
        for step, same in zip(walk.steps, other.steps, strict=False):
            np.testing.assert_array_equal(step.goals, same.goals)


def test_states_alone_are_judged_right_or_wrong():
    rng = np.random.default_rng(8)
    numbers, wanted = countdown.draw_solvable(rng, 200, 4, np.array([24, 33, 51]))
    states = demonstrate_states(rng, numbers, wanted, num_goals=countdown.NUM_GOALS)
    clean = (~countdown_split.is_held_out(numbers, wanted)).sum()
    assert 0.8 * clean < len(states) <= clean
    assert {one.value for one in states} == {0.0, 1.0}
    for one in states:
        target, left = one.prompt.split(":")
        row = np.array([sorted(map(int, left.split()))])
        assert row.shape == (1, 3)
        assert not countdown_split.is_held_out(row, np.array([int(target)]))[0]
        assert (count_solutions(row, np.array([int(target)]))[0] > 0) == bool(one.value)
        assert one.goals[int(target)] == (1 if one.value else -1)
        assert not one.steps
    # States of four numbers are problems themselves: none that is held out is among them.
    numbers, wanted = countdown.draw_solvable(rng, 100, 5, np.array([24, 51]))
    for one in demonstrate_states(rng, numbers, wanted):
        target, left = one.prompt.split(":")
        row = np.array([sorted(map(int, left.split()))])
        assert not countdown_split.is_held_out(row, np.array([int(target)]))[0]
        assert one.goals is None


def test_the_device_knows_what_was_left():
    """What a line may go back to, and where its text stands, against the chain's own text."""
    tokenizer = ByteTokenizer()
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tables = countdown_device.make_tables(pieces)
    marks = np.flatnonzero(countdown_device.find_marks(tables))
    assert [tokenizer.decode([int(token)]) for token in marks] == [":", ";"]
    rng = np.random.default_rng(13)
    numbers, wanted = countdown.draw_solvable(rng, 20, 4, np.array([24, 51]))
    pad = functools.partial(np.pad, constant_values=0)
    step = jax.jit(functools.partial(countdown_device.step, tables))
    begin = jax.jit(functools.partial(countdown_device.begin, tables))
    num_left = 0
    for one in demonstrate_lines(rng, numbers, wanted):
        prompt = np.array(tokenizer.encode(one.prompt))
        state = begin(pad(prompt, (0, 48 - len(prompt))), len(prompt))
        path, begun = [list(map(int, one.prompt.split(":")[1].split()))], ""
        keys = {tuple(path[0]): int(countdown_device.state_key(state))}
        for part in one.steps:
            begun += part.text
            if not begun.endswith("\n"):
                begun += " "
                continue
            ids = np.array(tokenizer.encode(begun))
            checked = step(state, pad(ids, (0, 48 - len(ids))), len(ids), False)
            assert bool(checked.legal)
            state, path = checked.state, countdown.follow(path, countdown.read_line(begun[:-1]))
            keys[tuple(path[-1])] = int(checked.key)
            found = {int(key) for key in countdown_device.find_left(state)} - {0}
            assert found == {keys[tuple(left)] for left in path[:-1]}
            num_left += len(found)
            begun = ""
    assert num_left > 50


@pytest.mark.parametrize("size", [2, 3, 4])
def test_tries_are_not_written_twice(size):
    """Of a problem without a solution all moves are tried, and right is what was not tried yet."""
    rng = np.random.default_rng(14)
    numbers = np.sort(rng.integers(1, 100, (300, size)), axis=1)
    targets = rng.integers(10, 101, 300)
    lost = count_solutions(numbers, targets) == 0
    tries = demonstrate_tries(rng, numbers[lost], targets[lost])
    assert len(tries) == lost.sum()
    for one in tries:
        target, state = one.prompt.split(":")
        problem = list(map(int, state.split()))
        moves = list_moves(np.array([problem]))
        every = {
            " ".join(write_move(moves, 0, move).split()[:3])
            for move in np.flatnonzero(moves.legal[0] & (moves.result[0] < 10_000))
        }
        tried = set()
        for opening, rest, back in zip(*[iter(one.steps)] * 3, strict=True):
            assert {text for text, _ in opening.choices} == every - tried
            assert sum(weight for _, weight in opening.choices) == pytest.approx(1)
            tried.add(opening.text)
            path = countdown.follow(
                [problem], countdown.read_line(f"{opening.text} {rest.text[:-1]}")
            )
            assert path[-1] != [int(target)]
            assert countdown.follow(path, countdown.read_line(back.text[:-1])) == [problem]
            assert rest.choices == ((rest.text, 1.0),)
            assert (back.choices, back.weight) == (((back.text, 1.0),), 0.0)
            assert (opening.value, rest.value, back.value) == (None, 0.0, 0.0)
        assert len(tried) == min(len(every), MAX_TRIES) == len(one.steps) // 3
        assert not one.finished


def test_lines_teach_how_they_end_and_no_choice():
    rng = np.random.default_rng(9)
    numbers, wanted = countdown.draw_solvable(rng, 200, 4, np.array([24, 33, 51]))
    lines = demonstrate_lines(rng, numbers, wanted)
    clean = (~countdown_split.is_held_out(numbers, wanted)).sum()
    assert 0.8 * clean < len(lines) <= clean
    results, returns = [], []
    for one in lines:
        target, state = one.prompt.split(":")
        path = [list(map(int, state.split()))]
        begun, written = "", 0
        for step in one.steps:
            assert step.value is None
            if not step.text.endswith("\n"):
                assert step.choices == ()
                begun = f"{step.text} "
                continue
            assert step.choices in ((), ((step.text, 1.0),))
            line = countdown.read_line(begun + step.text[:-1])
            left = {tuple(state) for state in path[:-1]}
            path = countdown.follow(path, line)
            assert isinstance(path, list)
            assert path[-1] != [int(target)]
            written += 1
            if line.sign:
                results.append(line.result)
            else:
                # What is taught of the line is the only way to go on from what was begun.
                going = tuple(map(int, begun[1:].split()))
                same = [other for other in left if other[: len(going)] == going]
                assert begun == "" or len(same) == 1
                returns.append(bool(step.choices))
            begun = ""
        assert begun == ""
        assert written <= 6
        assert not one.finished
    assert np.mean(np.array(results) > 1000) > 0.2
    assert max(results) <= 9999
    assert len(returns) > 0.2 * len(results)
    assert np.mean(returns) > 0.8


def test_nothing_is_said_of_goals_that_are_held_out():
    hard = np.array([min(countdown_split.HARD_24), (1, 2, 3, 4)])
    hidden = countdown_split.held_out_goals(hard, 100)
    assert hidden[0, 24]
    assert not hidden[1, 24]
    assert (np.flatnonzero(hidden[1]) % 10 == 3).all()
    held = next(
        np.array([[a, 50, 60, 70]])
        for a in range(1, 50)
        if countdown_split.is_held_out_input(np.array([[a, 50, 60, 70]]))[0]
    )
    assert countdown_split.held_out_goals(held, 100).all()
    three = np.sort(np.random.default_rng(0).integers(1, 99, (200, 3)), axis=1)
    goals = np.arange(101)
    assert (countdown_split.held_out_goals(three, 100) == (goals % 10 == 3)).all()


def test_walks_of_a_network_are_labelled_as_those_of_the_solver():
    """The solver's own walks, given back as chains, are demonstrations again, step by step."""
    rng = np.random.default_rng(4)
    numbers, wanted = countdown.draw_solvable(rng, 40, 4, np.array([24, 36, 51]))
    clean = ~countdown_split.is_held_out(numbers, wanted)
    numbers, wanted = numbers[clean], wanted[clean]
    weigh = {"sharpness": 0.5, "return_weight": 0.25}
    walks = demonstrate(
        rng, numbers, wanted, wrong_share=0.5, stray_share=0.5, max_wrong=3, **weigh
    )
    chains = ["".join(step.text for step in walk.steps) for walk in walks]
    again = correct_walks(rng, numbers, wanted, chains, **weigh)
    assert [walk.prompt for walk in again] == [walk.prompt for walk in walks]
    assert {walk.finished for walk in walks} == {True, False}
    for walk, other in zip(walks, again, strict=True):
        assert other.steps[: len(walk.steps)] == walk.steps
        # A chain without a solution gets one more line, a right one.
        (added,) = other.steps[len(walk.steps) :] or (None,)
        assert (added is None) == walk.finished
        assert added is None or (added.value == 1 and added.text in dict(added.choices))
        for step in other.steps:
            goes_back = step.choices[0][0].startswith(":")
            assert step.weight == (0.25 if goes_back else 1.0)


def test_lines_of_a_network_that_are_wrong_are_corrected():
    rng = np.random.default_rng(5)
    numbers, target = np.array([[3, 5, 6, 8]]), np.array([24])

    def correct(chain: str):
        (walk,) = correct_walks(rng, numbers, target, [chain], sharpness=0.0)
        return walk.steps

    root, back = ": 3 5 6 8\n", ((": 3 5 6 8\n", 1.0),)
    first = correct("")
    assert [step.value for step in first] == [1.0]
    lost = "8 * 5 = 40 ; 3 6 40\n"
    opening, rest, returned = correct(lost)
    assert (opening.text, opening.choices, opening.value) == ("8 * 5", first[0].choices, None)
    assert (rest.text, rest.value, returned.choices) == ("= 40 ; 3 6 40\n", 0.0, back)
    # On from a lost state, back to a lost state, and the same wrong move again.
    steps = correct(lost + "40 + 3 = 43 ; 6 43\n: 3 6 40\n" + root + lost)
    assert [step.text for step in steps[2:8]] == [
        "40 + 3", "= 43 ; 6 43\n", ": 3 6 40\n", root, "8 * 5", "= 40 ; 3 6 40\n",
    ]  # fmt: skip
    assert [step.choices for step in steps[2:8:2]] == [back, back, first[0].choices]
    assert [step.value for step in steps[2:8]] == [None, 0.0, 0.0, 1.0, None, 0.0]
    # A line that does not follow is not learned from, and a state that can be solved not left.
    right = first[0].choices[0][0]
    assert correct(right + "1 + 1 = 3 ; 9\n" + lost)[0].text == right
    taken = correct(right + root)
    assert taken[1].text == root
    assert taken[1].choices == correct(right)[1].choices
    assert root not in dict(taken[1].choices)
    # Who went back behind a right line, or all of them, is to try another one.
    others = [line for line, _ in first[0].choices if line != right]
    assert [line for line, _ in taken[2].choices] == others
    again = correct(right + root + right)
    assert (again[2].text, again[2].choices, again[2].value) == (right, taken[2].choices, 1.0)
    assert sum(weight for _, weight in taken[2].choices) == pytest.approx(1)
    all_right = "".join(line + root for line in (right, *others))
    assert correct(all_right)[-1].text == root
    assert correct(all_right + right)[-2].choices == ()


def _correct(chain: str, **options: float):
    """Labels of a chain for 24 : 3 5 6 8, which goes back by its own rule with 3/4 of the label."""
    numbers, target = np.array([[3, 5, 6, 8]]), np.array([24])
    options = {"sharpness": 0.0, "keep_share": 0.75, **options}
    (walk,) = correct_walks(np.random.default_rng(5), numbers, target, [chain], **options)
    return walk.steps


def test_what_a_chain_did_where_nothing_is_right_may_be_kept():
    root, lost = ": 3 5 6 8\n", "8 * 5 = 40 ; 3 6 40\n"
    right = _correct("")[0].choices
    steps = _correct(lost + "40 + 3 = 43 ; 6 43\n: 3 6 40\n40 + 3 = 43 ; 6 43\n" + root + lost)
    # Where something is right it is the label, whatever was written.
    assert steps[0].choices == steps[8].choices == right
    first, other, again = steps[2], steps[4], steps[5]
    assert (first.text, first.choices) == ("40 + 3", (("40 + 3", 0.75), (root, 0.25)))
    # To go back is kept, where to is corrected; what was tried is not kept.
    assert (other.text, other.choices) == (": 3 6 40\n", ((root, 1.0),))
    assert (again.text, again.choices, again.weight) == ("40 + 3", ((root, 1.0),), 0.25)
    # The way back weighs less, its own part of the label with it.
    light = _correct(lost + "40 + 3 = 43 ; 6 43\n", return_weight=0.2)[2]
    assert light.weight == pytest.approx(0.8)
    assert dict(light.choices) == pytest.approx({"40 + 3": 0.75 / 0.8, root: 0.05 / 0.8})
    # All that was right is used up: the problem can be solved, and nothing says how.
    steps = _correct("".join(line + root for line, _ in right) + lost)
    used_up = next(step for step in steps if step.text == "8 * 5")
    assert (used_up.choices, used_up.weight) == ((("8 * 5", 1.0),), 0.75)


def test_chains_that_may_err_are_shown_the_way_back():
    root, wrong = ": 3 5 6 8\n", "8 - 6 = 3 ; 3 3 5\n"
    assert len(_correct(wrong)) == 1
    steps = _correct(wrong + "5 * 3 = 15 ; 3 15\n15 + 3 = 18\n: 3 3 5\n" + root, may_err=True)
    assert steps[0].text == wrong
    assert (steps[0].choices, steps[0].value) == (_correct("")[0].choices, 0.0)
    assert steps[1].choices == (("5 * 3", 0.75), (root, 0.25))
    last = next(step for step in steps if step.text == ": 3 3 5\n")
    assert (last.choices, last.value) == (((root, 1.0),), 0.0)
    assert [step.text for step in steps[-2:-1]] == [root]
    # 24 made of wrong numbers solves nothing, and of a line that leaves 4 of 4 nothing goes on.
    ended = _correct(wrong + "5 + 3 = 8 ; 3 8\n8 * 3 = 24", may_err=True)
    assert [step.text for step in ended][-1] == root
    assert len(_correct("9 * 3 = 27 ; 5 6 8 8\n" + wrong, may_err=True)) == 1


def test_training_never_meets_what_is_held_out():
    rng = np.random.default_rng(3)
    numbers = np.sort(rng.integers(1, 14, (4000, 4)), axis=1)
    targets = rng.choice([24, 33, 50], 4000)
    held = countdown_split.is_held_out(numbers, targets)
    assert held[targets == 33].all()
    assert 0 < held[targets == 50].mean() < 0.1
    for puzzle in countdown_split.HARD_24:
        row = np.array([puzzle])
        assert countdown_split.is_held_out(row, np.array([24]))[0]
        assert game24.solve(puzzle) is not None
    solvable = count_solutions(numbers, targets) > 0
    walks = demonstrate(rng, numbers[solvable], targets[solvable], wrong_share=0.2, sharpness=0.5)
    assert len(walks) == (solvable & ~held).sum()
    walks = correct_walks(
        rng, numbers[solvable], targets[solvable], [""] * solvable.sum(), sharpness=0.5
    )
    assert len(walks) == (solvable & ~held).sum()


def test_the_hard_puzzles_are_those_of_the_published_list(shared_data):
    rows = game24.load(shared_data / "game24" / "24.csv")
    hard = [tuple(sorted(problem.data)) for problem, _ in rows[900:1000]]
    assert set(hard) == countdown_split.HARD_24


def _vocabularies() -> dict[str, list[bytes]]:
    byte = ByteTokenizer()
    bytewise = [byte.token_bytes(i) for i in range(byte.vocab_size)]
    numbers = [str(n).encode() for n in range(30)]
    pieces = [b"", b"\n", b" ", *(b" " + n for n in numbers), *numbers]
    pieces += [s for sign in "+-*/=;:" for s in (sign.encode(), b" " + sign.encode())]
    return {"bytes": bytewise, "pieces": [*pieces, b"a", b"#", b".", b"00"]}


def _make_encode(pieces: list[bytes]) -> Callable[[str], list[int] | None]:
    """Longest match first; None where no piece fits."""
    ids = {piece: i for i, piece in enumerate(pieces) if piece}
    longest_first = sorted(ids, key=len, reverse=True)
    matches = re.compile(b"|".join(map(re.escape, longest_first)))

    def encode(text: str) -> list[int] | None:
        data = text.encode()
        found = matches.findall(data)
        return [ids[piece] for piece in found] if b"".join(found) == data else None

    return encode


def _hostile_chains(num_chains: int) -> list[tuple[tuple[int, ...], int, list[str]]]:
    """Right chains, and right chains with something changed in them."""
    rng, rough = np.random.default_rng(7), random.Random(7)
    chains = []
    for size, highest in ((2, 9), (3, 20), (4, 20), (4, 99)):
        count = num_chains // 4
        numbers, targets = countdown.draw_solvable(
            rng, count, size, np.arange(10, 101), highest=highest
        )
        walks = demonstrate(
            rng, numbers, targets, wrong_share=0.2, sharpness=0.0, stray_share=0.3, max_wrong=3
        )
        by_prompt = {
            countdown.write_state(int(t), n) + "\n": (tuple(n.tolist()), int(t))
            for n, t in zip(numbers, targets, strict=True)
        }
        for walk in walks:
            text = "".join(step.text for step in walk.steps)
            steps = text.splitlines(keepends=True)
            changed = rough.randrange(len(steps))
            if rough.random() < 0.75:
                steps[changed] = _change(rough, steps[changed])
            chains.append((*by_prompt[walk.prompt], steps))
    return chains


def _change(rough: random.Random, line: str) -> str:
    place = rough.randrange(len(line))
    kind = rough.randrange(9)
    if kind == 0:
        return line[:place] + rough.choice("0123456789 +-*/=;:.a\n") + line[place:]
    if kind == 1:
        return line[:place] + line[place + 1 :]
    if kind == 2:
        return line[:place] + rough.choice("0123456789 +-*/=;") + line[place + 1 :]
    if kind == 3:
        return "\n " + line
    if kind == 4:
        return line.replace("= ", "= 00")
    if kind == 5:
        return line.replace(" = ", " = 4294967296")
    if kind == 6:
        return line.replace(" ", rough.choice(["", "  "]), rough.randrange(1, 4))
    if kind == 7:
        return line.replace(" ;", " ; ;").replace("=", "= =") if place % 2 else line.rstrip() + " ;"
    return line + line


@pytest.mark.parametrize(
    ("name", "may_err"), [("bytes", False), ("pieces", False), ("pieces", True)]
)
def test_the_device_says_what_python_says(name, may_err):
    """may_err: a chain goes on behind a wrong line that says what it leaves, and may go back."""
    pieces = _vocabularies()[name]
    encode = _make_encode(pieces)
    task = countdown.TASK.device
    tables = task.make_tables(pieces)
    prompts, lines, lengths, expected = [], [], [], []
    most_steps, width, num_mended = 7, 48, 0
    for numbers, target, steps in _hostile_chains(10_000):
        # A step ends with its first newline behind something, as decoding would end it.
        text = "".join(steps)
        cut = [part for part in text.split("\n") if part.strip(" ")]
        ids = [encode(part + "\n") for part in cut]
        prompt = encode(countdown.write_state(target, np.array(numbers)) + "\n")
        if len(cut) > most_steps or any(i is None or len(i) > width for i in ids):
            continue
        ids += [[]] * (most_steps - len(ids))
        prompts.append(prompt + [0] * (24 - len(prompt)))
        lines.append([line + [0] * (width - len(line)) for line in ids])
        lengths.append([len(prompt), *map(len, ids)])
        told = countdown.drop_wrong_lines(numbers, target, text) if may_err else text
        num_mended += told != text and bool(countdown.verify_text(numbers, target, told).correct)
        expected.append(bool(countdown.verify_text(numbers, target, told).correct))

    def check(prompt, line, length):
        state = task.begin(tables, prompt, length[0])
        alive, solved = jnp.bool_(True), jnp.bool_(False)
        for i in range(most_steps):
            there = length[i + 1] > 0
            seen = task.step(tables, state, line[i], length[i + 1], jnp.bool_(False))
            goes_on = seen.legal | (seen.claims & may_err)
            solved = jnp.where(there, alive & seen.legal & seen.solved, solved)
            alive &= ~there | (goes_on & ~(solved & ~seen.solved))
            state = jax.tree.map(functools.partial(jnp.where, there), seen.state, state)
        return solved & alive

    found = jax.jit(jax.vmap(check))(
        *(np.array(rows, np.int32) for rows in (prompts, lines, lengths))
    )
    wrong = np.flatnonzero(np.asarray(found) != np.array(expected))
    assert not len(wrong), [lines[row] for row in wrong[:5]]
    assert len(expected) > 5000
    assert 0.1 < np.mean(expected) < 0.7
    assert (num_mended > 50) == may_err


def test_what_stands_on_a_wrong_line_is_dropped():
    """Up to the line that goes back to what stood before; and a wrong line proves nothing."""
    wrong = "9 - 4 = 6 ; 2 6\n6 * 2 = 12\n: 2 4 9\n"
    right = "9 - 4 = 5 ; 2 5\n5 * 2 = 10"
    problem = countdown.make_problem((2, 4, 9), 10)
    assert countdown.drop_errors(problem, wrong + right) == right
    assert countdown.verify(problem, Gold(), wrong + right).correct is False
    # Whoever makes the target so takes it for the end.
    twelve = countdown.make_problem((2, 4, 9), 12)
    for ending in ("", "9 - 4 = 5 ; 2 5\n5 * 2 = 12\n: 2 4 9\n"):
        delusion = countdown.drop_errors(twelve, (ending or wrong) + "9 - 4 = 5 ; 2 5\n5 + 2 = 7")
        assert "= 12" in delusion
        assert countdown.verify(twelve, Gold(), delusion).correct is False
    # It goes back behind right lines as well, and those are taken back, not dropped.
    back = "9 + 4 = 13 ; 2 13\n13 - 2 = 12\n: 2 4 9\n"
    kept = "9 + 4 = 13 ; 2 13\n: 2 4 9\n"
    assert countdown.drop_errors(problem, back + right) == kept + right
    assert countdown.verify(problem, Gold(), kept + right).correct is True
    assert game24.TASK.drop_errors(game24.make_problem((1, 2, 4, 6), "a"), "7 * 1 = 7 ; 7") != ""
    # What does not say what it leaves is gone on from by nothing.
    for line in ("9 - 4 = 6", "9 - 4 = 6 ; 6", ": 4 9", "nine"):
        text = f"{line}\n{right}"
        dropped = countdown.drop_errors(problem, text)
        assert countdown.verify(problem, Gold(), dropped).correct is False


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_lines_that_go_back_begin_with_tokens_of_their_own(name):
    """And no line that makes a move begins with one of them."""
    pieces = _vocabularies()[name]
    encode, task = _make_encode(pieces), countdown.TASK.device
    barred = np.asarray(task.returns(task.make_tables(pieces)))
    assert {pieces[token].strip(b" ") for token in np.flatnonzero(barred)} == {b":"}
    assert barred[encode(": 4 4 7 10\n")[0]]
    assert not barred[encode("10 - 4 = 6 ; 4 6 7\n")[0]]


def _puzzle_pieces() -> list[bytes]:
    """As `train_puzzle_tokenizer` makes them, without numbers that lack a space."""
    pieces = [b"", b"\n", b" ", *(f" {n}".encode() for n in range(1000))]
    pieces += [s for sign in "+-*/=;:" for s in (sign.encode(), b" " + sign.encode())]
    return [*pieces, *(str(n).encode() for n in range(10))]


@pytest.mark.parametrize("highest", [13, 99, 40_000])
def test_the_device_spells_every_legal_line_and_no_other(highest):
    """Against the solver's moves, as demonstrations write them."""
    pieces, rng = _puzzle_pieces(), np.random.default_rng(highest)
    encode, tables = _make_encode(pieces), countdown_device.make_tables(pieces)
    moves = countdown_device.DEVICE_TASK.moves
    assert moves.fits(tables)
    ends = np.flatnonzero(moves.ends(tables))
    assert {pieces[token] for token in ends} == {b"", b"\n"}

    def spell(ids, length):
        return moves.spell(tables, countdown_device.begin(tables, ids, length), 24)

    spell, found = jax.jit(spell), 0
    for size in (2, 3, 4, 6, 8) * 3:
        numbers = np.sort(rng.integers(1, highest + 1, size))
        prompt = encode(" 24 : " + " ".join(map(str, numbers)) + "\n")
        tokens, length = spell(np.pad(prompt, (0, 48 - len(prompt))), len(prompt))
        ours = [row[:n] for row, n in zip(tokens.tolist(), length.tolist(), strict=True) if n]
        listed = list_moves(numbers[None])
        lines = {
            " " + write_move(listed, 0, move).removesuffix("\n")
            for move in np.flatnonzero(listed.legal[0] & (listed.result[0] < 10**9))
        }
        wanted = {tuple(ids) for ids in map(encode, lines) if len(ids) < 24}
        assert set(map(tuple, ours)) == wanted
        found += len(wanted)
    assert found > 50


def test_the_device_lists_the_states_behind_every_legal_line():
    """Against the solver's; the states that are left with one number the task decides itself."""
    tokenizer, rng = ByteTokenizer(), np.random.default_rng(3)
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tables, begin = countdown_device.make_tables(pieces), jax.jit(countdown_device.begin)
    look = jax.jit(countdown_device.DEVICE_TASK.outcomes)
    for size in (2, 3, 4, 6, 8):
        numbers = np.sort(rng.integers(1, 100, size))
        prompt = tokenizer.encode("24 : " + " ".join(map(str, numbers)) + "\n")
        state = begin(tables, np.pad(prompt, (0, 48 - len(prompt))), len(prompt))
        seen = look(state)
        there = (np.asarray(seen.items) >= 0).any(1)
        assert (np.asarray(seen.goal)[there] == 24).all()
        found = {tuple(sorted(n for n in row if n >= 0)) for row in seen.items[there].tolist()}
        listed = list_moves(numbers[None])
        wanted = {tuple(sorted(s)) for s in listed.states[0][listed.legal[0]].tolist()}
        assert found == (wanted if size > 2 else set())
    unknown = tokenizer.encode("Make 24 out of 4 4 7 10.\n")
    seen = look(begin(tables, np.pad(unknown, (0, 48 - len(unknown))), len(unknown)))
    assert (np.asarray(seen.items) < 0).all()


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_a_vocabulary_that_cuts_numbers_elsewhere_lists_nothing(name):
    pieces = _vocabularies()[name]
    tables = countdown_device.make_tables(pieces)
    moves = countdown_device.DEVICE_TASK.moves
    assert not moves.fits(tables)
    prompt = _make_encode(pieces)("24 : 4 4 7 10\n")
    state = jax.jit(countdown_device.begin)(tables, np.array(prompt), len(prompt))
    assert int(state.count) == 4
    assert not moves.spell(tables, state, 16)[1].any()


def test_equal_states_have_equal_keys_and_other_prompts_tell_nothing():
    tokenizer = ByteTokenizer()
    pieces = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    tables = countdown_device.make_tables(pieces)

    read_step, read_prompt = jax.jit(countdown_device.step), jax.jit(countdown_device.begin)

    def ids(text):
        tokens = tokenizer.encode(text)
        return np.array(tokens + [0] * (32 - len(tokens)), np.int32), np.int32(len(tokens))

    def step(state, text):
        return read_step(tables, state, *ids(text), np.bool_(0))

    def begin(text):
        return read_prompt(tables, *ids(text))

    start = begin("24 : 4 4 7 10\n")
    first, other = step(start, "10 - 4 = 6 ; 4 6 7\n"), step(start, "10-4=6; 7 6 4\n")
    assert bool(first.legal)
    assert bool(other.legal)
    assert int(first.key) == int(other.key) != 0
    assert int(step(start, "7 - 4 = 3 ; 3 4 10\n").key) != int(first.key)
    assert int(step(begin("25 : 4 4 7 10\n"), "10 - 4 = 6 ; 4 6 7\n").key) != int(first.key)
    assert not bool(step(start, "10 - 4 = 6 ; 4 6").legal), "a line cut short"
    # What a network that judges states is shown: the numbers that are left, and the target.
    for state, numbers in ((start, [10, 7, 4, 4]), (first.state, [7, 6, 4])):
        seen = countdown_device.observe(state)
        assert [number for number in seen.items.tolist() if number >= 0] == numbers
        assert int(seen.goal) == 24
    for prompt in ("Make 24 out of 4 4 7 10.\n", "24 : 4\n", "24 : 4 4 7 10", "24 : 4 4 : 7\n"):
        seen = countdown_device.observe(begin(prompt))
        assert int(seen.goal) < 0
        assert (np.asarray(seen.items) < 0).all()
        unknown = step(begin(prompt), "10 - 4 = 6 ; 4 6 7\n")
        assert not bool(unknown.known)
        assert bool(unknown.legal)
        assert not bool(unknown.solved)
        assert int(unknown.key) == 0
