"""`dev.py run`: a workflow in UI form, as the canvas saves it, through the API queue."""

import argparse
import json
from pathlib import Path

import commands
import pytest
import workflow
from comfy_server import ComfyServer

DRAWN = {
    "version": 0.4,
    "nodes": [
        {
            "id": 4,
            "type": "EmptyImage",
            "title": "A blank, v1.0",
            "mode": 0,
            "inputs": [],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [9]}],
            "widgets_values": [32, 16, 1, 255],
        },
        {
            "id": 5,
            "type": "SaveImage",
            "mode": 0,
            "inputs": [{"name": "images", "type": "IMAGE", "link": 9}],
            "outputs": [],
            "widgets_values": ["drawn"],
        },
        {"id": 6, "type": "Note", "mode": 0, "widgets_values": ["Read me."]},
    ],
    "links": [[9, 4, 0, 5, 0, "IMAGE"]],
}


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    path = tmp_path / "drawn.json"
    path.write_text(json.dumps(DRAWN), encoding="utf-8")
    return path


def test_a_drawn_workflow_is_converted(server: ComfyServer, drawn: Path) -> None:
    graph = workflow.load(drawn, server.object_info())
    assert graph.keys() == {"4", "5"}
    assert graph["4"]["inputs"] == {"width": 32, "height": 16, "batch_size": 1, "color": 255}
    assert graph["5"]["inputs"] == {"images": ["4", 0], "filename_prefix": "drawn"}


def test_run_prints_nodes_and_files(
    server: ComfyServer, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(workflow=drawn, set=["A blank, v1.0.width=48"])
    commands.run_on(server, options)
    printed = capsys.readouterr().out.splitlines()
    assert "A blank, v1.0" in printed
    saved = server.base_directory / "output" / "drawn_00001_.png"
    assert printed[-1].endswith(f": {saved}")
    assert saved.read_bytes()[16:24] == (48).to_bytes(4, "big") + (16).to_bytes(
        4, "big"
    )  # PNG width, height
