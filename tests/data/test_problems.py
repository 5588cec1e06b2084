"""Files of problems: what is wrong costs its own line, with its number, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.data import problems
from rlm_jax.data.builders.build import find_generating_tasks
from rlm_jax.tasks import countdown, game24, gsm8k, knapsack, sorting
from rlm_jax.tasks.base import Gold

GENERATING = list(find_generating_tasks().values())
BOM = b"\xef\xbb\xbf"
GOOD = b'{"question": "1 + 1?", "answer": 2, "id": "a"}'


@pytest.fixture
def read(tmp_path):
    def read(content: bytes, task=None):
        path = tmp_path / "problems.jsonl"
        path.write_bytes(content)
        return problems.read_problems(path, task)

    return read


def test_reads_questions_answers_and_ids(read):
    lines = [
        GOOD,
        b'{"question": " Who? ", "answer": "  Ada ", "id": 7, "level": 3}',
        b'{"question": "Who?", "answer": null}',
        b'{"question": "Who?", "answer": 1.50, "id": ""}',
    ]
    file = read(b"\n".join(lines))
    assert file.malformed == []
    (a, gold_a), (b, gold_b), (c, gold_c), (d, gold_d) = file.examples
    assert (a.question, a.id, gold_a) == ("1 + 1?", "a", Gold("2"))
    assert (b.question, b.id, gold_b) == ("Who?", "7", Gold("Ada"))
    assert (gold_c, gold_d) == (Gold(None), Gold("1.5"))
    assert c.id.endswith("-3")
    assert d.id.endswith("-4")
    assert c.id.split("-")[0] == d.id.split("-")[0]
    assert file.examples == read(b"\n".join(lines)).examples


@pytest.mark.parametrize("content", [b"", b"\n\n", b"  \r\n\t\n", BOM, BOM + b"\n"])
def test_empty_files_hold_nothing(read, content):
    assert read(content) == ([], [])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD + b"\r\n",
        b"\r\n\r\n" + GOOD,
        GOOD + b"\n\n",
        b" " + GOOD + b" ",
    ],
)
def test_windows_files_and_blank_lines_are_fine(read, content):
    file = read(content)
    assert [p.id for p, _ in file.examples] == ["a"]
    assert file.malformed == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"how many?", "not JSON"),
        (b'["question"]', "not a JSON object but list"),
        (b"3", "not a JSON object but int"),
        (b"null", "not a JSON object but NoneType"),
        (b"{}", 'no field "question"'),
        (b'{"Question": "x"}', 'no field "question"'),
        (b'{"question": null}', 'no field "question"'),
        (b'{"question": 5}', "is no string"),
        (b'{"question": ["x"]}', "is no string"),
        (b'{"question": ""}', "is empty"),
        (b'{"question": " \\n"}', "is empty"),
        (b'{"question": "x", "answer": [1]}', '"answer" is neither'),
        (b'{"question": "x", "answer": true}', '"answer" is neither'),
        (b'{"question": "x", "answer": 1e999}', '"answer" is too large'),
        (b'{"question": "x", "answer": NaN}', "NaN"),
        (b'{"question": "x", "answer": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"question": "x", "id": {}}', '"id" is neither'),
        (b'{"question": "x", "id": "a"}', "id 'a' is taken by line 1"),
        (b'{"question": "\\ud800"}', "surrogate"),
        (b'{"question": "\xff"}', "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"question": "' + b"x" * problems.MAX_LINE_BYTES + b'"}', "longer than"),
        (b"x" * (3 * problems.MAX_LINE_BYTES), "longer than"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_malformed_line_costs_itself_only(read, line, reason):
    other = b'{"question": "2 + 2?", "id": "b"}'
    file = read(GOOD + b"\n\n" + line + b"\n" + other)
    assert [p.id for p, _ in file.examples] == ["a", "b"]
    assert [m.line for m in file.malformed] == [3]
    assert reason in file.malformed[0].reason
    assert len(file.malformed[0].reason) < 200
    assert "\n" not in file.malformed[0].reason


def test_a_missing_file_and_a_folder_are_clear_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        problems.read_problems(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        problems.read_problems(tmp_path)


@given(st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=8))
def test_any_bytes_lose_no_good_line(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("p") / "problems.jsonl"
    path.write_bytes(b"\n".join([GOOD, *lines, json.dumps({"question": "last"}).encode()]))
    file = problems.read_problems(path)
    assert file.examples[0][0].id == "a"
    assert file.examples[-1][0].question == "last"
    assert len(file.examples) + len(file.malformed) <= len(lines) + 2


def test_a_tasks_own_rows_stand_beside_questions_that_it_reads(read):
    lines = [
        b'{"numbers": [4, 4, 7, 10], "target": 24}',
        b'{"numbers": [1, 2], "target": 3, "id": 7}',
        b'{"question": "Make 24 out of 4, 4, 7 and 10.", "id": "a"}',
        b'{"numbers": [1, 2], "target": "3"}',
        b'{"question": "How many?"}',
        b'{"target": 3}',
    ]
    file = read(b"\n".join(lines), countdown.TASK)
    found = [(problem.id, problem.data) for problem, _ in file.examples]
    puzzle = ((4, 4, 7, 10), 24)
    assert found == [("countdown-1", puzzle), ("7", ((1, 2), 3)), ("a", puzzle)]
    assert [line for line, _ in file.malformed] == [4, 5, 6]
    reasons = " ".join(reason for _, reason in file.malformed)
    for part in ("'3' is no whole number", "'How many?' is no puzzle", 'no field "question"'):
        assert part in reasons


def test_published_solutions_of_gsm8k_are_golds(read):
    lines = [
        b'{"question": "Q?", "answer": "2 + 3 = <<2+3=5>>5\\n#### 1,005"}',
        b'{"question": "Q?", "answer": "5", "id": "a"}',
        b'{"question": "Q?", "answer": 5, "id": "b"}',
        b'{"question": "Q?", "id": "c"}',
        b'{"question": "Q?", "answer": "#### many"}',
    ]
    file = read(b"\n".join(lines), gsm8k.TASK)
    found = [(problem.id, gold.answer) for problem, gold in file.examples]
    assert found == [("gsm8k-0", "1,005"), ("a", "5"), ("b", "5"), ("c", None)]
    assert file.malformed == [(5, "no number behind #### or alone in its answer: 'many'")]


def test_a_gold_that_a_task_cannot_read_costs_its_line(read):
    lines = [b'{"question": "A?", "answer": "True"}', b'{"question": "A?", "answer": "18"}']
    file = read(b"\n".join(lines), knapsack.TASK)
    assert [gold.answer for _, gold in file.examples] == ["True"]
    ((line, reason),) = file.malformed
    assert line == 2
    assert "gold answer '18' is neither True nor False" in reason


@pytest.mark.parametrize("task", GENERATING, ids=lambda task: task.name)
def test_generated_problems_are_read_as_they_were_written(task, tmp_path):
    examples = task.generate(3, 4, 0.3)
    path = tmp_path / "problems.jsonl"
    assert problems.write_problems(path, examples) == 4
    assert problems.read_problems(path, task) == (examples, [])


def test_data_of_any_kind_cost_their_line_at_most(read):
    nested = b"[" * 900 + b"]" * 900
    lines = [
        b'{"question": "Q?", "data": 3}',
        b'{"question": "Q?", "data": ' + nested + b"}",
        b'{"question": "Q?", "data": {}}',
        b'{"question": "Sort [1, 0].", "data": ["a", null]}',
        b'{"question": "Sort [1, 0].", "data": [1, 0], "answer": "[0, 1]"}',
    ]
    file = read(b"\n".join(lines), sorting.TASK)
    assert [problem.data for problem, _ in file.examples[:1]] == [()]
    problem, gold = file.examples[-1]
    assert (problem.question, problem.data, gold) == ("Sort [1, 0].", (1, 0), Gold("[0, 1]"))


def test_published_tables_are_read_as_they_are(tmp_path):
    path = tmp_path / "24.csv"
    path.write_text("Rank,Puzzles\n1,1 1 4 6\n2,1 1 11 11\n")
    found = problems.read_problems(path, game24.TASK)
    assert [problem.data for problem, _ in found.examples] == [(1, 1, 4, 6), (1, 1, 11, 11)]
    assert not found.malformed
