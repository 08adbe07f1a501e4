"""Configs: what overrides accept, what they refuse and in which words, and what makes an identity."""

import dataclasses
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Literal

import pytest

from llm_jax import config, experiment_file
from llm_jax.config import Tagged, UserError
from llm_jax.models.transformer import Transformer

ISOFLOP = pathlib.Path(__file__).parent.parent / "experiments" / "isoflop.py"


class Shape(Tagged):
    """A union."""


@dataclasses.dataclass(frozen=True)
class Square(Shape, kind="square"):
    side: int = 2
    colour: str = "red"
    filled: bool = False


@dataclasses.dataclass(frozen=True)
class Circle(Shape, kind="circle"):
    radius: float = 1.0
    colour: str = "blue"
    filled: bool = False


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)

    def validate(self):
        if self.rate < 0:
            raise UserError(f"rate {self.rate} is negative")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    shape: Shape = Square()
    shapes: tuple[Shape, ...] = ()
    limit: int | None = None
    mode: Literal["fast", "slow"] = "fast"
    on: bool = False
    pairs: tuple[tuple[int, int], ...] = ()
    folder: str = config.outside_identity("here")


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("inner.rate", "3e-3", 3e-3),
        ("inner.rate", "1", 1.0),
        ("inner.sizes", "(4, 5)", (4, 5)),
        ("inner.sizes", "4,5", (4, 5)),
        ("inner.sizes", "4,", (4,)),
        ("inner.sizes.1", "7", (1, 7)),
        ("pairs", "((1, 2), (3, 4))", ((1, 2), (3, 4))),
        ("pairs", "(1, 2), (3, 4)", ((1, 2), (3, 4))),
        ("pairs", "((1, 2),)", ((1, 2),)),
        ("limit", "1_000", 1000),
        ("limit", "none", None),
        ("mode", "slow", "slow"),
        ("on", "true", True),
        ("folder", "a=b", "a=b"),
        ("shape", "circle", Circle()),
        ("shape.side", "5", Square(side=5)),
    ],
)
def test_an_override_is_read_as_the_type_of_its_field(path, text, value):
    changed = config.override(Outer(), path, text)
    for part in path.split("."):
        if part.isdigit() or isinstance(changed, Shape):
            break
        changed = getattr(changed, part)
    assert changed == value
    assert type(changed) is type(value)


@pytest.mark.parametrize("path", ["shape", "shape.kind"])
def test_another_kind_keeps_fields_of_one_default_and_otherwise_has_its_own(path):
    outer = config.override(config.override(Outer(), "shape.colour", "green"), "shape.filled", "true")
    assert config.override(outer, path, "circle").shape == Circle(filled=True)  # a square's colour is its own
    assert config.override(outer, path, "square") == outer


def test_a_kind_belongs_to_one_member():
    with pytest.raises(TypeError, match="has a member 'square' already"):

        class Other(Shape, kind="square"):
            pass


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("iner.rate", "1", "no field 'iner' in Outer; did you mean 'inner'?"),
        ("inner.rat", "1", "no field 'rat' in Inner; did you mean 'rate'?"),
        ("limit", "1.5", "config.limit: '1.5' is not an integer or none"),
        ("inner.rate", "fast", "config.inner.rate: 'fast' is not a number"),
        ("on", "yes", "config.on: 'yes' is not true or false"),
        ("mode", "fastest", "config.mode: 'fastest' is not one of fast, slow"),
        ("inner.sizes", "a,b", "config.inner.sizes: 'a' is not an integer"),
        ("inner.sizes.2", "1", "'2' is no index into a tuple of 2"),
        ("shape", "sqare", "no shape 'sqare'; did you mean 'square'?"),
        ("shape.kind", "cube", "no shape 'cube'"),
        ("limit.x", "1", "limit is None and has no fields"),
    ],
)
def test_a_bad_override_is_one_line_that_names_what_is_wrong(path, text, words):
    with pytest.raises(UserError) as error:
        config.override(Outer(), path, text)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "outer", [Outer(), Outer(Inner(0.1, (3,)), Circle(2.0), (Square(), Circle()), 5, "slow")]
)
def test_json_and_back_is_the_same_config(outer):
    assert config.from_json(Outer, config.to_json(outer)) == outer


def test_json_with_an_unknown_field_is_refused():
    with pytest.raises(UserError, match="no field 'sied' in Square; did you mean 'side'"):
        config.from_json(Outer, {"shape": {"kind": "square", "sied": 3}})


