"""The routes of the runs: what is on disk, and what is asked of one that trains. docs/api.md."""

from __future__ import annotations

from asyncio import to_thread
from collections.abc import Callable
from functools import partial
from typing import Any

from aiohttp import web

from ..trainers import history
from ..trainers.history import UnknownRun
from . import folders, live
from .graph_queue import GraphRefused, queue_graph, queued_graphs, sentence
from .routes import Refused, add_route, posted

_LIVE_REQUESTS = {
    "training": ("stop", "pause", "save", "sample"),
    "paused": ("resume", "stop"),
}
"""What a training of this process can be asked, in each of its states."""


def add_run_routes() -> None:
    add_route("GET", "/atelier/runs", list_runs)
    add_route("GET", "/atelier/runs/{id}", show_run)
    add_route("GET", "/atelier/runs/{id}/metrics", show_metrics)
    add_route("POST", "/atelier/runs/{id}/resume", resume_run)
    add_route("POST", "/atelier/runs/{id}/delete", delete_run)
    for what in ("stop", "pause", "save", "sample"):
        add_route("POST", f"/atelier/runs/{{id}}/{what}", partial(ask_training, what))


async def list_runs(request: web.Request) -> web.Response:
    return web.json_response({"runs": await _read(history.list_runs)})


async def show_run(request: web.Request) -> web.Response:
    run = await _read(history.run_details, _id(request))
    return web.json_response(run | {"can": _possible(run)})


async def show_metrics(request: web.Request) -> web.Response:
    """The columns after `?since=`, a step."""
    try:
        since = int(request.query.get("since", 0))
    except ValueError:
        raise Refused(400, "The query since must be a step, such as ?since=250.") from None
    text = await _read(history.run_metrics, _id(request), since)
    return web.Response(text=text, content_type="application/json")


async def ask_training(what: Any, request: web.Request) -> web.Response:
    """Ask a training of this process for `what`."""
    await posted(request)
    run = await _read(history.run_details, _id(request))
    control = live.find(run["id"])
    if control is None or what not in _possible(run):
        raise Refused(409, _not_now(what, run))
    control.request(what)
    return await _answer(run["id"])


async def resume_run(request: web.Request) -> web.Response:
    """Let a paused training go on; else queue the graph of the run again, as the same page would:
    with the `client_id` of the body, if there is one, that page hears of its progress."""
    page = (await posted(request)).get("client_id")
    run = await _read(history.run_details, _id(request))
    control = live.find(run["id"])
    if "resume" not in _possible(run):
        raise Refused(409, _not_now("resume", run))
    if control is not None:
        control.request("resume")
        return await _answer(run["id"])
    return await _answer(run["id"], prompt_id=await _queue(run["id"], page))


async def delete_run(request: web.Request) -> web.Response:
    await posted(request)
    run = await _read(history.run_summary, _id(request))
    if live.find(run["id"]) is not None:  # its pictures may still be drawn
        raise Refused(409, f"The run {run['id']} is being trained. Stop it, then delete it.")
    return web.json_response({"freed": await _read(history.delete_run, run["id"])})


def _id(request: web.Request) -> str:
    return request.match_info["id"]


async def _read(read: Callable[..., Any], *arguments: Any) -> Any:
    """What `read` of history.py says of the runs, read beside the server's loop."""
    try:
        return await to_thread(read, folders.atelier_output(), *arguments)
    except UnknownRun as error:
        raise Refused(404, str(error)) from error
    except ValueError as error:
        raise Refused(409, str(error)) from error


async def _answer(run_id: str, **more: Any) -> web.Response:
    return web.json_response({"run": await _read(history.run_summary, run_id), **more})


def _possible(run: dict[str, Any]) -> list[str]:
    """What can be asked of a run now."""
    if live.find(run["id"]) is not None:
        possible = _LIVE_REQUESTS.get(run["state"], ())
        return [what for what in possible if what != "sample" or run["can_sample"]]
    if run["state"] in history.LIVE:  # another process trains it
        return []
    return ["resume", "delete"] if run["settings"] is not None else ["delete"]


def _not_now(what: str, run: dict[str, Any]) -> str:
    if run["state"] in history.LIVE and live.find(run["id"]) is None:
        return f"The run {run['id']} is trained by another process. Ask that one."
    if what == "resume" and run["state"] not in history.LIVE:
        return (
            f"The run {run['id']} does not keep the graph that trained it. Queue that graph again: "
            "it goes on from the last checkpoint."
        )
    if what == "sample" and run["state"] == "training":
        return (
            f"The run {run['id']} draws no sample pictures: connect Validation Settings to its "
            "Train LoRA."
        )
    return f"The run {run['id']} is {run['state']}: {what} is not possible now."


async def _queue(run_id: str, page: Any) -> str:
    """Queue the graph that trained a run, to go on; returns its prompt id."""
    kept = await _read(history.run_prompt, run_id)
    assert kept is not None  # the run has settings
    node_id, prompt = kept
    inputs = [node.get("inputs", {}) for graph in queued_graphs() for node in graph.values()]
    if any(values.get("resume") == run_id for values in inputs):
        raise Refused(409, f"The run {run_id} is in the queue already.")
    prompt[node_id]["inputs"]["resume"] = run_id
    try:
        return await queue_graph(prompt, node_id, None if page is None else str(page))
    except GraphRefused as refused:
        raise Refused(409, sentence(prompt, refused)) from refused
