"""Who is let in, and for how long: what stands before the routes of the server."""

import hmac
import ipaddress
import urllib.parse
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm_jax.inference.api import RefusedError

LARGEST = 8 << 20  # bytes of a request


def told(error: RefusedError) -> dict[str, Any]:
    """An error as the API tells it."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    message = " ".join(str(error).split())
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def response(error: RefusedError) -> JSONResponse:
    """The same as a response of its status."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
    return JSONResponse(told(error), error.status, headers.get(error.status))


class Guard:
    """Refuses who has no token; without one, whoever doesn't ask for this machine by a name of loopback.

    A page of another site could ask too, through the browser of who runs this, be it by a name of its own
    that was made to lead here: the names it gives as Origin and Host tell.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope["path"], Headers(scope=scope))
        except RefusedError as error:
            await response(error)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _check(self, path: str, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token is None and not _is_loopback(host):
            raise RefusedError(f"this server is asked as localhost, not as {host!r}", 403)
        if origin is not None and origin.partition("://")[2] != host:
            raise RefusedError(f"pages of {origin!r} may not ask this server", 403)
        kind, _, given = headers.get("authorization", "").partition(" ")
        if self.token is not None and path.startswith("/v1"):
            same = hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode())
            if kind.lower() != "bearer" or not same:
                message = "the token is missing or wrong: send it as 'Authorization: Bearer TOKEN'"
                raise RefusedError(message, 401, code="invalid_api_key")


def _is_loopback(host: str) -> bool:
    try:
        name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Attended:
    """Reads the body, then ends what is done for a client when it goes away."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
            if len(body) > LARGEST:
                error = RefusedError(f"the request is longer than {LARGEST:,} bytes", 413)
                return await response(error)(scope, receive, send)
        read = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Message:
            if not read:
                await anyio.sleep_forever()
            return read.pop()

        async with anyio.create_task_group() as group:

            async def leave() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(leave)
            await self.app(scope, once, send)
            group.cancel_scope.cancel()
