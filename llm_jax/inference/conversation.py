"""Talking to a model: it keeps nothing between turns, so each turn sends the whole conversation."""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from llm_jax.data.names import whole
from llm_jax.data.templates import TRANSCRIPT_STOPS, Message
from llm_jax.inference.batching import Answer, Batcher, Request
from llm_jax.inference.generation import Engine
from llm_jax.inference.opening import Opened
from llm_jax.inference.sampling import Sampling
from llm_jax.interop.tokenizer import written


class Speaker:
    """A model that answers. Without a chat template (a base model) it goes on with a plain transcript.

    slots: how many answers are decoded at once. candidates: of how many tokens each step tells. keep: the
    opened model's parameters can be used elsewhere too.
    """

    def __init__(self, opened: Opened, slots: int = 1, candidates: int = 0, keep: bool = True) -> None:
        self.opened = opened._replace(params=None)  # the engine has them
        self.template = opened.tokenizer.chat_template if opened.tokenizer else None
        self._engine = Engine(opened.config, opened.params, candidates, opened.mesh, keep=keep)
        self._slots = slots
        self.batcher = self.new_batcher()

    def new_batcher(self) -> Batcher:
        """One that nobody has asked anything."""
        return Batcher(self._engine, self._slots, self.opened.context, self.opened.tokenizer)

    @property
    def name(self) -> str:
        return self.opened.name

    def text(self, messages: Sequence[Message]) -> str:
        """What is sent, as text, with the special tokens that it begins with."""
        text = whole(written(self.opened.tokenizer, messages))
        if self.template is None and (tokenizer := self.opened.tokenizer):
            begun = itertools.takewhile(tokenizer.unwritten.__contains__, tokenizer.encode("").tolist())
            text = b"".join(map(tokenizer.spelling, begun)).decode() + text
        return text

    def ids(self, messages: Sequence[Message]) -> np.ndarray:
        """What is sent, as the model sees it. A template writes special tokens itself."""
        text = written(self.opened.tokenizer, messages)
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
        self._seconds: list[float] = []  # of each step, whoever else is answering meanwhile

    def __iter__(self) -> Iterator[str]:
        while self.answer.finish is None and self._batcher.busy:
            start = time.perf_counter()
            grown = self._batcher.step()
            self._seconds.append(time.perf_counter() - start)
            for _, piece in grown:
                yield piece

    def close(self) -> None:
        self._batcher.cancel(self.answer)

    def __str__(self) -> str:
        """How long and how fast it was."""
        first, following = sum(self._seconds[:1]), self._seconds[1:]
        speed = f", {len(following) / sum(following):.1f} tokens/s" if following else ""
        return (
            f"{len(self.answer.tokens)} tokens{speed}, first after {first:.2f} s "
            f"for {len(self.request.prompt)} sent"
        )
