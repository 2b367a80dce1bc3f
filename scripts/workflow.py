"""Workflow files: from the UI form to the API form, and `--set NODE.INPUT=VALUE`."""

import json
from pathlib import Path
from typing import Any

from comfy_cli.workflow_to_api import WorkflowConversionError, convert_ui_to_api, is_api_format

Graph = dict[str, dict[str, Any]]
"""A workflow in API form: node id -> class_type, inputs, _meta."""


class WorkflowError(Exception):
    """The file or a setting cannot be used; the message is a sentence for the user."""


def load(path: Path, object_info: dict[str, Any]) -> Graph:
    """Read a workflow file, in UI or API form, as a graph in API form."""
    try:
        workflow = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as err:
        raise WorkflowError(f"There is no workflow file {path}.") from err
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise WorkflowError(f"{path} is not a workflow: it is not JSON ({err}).") from err
    return to_api(workflow, object_info)


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> Graph:
    if is_api_format(workflow):
        return workflow
    nodes = workflow.get("nodes", []) if isinstance(workflow, dict) else []
    subgraphs = {g["id"] for g in workflow.get("definitions", {}).get("subgraphs", [])}
    drawn_only = {"Note", "MarkdownNote", "Reroute", "PrimitiveNode"}
    known = object_info.keys() | subgraphs | drawn_only
    missing = sorted({node["type"] for node in nodes if node["type"] not in known})
    if missing:
        raise WorkflowError(f"This ComfyUI has no node {', '.join(missing)}.")
    try:
        return convert_ui_to_api(workflow, object_info)
    except WorkflowConversionError as err:
        raise WorkflowError(f"The workflow cannot be converted: {err}") from err


def apply_setting(graph: Graph, setting: str, object_info: dict[str, Any]) -> None:
    """Change one input in place. NODE is a node's id, title or class; VALUE takes its type."""
    target, equals, text = setting.partition("=")
    if not equals or "." not in target:
        raise WorkflowError(f"--set takes NODE.INPUT=VALUE, but got {setting!r}.")
    node_id, input_name = find_input(graph, target)
    class_type = graph[node_id]["class_type"]
    declared = declared_inputs(object_info.get(class_type, {}))
    if input_name not in declared and input_name not in graph[node_id]["inputs"]:
        names = ", ".join(sorted(declared))
        raise WorkflowError(f"{class_type} has no input {input_name!r}; it has {names}.")
    graph[node_id]["inputs"][input_name] = convert(text, declared.get(input_name), target)


def find_input(graph: Graph, target: str) -> tuple[str, str]:
    """Split NODE.INPUT, where both may contain dots, at the first dot that leaves a known node."""
    dots = [i for i, letter in enumerate(target) if letter == "."]
    for dot in dots:
        matches = nodes_called(graph, target[:dot])
        if len(matches) > 1:
            raise WorkflowError(
                f"{target[:dot]!r} names {len(matches)} nodes: use an id ({', '.join(matches)})."
            )
        if matches:
            return matches[0], target[dot + 1 :]
    names = ", ".join(sorted({node["class_type"] for node in graph.values()}))
    raise WorkflowError(f"No node is called {target[: dots[-1]]!r}; the workflow has {names}.")


def nodes_called(graph: Graph, name: str) -> list[str]:
    """The ids of the nodes with this id, else this title, else this class."""
    if name in graph:
        return [name]
    titled = [i for i, node in graph.items() if node.get("_meta", {}).get("title") == name]
    return titled or [i for i, node in graph.items() if node["class_type"] == name]


def declared_inputs(node_info: dict[str, Any]) -> dict[str, Any]:
    groups = node_info.get("input", {})
    return {**groups.get("required", {}), **groups.get("optional", {})}


def convert(text: str, declaration: Any, target: str) -> Any:
    """The value of this text for an input declared so: [type, options]."""
    kind = declaration[0] if declaration else None
    if kind == "BOOLEAN" and text.lower() in ("true", "false"):
        return text.lower() == "true"
    wanted = {"INT": int, "FLOAT": float}.get(kind) if isinstance(kind, str) else None
    if kind == "BOOLEAN" or wanted is not None:
        try:
            return wanted(text) if wanted else bool(("no", "yes").index(text.lower()))
        except ValueError as err:
            raise WorkflowError(f"{target} takes a value of type {kind}, not {text!r}.") from err
    return text
