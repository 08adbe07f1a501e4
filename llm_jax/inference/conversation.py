"""Talking to a model: it keeps nothing between turns, so each turn sends the whole conversation."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data.templates import TRANSCRIPT, TRANSCRIPT_STOPS, Message, render
from llm_jax.inference.batching import Answer, Batcher, Request
from llm_jax.inference.generation import Engine
from llm_jax.inference.opening import Opened
from llm_jax.inference.sampling import Sampling


class Speaker:
    """A model that answers. Without a chat template (a base model) it goes on with a plain transcript.

    slots: how many answers are decoded at once. candidates: of how many tokens each step tells.
    """

    def __init__(self, opened: Opened, slots: int = 1, candidates: int = 0) -> None:
        self.opened = opened._replace(params=None)  # the engine has them
        self.template = opened.tokenizer.chat_template if opened.tokenizer else None
        self._engine, self._slots = Engine(opened.config, opened.params, candidates), slots
        self.batcher = self.new_batcher()

    def new_batcher(self) -> Batcher:
        """One that nobody has asked anything."""
        return Batcher(self._engine, self._slots, self.opened.context, self.opened.tokenizer)

    @property
    def name(self) -> str:
        return self.opened.name

    def text(self, messages: Sequence[Message]) -> str:
        """What is sent, as text."""
        special = self.opened.tokenizer.special if self.opened.tokenizer else {}
        return render(self.template or TRANSCRIPT, messages, special)

    def ids(self, messages: Sequence[Message]) -> np.ndarray:
        """What is sent, as the model sees it. A template writes special tokens itself."""
        text = self.text(messages)
        if self.template is None:
            return self.opened.encode(text)
        return self.opened.tokenizer.encode(text, special=False)

    def request(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        max_tokens: int = 512,
        stops: Sequence[str] = (),
    ) -> Request:
        """What asks for the answer to a conversation."""
        stops = (*stops, *(TRANSCRIPT_STOPS if self.template is None else ()))
        return Request(self.ids(messages), sampling, max_tokens, self.opened.stop_ids, stops)

    def reply(self, *asked: Any, **options: Any) -> "Reply":
        """The answer to a `request`, begun when it is iterated over; raises UserError for one too long."""
        return Reply(self.batcher, self.request(*asked, **options))


class Reply:
    """An answer under way: iterating gives its text piece by piece; `close` ends it early."""

    def __init__(self, batcher: Batcher, request: Request) -> None:
        self._batcher, self.request = batcher, request
        self.answer: Answer = batcher.submit(request)
        self._times: list[float] = [time.perf_counter()]

    def __iter__(self) -> Iterator[str]:
        while self.answer.finish is None and self._batcher.busy:
            for _, piece in self._batcher.step():
                self._times.append(time.perf_counter())
                yield piece

    def close(self) -> None:
        self._batcher.cancel(self.answer)

    def __str__(self) -> str:
        """How long and how fast it was."""
        steps = len(self._times) - 2
        waited = self._times[min(1, len(self._times) - 1)] - self._times[0]
        took = self._times[-1] - self._times[min(1, len(self._times) - 1)]
        speed = f", {steps / took:.1f} tokens/s" if steps > 0 and took > 0 else ""
        return (
            f"{len(self.answer.tokens)} tokens{speed}, first after {waited:.2f} s "
            f"for {len(self.request.prompt)} sent"
        )
