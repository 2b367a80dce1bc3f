"""What the pack's pages ask ComfyUI's server for, besides nodes."""

from __future__ import annotations

from asyncio import to_thread
from urllib.parse import urlsplit

from aiohttp import web

from ..trainers.clearing import clear_caches
from . import host


def add_routes() -> None:
    host.add_post_route("/atelier/cache/clear", clear_cache)


async def clear_cache(request: web.Request) -> web.Response:
    """`{"what": "latents"}` to `{"freed": bytes}`, or with a status of 4xx to `{"error": text}`.

    A request of another site's page is refused: a browser sends that by itself. While a graph runs
    nothing is removed, since it may be reading.
    """
    if not _is_same_site(request):
        return _refusal(403, "Only a page of this ComfyUI may clear its caches.")
    try:
        body = await request.json() if request.content_type == "application/json" else None
        what = body["what"]  # pyright: ignore[reportOptionalSubscript]
    except (ValueError, LookupError, TypeError):
        return _refusal(400, "The request must be JSON that says what to clear.")
    if host.is_busy():
        return _refusal(
            409, "A graph is running. Wait until it is done, or cancel it, then clear the cache."
        )
    try:
        freed = await to_thread(clear_caches, host.atelier_output() / "cache", what)
    except ValueError as error:
        return _refusal(400, str(error))
    return web.json_response({"freed": freed})


def _is_same_site(request: web.Request) -> bool:
    """Whether it comes from our own page, or from no page. ComfyUI itself looks only on localhost,
    and not with --enable-cors-header."""
    origin = request.headers.get("Origin")
    return origin is None or urlsplit(origin).netloc.lower() == request.host.lower()


def _refusal(status: int, error: str) -> web.Response:
    return web.json_response({"error": error}, status=status)
