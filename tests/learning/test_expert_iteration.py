"""Solutions worth imitating, picked out of records written by hand."""

import pytest
from record_trees import make_tree_record

from rlm_jax.data.countdown import is_held_out_question, passes_held_out
from rlm_jax.data.records import RecordWriter
from rlm_jax.learning.expert_iteration import (
    finished_paths,
    make_answer_key,
    make_verifier,
    read_examples,
    select_solutions,
)
from rlm_jax.tasks import countdown, gsm8k
from rlm_jax.text.tokenizer import ByteTokenizer

# parent, text, terminal, alive, searched value
TREE = [
    (None, "Make 24.", False, True, None),
    (0, "a;", False, True, 0.5),
    (1, "b=24", True, True, 0.2),
    (1, "c=24", True, True, 0.9),
    (0, "d=7", True, True, 0.99),
    (0, "a;", False, False, None),
    (0, "ab=24", True, True, 0.2),
    (0, "c=24", True, True, None),
]


def make(tree=TREE, id="p", correct=True, chosen=(0, 1, 3), question="Make 24."):
    return make_tree_record(
        [step[:4] for step in tree[1:]],
        root=tree[0][1],
        values={"search": [value for *_, value in tree]},
        id=id,
        question=question,
        answer="24",
        correct=correct,
        strategy="puct",
        chosen=list(chosen),
    )


def says_24(record, path):
    return path[-1]["text"].endswith("=24")


def texts(solutions):
    return [solution.text for solution in solutions]


def test_a_record_vouches_for_its_chosen_solution_alone():
    (solution,) = select_solutions([make()])
    assert solution.problem == "p"
    assert bytes(solution.prompt) == b"Make 24."
    assert [bytes(step) for step in solution.steps] == [b"a;", b"c=24"]
    assert solution.text == "a;c=24"
    for correct in (False, None):
        assert select_solutions([make(correct=correct)]) == []
    assert select_solutions([make(chosen=())]) == []


def test_right_paths_come_best_first_then_shortest():
    found = select_solutions([make()], is_right=says_24)
    assert texts(found) == ["a;c=24", "ab=24", "a;b=24", "c=24"]
    assert texts(select_solutions([make()], is_right=says_24, max_per_problem=2)) == texts(
        found[:2]
    )


def test_equal_solutions_are_one_however_they_are_cut_into_steps():
    """Of two records' equal solutions the one of higher value stands for both."""
    whole = [TREE[0], (0, "a;c=24", True, True, 0.95), (0, "a;b=24", True, True, 0.1)]
    again = make(whole, chosen=(0, 1))
    found = select_solutions([make(), again], is_right=says_24)
    assert texts(found) == ["a;c=24", "ab=24", "a;b=24", "c=24"]
    assert len(found[0].steps) == 1
    assert len(found[2].steps) == 2


def test_answers_as_keys():
    key = make_answer_key(lambda text: "24" if text.endswith("b=24") else None)
    found = select_solutions([make()], is_right=says_24, key_fn=key)
    assert texts(found) == ["a;c=24", "ab=24", "c=24"]


def test_problems_keep_their_order_and_their_own_solutions():
    records = [make(id="q"), make(id="p"), make(id="q", correct=False)]
    assert [s.problem for s in select_solutions(records)] == ["q", "p"]


def test_problems_of_equal_ids_are_told_apart_by_their_questions():
    """Ids are by the line of a file: another file's are the same."""
    records = [make(), make(question="Make 25."), make()]
    found = select_solutions(records, is_right=says_24, max_per_problem=1)
    assert texts(found) == ["a;c=24", "a;c=24"]


def test_dead_and_unfinished_ends_are_no_solutions_unless_chosen():
    ends = [path[-1]["id"] for path in finished_paths(make())]
    assert ends == [2, 3, 4, 6, 7]
    ends = [path[-1]["id"] for path in finished_paths(make(chosen=(0, 1)))]
    assert ends == [2, 3, 4, 6, 7, 1]
    assert finished_paths(make(TREE[:1], chosen=(0,))) == []


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="max_per_problem"):
        select_solutions([], max_per_problem=0)


# Lines in notation, a byte a token: an end that is wrong, and a chain that went back.
PUZZLE = "Make 36 out of 3 5 7 8."
LINES = [
    (None, "36 : 3 5 7 8\n", False, True, None),
    (0, "8 - 5 = 3 ; 3 3 7\n", False, True, 0.5),
    (1, "7 - 3 = 4 ; 3 4\n", False, True, 0.5),
    (2, "4 * 3 = 12", True, True, 0.9),
    (0, "8 - 7 = 1 ; 1 3 5\n", False, True, 0.5),
    (4, ": 3 5 7 8\n", False, True, 0.5),
    (5, "5 + 7 = 12 ; 3 8 12\n", False, True, 0.5),
    (6, "12 * 3 = 36 ; 8 36\n", False, True, 0.5),
]


