"""Continuous batching: requests come and go while the others are decoded.

batcher = Batcher(engine, slots=8)
answers = [batcher.submit(request) for request in requests]     # at any time
while batcher.busy:
    for answer, piece in batcher.step():                        # streams
        ...
"""

import collections
import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.inference.generation import SHORTEST, Drawn, Engine, Prompt, bucket
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.text import SIGHT, TextStream
from llm_jax.interop.tokenizer import Portable


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt [tokens], how it is continued, and where that ends.

    number: which of several samples of one seed. stop_ids: end the answer and are no part of it. stops: texts
    that do.
    """

    prompt: np.ndarray
    sampling: Sampling = Sampling()
    max_tokens: int = 128
    stop_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = ()
    number: int = 0


class Token(NamedTuple):
    """A token of an answer, its log-probability, and the most probable ones at its place with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Answer:
    """What a request has been given so far. prompt: the request's. finish: None, "stop" or "length"."""

    def __init__(self, request: Request, prompt: Prompt, tokenizer: Portable | None) -> None:
        self.request, self.prompt, self.tokens, self.text, self.finish = request, prompt, [], "", None
        self._stream = TextStream(tokenizer, request.stops, prompt.ids[-SIGHT:]) if tokenizer else None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def stopped_at(self) -> str:
        """The stop text that ended it; "" for any other end."""
        return self._stream.stopped if self._stream else ""

    def push(self, token: Token, full: bool) -> str:
        """Takes one more token and returns the text that is now certain; full: there is room for no more."""
        piece = ""
        if token.id in self.request.stop_ids:
            self.finish = "stop"
        else:
            self.tokens.append(token)
            piece = self._stream.push(token.id) if self._stream else ""
            if full or len(self.tokens) >= self.request.max_tokens:
                self.finish = "length"
        if self._stream:
            piece += self._stream.rest() if self.finish else ""
            self.finish = "stop" if self._stream.stopped else self.finish
        self.text += piece
        return piece


class Batcher:
    """Decodes up to `slots` requests at once; more wait. context: how long a row may become, if limited.

    A step takes longer with more rows, used or not, so there are only as many as were needed at once since
    the batcher was last idle, rounded up to a power of two.
    """

    def __init__(
        self, engine: Engine, slots: int, context: int | None = None, tokenizer: Portable | None = None
    ) -> None:
        self.engine, self.context, self.tokenizer = engine, context, tokenizer
        self._most = slots
        self._waiting: collections.deque[Answer] = collections.deque()
        self._slots: list[Answer | None] = []
        self._admitted = False  # by the last step
        self._lengths = np.zeros(slots, np.int64)  # of each row, its last token included

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._slots)

    @property
    def waiting(self) -> int:
        """How many requests are in line."""
        return len(self._waiting)

    def submit(self, request: Request) -> Answer:
        """Puts a request in line; raises UserError for one that can't be answered."""
        prompt, size = (
            self.engine.ready(request.prompt, request.sampling, request.number),
            len(request.prompt),
        )
        if request.max_tokens < 1:
            raise UserError(f"max_tokens is {request.max_tokens}; it is at least 1")
        if "" in request.stops:
            raise UserError("a stop text is empty")
        if self.context is not None and size >= self.context:
            raise UserError(
                f"the prompt has {size:,} tokens, and the model's context is {self.context:,}: shorten it"
            )
        answer = Answer(request, prompt, self.tokenizer)
        self._waiting.append(answer)
        return answer

    def cancel(self, answer: Answer) -> None:
        """Gives the answer's place free; nothing more is added to it."""
        if answer in self._waiting:
            self._waiting.remove(answer)
        elif answer in self._slots:
            self._slots[self._slots.index(answer)] = None

    def step(self) -> list[tuple[Answer, str]]:
        """Admits who waits, as far as slots are free, else decodes a token of every row.

        After an admission comes a token, or many short answers would keep the long ones waiting. Returns the
        answers that grew, each with the text that became certain.
        """
        active = np.array([answer is not None for answer in self._slots], bool)
        arriving = min(len(self._waiting), self._most - int(active.sum()))
        self._admitted = arriving > 0 and not (self._admitted and active.any())
        if self._admitted:
            return self._admit(arriving)
        if not active.any():
            return []
        self._make_room(len(self._slots), int(self._lengths[: len(active)][active].max()))
        self._state, self._rows, drawn = self.engine.step(self._state, self._rows, active)
        return self._give(drawn, {int(slot): int(slot) for slot in np.flatnonzero(active)})

    def _admit(self, count: int) -> list[tuple[Answer, str]]:
        arriving = [self._waiting.popleft() for _ in range(count)]
        prompts = [answer.prompt for answer in arriving]
        if not any(self._slots):
            self._slots = []  # what there was is forgotten
        used = len(self._slots) - self._slots.count(None)
        self._make_room(used + count, max(len(prompt.ids) for prompt in prompts))
        slots = [slot for slot, answer in enumerate(self._slots) if answer is None][:count]
        for slot, answer in zip(slots, arriving, strict=True):
            self._slots[slot], self._lengths[slot] = answer, len(answer.prompt.ids)
        self._state, self._rows, drawn = self.engine.join(self._state, self._rows, prompts, slots)
        return self._give(drawn, dict(enumerate(slots)))

    def _give(self, drawn: Drawn, slots: dict[int, int]) -> list[tuple[Answer, str]]:
        """What was drawn, by row, to the answers in the slots."""
        ids, logprobs, top, top_logprobs = (np.asarray(x).tolist() for x in drawn)
        given = []
        for row, slot in slots.items():
            answer = self._slots[slot]
            self._lengths[slot] += 1
            token = Token(ids[row], logprobs[row], tuple(zip(top[row], top_logprobs[row], strict=True)))
            full = self.context is not None and self._lengths[slot] >= self.context
            given.append((answer, answer.push(token, full)))
            if answer.finish:
                self._slots[slot] = None
        return given

    def _make_room(self, rows: int, tokens: int) -> None:
        """For so many rows, and so many tokens in each."""
        if not self._slots:
            self._slots, self._room = [None] * min(bucket(rows), self._most), bucket(tokens, SHORTEST)
            self._state, self._rows = self.engine.empty(len(self._slots), self._room)
        elif rows > len(self._slots) or tokens > self._room:
            self._slots += [None] * (min(bucket(rows), self._most) - len(self._slots))
            self._room = max(self._room, bucket(tokens))
            self._state, self._rows = self.engine.grow(self._state, self._rows, len(self._slots), self._room)


def complete(batcher: Batcher, requests: Sequence[Request]) -> list[Answer]:
    """The answers to requests, all of them finished."""
    answers = [batcher.submit(request) for request in requests]
    while batcher.busy:
        batcher.step()
    return answers
