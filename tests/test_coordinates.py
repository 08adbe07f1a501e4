"""The coordinate check: what a few steps move doesn't depend on the width where rates transfer."""

import dataclasses

import pytest

from llm_jax.config import UserError
from llm_jax.coordinates import growth, movements
from llm_jax.data import Files, Text
from llm_jax.models import Layout
from llm_jax.models.parametrization import CompleteP, MuP, PerLayer, Standard
from llm_jax.models.transformer import Transformer
from llm_jax.optimizers import AdamW
from llm_jax.run import Execution, Run

WIDTHS, HEAD = (32, 256), 16


@pytest.fixture(scope="module")
def moved(corpus):
    """By what power of the width (or, at 1 and 4 layers, of the depth) each activation's movement grows."""
    data = Text(corpus=Files((corpus,)), sequence_length=16, batch_size=8)

    def run(parametrization, width=16, layers=1):
        fields = {
            "layers": layers,
            "width": width,
            "heads": width // HEAD,
            "tied": False,
            "activation": "gelu",
        }
        execution = Execution(layout=Layout(unroll=False))  # compiles faster
        return Run(
            Transformer(**fields, parametrization=parametrization), data, AdamW(1e-2), execution=execution
        )

    def over_width(parametrization):
        return growth(WIDTHS, [movements(run(parametrization, width), steps=6) for width in WIDTHS])

    def over_depth(parametrization):
        return growth((1, 4), [movements(run(parametrization, layers=n), steps=6) for n in (1, 4)])

    return run, over_width, over_depth


def test_in_the_standard_parametrisation_movements_grow_with_the_width(moved):
    _, over_width, _ = moved
    found = over_width(Standard())
    assert min(found[name] for name in ("mixer", "mlp", "stream")) > 0.8, found


@pytest.mark.parametrize("parametrization", [MuP(32, HEAD), PerLayer(32)], ids=lambda p: p.kind)
def test_in_the_others_they_neither_grow_nor_shrink_with_the_width(moved, parametrization):
    _, over_width, _ = moved
    found = over_width(parametrization)
    assert max(map(abs, found.values())) < 0.3, found
    assert abs(found["stream"]) < 0.2 and abs(found["embedding"]) < 0.1, found


def test_only_completep_s_streams_move_by_as_much_at_every_depth(moved):
    _, _, over_depth = moved
    assert over_depth(MuP(16, HEAD))["stream"] > 0.4
    assert abs(over_depth(CompleteP(16, HEAD, 1))["stream"]) < 0.15


def test_a_model_that_hides_its_activations_is_refused(moved, monkeypatch):
    run, _, _ = moved
    build = Transformer.build
    monkeypatch.setattr(
        Transformer,
        "build",
        lambda self, *layout: dataclasses.replace(build(self, *layout), activations=None),
    )
    with pytest.raises(UserError, match="doesn't show its activations"):
        movements(run(Standard()), steps=1)