def write(path, *records):
    with RecordWriter(path) as writer:
        for record in records:
            writer.write(record)
    return path


def solved(**fields):
    """12 = (8 - 5) * (7 - 3): the same lines with target 12."""
    lines = [(None, "12 : 3 5 7 8\n", False, True, None), *LINES[1:4]]
    lines += [
        (0, ": 3 5 7 8\n", False, True, 0.5),
        (0, "8 - 7 = 1 ; 1 3 5\n", False, True, 0.5),
        (5, ": 3 5 7 8\n", False, True, 0.5),
        (6, LINES[1][1], False, True, 0.5),
        (7, LINES[2][1], False, True, 0.5),
        (8, "4 * 3 = 12", True, True, 0.4),
        (2, "4 + 3 = 7", True, True, 0.9),
    ]
    return make(lines, chosen=(0, 1, 2, 3), question="Make 12 out of 3 5 7 8.", **fields)


def read(*paths, held_out_fn=is_held_out_question, **options):
    return read_examples(
        paths,
        task=countdown.TASK,
        tokenizer=ByteTokenizer(),
        held_out_fn=held_out_fn,
        passes_fn=passes_held_out,
        **options,
    )


def test_files_of_records_become_examples(tmp_path):
    """Every right path is taught, the way that was taken back with it; prompts are not."""
    path = write(tmp_path / "a.jsonl", solved())
    direct, back = read(path)
    prompt = "12 : 3 5 7 8\n"
    steps = "".join(text for _, text, *_ in LINES[1:4])
    assert bytes(direct.tokens.tolist()).decode() == prompt + steps
    text = bytes(back.tokens.tolist()).decode()
    assert text == f"{prompt}8 - 7 = 1 ; 1 3 5\n: 3 5 7 8\n{steps}"
    for example in (direct, back):
        assert example.loss_weight[: len(prompt)].max() == 0
        assert example.loss_weight[len(prompt) :].min() == 1
        assert example.value_weight.max() == 0
    assert len(read(path, max_per_problem=1)) == 1
    # Two files of one problem hold no more than one does.
    again = write(tmp_path / "b.jsonl", solved(correct=False))
    assert len(read(path, again)) == 2


def test_solutions_that_pass_a_test_problem_are_left_out(tmp_path):
    """`24 : 1 3 9 9` is a hard puzzle of Game of 24, on the way of half of these."""
    end = "9 / 3 = 3 ; 3 8\n", "8 * 3 = 24"
    lines = [
        (None, "24 : 1 7 9 9 10\n", False, True, None),
        (0, "10 - 7 = 3 ; 1 3 9 9\n", False, True, 0.5),
        (1, "9 - 1 = 8 ; 3 8 9\n", False, True, 0.5),
        (2, end[0], False, True, 0.5),
        (3, end[1], True, True, 0.9),
        (0, "9 - 1 = 8 ; 7 8 9 10\n", False, True, 0.5),
        (5, "10 - 7 = 3 ; 3 8 9\n", False, True, 0.5),
        (6, end[0], False, True, 0.5),
        (7, end[1], True, True, 0.1),
    ]
    fields = {"question": "Make 24 out of 1 7 9 9 10.", "chosen": (0, 1, 2, 3, 4)}
    (example,) = read(write(tmp_path / "a.jsonl", make(lines, **fields)), max_per_problem=1)
    text = bytes(example.tokens.tolist()).decode()
    assert text == "".join(text for _, text, *_ in (lines[0], *lines[5:]))
    path = write(tmp_path / "b.jsonl", make(lines[:5], **fields))
    with pytest.raises(ValueError, match=r"no right solution in .*b\.jsonl that may be trained on"):
        read(path)


def test_what_must_not_be_trained_on_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", make(LINES, chosen=(0,), question=PUZZLE))
    with pytest.raises(ValueError, match=r"a\.jsonl: record 'p' is of a test problem, 'Make 36"):
        read(path, held_out_fn=lambda question: question == PUZZLE)
    with pytest.raises(ValueError, match=r"no right solution in .*a\.jsonl"):
        read(path)
    assert is_held_out_question("Make 24 out of 4 4 7 10.")
    assert is_held_out_question("33 : 1 2 3 4")
    assert not is_held_out_question(PUZZLE)
    record = solved()
    record["nodes"][0]["tokens"][0] += 1
    with pytest.raises(ValueError, match="another tokenizer"):
        read(write(tmp_path / "b.jsonl", record))
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="gsm8k cannot verify"):
        make_verifier(gsm8k.TASK)
