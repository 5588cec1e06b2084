import dataclasses
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

from rlm_jax.data.builders import build as building
from rlm_jax.data.builders.build import build
from rlm_jax.data.builders.countdown.countdown_dataset_builder import CountdownSpec
from rlm_jax.data.builders.countdown.countdown_dataset_builder import (
    generate_splits as draw_countdown,
)
from rlm_jax.data.builders.gsm8k import gsm8k_dataset_builder
from rlm_jax.data.builders.gsm8k.gsm8k_dataset_builder import build_gsm8k
from rlm_jax.data.builders.puzzles.puzzles_dataset_builder import (
    PuzzleSpec,
    build_puzzles,
    generate_splits,
)
from rlm_jax.data.builders.reading import read_text, to_element, to_example
from rlm_jax.data.examples import make_example
from rlm_jax.data.iterators import make_batches
from rlm_jax.data.overlap import exact_text, require_disjoint
from rlm_jax.data.packing import Packed
from rlm_jax.data.problems import read_problems
from rlm_jax.data.splits import load_split
from rlm_jax.tasks import arithmetic, countdown, game24, gsm8k
from rlm_jax.tasks.base import Gold, Problem
from rlm_jax.tasks.countdown_split import is_held_out

SMALL = PuzzleSpec(arithmetic.TASK, difficulty=0.3, num_train=50, num_validation=5, num_test=8)
ROWS = [("How many?", "1 + 1 = <<1+1=2>>2\n#### 2"), ("Ünd nöw?", "#### 1,000")]


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, build_puzzles(SMALL, folder)


def questions_of(examples):
    return [problem.question for problem, _ in examples]


# Puzzles


def test_built_splits_hold_what_was_generated(puzzles):
    folder, sources = puzzles
    for split, examples in generate_splits(SMALL).items():
        read = [to_example(sources[split][i]) for i in range(len(sources[split]))]
        assert read == list(examples)
        assert len(read) == SMALL.num_problems(split)
        assert {gold.answer for _, gold in read} != {None}
        for problem, gold in read:
            assert arithmetic.TASK.verify(problem, gold, f"#### {gold.answer}").correct
    assert list(folder.glob("puzzles/*/*/*.array_record-*"))
    # A second call reads the files.
    again = build_puzzles(SMALL, folder)
    assert [again["train"][i] for i in range(3)] == [sources["train"][i] for i in range(3)]


def test_a_built_split_is_a_source_of_batches(puzzles):
    _, sources = puzzles

    def tokenize(element):
        problem, gold = to_example(element)
        return make_example(list(f"{problem.question} {gold.answer}".encode()))

    batches = make_batches(
        sources["test"], Packed(2, 256), seed=0, num_epochs=1, make_example=tokenize
    )
    text = b"".join(bytes(batch.tokens.ravel().tolist()) for batch in batches).decode()
    for problem, gold in generate_splits(SMALL)["test"]:
        assert f"{problem.question} {gold.answer}" in text


def test_held_out_problems_are_fixed_and_never_trained_on():
    # Few enough problems that chance alone would repeat them.
    spec = PuzzleSpec(arithmetic.TASK, difficulty=0.0, num_train=400, num_validation=30)
    spec = dataclasses.replace(spec, num_test=40)
    splits = {name: list(examples) for name, examples in generate_splits(spec).items()}
    keys = {name: [exact_text(p) for p, _ in examples] for name, examples in splits.items()}
    assert [len(keys[name]) for name in ("test", "validation", "train")] == [40, 30, 400]
    assert len(set(keys["test"] + keys["validation"])) == 70
    assert len(set(keys["train"])) < 400
    train, test = ([problem for problem, _ in splits[name]] for name in ("train", "test"))
    require_disjoint(train, test, permuted_key=None)
    other = generate_splits(dataclasses.replace(spec, num_train=10, num_validation=1))
    assert list(other["test"]) == splits["test"]
    fewer = generate_splits(dataclasses.replace(spec, num_train=10))
    assert list(fewer["train"]) == splits["train"][:10]
    seeded = generate_splits(dataclasses.replace(spec, seed=1))
    assert questions_of(seeded["test"]) != questions_of(splits["test"])
    ids = [problem.id for problem, _ in itertools.chain(*splits.values())]
    assert len(set(ids)) == len(ids)


def by_operands(problem):
    return "".join(sorted(problem.data[0]))


