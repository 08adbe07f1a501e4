"""What a model can be asked in an evaluation, and what it answers. Both are plain values that JSON keeps."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from llm_jax.config import UserError
from llm_jax.data.cache import digest
from llm_jax.inference.opening import Opened
from llm_jax.inference.sampling import Sampling

ASSUMED_CONTEXT = 4096  # of a model whose own isn't known


@dataclasses.dataclass(frozen=True)
class LogLikelihood:
    """How probable is `continuation` after `context`? written: a chat template wrote the context, with all
    its special tokens. apart: no token reaches over the boundary, as turns are taught and said.
    """

    context: str
    continuation: str
    written: bool = False
    apart: bool = False


@dataclasses.dataclass(frozen=True)
class Rolling:
    """How probable is a text from its beginning, however long it is?"""

    text: str


@dataclasses.dataclass(frozen=True)
class Generate:
    """How does a prompt go on, up to a stop text, the model's own end, or `max_tokens`?"""

    prompt: str
    stops: tuple[str, ...] = ()
    max_tokens: int = 256
    sampling: Sampling = Sampling()
    written: bool = False


Request = LogLikelihood | Rolling | Generate


class Scored(NamedTuple):
    """nats: minus the log-probability of `tokens` tokens; greedy: each was the most probable at its place.

    cut: tokens that were left out at the beginning since the model's context is shorter.
    """

    nats: float
    tokens: int
    greedy: bool
    cut: int = 0


class Generated(NamedTuple):
    """finish: "stop" or "length"; cut as in `Scored`; stopped_at: the stop text that ended it, if any."""

    text: str
    finish: str
    tokens: int
    cut: int = 0
    stopped_at: str = ""


Answered = Scored | Generated


def key(request: Request) -> str:
    """What tells a request from any other."""
    return digest([type(request).__name__, dataclasses.asdict(request)])


def answer_of(request: Request, values: list[Any]) -> Answered:
    """The answer that JSON has kept as a list."""
    return Generated(*values) if isinstance(request, Generate) else Scored(*values)


class Part(NamedTuple):
    """One pass over tokens [T] of which the last `count` are scored, each given all those before it."""

    tokens: np.ndarray
    count: int


def parts(request: LogLikelihood | Rolling, opened: Opened) -> tuple[list[Part], int]:
    """The passes that a request needs, and how many tokens were cut at its beginning."""
    room = (opened.context or ASSUMED_CONTEXT) + 1  # the last token is only predicted
    if isinstance(request, Rolling):
        return _windows(encode(opened, request.text, special=False), beginning(opened), room), 0
    if not request.continuation:
        raise UserError("a continuation is empty: there is nothing to score")
    context, following = pair(opened, request)
    if len(following) >= room:
        raise UserError(f"a continuation has {len(following):,} tokens, and the model reads {room - 1:,}")
    whole = np.concatenate([context, following])
    return [Part(whole[-room:], len(following))], max(0, len(whole) - room)


def fits(request: Request, opened: Opened) -> bool:
    """Whether the model reads as many tokens as are to be scored at once; all else can be cut."""
    room = opened.context or ASSUMED_CONTEXT
    if not isinstance(request, LogLikelihood) or 4 * len(request.continuation.encode()) < room:
        return True  # without counting: hardly a tokenizer makes so many tokens of a byte
    return len(pair(opened, request)[1]) <= room


def pair(opened: Opened, request: LogLikelihood) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of context and continuation, as a model has met them: in turns apart, in a text together.

    In a text, spaces at the end of the context belong to the continuation, since tokens begin with them; what
    is left of the whole after as many tokens as the context has alone is the continuation (as
    lm-evaluation-harness has it). An empty context is the beginning of a text.
    """
    if request.apart:
        following = encode(opened, request.continuation, special=False)
        return encode(opened, request.context, not request.written), following
    context = request.context.rstrip()
    if not context:
        return beginning(opened)[None], encode(opened, request.context + request.continuation, False)
    whole = encode(opened, request.context + request.continuation, not request.written)
    # A merge across the boundary may leave nothing behind it: the last token is then the continuation.
    start = min(len(encode(opened, context, not request.written)), len(whole) - 1)
    return (whole[:start] if start else beginning(opened)[None]), whole[start:]


def encode(opened: Opened, text: str, special: bool = True) -> np.ndarray:
    """Token ids; special: with what a text begins with. Raises UserError without a tokenizer."""
    if opened.tokenizer is None:
        raise UserError(f"{opened.name} has no tokenizer, so it can't be asked about texts")
    return opened.tokenizer.encode(text, special)


def beginning(opened: Opened) -> np.ndarray:
    """The token that stands before a text: the one that was set, bos, or the end of the one before."""
    if opened.first is not None:
        return np.int32(opened.first)
    roles = [opened.tokenizer.id_of(role) for role in ("bos_token", "eos_token")] if opened.tokenizer else []
    found = [token for token in (*roles, *opened.stop_ids) if token is not None]
    if not found:
        raise UserError(f"{opened.name} has no token that begins a text")
    return np.int32(found[0])


def _windows(tokens: np.ndarray, first: np.ndarray, room: int) -> list[Part]:
    """Windows in which every token is scored once; the last reaches back as far as it can."""
    whole, out = np.concatenate([first[None], tokens]), []
    for start in range(0, len(tokens), room - 1):
        end = min(start + room, len(whole))
        out.append(Part(whole[max(0, end - room) : end], end - start - 1))
    return out
