"""Every experiment file: its scales are valid, and what it asks for is pinned, so that no result is orphaned.

If a change here is meant, write the golden files anew: UPDATE_GOLDEN=1 pytest tests/test_experiments.py. If a
default has changed, raise llm_jax/run.py's SCHEMA too, or old results count for the new meaning.
"""

import dataclasses
import json
import os
import pathlib

import pytest

from llm_jax import config, experiment_file

ROOT = pathlib.Path(__file__).parent.parent

EXPERIMENTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.fixture(params=EXPERIMENTS, ids=lambda path: path.stem)
def experiment(request):
    return experiment_file.load_experiment(str(request.param))[0]


def test_every_scale_is_a_valid_run_that_json_keeps(experiment):
    assert "smoke" in experiment.SCALES
    for scale in experiment.SCALES:
        run = experiment.get_config(scale)
        config.check(run)
        assert config.from_json(type(run), json.loads(json.dumps(config.to_json(run)))) == run


def test_what_every_experiment_asks_for_is_pinned(experiment):
    base = experiment.get_config("smoke")
    runs = [base, *(experiment.sweep(base) if hasattr(experiment, "sweep") else [])]
    runs += experiment.holdout(base) if hasattr(experiment, "holdout") else []
    asked = {run.identity(content=False): config.scientific(run, content=False) for run in runs}
    # Identities leave defaults out: one that changes shows here or below, and must raise run.SCHEMA.
    whole = config.to_json(base)
    asked["defaults"] = {
        name: whole[name] for name in config.values.hints(type(base)) if _decides(base, name)
    }
    _check_pinned(pathlib.Path(experiment.__file__).stem, asked)


def test_the_defaults_of_every_kind_are_pinned():
    """The fields that a run's identity leaves out where they stand at their defaults."""
    ours = {cls for cls in config.Tagged.__subclasses__() if cls.__module__.startswith("llm_jax.")}
    roots = {cls for cls in ours if cls.__name__ != "Task"}  # which no run has
    asked = {}
    for root in sorted(roots, key=lambda root: root.__name__):
        kinds = {kind: cls for kind, cls in root.members.items() if cls.__module__.startswith("llm_jax.")}
        fields = {kind: dataclasses.fields(cls) for kind, cls in sorted(kinds.items())}
        asked[root.__name__] = {
            kind: {
                field.name: config.to_json(config._default(field))
                for field in each
                if field.metadata.get("identity", True) and not _needed(field)
            }
            for kind, each in fields.items()
        }
    assert asked["Optimizer"]["muon"]["momentum"] == 0.95 and len(asked) >= 8
    _check_pinned("defaults", asked)


def _needed(field):
    """Whether the field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _check_pinned(name, asked):
    """That the golden file of this name says the same, or is written to say so."""
    path, asked = ROOT / "tests" / "golden" / f"{name}.json", json.loads(json.dumps(asked))
    if os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(asked, indent=1, sort_keys=True) + "\n")
    assert json.loads(path.read_text()) == asked


def _decides(run, name):
    """Whether the field decides the result."""
    field = next(field for field in dataclasses.fields(run) if field.name == name)
    return field.metadata.get("identity", True)


def test_the_docstring_asks_the_question_and_gives_the_command(experiment):
    first = experiment.__doc__.splitlines()[0]
    assert first.endswith("?")
    assert f"experiments/{pathlib.Path(experiment.__file__).stem}.py:smoke" in experiment.__doc__
