"""From a law, a table and a user's choices to the problem that the solver is given."""

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from llm_jax.config import UserError, nearest
from llm_jax.scaling.law import Law
from llm_jax.scaling.objectives import Objective
from llm_jax.scaling.solver import Data, Problem
from llm_jax.scaling.tables import Points, listed


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a user settles about a law's parameters, in natural units.

    fixed: {"E": 1.69}; a coefficient of 0 drops its term. tied: {"beta": "alpha"}. bounds: {"E": (0.5, 3)}.
    """

    fixed: Mapping[str, float]
    tied: Mapping[str, str]
    bounds: Mapping[str, tuple[float, float]]

    def check(self, law: Law) -> None:
        """Raises UserError where a name or a value can't be meant."""
        for flag, names in (("fix", self.fixed), ("tie", self.tied), ("bounds", self.bounds)):
            for name in names:
                if name not in law.places:
                    raise UserError(
                        f"--{flag}: {law.formula} has no parameter {name!r}; {nearest(name, law.places)}"
                    )
        for name, target in self.tied.items():
            if target not in law.places:
                raise UserError(
                    f"--tie: {law.formula} has no parameter {target!r}; {nearest(target, law.places)}"
                )
            if target in self.tied or target == name:
                raise UserError(f"--tie={name}={target}: {target} is tied itself")
            if len({law.parameters[law.places[each]].log for each in (name, target)}) > 1:
                raise UserError(f"--tie={name}={target}: a coefficient can't be tied to an exponent")
        for name, value in self.fixed.items():
            if name in self.tied:
                raise UserError(f"--fix: {name} is tied to {self.tied[name]} in {law.formula}; fix that")
            parameter = law.parameters[law.places[name]]
            if value < 0 and parameter.log:
                raise UserError(f"--fix={name}={value:g}: a coefficient is not negative")
            if not parameter.log and not parameter.lower <= value <= parameter.upper:
                raise UserError(
                    f"--fix={name}={value:g}: it lies between {parameter.lower:g} and {parameter.upper:g}"
                )
        for name, (low, high) in self.bounds.items():
            if name in self.fixed or name in self.tied:
                raise UserError(f"--bounds: {name} is {'fixed' if name in self.fixed else 'tied'}")
            if not low < high or (low < 0 and law.parameters[law.places[name]].log):
                raise UserError(f"--bounds={name}={low:g}:{high:g} is no range of values of {name}")


def pose(
    law: Law, points: Points, objective: Objective, choices: Choices
) -> tuple[Problem, Data, np.ndarray, list[str]]:
    """The problem in the free parameters alone, its data, the grid of starts [S, F], and their names."""
    choices.check(law)
    place = law.places
    free = [p for p in law.parameters if p.name not in choices.fixed and p.name not in choices.tied]
    if not free:
        raise UserError(f"every parameter of {law.formula} is fixed; nothing is left to fit")
    spread, offset = np.zeros((len(free), len(place))), np.zeros(len(place))
    for row, parameter in enumerate(free):
        spread[row, place[parameter.name]] = 1
        for tied, target in choices.tied.items():
            spread[row, place[tied]] = target == parameter.name
    for name, value in choices.fixed.items():
        for index in [place[name], *(place[tied] for tied, target in choices.tied.items() if target == name)]:
            offset[index] = law.parameters[index].inner(value)
    lower, upper = np.array([p.lower for p in free]), np.array([p.upper for p in free])
    for row, parameter in enumerate(free):
        if parameter.name in choices.bounds:
            low, high = (parameter.inner(end) for end in choices.bounds[parameter.name])
            lower[row], upper[row] = max(low, lower[row]), high
            if not lower[row] < high:
                least, most = (parameter.natural(end) for end in (lower[row], high))
                raise UserError(
                    f"--bounds: {parameter.name} is at least {least:.3g}, and at most {most:.3g} here"
                )
    grid = np.array(list(itertools.product(*(p.grid for p in free))))
    frame = points.frame
    problem = Problem(
        law=law,
        x={name: np.log(frame[name].to_numpy(float)) for name in law.inputs},
        objective=objective,
        spread=spread,
        offset=offset,
        lower=lower,
        upper=upper,
    )
    data = Data(np.log(frame[[law.output]].to_numpy(float).T), points.weights[None])
    return problem, data, np.unique(np.clip(grid, lower, upper), axis=0), [p.name for p in free]


_FAR = 6.0  # deviations of the noise, as the middle half of the runs shows it


