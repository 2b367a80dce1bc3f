"""What a server that is told to stop does with a training."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from comfy_server import ComfyServer, ServerError
from graphs import train_graph, write_base, write_pictures


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for another process")
@pytest.mark.parametrize(
    "number",
    [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM],
    ids=lambda number: number.name,
)
def test_a_server_that_exits_saves_the_run_first(
    server: ComfyServer, tmp_path: Path, number: signal.Signals
) -> None:
    # Shells start what runs in the background with SIGINT ignored, and a child inherits that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write_base(tmp_path / "models")
    write_pictures(tmp_path / "input" / "circles")
    graph = train_graph("circles", sampling=False, length=100_000)
    with ComfyServer(server.comfyui, tmp_path, arguments=("--cpu",)) as exiting:

        def stop_server(event) -> None:
            if event.type == "progress" and event.data["node"] == "train":
                os.kill(exiting.pid, number)

        with pytest.raises(ServerError):
            exiting.run(graph, stop_server)
    (run,) = (tmp_path / "output" / "atelier").glob("test-*")
    (checkpoint,) = (run / "checkpoints").iterdir()
    steps = len((run / "metrics.jsonl").read_text().splitlines())  # one line for each whole step
    assert checkpoint.name == f"step-{steps:06d}"
    assert (checkpoint / "state.json").is_file()
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"], status["error"]) == ("cancelled", steps, None)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for another process")
def test_after_a_training_sigterm_ends_the_server_at_once(
    server: ComfyServer, tmp_path: Path
) -> None:
    write_base(tmp_path / "models")
    write_pictures(tmp_path / "input" / "circles")
    with ComfyServer(server.comfyui, tmp_path, arguments=("--cpu",)) as exiting:
        exiting.run(train_graph("circles", sampling=False, length=1))
        os.kill(exiting.pid, signal.SIGTERM)
        assert exiting.wait() == -signal.SIGTERM
