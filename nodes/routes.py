"""What the pack's pages and users' programs ask ComfyUI's server for, besides nodes."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from ..trainers.clearing import clear_caches
from . import folders, host

Handler = Callable[[web.Request], Awaitable[web.Response]]


class Refused(Exception):
    """A request that is answered with a status of 4xx and a sentence."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


def add_routes() -> None:
    add_route("POST", "/atelier/cache/clear", clear_cache)


def add_route(method: str, path: str, handler: Handler) -> None:
    """Answer requests by `handler`, and what it refuses by `{"error": text}`."""

    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except Refused as refused:
            return web.json_response({"error": str(refused)}, status=refused.status)

    host.add_route(method, path, answer)


async def posted(request: web.Request) -> dict[str, Any]:
    """The body of a POST request, a JSON object.

    A request of another site's page is refused: a browser sends forms and plain text by itself.
    ComfyUI itself looks only on localhost, and not with --enable-cors-header.

    Raises:
        Refused: another site's page sent it, or it is no JSON object.
    """
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != request.host.lower():
        raise Refused(403, "Only a page of this ComfyUI may do that.")
    try:
        body = await request.json() if request.content_type == "application/json" else None
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise Refused(400, "Send a JSON object, with the content type application/json.")
    return body


async def clear_cache(request: web.Request) -> web.Response:
    """`{"what": "latents"}` to `{"freed": bytes}`. While a graph runs nothing is removed, since it
    may be reading."""
    what = (await posted(request)).get("what")
    if host.is_busy():
        raise Refused(
            409, "A graph is running. Wait until it is done, or cancel it, then clear the cache."
        )
    try:
        freed = await to_thread(clear_caches, folders.atelier_output() / "cache", what)
    except (ValueError, TypeError) as error:
        raise Refused(400, str(error)) from error
    return web.json_response({"freed": freed})
