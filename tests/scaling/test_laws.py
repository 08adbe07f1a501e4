"""Laws: derivatives, optima, and what a user's own law needs."""

import numpy as np
import pandas as pd
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
        ("overtraining", dict(E=1.8, a=60.0, b=200.0, eta=0.12)),
    ],
)
def test_own_derivatives_equal_complex_steps(name, values):
    frame = sweep().assign(M=lambda f: f["D"] / f["N"])
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


GRIDS = {
    "chinchilla-tied": sweep(),
    "kaplan": sweep(),
    "data-constrained": pd.DataFrame(
        [
            dict(N=N, D=U * epochs, U=U)
            for U in np.geomspace(1e8, 1e10, 4)
            for N in np.geomspace(1e7, 1e10, 4)
            for epochs in (0.5, 4, 40)
        ]
    ),
    "overtraining": pd.DataFrame(
        [dict(C=C, M=M) for C in np.geomspace(1e18, 1e21, 4) for M in np.geomspace(5, 640, 8)]
    ),
    "power-n": sweep(),
    "power-d": sweep(),
    "n-opt": pd.DataFrame({"C": np.geomspace(6e18, 1e22, 10)}),
    "d-opt": pd.DataFrame({"C": np.geomspace(6e18, 1e22, 10)}),
    "downstream-exponential": pd.DataFrame({"loss": np.linspace(2, 4, 12)}),
    "downstream-sigmoid": pd.DataFrame({"loss": np.linspace(2, 4, 12)}),
}
PUBLISHED = {
    "chinchilla-tied": dict(E=1.87, A=521.0, alpha=0.3527, B=1488.0, beta=0.3527),
    "kaplan": dict(Nc=6.4e13, alpha_N=0.076, Dc=1.8e13, alpha_D=0.103),
    "data-constrained": dict(E=1.87, A=521.0, alpha=0.3527, B=1488.0, beta=0.3527, R_D=15.39, R_N=5.31),
    "overtraining": dict(E=1.8, a=60.0, b=200.0, eta=0.12),
    "power-n": dict(E=0.5, A=(8.8e13) ** 0.076, a=0.076),
    "power-d": dict(E=0.5, A=(5.4e13) ** 0.095, a=0.095),
    "n-opt": dict(k=0.09, a=0.49),
    "d-opt": dict(k=0.299, a=0.537),
    "downstream-exponential": dict(eps=0.85, k=2.1, gamma=0.7),
    "downstream-sigmoid": dict(floor=0.1, rise=0.65, k=3.0, middle=2.9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_law_gives_its_constants_back_from_noise_free_points(name):
    frame, truth = GRIDS[name], PUBLISHED[name]
    x = {variable: np.log(frame[variable].to_numpy(float)) for variable in law(name).inputs}
    made = np.exp(law(name).log_loss(inner(name, **truth), x)[0])
    found = fit_law(frame.assign(**{law(name).output: made}), name, bootstrap=0).parameters
    assert {key: found[key].value for key in truth} == pytest.approx(truth, rel=1e-6)


def test_laws_are_the_published_formulas():
    N, D, U, C, M = 3e8, 6e9, 2e9, 1e20, 50.0

    def value(name, **at):
        x = {variable: np.log([number]) for variable, number in at.items()}
        return np.exp(law(name).log_loss(inner(name, **PUBLISHED[name]), x))[0, 0]

    kaplan = ((6.4e13 / N) ** (0.076 / 0.103) + 1.8e13 / D) ** 0.103
    assert value("kaplan", N=N, D=D) == pytest.approx(kaplan, rel=1e-12)
    assert value("overtraining", C=C, M=M) == pytest.approx(1.8 + (60 * M**0.12 + 200 * M**-0.12) * C**-0.12)
    assert value("downstream-exponential", loss=2.5) == pytest.approx(0.85 - 2.1 * np.exp(-0.7 * 2.5))
    assert value("downstream-sigmoid", loss=2.5) == pytest.approx(0.1 + 0.65 / (1 + np.exp(-3 * (2.5 - 2.9))))
    G = (521 / 1488) ** (1 / (2 * 0.3527))
    needed = min(N, G * U * G)
    faded = [u + u * r * (1 - np.exp(-(x / u - 1) / r)) for x, u, r in ((D, U, 15.39), (N, needed, 5.31))]
    expected = 1.87 + 521 / faded[1] ** 0.3527 + 1488 / faded[0] ** 0.3527
    assert value("data-constrained", N=N, D=D, U=U) == pytest.approx(expected, rel=1e-12)
    once = value("data-constrained", N=1e6, D=U, U=U)  # one epoch, no spare parameters: Chinchilla
    assert once == pytest.approx(1.87 + 521 / 1e6**0.3527 + 1488 / U**0.3527)


def test_optima_are_the_lowest_points_of_their_budgets():
    for name, given in (("kaplan", {}), ("data-constrained", {"U": 1e9}), ("overtraining", {})):
        theta = inner(name, **PUBLISHED[name])
        N, D = law(name).optimum(theta, 1e21, 6.0, given)
        assert pytest.approx(1e21) == N * D * 6
        around = N * np.array([0.9, 1.0, 1.1])
        every = {"N": around, "D": 1e21 / 6 / around, "C": np.full(3, 1e21), "M": 1e21 / 6 / around**2}
        every["U"] = np.full(3, 1e9)
        losses = law(name).log_loss(theta, {k: np.log(every[k]) for k in law(name).inputs})[0]
        assert losses.argmin() == 1, name
    with pytest.raises(UserError, match="give U too"):
        law("data-constrained").optimum(inner("data-constrained", **PUBLISHED["data-constrained"]), 1e21)


def test_a_law_in_a_file_is_found_by_its_name(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from llm_jax.scaling.laws import Parameter, SumOfPowers\n\n\n"
        "class DataOnly(SumOfPowers):\n"
        "    formula = 'L = B/D^beta'\n"
        "    inputs = ('D',)\n"
        "    parameters = (Parameter('B', (0.0, 5.0), log=True), Parameter('beta', (0.1, 0.5), lower=0.0))\n"
        "    terms = (('B', (('D', 'beta'),)),)\n"
    )
    D = np.geomspace(1e6, 1e9, 6)
    found = fit_law(pd.DataFrame({"D": D, "loss": 30 / D**0.2}), f"{file}:DataOnly", bootstrap=0).parameters
    assert (found["B"].value, found["beta"].value) == pytest.approx((30, 0.2))
    for name, said in (("DataOnlt", "did you mean 'DataOnly'"), ("SumOfPowers", "has no formula")):
        with pytest.raises(UserError, match=said):
            law(f"{file}:{name}")
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="can't be imported"):
        law(f"{file}:DataOnly")
    with pytest.raises(UserError, match="no file"):
        law(f"{tmp_path}/absent.py:DataOnly")


MISTAKES = {
    "return 1 / 0": "ZeroDivisionError: division by zero",
    "return theta[:, 0]": r"has the shape \(2,\), not \(2, 3\)",
    "return np.nan * (theta[..., :1] - x['D'])": "finite at none of its starts",
    "return np.abs(theta[..., :1] + 0 * x['D'])": "changes with no parameter",
    "return unknown": "NameError: name 'unknown' is not defined",
}


@pytest.mark.parametrize("body", MISTAKES)
def test_a_users_law_that_no_fit_can_use_is_refused_with_the_reason(tmp_path, body):
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np\nfrom llm_jax.scaling.laws import Law, Parameter\n\n\n"
        "class Mine(Law):\n    formula = 'L = B'\n    inputs = ('D',)\n"
        "    parameters = (Parameter('B', (1.0, 5.0), log=True),)\n\n"
        f"    def log_loss(self, theta, x):\n        {body}\n"
    )
    with pytest.raises(UserError, match=MISTAKES[body]) as error:
        law(f"{file}:Mine")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("class Mine(:\n", "can't be imported .SyntaxError"),
        ("import sys\nsys.exit(3)\n", "can't be imported .SystemExit: 3"),
        (
            "from llm_jax.scaling.laws import Law\n\n\nclass Mine(Law):\n"
            "    formula, inputs, parameters = 'L = B', ('D',), ('B',)\n",
            "are a tuple of Parameter",
        ),
    ],
)
def test_a_file_without_a_law_in_it_ends_nothing_but_the_fit(tmp_path, text, said):
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=said):
        law(f"{tmp_path}/mine.py:Mine")


def test_a_law_of_compute_has_no_optimum():
    with pytest.raises(UserError, match="no N and D to choose"):
        law("power").optimum(inner("power", E=1.0, A=1.0, a=0.1), 1e20)
