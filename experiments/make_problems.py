"""Writes problems of a task to a file that solve.py and evaluate.py read (--problems).

    python experiments/make_problems.py --task=sat --num_problems=200 --out=sat.jsonl
    python experiments/solve.py --config=configs/smollm2.py --config.task=sat --problems=sat.jsonl

Tasks that generate problems take --difficulty, from 0 to 1, and --seed. Of the reasoning-gym
package any data set will do, as --task=reasoning_gym:leg_counting, with the package's own settings
(pip install 'rlm_jax[reasoning_gym]'); programs know its problems by --config.task=reasoning_gym.
Answers are written for the grading of finished searches and are seen by nothing else. Test sets
that training data does not meet: `python -m rlm_jax.data.builders.build --help`.
"""

import pathlib

import launching
from absl import flags

from rlm_jax.data.builders.build import find_generating_tasks
from rlm_jax.data.problems import write_problems
from rlm_jax.tasks import reasoning_gym
from rlm_jax.tasks.base import Example

_TASK = flags.DEFINE_string("task", None, "A task that generates, or reasoning_gym:DATA_SET.")
_NUM_PROBLEMS = flags.DEFINE_integer("num_problems", 100, "How many.", lower_bound=1)
_DIFFICULTY = flags.DEFINE_float("difficulty", None, "From 0, the default, to 1.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the problems.", lower_bound=0)
_OUT = flags.DEFINE_string("out", None, "The file to write (.jsonl).")


def main() -> None:
    """Checks the flags, makes the problems, says where they are."""
    if not _TASK.value or not _OUT.value:
        raise ValueError(f"--{'out' if _TASK.value else 'task'} is missing")
    path = pathlib.Path(_OUT.value)
    if path.is_dir():
        raise ValueError(f"--out={path} is a folder; accepted is a file (.jsonl)")
    examples = _make_examples(_TASK.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = write_problems(path, examples)
    print(f"{count} problems: {path}")


def _make_examples(name: str) -> list[Example]:
    package, _, data_set = name.partition(":")
    if package == reasoning_gym.TASK.name and data_set:
        if _DIFFICULTY.value is not None:
            raise ValueError("--difficulty: data sets of reasoning-gym have settings of their own")
        return reasoning_gym.make_examples(data_set, _SEED.value, _NUM_PROBLEMS.value)
    tasks = find_generating_tasks()
    if name not in tasks:
        accepted = f"{', '.join(tasks)} and {reasoning_gym.TASK.name}:DATA_SET"
        raise ValueError(f"--task={name}: accepted are {accepted}")
    generate = tasks[name].generate
    assert generate is not None
    return generate(_SEED.value, _NUM_PROBLEMS.value, _DIFFICULTY.value or 0.0)


if __name__ == "__main__":
    launching.launch(main, "stopped; nothing was written")