def check_enough(problem: Problem, names: list[str]) -> list[str]:
    """Refuses tables that can't determine the law; warns of those that barely can."""
    law = problem.law
    for name in law.inputs:
        values = np.unique(problem.x[name])
        if len(values) < 2:
            raise UserError(f"{name} is {np.exp(values[0]):g} in every run; {law.formula} needs it to vary")
    n = len(np.unique(np.stack(list(problem.x.values())), axis=1).T)
    if n < len(names):
        raise UserError(
            f"too few points: {n} for the {len(names)} free parameters of {law.formula}; "
            "add runs or fix parameters, as in --fix=E=1.69"
        )
    if n < len(names) + 2:
        return [f"under-identified: {n} points for {len(names)} parameters leave nothing to judge the fit by"]
    return []


def far_bound(residuals: np.ndarray) -> float:
    """The size of a residual of ln loss beyond which a run is no noisy one, beside the others [n]."""
    # The runs that the fit passes through tell nothing of the noise; 1.48 makes a median a deviation.
    sizes = np.sort(np.abs(residuals))[min(5, len(residuals) // 3) :]
    return max(_FAR * 1.48 * float(np.median(sizes)), 0.005)


def far_runs(points: Points, residuals: np.ndarray) -> str:
    """Runs that lie far from the law beside the others, named: diverged, or of another recipe."""
    bound = far_bound(residuals)
    by = pd.Series(residuals, index=points.frame.index)
    far = by.abs().sort_values(ascending=False, kind="stable")
    text = f"more than {bound:.1%} from the law, perhaps diverged or of another recipe"
    return listed(text, points.frame, far.index[far > bound], np.expm1(by))


def judge(
    problem: Problem,
    free: np.ndarray,
    draws: np.ndarray,
    names: list[str],
    agree: np.ndarray,
    choices: Choices,
) -> tuple[list[str], float, dict[str, str]]:
    """What a reader must know before believing the numbers, the condition number, and the bounds hit."""
    warnings, hit = [], {}
    effect, condition = sensitivities(problem, free)
    for index, name in enumerate(names):
        bounds = {"lower": problem.lower[index], "upper": problem.upper[index]}
        for side, bound in bounds.items():
            if free[0, index] == bound:
                hit[name] = side
                held = (
                    "as --bounds holds it"
                    if name in choices.bounds
                    else "these points don't determine its term"
                )
                warnings.append(f"{name} is at its {side} bound; {held}")
            elif len(draws) and (share := np.mean(draws[:, index] == bound)) > 0.01:
                warnings.append(f"{name} is at its {side} bound in {share:.0%} of the refits")
        if effect[index] < 1e-6 and name not in hit:
            warnings.append(f"{name} changes no loss by 1e-6: these points don't determine its term")
    if together := _rise_together(problem):
        warnings.append(together)
    if condition > 1e8:
        warnings.append(f"flat valley: condition number {condition:.1e}; the parameters are not told apart")
    if agree.sum() < min(max(2, 0.01 * len(agree)), len(agree)):
        warnings.append(f"only {agree.sum()} of {len(agree)} starts reach the optimum")
    return warnings, condition, hit


_LADDER = 0.25  # of ln D, beside a power of N


def _rise_together(problem: Problem) -> str:
    """What to say where D is nearly a power of N in all runs, as on a ladder of one D/N; "" elsewhere."""
    if not {"N", "D"} <= set(problem.law.inputs):
        return ""
    x, y = problem.x["N"], problem.x["D"]
    beside = float(np.std(y - np.polyval(np.polyfit(x, y, 1), x)))
    if beside >= _LADDER:
        return ""
    return (
        f"D is a power of N to {np.expm1(beside):.0%} in these runs: which of the two lowers the loss they "
        "hardly tell, and exponents and optima mean little whatever their intervals say"
    )


def sensitivities(problem: Problem, free: np.ndarray) -> tuple[np.ndarray, float]:
    """How far each parameter moves ln of the loss (rms over runs) [F], and how alike their effects are.

    The second is the condition number of the squared Jacobian, scaled to unit diagonal.
    """
    jacobian = problem.spread @ problem.law.with_jacobian(problem.theta(free), problem.x)[1][0]
    scale = np.sqrt((jacobian**2).mean(1))
    if not (scale > 0).all():
        return scale, float("inf")
    unit = jacobian / scale[:, None]
    return scale, float(np.linalg.cond(unit @ unit.T))
