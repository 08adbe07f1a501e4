"""The requests of the OpenAI API, checked field by field.

A field that isn't known, or that asks for what isn't here, is refused by name; null is the same as not given.
"""

import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
import pydantic
import pydantic_core
from pydantic import BeforeValidator, Field

from llm_jax.config import UserError, nearest
from llm_jax.data.templates import CLOSE, Message
from llm_jax.inference.batching import Request
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.sampling import Sampling
from llm_jax.inference.tools import Tool, introduced

CANDIDATES = 20  # the most that are told of at a place
ANSWERS = 128  # the most that one request asks for
STOPS = 16  # texts that end an answer

# Fields of the API that aren't here, with the values that ask for nothing.
ABSENT: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
}


class RefusedError(UserError):
    """A request that isn't answered: its HTTP status, and the field and code that the API tells with it."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class Body(pydantic.BaseModel):
    """A JSON object with known fields of the right types."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        return {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The request in a body; raises RefusedError."""
        try:
            given = pydantic_core.from_json(data, allow_inf_nan=False)
        except ValueError as error:
            raise RefusedError(f"the body is not JSON: {error}") from None
        for name, harmless in ABSENT.items() if isinstance(given, dict) else ():
            if (value := given.pop(name, None)) is not None and value not in harmless:
                raise RefusedError(f"{name} is not supported here", param=name)
        try:
            return cls.model_validate(given)
        except pydantic.ValidationError as error:
            first = error.errors(include_url=False)[0]
            param = str(first["loc"][0]) if first["loc"] else None
            raise RefusedError(cls._plainly(first), param=param) from None

    @classmethod
    def _plainly(cls, error: Mapping[str, Any]) -> str:
        """pydantic's complaint as one line in plain words."""
        place, kind = ".".join(map(str, error["loc"])), error["type"]
        if kind == "extra_forbidden":
            return f"no field {place!r}" + (
                f"; {nearest(place, cls.model_fields)}" if "." not in place else ""
            )
        if kind == "missing":
            return f"{place} is missing"
        words = str(error["ctx"]["error"]) if kind == "value_error" else error["msg"].lower()
        return f"{place or 'the body'}: {words}"


# ---- values that may be written in several ways ----


def _texts(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[str | list[int]]:
    """A text, texts, ids or lists of ids, as texts and lists of ids."""
    one = isinstance(value, str) or (isinstance(value, list) and any(map(_is_id, value)))
    found = [value] if one else value
    if not isinstance(found, list) or not found or not all(map(_is_prompt, found)):
        raise ValueError("it is a text, a list of texts, a list of token ids or a list of such lists")
    return found


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_is_id, value)))


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _role(value: Any) -> Any:
    """What a developer says is the system's word under its newer name."""
    return "system" if value == "developer" else value


def _content(value: Any) -> Any:
    """A text, or parts that are texts, as one text."""
    if not isinstance(value, list):
        return value
    if not all(isinstance(part, dict) and part.keys() == {"type", "text"} for part in value) or not all(
        part["type"] == "text" and isinstance(part["text"], str) for part in value
    ):
        raise ValueError('its parts are {"type": "text", "text": …}; nothing else is read here')
    return "".join(part["text"] for part in value)


def _biases(value: Any) -> Any:
    if not isinstance(value, dict) or not all(token.isdecimal() for token in value):
        raise ValueError("it maps token ids to numbers")
    return {int(token): bias for token, bias in value.items()}


def _hosted(value: Any) -> Any:
    tools = value if isinstance(value, list) else []
    if any(isinstance(tool, dict) and tool.get("type") == "function" for tool in tools):
        raise ValueError(
            "a client's functions are not supported here, only {\"type\": NAME} of the server's own"
        )
    return value


# ---- the requests ----


class Turn(Body):
    """What one side said, the assistant perhaps nothing; templates may use a name."""

    role: Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)] = ""
    name: str | None = None

    @pydantic.model_validator(mode="after")
    def _said(self) -> Self:
        if self.role != "assistant" and "content" not in self.model_fields_set:
            raise ValueError("content is missing")
        return self


