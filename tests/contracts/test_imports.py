"""The house rules, read off the source: who imports whom, what is never used, how long files are.

`find_offences` is the checker; it is itself checked on sources that break each rule.
"""

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

RANKS = {
    "core": 0,
    "tasks": 1,
    "text": 1,
    "data": 2,
    "models": 3,
    "inference": 4,
    "reasoning": 5,
    "learning": 6,
    "evaluation": 7,
    "agents": 7,
    "serving": 7,
    "viz": 7,
    "configs": 8,
    "experiments": 9,
}
PROGRAMS = {"configs", "experiments"}
PROGRAMS_ONLY = {"absl", "ml_collections"}
NEVER = {"torch", "transformers", "llama_cpp", "tensorflow", "pickle"}
# The other sides of benchmarks: processes of their own, for a Python that has none of ours.
OURS = {"rlm_jax", "jax", "configs"}
OTHER_SIDES = {
    "experiments/side_process.py": set(),
    "experiments/host_tree.py": set(),
    "experiments/bench_transformers.py": {"torch", "transformers"},
    "experiments/bench_host_search.py": {"torch"},
    "experiments/host_model.py": {"torch", "transformers"},
    "experiments/bench_llama.py": {"llama_cpp"},
}
EXTRAS = {"tokenizers", "gguf", "sentencepiece", "huggingface_hub"}
DEPRECATED = {"pjit", "pmap"}
KNOWS_LANGUAGE = "rlm_jax/reasoning/language"  # and what its name begins with
MAX_LINES = 500


def find_offences(path: str, source: str) -> list[str]:
    """What a source file, at a path relative to the repository, does against the house rules."""
    tree = ast.parse(source, path)
    room = _room_of(path)
    offences = []
    for line, module in _iterate_imports(path, tree):
        offences += [f"{path}:{line} {why}" for why in _judge_import(path, room, module)]
    offences += [f"{path}:{line} uses {name}" for line, name in _iterate_deprecated(tree)]
    if path.endswith("/utils.py"):
        offences.append(f"{path} is a utils.py")
    if source.count("\n") >= MAX_LINES:
        offences.append(f"{path} has {source.count(chr(10))} lines, not under {MAX_LINES}")
    return offences


def _judge_import(path: str, room: str, module: str) -> Iterator[str]:
    package = module.split(".")[0]
    if package in NEVER - OTHER_SIDES.get(path, set()):
        yield f"imports {package}, which nothing here may"
    if package in OURS and path in OTHER_SIDES:
        yield f"imports {package}, which the other sides have not"
    if package in PROGRAMS_ONLY and room not in PROGRAMS:
        yield f"imports {package}, which is for experiments and configs"
    other = _room_of(module.replace(".", "/"))
    if not other or other == room:
        return
    if other not in RANKS or room not in RANKS:
        yield f"{room or path} imports {other}: one of them is no room"
    elif RANKS[other] >= RANKS[room]:
        yield f"{room} imports {other}, which is not below it"
    elif room == "reasoning" and other != "core" and not path.startswith(KNOWS_LANGUAGE):
        yield f"reasoning imports {other}; only {KNOWS_LANGUAGE}*.py may"


def _room_of(path: str) -> str:
    """The room of a path or dotted-to-slashed module; empty for what is none of ours."""
    first, *rest = path.split("/")
    if first == "rlm_jax":
        own = not rest or rest[0].startswith("__")
        return "" if own else rest[0].removesuffix(".py")
    return first if first in PROGRAMS else ""


