"""The quickstart workflow as the demo queues it: as it is, and its pictures for other prompts."""

import copy
from typing import Any

import comfy_server
import workflow
from comfy_server import GraphError
from workflow import Graph

WORKFLOW = comfy_server.ROOT / "workflows" / "atelier_quickstart_nano.json"
TRAIN, PROMPT, BEFORE, AFTER = "AtelierTrainLoRA", "Prompt", "Before", "After"
"""Class or title of the nodes that the demo needs to find."""
LORA_NAME = "lora_name"
"""Id of the node that the demo adds, which tells the name of the LoRA file."""


def load(object_info: dict[str, Any], settings: tuple[str, ...] = ()) -> Graph:
    """The quickstart in API form; `settings` are changes such as
    "AtelierTrainLoRA.length=20"."""
    graph = workflow.load(WORKFLOW, object_info)
    for setting in settings:
        workflow.apply_setting(graph, setting, object_info)
    graph[LORA_NAME] = {
        "class_type": "PreviewAny",
        "inputs": {"source": [node_called(graph, TRAIN), 2]},
        "_meta": {"title": "Name of the LoRA"},
    }
    return graph


def node_called(graph: Graph, name: str) -> str:
    """The id of the one node with this title or class."""
    found = workflow.nodes_called(graph, name)
    if len(found) != 1:
        raise GraphError(f"{WORKFLOW.name} has {len(found)} nodes called '{name}', not one.")
    return found[0]


def with_prompts(graph: Graph, prompts: list[str]) -> Graph:
    """The graph with the branches to Before and After once more for each prompt.

    Only what depends on the prompt is repeated, each time with the next seed, under ids that
    `output_of` gives: the model is loaded and the LoRA trained once.
    """
    prompt_node = node_called(graph, PROMPT)
    repeated = branch(graph, node_called(graph, BEFORE)) | branch(graph, node_called(graph, AFTER))
    whole = dict(graph)
    for number, prompt in enumerate(prompts):
        for node_id in repeated:
            node = copy.deepcopy(graph[node_id])
            for name, value in node["inputs"].items():
                if is_link(value) and value[0] in repeated:
                    node["inputs"][name] = [copy_id(value[0], number), value[1]]
            if node_id == prompt_node:
                node["inputs"]["text"] = prompt
            if "seed" in node["inputs"]:
                node["inputs"]["seed"] += number
            whole[copy_id(node_id, number)] = node
    return whole


def branch(graph: Graph, output: str) -> set[str]:
    """The nodes on all ways from the prompt to `output`, but not the training and what it needs."""
    prompt_node, train_node = node_called(graph, PROMPT), node_called(graph, TRAIN)
    if output == prompt_node:
        return {prompt_node}
    if output == train_node:
        return set()
    sources = [value[0] for value in graph[output]["inputs"].values() if is_link(value)]
    found = set().union(*(branch(graph, source) for source in sources))
    return found | {output} if found else found


def output_of(graph: Graph, title: str, number: int) -> str:
    """The id of the node called `title` in the branch of prompt `number` of `with_prompts`."""
    return copy_id(node_called(graph, title), number)


def copy_id(node_id: str, number: int) -> str:
    return f"{node_id}.prompt{number}"


def is_link(value: Any) -> bool:
    """Whether an input's value is an output of another node: [id, index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)
