"""ComfyUI's graphs: one in API form into its queue, or in a sentence why it is refused; and what a
node has before it."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Iterable
from typing import Any

from comfy_execution.graph_utils import is_link

from . import folders, host


class GraphRefused(Exception):
    """ComfyUI does not run a graph.

    Args:
        node_id: the node that it names, or None.
        reason: what it says of that one: type, message, details, extra_info.
    """

    def __init__(self, node_id: str | None, reason: dict[str, Any]) -> None:
        super().__init__(reason["message"])
        self.node_id, self.reason = node_id, reason


async def queue_graph(graph: dict[str, Any], node_id: str, client_id: str | None) -> str:
    """Queue a graph in API form as ComfyUI's own route does; returns its prompt id.

    Args:
        node_id: the node that is wanted. ComfyUI runs what is valid of a graph, with it or without.
        client_id: of the page that hears of the progress.

    Raises:
        GraphRefused: if that node would not run.
    """
    import execution

    from nodes import NODE_CLASS_MAPPINGS

    server = host.prompt_server()
    graph = server.trigger_on_prompt({"prompt": graph})["prompt"]
    if hasattr(server, "node_replace_manager"):  # from 2026 on
        server.node_replace_manager.apply_replacements(graph)
    for name, node in graph.items():
        # What it was when the graph ran before, which ComfyUI would not look at again.
        node.pop("is_changed", None)
        if node.get("class_type") not in NODE_CLASS_MAPPINGS:  # its versions say it differently
            raise GraphRefused(name, {"type": "missing_node_type", "message": "No such type"})
    prompt_id = str(uuid.uuid4())
    _, error, outputs, problems = await execution.validate_prompt(prompt_id, graph, None)
    if node_id not in _upstream(graph, outputs):
        named = [(name, problem["errors"][0]) for name, problem in problems.items()]
        raise GraphRefused(*named[0]) if named else GraphRefused(None, error)
    number, server.number = server.number, server.number + 1
    extra: dict[str, Any] = {"create_time": int(time.time() * 1000)}
    if client_id is not None:
        extra["client_id"] = client_id
    server.prompt_queue.put((number, prompt_id, graph, extra, outputs, {}))
    return prompt_id


def queued_graphs() -> list[dict[str, Any]]:
    """The graphs, in API form, that run or wait."""
    running, waiting = host.prompt_server().prompt_queue.get_current_queue_volatile()
    return [item[2] for item in [*running, *waiting]]


def _upstream(graph: dict[str, Any], outputs: Iterable[str]) -> set[str]:
    """The nodes that ComfyUI runs for the sake of `outputs`."""
    found: set[str] = set()
    waiting = list(outputs)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [link[0] for link in graph[name]["inputs"].values() if is_link(link)]
    return found


def sentence(graph: dict[str, Any], refused: GraphRefused) -> str:
    """Why a run cannot go on: which node ComfyUI refuses, and for what."""
    node, reason = graph.get(refused.node_id or "", {}), refused.reason
    kind = node.get("class_type")
    where = f"{node.get('_meta', {}).get('title') or kind} ({refused.node_id})"
    # The input that goes with an exception is another node's.
    is_raised = reason["type"].startswith("exception_")
    name = None if is_raised else reason.get("extra_info", {}).get("input_name")
    text = (reason.get("details") or reason["message"]).removeprefix(f"{name} - ").rstrip(".")
    if refused.node_id is None:
        return f"The run cannot go on: ComfyUI refuses its graph: {text}."
    if reason["type"] == "missing_node_type":
        return (
            f"The run cannot go on: this ComfyUI has no {kind}, which its node {where} is. Install "
            "the pack that has it, and resume again."
        )
    if reason["type"] == "value_not_in_list":
        value = reason["extra_info"]["received_value"]
        return (
            f"The run cannot go on: its node {where} takes {value!r} as {name}, which is not there "
            "any more. Put it back, and resume again."
        )
    if name is None:
        return f"The run cannot go on: ComfyUI refuses its node {where}: {text}."
    return f"The run cannot go on: ComfyUI refuses {name} of its node {where}: {text}."


def nodes_before(graph: Any, node_id: str, names: Iterable[str]) -> list[str]:
    """Hashes of what ComfyUI's graph has before some inputs of a node: all nodes with their
    settings, wherever they lie in it, and the sizes and times of the model files that they name.

    Args:
        graph: the DynamicPrompt of `io.Hidden.dynprompt`.
    """
    known: dict[str, str] = {}

    def node_hash(name: str) -> str:
        if name not in known:
            node = graph.get_node(name)
            inputs = {key: described(value) for key, value in node["inputs"].items()}
            text = json.dumps([node["class_type"], inputs], sort_keys=True, default=repr)
            known[name] = hashlib.sha256(text.encode()).hexdigest()
        return known[name]

    def described(value: Any) -> Any:
        if is_link(value):
            return [node_hash(value[0]), value[1]]
        files = folders.fingerprints(folders.files_called(value)) if isinstance(value, str) else []
        return [value, files]

    inputs = graph.get_node(node_id)["inputs"]
    return [repr(described(inputs[name])) for name in names]
