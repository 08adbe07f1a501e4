"""What --predict asks of a fit: an optimum, a loss, the cheapest run to a loss. What a law can't answer is
refused before anything is fitted.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.scaling import compare, identified, serving
from llm_jax.scaling.fits import AnyFit
from llm_jax.scaling.law import Law
from llm_jax.scaling.results import Estimate, Fit


class Answer(NamedTuple):
    """What --predict asked, and the numbers."""

    asked: str
    numbers: dict[str, Estimate]
    doubt: str = ""


def check(question: Mapping[str, float], law: Law | None, approach: str, flops_per_nd: float) -> None:
    """Raises UserError where a fit can't answer, whatever it finds. law: None for Approaches 1 and 2."""
    if law is None:
        if set(question) != {"C"}:
            raise UserError(
                f"Approach {approach} has no law of the loss: ask for an optimum, --predict=C=1e21"
            )
        return
    with np.errstate(all="ignore"):  # somewhere may be nowhere sensible
        if _of_loss(question, law):
            law.refuse_beside(given := _without("loss", question))
            law.of_size_and_data(_somewhere(law), given)
        elif _of_optimum(question, law):
            law.refuse_beside(given := _without("C", question))
            law.optimum(_somewhere(law), question["C"], flops_per_nd, given)
        else:
            law.inputs_of(question, flops_per_nd)


def _of_loss(question: Mapping[str, float], law: Law) -> bool:
    return "loss" in question and law.output == "loss"


def _of_optimum(question: Mapping[str, float], law: Law) -> bool:
    return "C" in question and not {"N", "D"} & set(question) and not set(law.inputs) <= set(question)


def _without(gone: str, question: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in question.items() if name != gone}


def _somewhere(law: Law) -> np.ndarray:
    """One theta [1, P] of the law, any."""
    return np.array([[parameter.grid[len(parameter.grid) // 2] for parameter in law.parameters]])


def answers(result: AnyFit, question: Mapping[str, float], inference_tokens: float = 0.0) -> list[Answer]:
    """The answer, or one for each recipe of a compute multiplier."""
    ((column, recipes),) = result.conventions.get("recipes", {"": []}).items()
    if not recipes:
        return [answer(result, question, inference_tokens)]
    asked = ", ".join(f"{name}={value:g}" for name, value in question.items())
    coded = [{**question, compare.COLUMN: value} for value in compare.CODES]
    found = [answer(result, each, inference_tokens).numbers for each in coded]
    return [
        Answer(f"{asked}, {column}={name}", numbers) for name, numbers in zip(recipes, found, strict=True)
    ]


def answer(result: AnyFit, question: Mapping[str, float], inference_tokens: float = 0.0) -> Answer:
    """The optimum at a budget C; the cheapest run to a loss; or the law's value at its inputs and what one
    more run would measure there.
    """
    law = result.law if isinstance(result, Fit) else None
    check(question, law, str(result.approach), result.conventions["flops_per_nd"])
    asked, doubt = ", ".join(f"{name}={value:g}" for name, value in question.items()), ""
    if law is None:
        found = result.optimum(question["C"])
    elif _of_loss(question, law):
        asked += f", then {inference_tokens:g} tokens of inference" if inference_tokens else ""
        found = serving.cheapest(result, question["loss"], inference_tokens, **_without("loss", question))
    elif _of_optimum(question, law):
        found = result.optimum(question["C"], **_without("C", question))
        known = identified.of_optimum(result, question["C"])
        doubt = known.doubt if known else ""
    else:
        numbers = {
            law.output: result.predict(**question),
            f"{law.output}, one run": result.one_run(**question),
        }
        return Answer(asked, numbers)
    return Answer(asked, {name: number for name, number in found._asdict().items() if number}, doubt)
