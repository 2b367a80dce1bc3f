"""The pack in a real ComfyUI."""

import asyncio
import re
from pathlib import Path

import pytest
from comfy_server import ComfyServer, GraphError

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_pack_loads_without_a_traceback(server: ComfyServer) -> None:
    log = server.log_text().split("Starting server")[0]
    # torchaudio is optional to ComfyUI, which reports its absence with a traceback.
    tracebacks = re.findall(r"Traceback.*?(?=\n\n)", log, re.DOTALL)
    assert [text for text in tracebacks if "No module named 'torchaudio'" not in text] == []
    assert f"IMPORT FAILED): {ROOT}" not in log
    assert "Error while calling comfy_entrypoint" not in log


def test_every_node_of_the_pack_is_offered(server: ComfyServer) -> None:
    import atelier

    async def node_ids() -> set[str]:
        extension = await atelier.comfy_entrypoint()
        return {node.GET_SCHEMA().node_id for node in await extension.get_node_list()}

    declared = asyncio.run(node_ids())
    offered = {
        name
        for name, info in server.object_info().items()
        if info["python_module"] == f"custom_nodes.{ROOT.name}"
    }
    assert offered == declared
    assert offered
    assert all(name.startswith("Atelier") for name in offered)


def test_a_graph_runs_and_reports_its_events(server: ComfyServer) -> None:
    seen = []
    graph = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 32, "batch_size": 1, "color": 0},
        },
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "a"}},
    }
    entry = server.run(graph, lambda event: seen.append(event.type), timeout_s=60)
    image = entry["outputs"]["2"]["images"][0]
    assert server.path_of(image).read_bytes() == server.view(image)
    assert entry["status"]["completed"]
    assert {"executing", "executed", "execution_success"} <= set(seen)


def test_a_refused_graph_names_the_node_and_the_input(server: ComfyServer) -> None:
    graph = {
        "1": {
            "class_type": "EmptyImage",
            "inputs": {"width": -5, "height": 32, "batch_size": 1, "color": 0},
        },
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    }
    with pytest.raises(GraphError, match=r"EmptyImage \(1\), input width: .*-5"):
        server.run(graph, timeout_s=60)
