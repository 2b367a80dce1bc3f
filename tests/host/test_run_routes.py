"""The routes of the runs, in a real ComfyUI, and the client script that uses them."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from comfy_server import ROOT, ComfyServer
from graphs import Graph, train_graph, write_base, write_pictures
from safetensors.torch import load_file

JSON = {"Content-Type": "application/json"}
FOREVER = 100_000


def ask(server: ComfyServer, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """(status, answer); a POST if there is a body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, {**JSON, **named})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        content = error.read()
        is_json = error.headers.get_content_type() == "application/json"
        return error.code, json.loads(content) if is_json else {}


def wait_for(what: Callable[[], Any], seconds: float = 60) -> Any:
    """What it gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)
    return found


def run_of(server: ComfyServer, name: str) -> dict[str, Any]:
    """The details of the run that has this name; empty if there is none."""
    runs = ask(server, "/atelier/runs")[1]["runs"]
    found = [run["id"] for run in runs if run["name"] == name]
    return ask(server, f"/atelier/runs/{found[0]}")[1] if found else {}


def wait_for_state(server: ComfyServer, name: str, state: str, step: int = 0) -> dict[str, Any]:
    def found() -> dict[str, Any] | None:
        run = run_of(server, name)
        return run if run and run["state"] == state and run["step"] >= step else None

    return wait_for(found)


def is_idle(server: ComfyServer) -> bool:
    queue = server.get("/queue")
    return not queue["queue_running"] and not queue["queue_pending"]


@pytest.fixture
def pictures(server: ComfyServer) -> Iterator[str]:
    """A folder of pictures on the server, with the base model; the queue is empty in the end."""
    write_pictures(server.base_directory / "input" / "routes")
    write_base(server.base_directory / "models")
    yield "routes"
    server.post("/queue", {"clear": True})
    if not is_idle(server):
        server.interrupt()
    wait_for(lambda: is_idle(server))


@pytest.fixture
def finished(server: ComfyServer, pictures: str) -> dict[str, Any]:
    """A run of three steps with two pictures."""
    graph = train_graph(pictures, name="finished", sample_every=2)
    server.run(graph)
    return run_of(server, "finished")


def test_a_finished_run_is_found_with_all_that_belongs_to_it(
    server: ComfyServer, finished: dict[str, Any]
) -> None:
    assert (finished["state"], finished["step"], finished["num_steps"]) == ("finished", 3, 3)
    assert finished["can"] == ["resume", "delete"]
    assert finished["settings"]["rank"] == 4
    assert "model" not in finished["settings"]
    assert finished["checkpoints"] == [3]
    folder = Path(finished["path"])
    assert folder == server.base_directory / "output" / finished["folder"]
    assert {file["path"]: file["bytes"] for file in finished["files"]} == {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert [sample["step"] for sample in finished["samples"]] == [0, 2, 3]
    for view in [*finished["samples"], finished["thumbnail"], finished["lora"]]:
        asked = {name: view[name] for name in ("filename", "subfolder", "type")}
        assert server.view(asked) == server.path_of(asked).read_bytes()


def test_metrics_are_those_of_the_file(server: ComfyServer, finished: dict[str, Any]) -> None:
    text = (Path(finished["path"]) / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    path = f"/atelier/runs/{finished['id']}/metrics"
    status, answer = ask(server, path)
    assert status == 200
    assert answer["loss"] == [line["loss"] for line in lines]
    assert (answer["step"], answer["num_steps"]) == ([1, 2, 3], 3)
    assert ask(server, f"{path}?since=2")[1]["loss"] == [lines[-1]["loss"]]
    for wrong in ("two", "", "1.5", "1e3"):
        status, answer = ask(server, f"{path}?since={wrong}")
        assert (status, answer["error"][:15]) == (400, "The query since")


@pytest.mark.parametrize("end", ["", "/metrics", "/stop", "/resume", "/delete"])
@pytest.mark.parametrize(
    "run_id",
    [
        "nothing",
        "..",
        "%2e%2e",
        "%2e%2e%2fatelier",
        "..%2f..%2finput",
        "%2fetc%2fpasswd",
        "cache",
        "a%00b",
        "C:%5cWindows",
        "FINISHED",
    ],
)
def test_what_is_no_run_is_not_found(
    server: ComfyServer, finished: dict[str, Any], run_id: str, end: str
) -> None:
    run_id = finished["id"].upper() if run_id == "FINISHED" else run_id
    body = None if end in ("", "/metrics") else {}
    status, answer = ask(server, f"/atelier/runs/{run_id}{end}", body)
    assert status == 404 or (status == 405 and ".." in urllib.parse.unquote(run_id))
    assert (Path(finished["path"]) / "run.json").exists()
    if "." not in urllib.parse.unquote(run_id):  # those are another path already in the request
        assert answer["error"].startswith("There is no run ")


@pytest.mark.parametrize("what", ["stop", "pause", "resume", "save", "sample", "delete"])
def test_pages_of_other_sites_and_forms_are_refused(
    server: ComfyServer, finished: dict[str, Any], what: str
) -> None:
    path = f"/atelier/runs/{finished['id']}/{what}"
    foreign = {"Origin": "https://evil.example", "Host": "comfy.example"}
    assert ask(server, path, {}, **foreign) == (
        403,
        {"error": "Only a page of this ComfyUI may do that."},
    )
    for body, kind in [(b"{}", "text/plain"), (b"a=1", "application/x-www-form-urlencoded")]:
        assert ask(server, path, body, Content_Type=kind)[0] == 400
    for body in (b"", b"[]", b"{", b'"x"'):
        assert ask(server, path, body)[0] == 400
    assert is_idle(server)
    assert (Path(finished["path"]) / "run.json").exists()


@pytest.mark.parametrize("what", ["stop", "pause", "save", "sample"])
def test_a_finished_run_hears_nothing(
    server: ComfyServer, finished: dict[str, Any], what: str
) -> None:
    status, answer = ask(server, f"/atelier/runs/{finished['id']}/{what}", {})
    assert status == 409
    assert answer["error"] == (f"The run {finished['id']} is finished: {what} is not possible now.")


def test_a_run_is_deleted_and_its_lora_stays(server: ComfyServer, pictures: str) -> None:
    server.run(train_graph(pictures, name="deleted", sampling=False))
    run = run_of(server, "deleted")
    status, answer = ask(server, f"/atelier/runs/{run['id']}/delete", {})
    assert (status, answer) == (200, {"freed": sum(file["bytes"] for file in run["files"])})
    assert not Path(run["path"]).exists()
    assert server.path_of(run["lora"]).exists()
    assert run_of(server, "deleted") == {}
    assert ask(server, f"/atelier/runs/{run['id']}/delete", {})[0] == 404


def test_a_training_is_paused_saved_sampled_and_stopped(server: ComfyServer, pictures: str) -> None:
    def post(what: str) -> tuple[int, Any]:
        return ask(server, f"/atelier/runs/{run['id']}/{what}", {})

    graph = train_graph(pictures, name="live", length=FOREVER)
    prompt_id = server.queue(graph)
    run = wait_for_state(server, "live", "training", step=2)
    assert run["can"] == ["stop", "pause", "save", "sample"]
    assert (run["node"], run["num_steps"]) == ("train", FOREVER)
    refused = f"The run {run['id']} is being trained. Stop it, then delete it."
    assert post("delete") == (409, {"error": refused})
    assert post("resume")[0] == 409

    status, answer = post("pause")
    assert (status, answer["run"]["id"]) == (200, run["id"])
    paused = wait_for_state(server, "live", "paused")
    assert paused["can"] == ["resume", "stop"]
    assert paused["checkpoints"][-1] == paused["step"]
    assert post("save")[0] == post("pause")[0] == 409
    time.sleep(0.5)
    assert run_of(server, "live")["step"] == paused["step"]

    assert post("resume")[0] == 200
    wait_for_state(server, "live", "training", step=paused["step"] + 2)
    assert post("save")[0] == 200
    saved = wait_for(lambda: run_of(server, "live")["lora"])
    assert load_file(server.path_of(saved))
    assert post("sample")[0] == 200
    drawn = wait_for(lambda: run_of(server, "live")["samples"])
    assert server.view({name: drawn[0][name] for name in ("filename", "subfolder", "type")})

    assert post("stop")[0] == 200
    wait_for(lambda: server.history(prompt_id))
    stopped = run_of(server, "live")
    assert (stopped["state"], stopped["can"]) == ("stopped", ["resume", "delete"])
    assert stopped["checkpoints"][-1] == stopped["step"] > paused["step"]
    assert stopped["lora"]["filename"].endswith(f"-{stopped['step']}.safetensors")
    assert server.path_of(stopped["lora"]).exists()


def test_a_training_without_pictures_says_so(server: ComfyServer, pictures: str) -> None:
    server.queue(train_graph(pictures, name="blind", sampling=False, length=FOREVER))
    run = wait_for_state(server, "blind", "training", step=1)
    assert "sample" not in run["can"]
    status, answer = ask(server, f"/atelier/runs/{run['id']}/sample", {})
    assert status == 409
    assert answer["error"].startswith(f"The run {run['id']} draws no sample pictures: connect")


def stopped_run(server: ComfyServer, graph: Graph) -> dict[str, Any]:
    """A run that was stopped and kept."""
    name = graph["train"]["inputs"]["name"]
    prompt_id = server.queue(graph)
    run = wait_for_state(server, name, "training", step=1)
    assert ask(server, f"/atelier/runs/{run['id']}/stop", {})[0] == 200
    wait_for(lambda: server.history(prompt_id))
    return run_of(server, name)


def test_a_stopped_run_goes_on_with_the_graph_that_it_keeps(
    server: ComfyServer, pictures: str
) -> None:
    run = stopped_run(server, train_graph(pictures, name="again", sampling=False, length=FOREVER))
    path = f"/atelier/runs/{run['id']}"
    for _ in range(2):  # ComfyUI has the second graph in its cache
        with server.listen() as events:
            status, answer = ask(server, f"{path}/resume", {"client_id": server.client_id})
            assert (status, answer["run"]["id"]) == (200, run["id"])
            heard = next(event for event in events if event.type == "execution_start")
            assert heard.data["prompt_id"] == answer["prompt_id"]
        wait_for_state(server, "again", "training", step=run["step"] + 1)
        assert ask(server, f"{path}/stop", {})[0] == 200
        entry = wait_for(lambda prompt_id=answer["prompt_id"]: server.history(prompt_id))
        assert entry["status"]["status_str"] == "success"
        assert entry["outputs"]["train"]["atelier_run"] == [run["id"]]
        before, run = run, run_of(server, "again")
        assert run["step"] > before["step"]


def test_a_run_is_queued_once(server: ComfyServer, pictures: str) -> None:
    run = stopped_run(server, train_graph(pictures, name="once", sampling=False, length=FOREVER))
    server.queue(train_graph(pictures, name="before", sampling=False, length=FOREVER))
    wait_for_state(server, "before", "training")
    assert ask(server, f"/atelier/runs/{run['id']}/resume", {})[0] == 200
    status, answer = ask(server, f"/atelier/runs/{run['id']}/resume", {})
    assert (status, answer["error"]) == (409, f"The run {run['id']} is in the queue already.")


def test_a_graph_that_does_not_fit_any_more_names_the_node(
    server: ComfyServer, finished: dict[str, Any]
) -> None:
    def resume(**changes: Any) -> str:
        """The refusal after a change of the graph on disk."""
        changed = copy.deepcopy(kept)
        for name, node in changes.items():
            changed["prompt"].setdefault(name, {}).update(node)
        path.write_text(json.dumps(changed), encoding="utf-8")
        status, answer = ask(server, f"/atelier/runs/{finished['id']}/resume", {})
        assert status == 409
        return answer["error"]

    path = Path(finished["path"]) / "prompt.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    model = server.base_directory / "models" / "diffusion_models" / "tiny.safetensors"
    model.rename(model.with_suffix(".gone"))
    try:
        assert resume() == (
            "The run cannot go on: ComfyUI refuses model of its node AtelierLoadQuantizedFlux "
            "(load): The model 'tiny.safetensors' is not there any more. Press R and choose "
            "another."
        )
        titled = resume(load={"_meta": {"title": "My loader"}})
        assert "refuses model of its node My loader (load): The model 'tiny.saf" in titled
    finally:
        model.with_suffix(".gone").rename(model)
    assert resume(data={"class_type": "NoSuchNode"}) == (
        "The run cannot go on: this ComfyUI has no NoSuchNode, which its node NoSuchNode (data) "
        "is. Install the pack that has it, and resume again."
    )
    latents = {"inputs": kept["prompt"]["latents"]["inputs"] | {"vae": ["vae", 0]}}
    vae = {"class_type": "VAELoader", "inputs": {"vae_name": "gone.safetensors"}}
    assert resume(latents=latents, vae=vae) == (
        "The run cannot go on: its node VAELoader (vae) takes 'gone.safetensors' as vae_name, "
        "which is not there any more. Put it back, and resume again."
    )
    name = {"inputs": kept["prompt"]["train"]["inputs"] | {"name": "a/b"}}
    assert resume(train=name).startswith(
        "The run cannot go on: ComfyUI refuses name of its node AtelierTrainLoRA (train): The name "
        "'a/b' cannot be a file name."
    )
    lost = {"inputs": kept["prompt"]["train"]["inputs"] | {"latents": ["nowhere", 0]}}
    assert "refuses its node AtelierTrainLoRA (train): 'nowhere'." in resume(train=lost)
    assert is_idle(server)
    path.write_text("{", encoding="utf-8")
    status, answer = ask(server, f"/atelier/runs/{finished['id']}/resume", {})
    assert status == 409
    assert "does not keep the graph that trained it" in answer["error"]
    assert run_of(server, "finished")["can"] == ["delete"]
    path.write_text(json.dumps(kept), encoding="utf-8")


def test_the_client_script_trains_and_fetches_the_lora(
    server: ComfyServer, pictures: str, tmp_path: Path
) -> None:
    def fetch(graph: Graph) -> subprocess.CompletedProcess[str]:
        (tmp_path / "graph.json").write_text(json.dumps(graph), encoding="utf-8")
        script = ROOT / "scripts" / "train_client.py"
        return subprocess.run(
            [sys.executable, str(script), "graph.json", server.url],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
        )

    graph = train_graph(pictures, name="client", sampling=False, length=60)
    done = fetch(graph)
    assert done.returncode == 0, done.stderr
    run = run_of(server, "client")
    lines = done.stdout.splitlines()
    assert lines[-1] == f"finished at step 60: {run['lora']['filename']}"
    assert len(lines) > 1
    for line in lines[:-1]:
        assert re.fullmatch(r"step \d+ of 60, loss \d+\.\d{4}, \d+ s left", line)
    fetched = load_file(tmp_path / run["lora"]["filename"])
    written = load_file(server.path_of(run["lora"]))
    assert fetched.keys() == written.keys()
    assert all(fetched[name].equal(written[name]) for name in written)

    (tmp_path / run["lora"]["filename"]).unlink()
    assert fetch(graph).returncode == 0  # from disk
    assert (tmp_path / run["lora"]["filename"]).exists()

    graph["train"]["inputs"]["name"] = "a/b"
    refused = fetch(graph)
    assert refused.returncode == 1
    assert "cannot be a file name" in refused.stderr
