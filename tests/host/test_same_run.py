"""Trainings one after the other in ComfyUI's queue, and what is the same run."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ComfyServer, Event, GraphError
from graphs import Graph, node, train_graph, validated, write_base, write_pictures


@pytest.fixture(scope="module")
def pictures(server: ComfyServer) -> str:
    write_base(server.base_directory / "models")
    write_pictures(server.base_directory / "input" / "queued")
    return "queued"


def run_folder(server: ComfyServer, entry: dict) -> Path:
    (run_id,) = entry["outputs"]["train"]["atelier_run"]
    return server.base_directory / "output" / "atelier" / run_id


def test_trainings_of_one_graph_and_of_several_run_one_after_the_other(
    server: ComfyServer, pictures: str
) -> None:
    def two(name: str) -> Graph:
        graph = train_graph(pictures, sampling=False, name=f"{name} one", length=2)
        second = train_graph(pictures, sampling=False, name=f"{name} two", length=2, seed=1)
        graph["second"], graph["second name"] = (
            second["train"],
            node("PreviewAny", source=["second", 2]),
        )
        return graph

    queued = [server.queue(two(name)) for name in ("first", "next")]
    deadline = time.monotonic() + 120
    while any(server.history(prompt_id) is None for prompt_id in queued):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    entries = [server.history(prompt_id) for prompt_id in queued]
    runs = []
    for entry in entries:
        assert entry is not None
        assert entry["status"]["status_str"] == "success"
        for name in ("train", "second"):
            (run_id,) = entry["outputs"][name]["atelier_run"]
            path = server.base_directory / "output" / "atelier" / run_id / "status.json"
            runs.append(json.loads(path.read_text()))
    assert [run["state"] for run in runs] == ["finished"] * 4
    times = sorted((run["started"], run["updated"]) for run in runs)
    assert all(end <= start for (_, end), (start, _) in pairwise(times))


DISPLAY = [
    {"sample_every": 1},
    {"checkpoint_every": 1},
    {"checkpoint_unit": "epochs", "keep_checkpoints": 2},
    {"sample_steps": 1, "sample_seed": 3},
    {"gradient_checkpointing": False},
]


@pytest.mark.parametrize("changed", DISPLAY, ids=lambda changed: next(iter(changed)))
def test_a_finished_run_is_answered_in_less_than_a_second(
    server: ComfyServer, pictures: str, changed: dict[str, Any]
) -> None:
    """Of the node's own time, when only what is shown or kept is changed."""
    graph = validated(pictures, train={"name": "answered"})
    first = server.run(graph)
    graph["train"]["inputs"] |= changed
    moments: dict[str, float] = {}

    def on_event(event: Event) -> None:
        if event.data.get("node") == "train" and event.type in ("executing", "executed"):
            moments[event.type] = time.monotonic()

    events: list[str] = []
    entry = server.run(graph, lambda event: (on_event(event), events.append(event.type)))
    assert not {"atelier.step", "atelier.preview"} & {*events}
    assert run_folder(server, entry) == run_folder(server, first)
    assert moments["executed"] - moments["executing"] < 1


def test_validation_is_not_part_of_a_run_and_the_name_is(
    server: ComfyServer, pictures: str
) -> None:
    plain = server.run(train_graph(pictures, sampling=False, name="identity"))
    metrics = (run_folder(server, plain) / "metrics.jsonl").read_bytes()
    watched = server.run(validated(pictures, train={"name": "identity"}))
    assert run_folder(server, watched) == run_folder(server, plain)
    assert (run_folder(server, plain) / "metrics.jsonl").read_bytes() == metrics
    other = server.run(train_graph(pictures, sampling=False, name="identity of another"))
    codes = [run_folder(server, entry).name.rpartition("-") for entry in (plain, other)]
    assert codes[0][2] == codes[1][2]
    assert [code[0] for code in codes] == ["identity", "identity of another"]


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"rank": 8}, r"rank (there 4, here 8)"),
        ({"learning_rate": 1e-3}, r"learning_rate (there 0.01, here 0.001)"),
    ],
    ids=["rank", "learning rate"],
)
def test_a_chosen_run_goes_on_or_says_what_differs(
    server: ComfyServer, pictures: str, changed: dict[str, Any], found: str
) -> None:
    first = run_folder(server, server.run(train_graph(pictures, sampling=False, name="chosen")))
    resumed = train_graph(pictures, sampling=False, name="any other", length=4, resume=first.name)
    assert run_folder(server, server.run(resumed)) == first
    graph = train_graph(
        pictures, sampling=False, **{"name": "chosen", **changed}, resume=first.name
    )
    with pytest.raises(GraphError) as caught:
        server.run(graph)
    assert f"The run {first.name} was trained differently: {found}. Set it back" in str(
        caught.value
    )
    graph["train"]["inputs"]["resume"] = "chosen-00000000"
    with pytest.raises(
        GraphError, match=r"There is no run 'chosen-00000000' any more\. Set resume"
    ):
        server.run(graph)