def test_a_task_says_which_problems_are_the_same():
    spec = PuzzleSpec(arithmetic.TASK, difficulty=0.0, num_train=200, num_validation=0, num_test=40)
    held_out = {by_operands(problem) for problem, _ in generate_splits(spec)["test"]}
    by_text = {by_operands(problem) for problem, _ in generate_splits(spec)["train"]}
    assert held_out & by_text
    spec = dataclasses.replace(spec, key_fn=by_operands)
    splits = {name: list(examples) for name, examples in generate_splits(spec).items()}
    test = [by_operands(problem) for problem, _ in splits["test"]]
    assert len(set(test)) == 40
    assert not set(test) & {by_operands(problem) for problem, _ in splits["train"]}
    excluded = tuple(problem for problem, _ in splits["test"])
    other = dataclasses.replace(spec, excluded=excluded)
    for examples in generate_splits(other).values():
        assert not {by_operands(problem) for problem, _ in examples} & set(test)
    names = {spec.name, other.name, dataclasses.replace(spec, key_fn=exact_text).name}
    assert len(names) == 3


def test_too_few_problems_are_an_error():
    def generate(seed, num_problems, difficulty):
        return [(Problem(f"{(seed + i) % 30}?"), Gold()) for i in range(num_problems)]

    task = dataclasses.replace(arithmetic.TASK, name="thirty", generate=generate)
    spec = PuzzleSpec(task, num_train=9, num_validation=8, num_test=20)
    assert [len(list(s)) for s in generate_splits(spec).values()] == [20, 8, 9]
    with pytest.raises(ValueError, match=r"too few different problems: 5 of 15 .* in validation"):
        generate_splits(dataclasses.replace(spec, num_validation=15))
    splits = generate_splits(dataclasses.replace(spec, num_validation=10))
    with pytest.raises(ValueError, match="9 of 9 are missing in train"):
        list(splits["train"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": game24.TASK}, "game24 generates no problems"),
        ({"seed": -1}, "seed"),
        ({"difficulty": 1.5}, "1.5"),
        ({"num_test": -1}, "num_test"),
        ({"key_fn": lambda problem: problem.data}, "no lambda"),
    ],
)
def test_bad_specs_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


def test_elements_give_back_their_examples():
    problem = Problem("Make 24 öut.", ((4, 4, (7, "x")), 24), "a")
    for gold in (Gold(), Gold("8")):
        element = {k: v.encode() for k, v in to_element(problem, gold).items()}
        assert to_example(element) == (problem, gold)
    with pytest.raises(ValueError, match="a: data"):
        to_element(dataclasses.replace(problem, data=([1, 2],)), Gold())
    with pytest.raises(ValueError, match="a: the gold answer"):
        to_element(problem, Gold(""))


# Countdown


def test_countdown_is_built_by_the_rule(tmp_path):
    sources = build("countdown", tmp_path, size=4, num_train=30)
    read = {
        split: [to_example(source[i]) for i in range(len(source))]
        for split, source in sources.items()
    }
    assert {split: len(examples) for split, examples in read.items()} == {
        "train": 30,
        "test_inputs": 1000,
        "test_targets": 1000,
    }
    assert tuple(read["test_inputs"]) == load_split("countdown4-inputs").examples
    assert tuple(read["test_targets"]) == load_split("countdown4-targets").examples
    for problem, gold in read["train"]:
        numbers, target = problem.data
        assert not is_held_out(np.array([sorted(numbers)]), np.array([target]))[0]
        assert countdown.verify(problem, gold, f"#### {countdown.solve(numbers, target)}").correct
    assert list(tmp_path.glob("countdown/n4-s0-30/1.0.0/*.array_record-*"))


def test_training_problems_of_countdown_hang_on_seed_and_size_alone():
    def draw(**options):
        return list(itertools.islice(draw_countdown(CountdownSpec(**options))["train"], 12))

    first = draw(num_train=12, size=3)
    assert first == draw(num_train=5000, size=3)
    assert questions_of(first) != questions_of(draw(num_train=12, size=3, seed=1))
    assert {len(problem.data[0]) for problem, _ in first} == {3}
    assert len({problem.id for problem, _ in first}) == 12
    assert set(draw_countdown(CountdownSpec(size=3))) == {"train"}
    assert set(draw_countdown(CountdownSpec(size=5))) == {"train", "test_inputs"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "size 7: accepted are 3, 4, 5, 6"),
        ({"seed": -1}, "seed"),
        ({"num_train": 0}, "num_train"),
    ],
)
def test_bad_sets_of_countdown_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CountdownSpec(**options)


