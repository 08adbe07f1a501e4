"""Laws: derivatives, optima, and what a user's own law needs."""

import numpy as np
import pytest
from known_laws import TRUTH, sweep

from llm_jax.config import UserError
from llm_jax.scaling.fits import fit_law
from llm_jax.scaling.laws import Chinchilla, Law, Parameter, law


def inner(name: str, **values: float) -> np.ndarray:
    """theta [1, P] of a law at natural values."""
    return np.array([[p.inner(values[p.name]) for p in law(name).parameters]])


@pytest.mark.parametrize(
    "name, values",
    [
        ("chinchilla", TRUTH),
        ("chinchilla", TRUTH | {"E": 0.0}),
        ("power", dict(E=1.7, A=300.0, a=0.15)),
        ("power", dict(E=0.0, A=9.0, a=0.1)),
    ],
)
def test_own_derivatives_equal_complex_steps(name, values):
    frame = sweep()
    x = {variable: np.log(frame[variable].to_numpy()) for variable in law(name).inputs}
    theta = inner(name, **values)
    own, exact = law(name).with_jacobian(theta, x), Law.with_jacobian(law(name), theta, x)
    assert np.allclose(own[0], exact[0], rtol=1e-14)
    assert np.allclose(own[1], exact[1], rtol=1e-12, atol=1e-14)
    assert np.isfinite(own[1]).all()


def test_the_closed_form_optimum_is_the_lowest_point_of_the_budget():
    theta = inner("chinchilla", **TRUTH)
    closed = Chinchilla().optimum(theta, 1e21)
    searched = Law.optimum(Chinchilla(), theta, 1e21)
    assert np.allclose(closed, searched, rtol=1e-6)
    assert closed[0] * closed[1] * 6 == pytest.approx(1e21)


def test_the_published_optimum_at_the_flops_of_chinchilla():
    """18.4 tokens a parameter by Besiroglu et al. 2024, 92.7 by Hoffmann et al. 2022 as rounded in print."""
    N, D = Chinchilla().optimum(
        inner("chinchilla", E=1.8172, A=482.01, alpha=0.3478, B=2085.43, beta=0.3658), 5.76e23
    )
    assert N[0] == pytest.approx(7.2249e10, rel=1e-4) and D[0] == pytest.approx(1.3287e12, rel=1e-4)
    N, D = Chinchilla().optimum(inner("chinchilla", E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28), 5.76e23)
    assert D[0] / N[0] == pytest.approx(92.65, rel=1e-4)


def test_a_users_law_is_a_formula_and_its_parameters():
    class Product(Law):
        formula = "L = A / (N D)^c"
        inputs = ("N", "D")
        parameters = (Parameter("A", (0.0, 5.0), log=True), Parameter("c", (0.05, 0.5), lower=0.0))

        def log_loss(self, theta, x):
            return theta[..., :1] - theta[..., 1:] * (x["N"] + x["D"])

    frame = sweep()
    frame["loss"] = 40 / (frame["N"] * frame["D"]) ** 0.07
    found = fit_law(frame.iloc[::3], Product(), bootstrap=0).parameters
    assert found["A"].value == pytest.approx(40) and found["c"].value == pytest.approx(0.07)


def test_an_unknown_law_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="did you mean 'chinchilla'"):
        law("chinchila")


def test_a_law_of_compute_has_no_optimum():
    with pytest.raises(UserError, match="no N and D to choose"):
        law("power").optimum(inner("power", E=1.0, A=1.0, a=0.1), 1e20)
