"""lm-evaluation-harness and its tasks over an evaluator of this house; needs the extra `harness`.

    evaluator = Evaluator(open_model("runs/mine"), keep=True)
    results = lm_eval.simple_evaluate(model=HarnessModel(evaluator), tasks=["hellaswag"])["results"]

The harness writes prompts and computes metrics; what it asks is answered, batched, spread and kept as ever.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.config import UserError
from llm_jax.data.cache import digest
from llm_jax.data.templates import Message, render
from llm_jax.evaluation.requests import Generate, LogLikelihood, Rolling, key
from llm_jax.evaluation.runner import Evaluator
from llm_jax.inference.sampling import Sampling

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise UserError(
        f"the harness needs the extra `harness` (pip install 'llm-jax[harness]'): {error}"
    ) from None

MAX_TOKENS = 256  # of an answer, where a task doesn't say


class HarnessModel(LM):
    """A model as the harness sees it.

    What its chat template wrote has all its special tokens and is given no more. Prompts that the harness has
    kept on disk itself (cache_requests) are taken for plain text.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self._evaluator, self._tokenizer = evaluator, evaluator.opened.tokenizer
        self._rendered: dict[int, set[str]] = {}  # what the chat template wrote, by its length

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each continuation."""
        asked = [LogLikelihood(*args, written=self._written(args[0])) for args in (r.args for r in requests)]
        return [(-answer.nats, answer.greedy) for answer in self._evaluator.run(asked, "harness")]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """The log-probability of each text from its beginning."""
        asked = [Rolling(*request.args) for request in requests]
        return [-answer.nats for answer in self._evaluator.run(asked, "harness")]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """How each prompt goes on, up to a stop text. The same one asked again is sampled anew."""
        asked, times = [], collections.Counter()
        for request in requests:
            one = self._generate(*request.args)
            if one.sampling.temperature:
                times[key(one)] += 1
                seed = times[key(one)] - 1
                one = dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, seed=seed))
            asked.append(one)
        return [answer.text for answer in self._evaluator.run(asked, "harness")]

    def _generate(self, prompt: str, settings: Mapping[str, Any]) -> Generate:
        until = settings.get("until") or []
        stops = tuple(filter(None, [until] if isinstance(until, str) else until))
        sampling = Sampling()
        if settings.get("do_sample") or settings.get("temperature"):
            known = {
                name: settings[name]
                for name in ("temperature", "top_k", "top_p", "min_p")
                if name in settings
            }
            sampling = Sampling(**{"temperature": 1.0, **known})
        most = settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_TOKENS
        return Generate(prompt, stops, int(most), sampling, self._written(prompt))

    # ---- chat templates ----

    @property
    def tokenizer_name(self) -> str:
        """What the harness keeps its own cache of requests by."""
        return digest([self._tokenizer.data, self._tokenizer.chat_template])

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template, if one is asked for; the harness keeps it with its results."""
        if chat_template and self._tokenizer.chat_template is None:
            raise UserError(f"{self._evaluator.opened.name} has no chat template: ask without one")
        return self._tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without the prompt, its last message is the beginning of an answer."""
        template, begun = self.chat_template(True), ""
        if not add_generation_prompt:
            *chat_history, last = chat_history
            begun = last["content"]
        text = render(template, chat_history, self._tokenizer.special) + begun
        self._rendered.setdefault(len(text), set()).add(text)
        return text

    def _written(self, prompt: str) -> bool:
        """Whether the chat template wrote the prompt, up to a choice that may stand behind it."""
        return any(prompt[:length] in texts for length, texts in self._rendered.items())
