"""Queues a training in a running ComfyUI, follows it and downloads its LoRA. Copy it; docs/api.md.

    python train_client.py graph.json [http://127.0.0.1:8188]

graph.json is a graph with a Train LoRA node, from the menu Workflow > Export (API).
"""

import json
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

SERVER = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8188"


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = Request(SERVER + path, data, {"Content-Type": "application/json"})
    try:
        return json.load(urlopen(request))
    except HTTPError as error:
        sys.exit(error.read().decode())


graph = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
node = next(name for name, node in graph.items() if node["class_type"] == "AtelierTrainLoRA")
# Without a client_id, ComfyUI leaves nodes that it has in its cache out of the history.
prompt_id = ask("/prompt", {"prompt": graph, "client_id": "train_client"})["prompt_id"]
seen = 0
while not (ended := ask(f"/history/{prompt_id}")):
    time.sleep(1)
    running = [item[1] for item in ask("/queue")["queue_running"]]
    for run in ask("/atelier/runs")["runs"] if prompt_id in running else []:
        if run["state"] == "training" and run["node"] == node and run["step"] > seen:
            new = ask(f"/atelier/runs/{run['id']}/metrics?since={seen}")
            seen, steps, loss = new["step"][-1], new["num_steps"], new["loss"][-1]
            left = sum(new["seconds"]) / len(new["seconds"]) * (steps - seen)
            print(f"step {seen} of {steps}, loss {loss:.4f}, {left:.0f} s left")

status = ended[prompt_id]["status"]
if status["status_str"] != "success":
    sys.exit(status["messages"][-1][1].get("exception_message", "The training was cancelled."))
run = ask(f"/atelier/runs/{ended[prompt_id]['outputs'][node]['atelier_run'][0]}")
with urlopen(f"{SERVER}/view?{urlencode(run['lora'])}") as file:
    Path(run["lora"]["filename"]).write_bytes(file.read())
print(f"{run['state']} at step {run['step']}: {run['lora']['filename']}")
