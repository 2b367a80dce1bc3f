"""The scripts of developers, as far as they need no server."""

import json
from pathlib import Path
from types import SimpleNamespace

import comfy_server
import environment
import pytest
import workflow
from comfy_server import Event, GraphError
from dev import build_parser

OBJECT_INFO = {
    "KSampler": {"input": {"required": {"steps": ["INT", {}], "cfg": ["FLOAT", {}]}}},
    "Train": {
        "input": {
            "required": {"name": ["STRING", {}], "mode": [["a", "b"], {}]},
            "optional": {"mode.deep": ["INT", {}], "keep": ["BOOLEAN", {}]},
        }
    },
}


def make_graph() -> workflow.Graph:
    return {
        "3": {"class_type": "KSampler", "inputs": {"steps": 20}, "_meta": {"title": "FLUX.1 dev"}},
        "7": {"class_type": "Train", "inputs": {"name": "a"}, "_meta": {"title": "Train"}},
        "8": {"class_type": "KSampler", "inputs": {"steps": 20}},
    }


@pytest.mark.parametrize(
    ("setting", "node_id", "input_name", "value"),
    [
        ("3.steps=5", "3", "steps", 5),
        ("FLUX.1 dev.steps=5", "3", "steps", 5),
        ("FLUX.1 dev.cfg=1", "3", "cfg", 1.0),
        ("Train.name=5", "7", "name", "5"),
        ("Train.name=a=b", "7", "name", "a=b"),
        ("Train.mode=b", "7", "mode", "b"),
        ("Train.mode.deep=4", "7", "mode.deep", 4),
        ("Train.keep=true", "7", "keep", True),
    ],
)
def test_set_finds_the_node_and_takes_the_type_of_the_input(
    setting: str, node_id: str, input_name: str, value: object
) -> None:
    graph = make_graph()
    workflow.apply_setting(graph, setting, OBJECT_INFO)
    assert graph[node_id]["inputs"][input_name] == value
    assert type(graph[node_id]["inputs"][input_name]) is type(value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps=5", "takes NODE.INPUT=VALUE, but got 'steps=5'"),
        ("3.steps", "takes NODE.INPUT=VALUE"),
        ("Painter.steps=5", "No node is called 'Painter'; the workflow has KSampler, Train"),
        ("KSampler.steps=5", r"'KSampler' names 2 nodes: use an id \(3, 8\)"),
        ("3.stepz=5", "KSampler has no input 'stepz'; it has cfg, steps"),
        ("3.steps=many", "3.steps takes a value of type INT, not 'many'"),
        ("Train.keep=perhaps", "Train.keep takes a value of type BOOLEAN, not 'perhaps'"),
    ],
)
def test_a_wrong_set_ends_in_one_sentence(setting: str, message: str) -> None:
    with pytest.raises(workflow.WorkflowError, match=message):
        workflow.apply_setting(make_graph(), setting, OBJECT_INFO)


def test_a_workflow_file_that_is_missing_or_no_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(workflow.WorkflowError, match="no workflow file"):
        workflow.load(tmp_path / "none.json", {})
    (tmp_path / "bad.json").write_text("{", encoding="utf-8")
    with pytest.raises(workflow.WorkflowError, match="is not JSON"):
        workflow.load(tmp_path / "bad.json", {})


def test_a_workflow_with_an_unknown_node_names_it() -> None:
    drawn = {"nodes": [{"id": 1, "type": "Unheard"}, {"id": 2, "type": "Note"}], "links": []}
    with pytest.raises(workflow.WorkflowError, match=r"has no node Unheard\."):
        workflow.to_api(drawn, OBJECT_INFO)


def test_a_workflow_in_api_form_is_taken_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(make_graph()), encoding="utf-8")
    assert workflow.load(path, OBJECT_INFO) == make_graph()


def test_an_error_of_a_node_becomes_a_sentence_with_its_title() -> None:
    data = {"node_id": "7", "exception_message": "The folder is empty.\n"}
    with pytest.raises(GraphError, match=r"^Train \(7\): The folder is empty\.$"):
        comfy_server.is_last(Event("execution_error", data), make_graph())


def test_a_progress_text_is_read_from_its_binary_message() -> None:
    message = b"\0\0\0\3" + b"\0\0\0\2" + b"42" + "Verlust 0,5 …".encode()
    event = comfy_server.parse_message(message)
    assert event == Event("progress_text", {"node": "42", "text": "Verlust 0,5 …"})
    assert comfy_server.parse_message(b"\0\0\0\1\0\0\0\2picture") is None


def test_a_folder_that_is_no_comfyui_is_refused(tmp_path: Path) -> None:
    with pytest.raises(environment.SetupError, match=r"holds no main\.py"):
        environment.find_comfyui(tmp_path)


def test_a_pack_in_custom_nodes_uses_the_comfyui_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "comfy").mkdir()
    (tmp_path / "main.py").touch()
    monkeypatch.setattr(environment, "ROOT", tmp_path / "custom_nodes" / "any_name")
    assert environment.find_comfyui(None) == tmp_path
    monkeypatch.setattr(environment, "ROOT", tmp_path / "elsewhere" / "any_name")
    assert environment.find_comfyui(None) is None


def test_an_old_python_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "sys", SimpleNamespace(version_info=(3, 8, 1)))
    with pytest.raises(environment.SetupError, match=r"Python 3\.10 .* this is 3\.8\.1"):
        environment.prepare(None)


def test_versions_of_the_host_are_held_but_not_those_of_our_tools(tmp_path: Path) -> None:
    environment.write_constraints(tmp_path, {"torch": "2.1", "pytest": "8.0", "numpy": "2.0"})
    text = (tmp_path / "host-versions.txt").read_text(encoding="utf-8")
    assert text.splitlines() == ["numpy==2.0", "torch==2.1"]


def test_arguments_of_pytest_are_left_for_pytest() -> None:
    options, others = build_parser().parse_known_args(["test", "-k", "layers", "tests/x.py", "-q"])
    assert options.command == "test"
    assert others == ["-k", "layers", "tests/x.py", "-q"]
