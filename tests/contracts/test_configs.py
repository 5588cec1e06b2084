"""Every file of configs/, found by looking: what it must say, and that its :smoke variant works."""

import importlib.util
import pathlib
import re
import shlex

import pytest
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def load(path):
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=CONFIGS, ids=lambda path: path.stem)
def path(request):
    """Each config file in turn."""
    return request.param


@pytest.fixture
def module(path):
    """The config file, imported."""
    return load(path)


def test_there_are_configs():
    assert CONFIGS


def test_it_resolves_in_full_and_small(module):
    full, smoke = module.get_config(), module.get_config("smoke")
    assert isinstance(full, ConfigDict)
    assert isinstance(smoke, ConfigDict)
    assert full.to_dict() == module.get_config("").to_dict() != smoke.to_dict()
    # The small one is the same program on something small, not another program.
    assert names(full) == names(smoke)
    assert smoke.model.startswith("random:")


def names(config):
    """Dotted names of all fields."""
    found = set()
    for name, value in config.items():
        below = names(value) if isinstance(value, ConfigDict) else []
        found |= {name} | {f"{name}.{field}" for field in below}
    return found


def test_each_call_gives_a_config_of_its_own(module):
    one, other = module.get_config(), module.get_config()
    one.model = "changed"
    assert other.model != "changed"


@pytest.mark.parametrize("variant", ["Smoke", "smoke,smoke", "full", " "])
def test_an_unknown_variant_is_refused_by_name(module, path, variant):
    message = rf"{re.escape(f'configs/{path.name}:{variant}')}: accepted (is|are) .*smoke"
    with pytest.raises(ValueError, match=message):
        module.get_config(variant)


def test_its_docstring_says_how_where_and_what(module, path):
    doc = module.__doc__
    for heading in ("Command:", "Hardware:", "Expected:"):
        assert re.search(rf"(?m)^{heading}\s+\S", doc), f"{path}: no {heading}"
    assert re.search(r"(?m)^Expected:.*\d", doc), f"{path}: expects no number"
    assert f"configs/{path.name}:smoke" in doc
    program, flags = documented_command(module)
    assert (ROOT / "experiments" / program).is_file()
    assert f"--config=configs/{path.name}" in flags


def documented_command(module):
    """The program and the flags of the docstring's command, continued lines joined."""
    found = re.search(r"(?m)^Command:\s+(.*(?:\\\n.*)*)$", module.__doc__)
    python, program, *flags = shlex.split(found[1])
    assert python == "python"
    return program.removeprefix("experiments/"), flags


def test_its_command_runs_small(module, path, tmp_path):
    """The documented command on the :smoke variant: for solve.py, a question from end to end."""
    program, flags = documented_command(module)
    if program == "train.py":
        pytest.skip("tests/experiments/test_train.py trains with it, stops and goes on")
    own = f"--config=configs/{path.name}"
    flags = [f"{own}:smoke" if flag == own else flag for flag in flags]
    running = load(ROOT / "tests/experiments/running.py")
    done = running.run_program(program, *flags, f"--out={tmp_path / 'out'}")
    assert (done.status, done.err) == (0, "")
    assert done.out.strip()
    assert any((tmp_path / "out").iterdir())
