"""Where a step's time goes, by a trace of a real step, and by events whose sums are known."""

import collections
import dataclasses
import pathlib
import re

import pytest

from llm_jax import config, experiment_file, profiling
from llm_jax.config import UserError
from llm_jax.train import train

BITS = pathlib.Path(__file__).parent / "launch" / "bits.py"

Event = collections.namedtuple("Event", "start_ns duration_ns stats")


def test_a_traced_run_says_which_operations_its_steps_spent_their_time_on(tmp_path, capsys):
    run = experiment_file.load_experiment(str(BITS))[0].get_config("small")
    run = config.replace(dataclasses.replace(run, tokens=16 * 12), "execution.profile_steps", "10:12")
    train(run, tmp_path)
    text = (tmp_path / "profile" / "summary.txt").read_text()
    assert text in capsys.readouterr().out
    assert text.startswith("2 steps, ")
    assert re.search(r"^ *[\d.]+% +[\d.]+  (forward|backward) ", text, re.MULTILINE)


def test_an_operation_counts_without_those_that_it_contains():
    events = [Event(0, 100, {"hlo_op": "while.1"}), Event(10, 30, {"hlo_op": "dot.2"})]
    events += [Event(50, 20, {"hlo_op": "dot.2"}), Event(200, 50, {"hlo_op": "add.3"}), Event(0, 999, {})]
    hlo = 'dot.2 = f32[] dot(x), metadata={op_name="jit(step)/transpose(jvp(x))/while/body/dot_general"}'
    plane = collections.namedtuple("Plane", "lines")([collections.namedtuple("Line", "events")(events)])
    rows = profiling.table([plane], profiling.names(hlo), steps=1, seconds=1.0).splitlines()[2:]
    assert sorted(row.split() for row in rows[:3]) == [
        ["33.3%", "0.000", "backward", "dot_general"],
        ["33.3%", "0.000", "rest", "add"],
        ["33.3%", "0.000", "rest", "while"],
    ]


@pytest.mark.parametrize("text", ["15:10", "10", "a:b"])
def test_a_span_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="FROM:TO, the steps to trace, such as 10:15"):
        profiling.span(text)