def test_check_finds_wrong_types_and_broken_rules_inside():
    config.check(Outer())
    with pytest.raises(UserError, match=r"config\.inner\.rate: 'x' is not a number"):
        config.check(Outer(Inner(rate="x")))
    with pytest.raises(UserError, match="is negative"):
        config.check(Outer(Inner(rate=-1.0)))


def test_identity_depends_on_what_differs_from_defaults_only():
    same = config.identity(Outer(), 1)
    assert config.identity(Outer(folder="there"), 1) == same
    assert config.identity(Outer(inner=Inner(rate=1e-3)), 1) == same
    assert config.identity(Outer(), 2) != same
    different = [Outer(limit=1), Outer(shape=Circle()), Outer(inner=Inner(rate=1)), Outer(shapes=(Square(),))]
    assert len({config.identity(outer, 1) for outer in [Outer(), *different]}) == 5


def test_an_integer_and_the_equal_float_have_one_identity():
    assert config.identity(Outer(Inner(rate=1)), 1) == config.identity(Outer(Inner(rate=1.0)), 1)


def test_a_new_field_with_a_default_keeps_old_identities():
    @dataclasses.dataclass(frozen=True)
    class Old:
        a: int = 1

    @dataclasses.dataclass(frozen=True)
    class New:
        a: int = 1
        b: Shape = Square()

    assert config.identity(Old(3), 1) == config.identity(New(3), 1)
    assert config.identity(New(3), 1) != config.identity(New(3, Circle()), 1)


def test_content_enters_the_identity_by_fingerprint():
    @dataclasses.dataclass(frozen=True)
    class File:
        path: str = config.outside_identity("x")
        content: str = config.outside_identity("1")

        def fingerprint(self):
            return {"content": self.content}

    assert config.identity(File("x"), 1) == config.identity(File("moved"), 1)
    assert config.identity(File(content="1"), 1) != config.identity(File(content="2"), 1)
    assert config.identity(File(content="1"), 1, content=False) == config.identity(
        File(content="2"), 1, content=False
    )


EXPERIMENT = """
import dataclasses
SCALES = {"small": 1, "large": 2}

@dataclasses.dataclass(frozen=True)
class Config:
    layers: int = 4

def get_config(scale):
    return Config(SCALES[scale])
"""
COMMAND = """
from llm_jax.command_line import chosen, define_config, run_main
define_config()
run_main(lambda: print(chosen().config))
"""


