"""The ladder of a sweep: one model at every size."""

import dataclasses

import pytest

from llm_jax import config, transfer
from llm_jax.ladder import candidates, model_of, rate, shapes
from llm_jax.run import Run, Sweep


@dataclasses.dataclass(frozen=True)
class Sized(Sweep, kind="test_ladder"):
    rate_exponent: float = -0.7
    horizon_exponent: float = 0.0


BASE = Run(sweep=Sized())


def test_every_width_has_a_valid_model_with_heads_of_16_or_wider():
    for width in range(8, 2049, 8):
        rung = model_of(BASE, width, layers=3)
        config.check(rung)
        assert rung.size_of_head * rung.heads == width and rung.layers == 3
        assert rung.size_of_head >= min(16, width)
        assert rung.size_of_head == 16 or width < 16 or width % 16


def test_candidates_grow_with_the_width_and_count_what_their_models_have():
    rows = candidates(BASE, shapes((16, 32, 64), 2))
    assert rows["N"].is_monotonic_increasing
    assert (rows["flops_per_token"] == 6 * rows["N"]).all()
    # 12 width^2 a layer (gated, rounded up) and the logits of 257 tokens.
    assert rows["N"].tolist() == pytest.approx(
        [2 * (4 * w * w + 3 * w * (-(-8 * w // 96) * 32)) + 257 * w for w in (16, 32, 64)]
    )


def test_rates_follow_the_width_and_where_asked_the_tokens():
    longer = dataclasses.replace(BASE, sweep=Sized(horizon_exponent=0.32))
    first = BASE.optimizer.learning_rate
    assert rate(BASE, 64, 4 * BASE.tokens) == pytest.approx(first)
    assert rate(BASE, 128, BASE.tokens) == pytest.approx(first * 2**-0.7)
    told = transfer.to_horizon(BASE.optimizer, 4 * BASE.tokens, BASE.tokens).learning_rate
    assert rate(longer, 64, 4 * BASE.tokens) == pytest.approx(told)
