"""What a server that is told to stop does with a training."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from comfy_server import ComfyServer, ServerError
from graphs import train_graph, write_base, write_pictures


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for another process")
def test_a_server_that_exits_saves_the_run_first(server: ComfyServer, tmp_path: Path) -> None:
    write_base(tmp_path / "models")
    write_pictures(tmp_path / "input" / "circles")
    graph = train_graph("circles", sampling=False, length=100_000)
    with ComfyServer(server.comfyui, tmp_path, arguments=("--cpu",)) as exiting:

        def stop_server(event) -> None:
            if event.type == "progress" and event.data["node"] == "train":
                os.kill(exiting.pid, signal.SIGINT)

        with pytest.raises(ServerError):
            exiting.run(graph, stop_server)
    (run,) = (tmp_path / "output" / "atelier").glob("test-*")
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert checkpoint.name.startswith("step-")
    assert (checkpoint / "state.json").is_file()
