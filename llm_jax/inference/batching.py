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
from llm_jax.inference.generation import SHORTEST, Drawn, Engine, bucket
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.text import TextStream
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
    """What a request has been given so far. finish: None, "stop" or "length"."""

    def __init__(self, request: Request, tokenizer: Portable | None) -> None:
        self.request, self.tokens, self.text, self.finish = request, [], "", None
        self._stream = TextStream(tokenizer, request.stops) if tokenizer else None

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
            if self._stream and self._stream.stopped:
                self.finish = "stop"
            elif full or len(self.tokens) >= self.request.max_tokens:
                self.finish = "length"
        if self.finish and self._stream:
            piece += self._stream.rest()
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
        self._lengths = np.zeros(slots, np.int64)  # of each row, its last token included

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or any(self._slots)

    def submit(self, request: Request) -> Answer:
        """Puts a request in line; raises UserError for one that can't be answered."""
        size, vocabulary = len(request.prompt), self.engine.vocabulary
        request.sampling.check(vocabulary)
        if size == 0:
            raise UserError("the prompt is empty: give at least one token to continue")
        if request.prompt.min() < 0 or request.prompt.max() >= vocabulary:
            raise UserError(f"the prompt has ids outside 0 .. {vocabulary - 1}")
        if request.max_tokens < 1:
            raise UserError(f"max_tokens is {request.max_tokens}; it is at least 1")
        if "" in request.stops:
            raise UserError("a stop text is empty")
        if self.context is not None and size >= self.context:
            raise UserError(
                f"the prompt has {size:,} tokens, and the model's context is {self.context:,}: shorten it"
            )
        answer = Answer(request, self.tokenizer)
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

        Returns the answers that grew, each with the text that became certain.
        """
        active = np.array([answer is not None for answer in self._slots], bool)
        arriving = min(len(self._waiting), self._most - int(active.sum()))
        if arriving:
            return self._admit(arriving)
        if not active.any():
            return []
        self._make_room(len(self._slots), int(self._lengths[: len(active)][active].max()))
        self._state, self._rows, drawn = self.engine.step(self._state, self._rows, active)
        return self._give(drawn, {int(slot): int(slot) for slot in np.flatnonzero(active)})

    def _admit(self, count: int) -> list[tuple[Answer, str]]:
        arriving = [self._waiting.popleft() for _ in range(count)]
        requests = [answer.request for answer in arriving]
        if not any(self._slots):
            self._slots = []  # what there was is forgotten
        used = len(self._slots) - self._slots.count(None)
        self._make_room(used + count, max(len(request.prompt) for request in requests))
        slots = [slot for slot, answer in enumerate(self._slots) if answer is None][:count]
        for slot, answer in zip(slots, arriving, strict=True):
            self._slots[slot], self._lengths[slot] = answer, len(answer.request.prompt)
        self._state, self._rows, drawn = self.engine.join(
            self._state,
            self._rows,
            [request.prompt for request in requests],
            [request.sampling for request in requests],
            [request.number for request in requests],
            slots,
        )
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