def ask(*arguments):
    done = subprocess.run([sys.executable, "-c", COMMAND, *arguments], capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_every_field_is_listed_as_it_is_typed():
    outer = Outer(Inner(0.1, (3,)), Circle(2.0), (Square(), Circle()), None, "slow", True, ((1, 2),), "a b")
    rows = dict(config.listing(outer))
    assert rows["--config.shape=circle"] == "one of square, circle"
    assert rows["--config.shape.radius=2.0"] == "a number"
    assert rows["--config.limit=none"] == "an integer or none"
    assert rows["--config.inner.sizes='(3,)'"].startswith("a tuple")
    assert "--config.shapes.1.colour=blue" in rows
    typed = Outer(shapes=(Square(side=7), Circle(7.0)))
    for flag in rows:
        path, _, text = shlex.split(flag)[0].removeprefix("--config.").partition("=")
        typed = config.override(typed, path, text)
    assert typed == outer


@pytest.mark.parametrize("module", ["llm_jax.train", "launch.local"])
def test_help_exits_0_with_the_flags_and_where_all_fields_are_listed(command, module):
    code, out, err = command(module, "--help")
    assert (code, err) == (0, "")
    assert "--config: " in out and "--folder: " in out
    assert "--config.help lists all fields" in " ".join(out.split())
    code, out, err = command(module, f"--config={ISOFLOP}", "--config.model.help")
    assert (code, err) == (0, "")
    listed = {row.split("=")[0].removeprefix("--config.model.").split(".")[0] for row in out.splitlines()}
    assert listed >= {field.name for field in dataclasses.fields(Transformer)}


def test_help_lists_fields_and_kinds_after_the_overrides(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    code, out, err = ask(f"--config={file}", "--config.layers=7", "--config.help")
    assert (code, out, err) == (0, "--config.layers=7  an integer", "")
    code, out, err = ask(f"--config={file}", "--config.layer.help")
    assert (code, out, err) == (2, "", "error: no field 'layer'; did you mean 'layers'?")


POSTPONED = """
from __future__ import annotations
import dataclasses
SCALES = {"only": 1}

@dataclasses.dataclass(frozen=True)
class Config:
    size: Size

@dataclasses.dataclass(frozen=True)
class Size:
    WORD: float = 1.0

def get_config(scale):
    return Config(Size())
"""


def test_two_experiment_files_of_one_name_keep_their_own_types(tmp_path):
    """Types that a file postpones are looked up in the module that its classes name."""
    for word in ("width", "depth"):
        (tmp_path / word).mkdir()
        text = POSTPONED.replace("WORD", word)
        (tmp_path / word / "json.py").write_text(text)
    loaded = {
        word: experiment_file.load_experiment(str(tmp_path / word / "json.py")) for word in ("width", "depth")
    }
    for word, (module, scale) in loaded.items():
        base = module.get_config(scale)
        config.check(base)
        changed = config.override(base, f"size.{word}", "3")
        assert getattr(changed.size, word) == 3.0
        assert config.from_json(module.Config, config.to_json(changed)) == changed
    assert sys.modules["json"].__name__ == "json"


def test_the_command_line_picks_a_file_a_scale_and_fields(tmp_path):
    file = tmp_path / "experiment.py"
    file.write_text(EXPERIMENT)
    assert ask(f"--config={file}") == (0, "Config(layers=1)", "")
    assert ask(f"--config={file}:large") == (0, "Config(layers=2)", "")
    assert ask(f"--config={file}", "--config.layers=7") == (0, "Config(layers=7)", "")
    assert ask(f"--config={file}", "--config.layers", "7") == (0, "Config(layers=7)", "")
    assert ask(f"--config={file}", "--config.layers", "-7") == (0, "Config(layers=-7)", "")


@pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_is_told_in_a_line_though_python_names_no_file():
    code = """
from llm_jax.command_line import run_main
def main():
    with open("/dev/full", "w") as full:
        full.write("text")
run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: a file: No space left on device\n")


def test_a_command_has_no_flags_but_its_own_and_help_tells_them_all(command):
    for wrong in ("--config=isoflop.py", "--config.seed=1"):
        name = wrong.partition("=")[0]
        code, _, line = command("launch.stop", "--folder=runs", wrong)
        assert (code, line) == (2, f"error: no flag {name}; there are: --folder\n")
    told = command("llm_jax.generate", "--help")[1]
    assert {"model", "temperature", "prompt"} <= set(re.findall(r"--(?:\[no\])?(\w+)", told))
    assert "orbax" not in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config is missing"),
        (["--config=FOLDER/experimant.py"], "FOLDER/experimant.py'; did you mean 'FOLDER/experiment.py'?"),
        (
            ["--config=FOLDER"],
            "no experiment file 'FOLDER'; did you mean 'FOLDER/",
        ),
        (["--config=FOLDER/notes.md"], "no experiment file 'FOLDER/notes.md'; "),
        (["--config=nowhere/experiment.py"], "'nowhere/experiment.py'; name one such as"),
        (["--config=FOLDER/empty.py"], "empty.py: SCALES is empty"),
        (["--config=FOLDER/nothing.py"], "nothing.py: get_config('only') returned None, not a config"),
        (["--config=FOLDER/syntax.py"], "syntax.py, line 2: "),
        (
            ["--config=FOLDER/imports.py"],
            "imports.py, line 3: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (["--config=FILE:lage"], "no scale 'lage'; did you mean 'large'?"),
        (["--config=FILE", "--config.layer=3"], "no field 'layer' in Config; did you mean 'layers'?"),
        (["--config=FILE", "--config.layers=x"], "config.layers: 'x' is not an integer"),
        (["--config=FILE", "--config.layers"], "--config.layers needs a value"),
        (
            ["--config=FILE", "--config.layers", "--v=0"],
            "--config.layers needs a value: --config.layers=VALUE",
        ),
        (["--config=FILE", "--confg=3"], "no flag --confg; did you mean '--config'?"),
        (["--config=FILE", "stray"], "unexpected argument 'stray'"),
        (["--config=BROKEN"], "an experiment file defines SCALES"),
    ],
)
def test_a_bad_command_line_is_one_line_and_exit_code_2(tmp_path, arguments, words):
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    (tmp_path / "broken.py").write_text("")
    (tmp_path / "notes.md").write_text("Not Python.")
    (tmp_path / "empty.py").write_text("SCALES = {}\ndef get_config(scale): ...\n")
    (tmp_path / "nothing.py").write_text("SCALES = {'only': 1}\ndef get_config(scale): ...\n")
    (tmp_path / "syntax.py").write_text("SCALES = {}\ndef get_config(scale:\n")
    (tmp_path / "imports.py").write_text("SCALES = {}\n\nimport nowhere\n")
    places = {"FILE": tmp_path / "experiment.py", "FOLDER": tmp_path, "BROKEN": tmp_path / "broken.py"}
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
        words = words.replace(name, str(place))
    code, out, err = ask(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 0