def _iterate_imports(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, wherever in the file and however."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = [*base, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*parts, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            literal = node.args[0]
            if name in ("import_module", "__import__") and isinstance(literal, ast.Constant):
                yield node.lineno, str(literal.value)


def _iterate_deprecated(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.With):
            for item in node.items:
                context = item.context_expr
                name = getattr(context, "attr", getattr(context, "id", ""))
                if name == "mesh" or name.endswith("_mesh"):
                    yield node.lineno, "`with mesh:`"
        names = [getattr(node, "attr", ""), getattr(node, "id", "")]
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [part for alias in node.names for part in alias.name.split(".")]
            names += (getattr(node, "module", "") or "").split(".")
        line = getattr(node, "lineno", 0)
        yield from ((line, name) for name in names if name in DEPRECATED)


def _source_files(root: pathlib.Path) -> list[pathlib.Path]:
    folders = ("rlm_jax", "experiments", "configs")
    return sorted(file for folder in folders for file in (root / folder).rglob("*.py"))


def test_the_house_rules_hold(root):
    files = _source_files(root)
    assert len(files) > 10
    offences = []
    for file in files:
        path = file.relative_to(root).as_posix()
        offences += find_offences(path, file.read_text(encoding="utf-8"))
    assert not offences, "\n".join(offences)


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("rlm_jax/core/a.py", "import rlm_jax.models", "core imports models"),
        ("rlm_jax/core/a.py", "from rlm_jax import text", "core imports text"),
        ("rlm_jax/core/a.py", "from ..data.records import x", "core imports data"),
        ("rlm_jax/core/a.py", "def f():\n  from rlm_jax.viz.text import x", ":2 core imports viz"),
        ("rlm_jax/text/a.py", "import rlm_jax.tasks.base", "text imports tasks"),
        ("rlm_jax/viz/a.py", "from rlm_jax.evaluation import x", "viz imports evaluation"),
        ("rlm_jax/agents/a.py", "from rlm_jax.serving import x", "agents imports serving"),
        ("rlm_jax/viz/a.py", "import experiments.solve", "viz imports experiments"),
        ("rlm_jax/viz/a.py", "import rlm_jax.attic.b", "no room"),
        ("rlm_jax/attic/a.py", "import rlm_jax.core.b", "no room"),
        ("rlm_jax/__init__.py", "from rlm_jax.core import mesh", "no room"),
        ("rlm_jax/reasoning/drive.py", "import rlm_jax.models.x", "only rlm_jax/reasoning/lang"),
        (
            "rlm_jax/reasoning/strategies/a.py",
            "from rlm_jax import tasks",
            "reasoning imports tasks",
        ),
        ("rlm_jax/reasoning/language.py", "import rlm_jax.viz.text", "not below it"),
        ("rlm_jax/models/a.py", "import absl.flags", "imports absl"),
        ("rlm_jax/models/a.py", "from ml_collections import config_dict", "imports ml_coll"),
        ("experiments/a.py", "import torch.nn", "imports torch"),
        ("configs/a.py", "from transformers import x", "imports transformers"),
        ("experiments/bench_host.py", "import llama_cpp", "imports llama_cpp"),
        ("experiments/bench_llama.py", "import torch", "imports torch"),
        ("experiments/host_tree.py", "import jax.numpy", "other sides have not"),
        ("experiments/host_model.py", "from rlm_jax.text import x", "other sides have not"),
        ("rlm_jax/data/a.py", "import tensorflow as tf", "imports tensorflow"),
        ("rlm_jax/data/a.py", "import pickle", "imports pickle"),
        ("rlm_jax/data/a.py", "importlib.import_module('torch')", "imports torch"),
        ("rlm_jax/data/a.py", "__import__('pickle')", "imports pickle"),
        ("rlm_jax/core/a.py", "from jax.experimental.pjit import pjit", "uses pjit"),
        ("rlm_jax/core/a.py", "f = jax.pmap(g)", "uses pmap"),
        ("rlm_jax/core/a.py", "with mesh:\n  pass", "uses `with mesh:`"),
        ("rlm_jax/core/a.py", "with self.mesh as m:\n  pass", "uses `with mesh:`"),
        ("rlm_jax/core/utils.py", "", "is a utils.py"),
        ("rlm_jax/core/a.py", "x = 1\n" * 500, "has 500 lines"),
    ],
)
def test_the_checker_finds(path, source, offence):
    (found,) = set(find_offences(path, source))
    assert offence in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rlm_jax/viz/a.py", "from rlm_jax.data import records\nfrom rlm_jax.viz import text"),
        ("rlm_jax/reasoning/a.py", "from rlm_jax.core import mesh\nfrom . import structure"),
        ("rlm_jax/reasoning/language.py", "from rlm_jax.inference import decode"),
        (
            "experiments/a.py",
            "from absl import app\nfrom rlm_jax.viz import text\nimport configs.b",
        ),
        ("rlm_jax/core/a.py", '"""pjit is jax.jit today; never `with mesh:`."""\nimport jax'),
        ("rlm_jax/core/a.py", "with jax.set_mesh(mesh):\n  jax.vmap(f)"),
        ("rlm_jax/core/a.py", "x = 1\n" * 499),
        ("experiments/bench_llama.py", "import llama_cpp\nfrom side_process import serve"),
        ("rlm_jax/__init__.py", "__version__ = '0'"),
        ("experiments/a.py", "import rlm_jax\nfrom rlm_jax import __version__"),
    ],
)
def test_the_checker_lets_be(path, source):
    assert find_offences(path, source) == []


def test_every_module_imports_without_the_extras(root):
    """In a process of its own, where importing an extra (or a banned package) fails."""
    files = [f for f in _source_files(root) if f.is_relative_to(root / "rlm_jax")]
    parts = [f.relative_to(root).with_suffix("").parts for f in files]
    modules = [".".join(p).removesuffix(".__init__") for p in parts]
    program = (
        "import importlib, sys\n"
        f"blocked = {sorted(EXTRAS | NEVER - {'pickle'})}\n"
        "sys.modules.update(dict.fromkeys(blocked))\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print([name for name in blocked if sys.modules[name] is not None])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_importing_the_package_alone_imports_no_jax(root):
    program = "import rlm_jax, sys; print(rlm_jax.__version__, 'jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split()[1] == "False", done.stderr