class StreamOptions(Body):
    include_usage: bool = False


class Hosted(Body):
    """A tool of this server, by its name, in the manner of what OpenAI hosts."""

    type: str


class Conversation(Body):
    """What a model is told. tools: which of the server's own it may call."""

    model: str
    messages: list[Turn] = Field(min_length=1)
    tools: Annotated[list[Hosted], BeforeValidator(_hosted)] = []
    tool_choice: Literal["auto", "none"] = "auto"

    def toolbox(self, there: Mapping[str, Tool]) -> dict[str, Tool]:
        """Those of the tools `there` that may be called; raises RefusedError for others."""
        names = [tool.type for tool in self.tools]
        for name in names:
            if name not in there:
                raise RefusedError(f"no tool {name!r} on this server; {nearest(name, there)}", param="tools")
        return {name: there[name] for name in names} if self.tool_choice == "auto" else {}

    def turns(self, tools: Mapping[str, Tool]) -> list[Message]:
        return introduced([turn.model_dump(exclude_none=True) for turn in self.messages], tools)


class Sampled(Body):
    """What chats and completions share; sampling as the API has it, and the settings it lacks."""

    model: str
    n: int = Field(1, ge=1, le=ANSWERS)
    max_tokens: int | None = None
    stop: Annotated[list[str], BeforeValidator(_texts), Field(max_length=STOPS)] = []
    seed: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_biases)] = {}
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    user: str = ""  # whoever it is, and whatever for, the answer is the same
    metadata: dict[str, str] = {}

    def sampling(self) -> Sampling:
        """Without a seed, another one each time."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias")
        seed = uuid.uuid4().int % (1 << 32) if self.seed is None else self.seed
        return Sampling(**{name: getattr(self, name) for name in names}, seed=seed)


class Chat(Sampled, Conversation):
    """POST /v1/chat/completions"""

    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=CANDIDATES)

    def prompts(
        self,
        speaker: Speaker,
        longest: int,
        tools: Mapping[str, Tool] | None = None,
        said: Sequence[Message] = (),
    ) -> list[Request]:
        """What asks for the answers, one for each prompt; longest: an answer whose length isn't limited.

        tools: that may be called. said: calls that were made, and their results.
        """
        if tools and self.n > 1:
            raise RefusedError(f"n is {self.n}; with tools it is 1", param="n")
        if self.top_logprobs and not self.logprobs:
            raise RefusedError("top_logprobs comes with logprobs: true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RefusedError("max_completion_tokens is max_tokens: give one of them", param="max_tokens")
        given = (self.max_tokens, self.max_completion_tokens, longest)
        most = next(tokens for tokens in given if tokens is not None)
        stops = (*self.stop, *[CLOSE] * bool(tools))
        return [speaker.request([*self.turns(tools or {}), *said], self.sampling(), most, stops)]


class Completion(Sampled):
    """POST /v1/completions"""

    prompt: Annotated[list, BeforeValidator(_prompts)]
    max_tokens: int = 16
    logprobs: int | None = Field(None, ge=0, le=CANDIDATES)
    echo: bool = False

    def prompts(self, speaker: Speaker, longest: int) -> list[Request]:
        """What asks for the answers, one for each prompt."""
        if self.echo and self.logprobs is not None:
            raise RefusedError(
                "logprobs with echo is not supported: llm_jax.score tells a prompt's", param="echo"
            )
        if (count := len(self.prompt) * self.n) > ANSWERS:
            raise RefusedError(f"{count} answers: one request asks for {ANSWERS} at most", param="prompt")
        opened, sampling = speaker.opened, self.sampling()
        ids = [
            opened.encode(text) if isinstance(text, str) else np.array(text, np.int32) for text in self.prompt
        ]
        return [
            Request(prompt, sampling, self.max_tokens, opened.stop_ids, tuple(self.stop)) for prompt in ids
        ]
