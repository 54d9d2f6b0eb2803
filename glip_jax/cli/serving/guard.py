"""What a request must pass before the application sees it: who sends it, how large it is, how long it takes to come."""

import asyncio
import base64
import binascii
import hmac
import logging
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from glip_jax.cli.serving.service import Limits

__all__ = ["Guard"]

logger = logging.getLogger(__name__)

_OPEN = ("/", "/health", "/openapi.json")
"""Paths without a token, beside those of the page: they tell nothing that is secret."""
_VALUES = 200_000
"""Values of a body in JSON, which is parsed while nothing else is answered: 32 MB of short ones take half a minute."""
_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)  # fmt: skip


class Guard:
    """ASGI middleware.

    400 for a foreign Host, 403 for a request that a page of another site makes, 401 without the token, 429 for more requests at a time than the queue
    has places, 413 for a body that is too large, 408 for one that does not end, 500 for a fault of the application.
    """

    def __init__(self, app: ASGIApp, limits: Limits, token: str = "", hosts: Sequence[str] = ()) -> None:
        """`token`: "" for none. `hosts`: names that the server answers to; () for any.

        A page of another site can make a browser ask a server on loopback: under a name of its own ("DNS rebinding"), and would read the answer; or
        under the server's name, and would use it without reading the answer. So with `hosts` the Host must be one of them, and the Origin, where a
        browser sends one, the server's own. A token makes both needless: such a page does not have it.
        """
        self.app, self.limits, self.token, self.hosts = app, limits, token, hosts
        self.requests = 0
        """Requests with a body at the moment."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request, or refuses it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        has_body = scope["method"] in ("POST", "PUT", "PATCH")
        refused = self._refused(scope["path"], headers)
        if refused is None and has_body and self.requests >= self.limits.queue:
            refused = 429, f"the server is busy: {self.requests} requests at a time; try again later"
        if refused is None and has_body:
            length = headers.get("content-length", "0")
            if not length.isdecimal() or int(length) > self.limits.bytes_:
                await self._discard(receive)
                refused = 413, f"the body has {length:.20} bytes: expected at most {self.limits.bytes_:,}"
        if refused is not None:
            status, reason = refused
            extra = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "1"}}.get(status, {})
            await JSONResponse({"error": reason}, status, extra)(scope, receive, send_guarded)
            return
        self.requests += has_body
        try:
            json = "json" in headers.get("content-type", "").lower()
            await self.app(scope, self._limited(receive, json) if has_body else receive, send_guarded)
        except Exception:
            # The path may have line ends, which would make lines of the log.
            logger.exception(f"{scope['method']} {scope['path']!r:.200}: a fault of the server")
            if started:
                raise
            await JSONResponse({"error": "a fault of the server, whose log has the traceback"}, 500)(
                scope, receive, send_guarded
            )
        finally:
            self.requests -= has_body

    def _refused(self, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        """Status and reason for one who may not ask."""
        if self.hosts:
            try:
                host = urlsplit(f"//{headers.get('host', '')}").hostname
            except ValueError:
                host = None
            if host not in self.hosts:
                return 400, f"the Host {host!r:.60} is not this server's: expected {' or '.join(self.hosts)}"
            origin, own = headers.get("origin"), f"http://{headers['host']}"
            if origin not in (None, own):
                return 403, f"a page of {origin!r:.60} may not ask this server: expected the Origin {own}, or none"
        if self.token and path not in _OPEN and not path.startswith("/page/"):
            if not hmac.compare_digest(_token_of(headers.get("authorization", "")).encode(), self.token.encode()):
                return (
                    401,
                    "no token, or another one: expected the header Authorization: Bearer TOKEN, of the server's --token-file",
                )
        return None

    def _limited(self, receive: Receive, json: bool) -> Receive:
        """`receive` until the body is there or too large or too late; then as it is, for the end of the connection."""
        size, values, ended, closing = 0, 0, False, time.monotonic() + self.limits.body_seconds

        async def limited() -> Message:
            nonlocal size, values, ended
            if ended:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, closing - time.monotonic()))
            except TimeoutError:
                ended = True
                raise HTTPException(
                    408, f"the body did not end within {self.limits.body_seconds:g} s: {size:,} bytes came"
                ) from None
            body = message.get("body", b"")
            size += len(body)
            values += sum(map(body.count, (b",", b"[", b"{"))) if json else 0
            ended = not message.get("more_body", False)
            large = [f"{most:,} {what}" for found, most, what in
                     ((size, self.limits.bytes_, "bytes"), (values, _VALUES, "values")) if found > most]  # fmt: skip
            if large:
                if not ended:
                    await self._discard(receive)
                ended = True
                raise HTTPException(413, f"the body has more than {large[0]}, the most that is read")
            return message

        return limited

    async def _discard(self, receive: Receive) -> None:
        """Reads on for a while: most clients read no answer before all is sent."""
        size, closing = 0, time.monotonic() + self.limits.body_seconds
        while size <= 4 * self.limits.bytes_:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, closing - time.monotonic()))
            except TimeoutError:
                return
            size += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


def _token_of(header: str) -> str:
    """The token of `Bearer TOKEN`, or of `Basic` with any user and the token as password, which Label Studio sends; "" for none."""
    kind, _, value = header.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
