"""A model that many ask at once: one thread owns its batcher, and whoever asked hears what it says."""

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import NamedTuple

from absl import logging

from llm_jax.data.templates import CLOSE, Message
from llm_jax.inference import tools
from llm_jax.inference.api import RefusedError
from llm_jax.inference.batching import Answer, Request, Token
from llm_jax.inference.conversation import Speaker

LONGEST = 1024  # answers that wait in line


class Heard(NamedTuple):
    """How one of the answers asked for grew: text that is now certain, tokens, and its end, if it has one.

    stopped_at: the stop text that ended it. role: "tool" where the text is a tool's.
    """

    number: int
    text: str
    tokens: tuple[Token, ...]
    finish: str | None
    stopped_at: str = ""
    role: str = "assistant"


class Worker:
    """The thread that steps a speaker's batcher; what others want of it is done between two steps."""

    def __init__(self, speaker: Speaker) -> None:
        self.speaker = speaker
        self._errands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._listening: dict[Answer, tuple[Asked, int]] = {}
        self._thread = threading.Thread(target=self._work, name=speaker.name, daemon=True)
        self._thread.start()

    def ask(self, requests: Sequence[Request]) -> "Asked":
        """Puts requests in line, all or none; called on an event loop, on which it is then heard of them."""
        return Asked(self, requests)

    async def with_tools(
        self,
        asked: "Asked",
        again: Callable[[Sequence[Message]], Sequence[Request]],
        toolbox: Mapping[str, tools.Tool],
    ) -> "AsyncIterator[Heard]":
        """What is heard of one answer, the results of its calls, and how it goes on behind each.

        again(turns) asks anew, with the calls so far and their results.
        """
        said: list[Message] = []
        with contextlib.ExitStack() as leaving:
            for left in reversed(range(tools.MOST_CALLS + 1)):
                text, turns = "", []
                async for heard in asked:
                    text += heard.text
                    if heard.finish:
                        whole = heard._replace(text=text)
                        turns = await asyncio.to_thread(tools.heard, whole, toolbox, left)
                        if tools.call_of(whole) is not None:
                            finish = None if left else heard.finish
                            heard = heard._replace(text=heard.text + CLOSE, finish=finish)
                    yield heard
                if len(turns) < 2:  # no call, or one too many
                    return
                yield Heard(0, turns[1]["content"], (), None, role="tool")
                said += turns
                asked = leaving.enter_context(self.ask(await asyncio.to_thread(again, said)))
                await asked.begun()

    def close(self) -> None:
        """Ends the thread; who still listens hears no more."""
        self.do(None)
        self._thread.join()

    def do(self, errand: Callable[[], None] | None) -> None:
        """Has an errand run on the thread."""
        self._errands.put(errand)

    # ---- on the thread ----

    def submit(self, asked: "Asked", requests: Sequence[Request]) -> None:
        batcher, answers = self.speaker.batcher, []
        try:
            if batcher.waiting + len(requests) > LONGEST:
                message = f"overloaded: {batcher.waiting} answers wait in line; try again later"
                raise RefusedError(message, 503, code="overloaded")
            for request in requests:
                answers.append(batcher.submit(request))
        except Exception as error:  # a UserError where a request can't be answered
            for answer in answers:
                batcher.cancel(answer)
            asked.tell(error)
        else:
            self._listening |= {answer: (asked, number) for number, answer in enumerate(answers)}
            asked.tell(None)

    def cancel(self, asked: "Asked") -> None:
        for answer in [answer for answer, (whose, _) in self._listening.items() if whose is asked]:
            del self._listening[answer]
            self.speaker.batcher.cancel(answer)

    def _work(self) -> None:
        while True:
            while not self._errands.empty() or not self.speaker.batcher.busy:
                errand = self._errands.get()
                if errand is None:
                    return
                errand()
            try:
                grown = self.speaker.batcher.step()
            except Exception as error:  # what was under way is lost with the state, but not what comes next
                logging.exception("%s failed and begins anew", self.speaker.name)
                for asked in {asked for asked, _ in self._listening.values()}:
                    asked.tell(error)
                self._listening.clear()
                self.speaker.batcher = self.speaker.new_batcher()
            else:
                self._tell(grown)

    def _tell(self, grown: Sequence[tuple[Answer, str]]) -> None:
        for answer, text in grown:
            asked, number = self._listening[answer]
            tokens = tuple(answer.tokens[asked.told[number] :])
            asked.tell(Heard(number, text, tokens, answer.finish, answer.stopped_at))
            asked.told[number] = len(answer.tokens)
            if answer.finish:
                del self._listening[answer]


class Asked:
    """Requests that were put in line; leaving the block takes back what isn't finished.

    with worker.ask(requests) as asked:
        await asked.begun()             # raises UserError for what can't be answered
        async for heard in asked: ...
    """

    def __init__(self, worker: Worker, requests: Sequence[Request]) -> None:
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._events: asyncio.Queue[Heard | Exception | None] = asyncio.Queue()
        self.told = [0] * len(requests)  # tokens of each answer
        worker.do(lambda: worker.submit(self, requests))

    def __enter__(self) -> "Asked":
        return self

    def __exit__(self, *_: object) -> None:
        self._worker.do(lambda: self._worker.cancel(self))

    async def begun(self) -> None:
        if (error := await self._events.get()) is not None:
            raise error

    async def __aiter__(self) -> AsyncIterator[Heard]:
        left = len(self.told)
        while left:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= event.finish is not None
            yield event

    def tell(self, event: Heard | Exception | None) -> None:
        """Called on the worker's thread. A loop that was closed has nobody who listens."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
