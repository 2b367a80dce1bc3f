"""The route behind the Clear cache buttons, in a real ComfyUI."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_server import ComfyServer
from graphs import train_graph, write_base, write_pictures
from training import write_entries

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def cache(server: ComfyServer) -> Path:
    """The cache folder of the server, with an entry of each kind."""
    folder = server.base_directory / "output" / "atelier" / "cache"
    for kind in ("latents", "prompts"):
        write_entries(folder / kind, {"a" * 64: {"x": torch.zeros(1000)}})
    return folder


def post(server: ComfyServer, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """(status, answer)."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(
        f"{server.url}/atelier/cache/clear", data=body, headers={**JSON, **named}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read() or b"{}")


def shards(folder: Path, kind: str) -> list[Path]:
    return list((folder / kind).glob("*.safetensors"))


@pytest.mark.parametrize("what", ["latents", "prompts"])
def test_a_cache_is_cleared_and_the_other_stays(
    server: ComfyServer, cache: Path, what: str
) -> None:
    size = sum(path.stat().st_size for path in shards(cache, what))
    body = json.dumps({"what": what}).encode()
    assert post(server, body) == (200, {"freed": size})
    assert not shards(cache, what)
    assert shards(cache, {"latents": "prompts", "prompts": "latents"}[what])


def test_a_page_of_this_server_may_clear(server: ComfyServer, cache: Path) -> None:
    assert post(server, b'{"what": "all"}', Origin=server.url)[0] == 200
    assert not shards(cache, "latents")


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        # Not on localhost, where ComfyUI leaves it to us.
        {"Origin": "https://evil.example", "Host": "comfy.example"},
        {"Origin": "http://comfy.example:1", "Host": "comfy.example:2"},
        {"Origin": "null", "Host": "comfy.example"},
    ],
)
def test_a_page_of_another_site_is_refused(
    server: ComfyServer, cache: Path, headers: dict[str, str]
) -> None:
    status, answer = post(server, b'{"what": "all"}', **headers)
    assert status == 403
    assert answer in ({}, {"error": "Only a page of this ComfyUI may do that."})
    assert shards(cache, "latents")


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"latents", b'{"what": "../cache"}', b'{"what": ["all"]}', b'{"what": 1}'],
)
def test_what_is_no_request_is_refused(server: ComfyServer, cache: Path, body: bytes) -> None:
    status, answer = post(server, body)
    assert status == 400
    assert answer["error"]
    assert shards(cache, "latents")


def test_a_form_is_refused(server: ComfyServer, cache: Path) -> None:
    """Pages of other sites can send forms and plain text without being asked."""
    assert post(server, b'{"what": "all"}', Content_Type="text/plain")[0] == 400
    assert shards(cache, "latents")


def test_nothing_is_cleared_while_a_graph_runs(server: ComfyServer, cache: Path) -> None:
    write_pictures(server.base_directory / "input" / "circles")
    write_base(server.base_directory / "models")
    graph = train_graph("circles", sampling=False, length=100_000)
    with server.listen() as events:
        prompt_id = server.queue(graph)
        next(event for event in events if event.data.get("node") == "train")
        status, answer = post(server, b'{"what": "all"}')
        server.interrupt()
    while server.history(prompt_id) is None:
        time.sleep(0.1)
    assert status == 409
    assert answer["error"].startswith("A graph is running. Wait until it is done")
    assert shards(cache, "latents")
