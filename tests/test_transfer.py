"""Rules for other horizons and batches, against the numbers of their papers."""

import pytest

from llm_jax.config import UserError
from llm_jax.optimizers import SGD, AdamW, Lion, Muon
from llm_jax.transfer import beta_of_half_life, half_life_tokens, to_batch, to_horizon


def test_the_rate_falls_with_the_horizon_as_published():
    muon = to_horizon(Muon(0.02, adam_learning_rate=3e-3), 8e9, 1e9)
    assert muon.learning_rate == pytest.approx(0.02 * 8**-0.32)
    assert muon.adam_learning_rate == pytest.approx(3e-3 * 8**-0.32)
    assert to_horizon(AdamW(), 5e9, 5e9) == AdamW()
    there = to_horizon(AdamW(1e-3), 4e9, 1e9, exponent=0.5)
    assert there.learning_rate == pytest.approx(5e-4)
    assert to_horizon(there, 1e9, 4e9, exponent=0.5).learning_rate == pytest.approx(1e-3)


def test_beta2_forgets_after_as_many_tokens_at_every_batch():
    one = to_batch(AdamW(beta2=0.95), 1024, 512 * 1024)
    assert round(one.beta2, 4) == 0.9999  # Marek et al. 2025: 0.95 at 512 sequences is 0.9999 at one
    assert half_life_tokens(one.beta2, 1024) == pytest.approx(half_life_tokens(0.95, 512 * 1024))
    assert beta_of_half_life(half_life_tokens(0.97, 4096), 4096) == pytest.approx(0.97)
    assert beta_of_half_life(1e6, 1e6) == 0.5


def test_the_rate_grows_as_the_root_of_the_batch_and_for_sgd_as_the_batch():
    adam = to_batch(AdamW(1e-3, weight_decay=0.1, epsilon=1e-8), 4e5, 1e5)
    assert adam.learning_rate == pytest.approx(2e-3) and adam.epsilon == pytest.approx(5e-9)
    # As much decay for a token: four times as much for a step.
    assert adam.learning_rate * adam.weight_decay == pytest.approx(4 * 1e-3 * 0.1)
    assert adam.beta1 == AdamW().beta1
    sgd = to_batch(SGD(0.1, weight_decay=0.01), 4e5, 1e5)
    assert (sgd.learning_rate, sgd.weight_decay) == pytest.approx((0.4, 0.01))
    assert to_batch(Lion(), 7e4, 7e4) == Lion()
    assert to_batch(AdamW(average=0.999), 4e5, 1e5).average == pytest.approx(0.999**4)


@pytest.mark.parametrize("tokens", [0, -1, float("nan"), float("inf")])
def test_a_ratio_of_nothing_is_refused(tokens):
    with pytest.raises(UserError, match="both must be positive"):
        to_horizon(AdamW(), tokens, 1e9)
