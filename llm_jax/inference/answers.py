"""The answers of the OpenAI API: whole, or as the chunks of a stream."""

import itertools
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from llm_jax.inference.api import Chat, Completion
from llm_jax.inference.batching import Request, Token
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.worker import Heard
from llm_jax.interop.tokenizer import Portable

LEAST = -9999.0  # the log-probability of what is impossible: JSON has no infinities


class Writer:
    """Writes down what is heard of the answers to one request.

    prompts: what they are answers to; each has as many as the request asks for, one after another.
    """

    prefix: str
    object: str
    chunk_object: str

    def __init__(self, body: Any, speaker: Speaker, prompts: Sequence[Request]) -> None:
        self.body, self.prompts, self.tokenizer = body, [*prompts], speaker.opened.tokenizer
        self._facts = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": speaker.name,
        }
        self._roles: dict[int, str] = {}  # who speaks in each answer
        self._written = 0  # tokens

    def whole(self, events: Iterable[Heard]) -> dict[str, Any]:
        """The body of an answer that isn't streamed."""
        answers: dict[int, list[Heard]] = {}
        for heard in events:
            turns = answers.setdefault(heard.number, [])
            if turns and turns[-1].role == heard.role:
                before = turns.pop()
                heard = heard._replace(text=before.text + heard.text, tokens=before.tokens + heard.tokens)
            turns.append(heard)
        choices = []
        for _, (*earlier, last) in sorted(answers.items()):
            self._written += sum(len(turn.tokens) for turn in earlier)
            choices.append(self._choice(last, "message"))
            if earlier:
                turns = [{"role": turn.role, "content": turn.text} for turn in earlier]
                choices[-1]["message"]["tool_turns"] = turns
        return self._facts | {"object": self.object, "choices": choices, "usage": self._usage()}

    def chunk(self, heard: Heard) -> dict[str, Any]:
        """What a stream tells of an event."""
        return self._facts | {"object": self.chunk_object, "choices": [self._choice(heard, "delta")]}

    def last(self) -> list[dict[str, Any]]:
        """What a stream ends with: the usage, if that was asked for."""
        chunk = self._facts | {"object": self.chunk_object, "choices": [], "usage": self._usage()}
        return [chunk] if self.body.stream_options.include_usage else []

    def _usage(self) -> dict[str, int]:
        sent, written = sum(len(request.prompt) for request in self.prompts), self._written
        return {"prompt_tokens": sent, "completion_tokens": written, "total_tokens": sent + written}

    def _choice(self, heard: Heard, key: str) -> dict[str, Any]:
        first = self._roles.get(heard.number) != heard.role
        self._roles[heard.number] = heard.role
        self._written += len(heard.tokens)
        return {"index": heard.number, "finish_reason": heard.finish, **self._said(heard, first, key)}

    def _said(self, heard: Heard, first: bool, key: str) -> dict[str, Any]:
        """Text and log-probabilities; first: of a turn. key: of a chat's text."""
        raise NotImplementedError


class ChatWriter(Writer):
    prefix, object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"
    body: Chat

    def _said(self, heard: Heard, first: bool, key: str) -> dict[str, Any]:
        role = {"role": heard.role} if first else {}
        logprobs = {"content": [self._token(token) for token in heard.tokens]} if self.body.logprobs else None
        return {key: {**role, "content": heard.text}, "logprobs": logprobs}

    def _token(self, token: Token) -> dict[str, Any]:
        top = [self._candidate(*candidate) for candidate in token.top[: self.body.top_logprobs]]
        return self._candidate(token.id, token.logprob) | {"top_logprobs": top}

    def _candidate(self, token: int, logprob: float) -> dict[str, Any]:
        return spelled(self.tokenizer, token) | {"logprob": max(logprob, LEAST)}


class CompletionWriter(Writer):
    prefix, object, chunk_object = "cmpl", "text_completion", "text_completion"
    body: Completion

    def __init__(self, body: Completion, speaker: Speaker, prompts: Sequence[Request]) -> None:
        super().__init__(body, speaker, prompts)
        self._offsets: dict[int, int] = {}  # characters of each answer's tokens so far

    def _said(self, heard: Heard, first: bool, key: str) -> dict[str, Any]:
        echo = self._echo(heard.number // self.body.n) if first and self.body.echo else ""
        return {"text": echo + heard.text, "logprobs": self._logprobs(heard)}

    def _echo(self, number: int) -> str:
        prompt = self.body.prompt[number]
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _logprobs(self, heard: Heard) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        names = [name(self.tokenizer, token.id) for token in heard.tokens]
        ends = list(itertools.accumulate(map(len, names), initial=self._offsets.get(heard.number, 0)))
        self._offsets[heard.number] = ends[-1]
        tops = [token.top[: self.body.logprobs] for token in heard.tokens]
        return {
            "tokens": names,
            "token_logprobs": [max(token.logprob, LEAST) for token in heard.tokens],
            "top_logprobs": [{name(self.tokenizer, i): max(p, LEAST) for i, p in top} for top in tops],
            "text_offset": ends[:-1],
        }


def spelled(tokenizer: Portable, token: int) -> dict[str, Any]:
    """A token by its id, as text and as bytes."""
    return {"id": token, "token": name(tokenizer, token), "bytes": list(tokenizer.spelling(token))}


def name(tokenizer: Portable, token: int) -> str:
    """A token as text; a part of a character is written as its bytes."""
    data = tokenizer.spelling(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
