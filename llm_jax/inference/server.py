"""Models behind the OpenAI API, and a page to talk to them: `python -m llm_jax.chat --web`.

Every model has one thread and one batch, which whoever asks joins, and leaves with the connection. It is
served on loopback, and elsewhere only with a token.
"""

import base64
import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import ipaddress
import json
import re
import socket
import time
import urllib.parse
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from llm_jax.config import UserError, nearest
from llm_jax.data.templates import Message
from llm_jax.inference import batching, guards
from llm_jax.inference.answers import ChatWriter, CompletionWriter, Writer, spelled
from llm_jax.inference.api import Body, Chat, Completion, Conversation, RefusedError
from llm_jax.inference.conversation import Speaker
from llm_jax.inference.tools import Tool
from llm_jax.inference.worker import Heard, Worker


class Server:
    """The routes over some speakers, each asked by its name.

    defaults: what the page begins with; its max_tokens ends a chat's answer that has no limit of its own.
    tools: that models may call here, where a request names them.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        defaults: Mapping[str, Any],
        tools: Mapping[str, Tool] | None = None,
    ) -> None:
        self.workers = {speaker.name: Worker(speaker) for speaker in speakers}
        self.tools = tools or {}
        self.defaults, self.since = {**defaults, "tools": list(self.tools)}, int(time.time())
        self.page, self.policy = page()

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()

    def application(self, token: str | None) -> Starlette:
        """What a web server runs. token: what whoever asks must show, if anything."""
        routes = [
            Route("/", self.show),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/chat/context", self.context, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        handlers = {UserError: _mistake, HTTPException: _no_route, Exception: _failure}
        before = [Middleware(guards.Guard, token=token), Middleware(guards.Attended)]
        return Starlette(routes=routes, exception_handlers=handlers, middleware=before)

    # ---- the routes ----

    async def show(self, request: Request) -> Response:
        headers = {
            "Content-Security-Policy": self.policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-cache",
        }
        return HTMLResponse(self.page, headers=headers)

    async def models(self, request: Request) -> Response:
        found = [self._facts(name) for name in self.workers]
        return JSONResponse({"object": "list", "data": found, "defaults": self.defaults})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._facts(self._worker(request.path_params["name"]).speaker.name))

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, Chat, ChatWriter)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, Completion, CompletionWriter)

    async def context(self, request: Request) -> Response:
        """What a model would see of a conversation: the text that is sent, and its tokens."""
        body = await _body(request, Conversation)
        speaker, turns = self._worker(body.model).speaker, body.turns(body.toolbox(self.tools))
        ids = await run_in_threadpool(speaker.ids, turns)
        tokens = [spelled(speaker.opened.tokenizer, int(token)) for token in ids]
        return JSONResponse({"model": body.model, "text": speaker.text(turns), "tokens": tokens})

    async def _answer(
        self, request: Request, kind: type[Chat] | type[Completion], writer: type[Writer]
    ) -> Response:
        body = await _body(request, kind)
        worker = self._worker(body.model)
        ask = functools.partial(body.prompts, worker.speaker, self.defaults["max_tokens"])
        tools = body.toolbox(self.tools) if isinstance(body, Conversation) else {}
        ask = functools.partial(ask, tools) if tools else ask
        prompts = await run_in_threadpool(ask)
        written = writer(body, worker.speaker, prompts)

        def again(said: Sequence[Message]) -> list[batching.Request]:
            found = ask(said)
            written.prompts += found
            return found

        requests = [dataclasses.replace(one, number=number) for one in prompts for number in range(body.n)]
        with contextlib.ExitStack() as leaving:
            asked = leaving.enter_context(worker.ask(requests))
            await asked.begun()
            events = worker.with_tools(asked, again, tools) if tools else asked
            if body.stream:
                return _Stream(written, events, leaving.pop_all())
            return JSONResponse(written.whole([heard async for heard in events]))

    def _worker(self, name: str) -> Worker:
        if name not in self.workers:
            message = f"no model {name!r}; {nearest(name, self.workers)}"
            raise RefusedError(message, 404, param="model", code="model_not_found")
        return self.workers[name]

    def _facts(self, name: str) -> dict[str, Any]:
        speaker = self.workers[name].speaker
        facts = {"id": name, "object": "model", "created": self.since, "owned_by": "llm_jax"}
        return facts | {"context": speaker.opened.context, "chat_template": speaker.template is not None}


class _Stream(StreamingResponse):
    """Server-sent events, until the answers end or the client leaves."""

    def __init__(self, written: Writer, events: AsyncIterable[Heard], leaving: contextlib.ExitStack) -> None:
        super().__init__(self._events(written, events), media_type="text/event-stream")
        self.headers["Cache-Control"] = "no-store"
        self._leaving = leaving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._leaving:
            await super().__call__(scope, receive, send)

    async def _events(self, written: Writer, events: AsyncIterable[Heard]) -> AsyncIterator[str]:
        try:
            async for heard in events:
                yield _event(written.chunk(heard))
            for chunk in written.last():
                yield _event(chunk)
            yield "data: [DONE]\n\n"
        except UserError as error:  # of what is asked behind a tool's result: it is too long, say
            yield _event(guards.told(RefusedError(str(error))))
        except Exception:  # the model's, which the log has; that it went well has been said already
            yield _event(guards.told(FAILED))


def _event(chunk: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(chunk, allow_nan=False)}\n\n"


async def _body(request: Request, kind: type[Body]) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusedError("send JSON, with the header 'Content-Type: application/json'", 415)
    return kind.parse(await request.body())


# ---- errors ----


def _mistake(request: Request, error: UserError) -> Response:
    return guards.response(error if isinstance(error, RefusedError) else RefusedError(str(error)))


def _no_route(request: Request, error: HTTPException) -> Response:
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    return guards.response(RefusedError(message, error.status_code))


def _failure(request: Request, error: Exception) -> Response:
    return guards.response(FAILED)


FAILED = RefusedError("the model failed; what went wrong stands in the server's log", 500)


# ---- the page and the socket ----


def page() -> tuple[str, str]:
    """The page, and a policy by which a browser runs nothing but what stands in it and asks nobody else."""
    text = importlib.resources.files("llm_jax.inference").joinpath("page.html").read_text()

    def hashes(tag: str) -> str:
        parts = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        sums = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in parts]
        return " ".join(f"'sha256-{sum}'" for sum in sums)

    policy = {
        "default-src": "'none'",
        "script-src": hashes("script"),
        "style-src": hashes("style"),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return text, "; ".join(f"{name} {value}" for name, value in policy.items())


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket at `host`; port 0 takes a free one.

    Raises UserError for one that isn't to be had, and for a host other than loopback without a token.
    """
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise UserError("--token is made of letters, digits and signs, without spaces")
    if not 0 <= port < 1 << 16:
        raise UserError(f"--port={port}: ports are 0 .. 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if token is None and not ipaddress.ip_address(address[0]).is_loopback:
            raise UserError(f"--host={host} lets others ask: give a --token=SECRET that they have to show")
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise UserError(f"--host={host} --port={port}: {error}; another --port may be free") from None


def runner(server: Server, token: str | None) -> uvicorn.Server:
    """What runs it on a socket: `runner(…).run(sockets=[…])`."""
    config = uvicorn.Config(
        server.application(token),
        lifespan="off",
        ws="none",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=1,  # seconds; a stream may be long
    )
    return uvicorn.Server(config)


def serve(
    speakers: Sequence[Speaker],
    listening: socket.socket,
    token: str | None,
    defaults: Mapping[str, Any],
    tools: Mapping[str, Tool],
) -> None:
    """Serves the speakers until ctrl-C."""
    server = Server(speakers, defaults, tools)
    host, port = listening.getsockname()[:2]
    secret = f"#token={urllib.parse.quote(token, safe='')}" if token else ""
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/{secret}"
    print(f"{' and '.join(server.workers)}: {where} (ctrl-C ends it)", flush=True)
    try:
        runner(server, token).run(sockets=[listening])
    except KeyboardInterrupt:
        pass
    finally:
        server.close()
