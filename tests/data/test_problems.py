"""Files of problems: what is wrong costs its own line, with its number, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlm_jax.data import problems
from rlm_jax.tasks.base import Gold

BOM = b"\xef\xbb\xbf"
GOOD = b'{"question": "1 + 1?", "answer": 2, "id": "a"}'


@pytest.fixture
def read(tmp_path):
    def read(content: bytes):
        path = tmp_path / "problems.jsonl"
        path.write_bytes(content)
        return problems.read_problems(path)

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
