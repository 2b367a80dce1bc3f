"""The English texts of the nodes, in the form of ComfyUI's translations.

They are written once, in the schemas. This copies them to locales/en/nodeDefs.json, beside which
the other languages lie: `.dev/venv/bin/python scripts/english_texts.py`, after a change of a text.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from comfy_server import ROOT, ComfyServer

ENGLISH = ROOT / "locales" / "en" / "nodeDefs.json"


def english_texts(object_info: dict[str, Any]) -> dict[str, Any]:
    """Every text of the pack's nodes by node id, from what a server says of its nodes."""
    own = f"custom_nodes.{ROOT.name}"
    return {
        node_id: texts_of(info)
        for node_id, info in sorted(object_info.items())
        if info["python_module"] == own
    }


def texts_of(info: dict[str, Any]) -> dict[str, Any]:
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": name, "tooltip": options.get("tooltip") or ""}
            for group in ("required", "optional")
            for name, (_, options) in info["input"].get(group, {}).items()
        },
        "outputs": {
            str(index): {"name": name, "tooltip": tooltip or ""}
            for index, (name, tooltip) in enumerate(outputs)
        },
    }


def main() -> None:
    comfyui = Path(os.environ.get("ATELIER_COMFYUI") or ROOT / ".dev" / "ComfyUI")
    with (
        tempfile.TemporaryDirectory() as base,
        ComfyServer(comfyui, Path(base), arguments=("--cpu",)) as server,
    ):
        texts = english_texts(server.object_info())
    ENGLISH.parent.mkdir(parents=True, exist_ok=True)
    ENGLISH.write_text(
        json.dumps(texts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
    )


if __name__ == "__main__":
    main()