# GSM8K


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A folder of two small files that pass for the official ones, by checksum and by URL."""
    folder = tmp_path / "official"
    folder.mkdir()
    checksums = {}
    for split in ("train", "test"):
        lines = [json.dumps({"question": q + split, "answer": a}) + "\n" for q, a in ROWS]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        content = (folder / f"{split}.jsonl").read_bytes()
        checksums[split] = gsm8k_dataset_builder.hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(gsm8k_dataset_builder, "CHECKSUMS", checksums)
    monkeypatch.setattr(gsm8k_dataset_builder, "URL", folder.as_uri())
    return folder


@pytest.mark.parametrize("by_hand", [True, False])
def test_gsm8k_from_official_files(tmp_path, official, by_hand):
    sources = build_gsm8k(tmp_path / "data", official if by_hand else None)
    assert sorted(sources) == ["test", "train"]
    elements = [sources["test"][i] for i in range(2)]
    assert [to_example(element)[0].question for element in elements] == [
        "How many?test",
        "Ünd nöw?test",
    ]
    assert [to_example(element)[1].answer for element in elements] == ["2", "1,000"]
    assert [read_text(element, "solution") for element in elements] == [a for _, a in ROWS]
    for file in official.iterdir():
        file.unlink()
    assert len(build_gsm8k(tmp_path / "data")["train"]) == 2  # nothing is read or fetched again


def test_a_file_that_is_not_the_official_one_is_refused(tmp_path, official):
    with (official / "test.jsonl").open("a") as file:
        file.write("\n")
    for manual_dir in (official, None):
        with pytest.raises(ValueError, match=r"test.jsonl is not the official file"):
            build_gsm8k(tmp_path / "data", manual_dir)
    (official / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"train.jsonl; manual_dir holds"):
        build_gsm8k(tmp_path / "data", official)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded .* manual_dir may name"):
        build_gsm8k(tmp_path / "other")
    assert not list(tmp_path.glob("data/gsm8k/1.0.0"))


def test_the_published_files_of_gsm8k(shared_data):
    path = shared_data / "gsm8k" / "test.jsonl"
    gsm8k_dataset_builder._check_content(path, "test")
    gsm8k_dataset_builder._check_content(path.with_name("train.jsonl"), "train")
    elements = list(gsm8k_dataset_builder.iterate_elements(path, "test"))
    assert [to_example(element) for element in elements] == gsm8k.load(path)
    assert elements[0]["solution"].endswith("#### 18")


# By name


def test_a_data_set_by_its_name(tmp_path, monkeypatch, capsys):
    arguments = ["arithmetic", str(tmp_path), "--num_train=9", "--num_validation=0", "--num_test=2"]
    building.main(arguments)
    assert capsys.readouterr().out.split("\n")[-3:] == [
        "arithmetic/test: 2 problems",
        "arithmetic/train: 9 problems",
        "",
    ]
    building.main([*arguments, f"--problems_dir={tmp_path}/files"])
    path = tmp_path / "files" / "arithmetic-test.jsonl"
    assert f"  written to {path}\n" in capsys.readouterr().out
    assert list(path.parent.iterdir()) == [path]
    spec = PuzzleSpec(arithmetic.TASK, num_train=9, num_validation=0, num_test=2)
    expected = list(generate_splits(spec)["test"])
    assert read_problems(path, arithmetic.TASK) == (expected, [])
    with pytest.raises(ValueError, match=r"no data set 'chess'; accepted: gsm8k, .*arithmetic"):
        build("chess", tmp_path)
    with pytest.raises(SystemExit):
        building.main(["arithmetic", str(tmp_path), "--num_train=-1"])
    assert "num_train must not be negative" in capsys.readouterr().err


PROGRAM = """
import sys
from rlm_jax.data.builders.build import build
sources = build("arithmetic", sys.argv[1], num_train=3, num_validation=1, num_test=1)
print(len(sources["train"]), sources["test"][0]["question"], "tensorflow" in sys.modules)
"""


def test_tensorflow_is_never_imported(root, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    *_, line = done.stdout.strip().split("\n")
    assert line.startswith("3 b'Compute ")
    assert line.endswith(" False")


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record"])
def test_without_its_packages_the_extra_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=r"pip install 'rlm_jax\[train\]'"):
        build_puzzles(SMALL, tmp_path)
