"""Processes that train, measure, draw and save in ComfyUI's modules, to be killed at any moment.

    python -P tests/support/killed_training.py COMFYUI

Each line of its input is a name of `JOBS`, a space and a folder. A process of its own trains there,
or goes on with what was trained: the run lies below output/atelier, the LoRA file in output/loras.
It answers
`started <its id>`, then `ended <how>`. The processes are forks: importing takes longer than a run.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

NUM_STEPS, CHECKPOINT_EVERY, LOOK_EVERY = 24, 3, 4
"""Steps of the run, between its checkpoints, and between pictures and losses on held out ones."""
AROUND = {"tread": [{"selection_ratio": 0.5, "start_layer": 0, "end_layer": -1}]}
JOBS: dict[str, dict[str, Any]] = {
    "dora": {
        "lora": {"rank": 16, "dora": True, "dropout": 0.1},
        "train": {
            "learning_rate": 1e-3,
            "optimizer": {"schedule": "cosine", "warmup_steps": 2, "ema_decay": 0.9},
            "flow": {"noise_offset": 0.05, "rollout": {"max_offset": 1, "ramp_steps": 20}},
            "speed": AROUND,
        },
    },
    "pissa": {
        "lora": {"rank": 8, "init": "pissa", "dropout": 0.1},
        "train": {
            "learning_rate": 1.0,
            "optimizer": {"optimizer": "prodigy_schedulefree", "warmup_steps": 2},
            "preservation": {"trigger": "caption 1", "class_word": "caption 2"},
            "speed": AROUND,
        },
    },
    "lokr": {
        "lora": {"kind": "lokr", "rank": 4, "lokr_factor": 4, "dropout": 0.1},
        "train": {
            "learning_rate": 1e-3,
            "optimizer": {"optimizer": "adamw_bf16", "schedule": "cosine_with_restarts"},
            "flow": {"rollout": {"max_offset": 4, "ramp_steps": 20, "offsets": "late"}},
        },
    },
}
"""What has a state of its own, or draws of its own: as much at once as goes together. The pictures
are `caption 0` to `caption 3`."""


def main(comfyui: Path) -> None:
    support = Path(__file__).parent
    sys.path += [str(support), str(support.parents[1] / "scripts")]
    from comfy_in_process import make_comfy_importable
    from pack import load_pack

    with tempfile.TemporaryDirectory(prefix="atelier-") as empty:
        make_comfy_importable(comfyui, empty)
        load_pack()
        import atelier.nodes.session  # noqa: F401
        import diffusers.models.transformers.transformer_flux  # noqa: F401
        import server  # noqa: F401

    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            name, _, base = line.rstrip("\n").partition(" ")
            train_and_exit(name, Path(base))
        answer(f"started {process}")
        answer(f"ended {os.waitpid(process, 0)[1]}")


def answer(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def train_and_exit(name: str, base: Path) -> None:
    code = 1
    try:
        os.dup2(2, 1)
        train(name, base)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def train(name: str, base: Path) -> None:
    import folder_paths
    import torch
    from atelier.nodes.native import build_model
    from atelier.nodes.session import Asker, Session
    from atelier.trainers.load import load_flux
    from flux_files import write_flux
    from training import training_data

    folder_paths.set_output_directory(str(base / "output"))
    flux = base / "flux.safetensors"
    if not flux.exists():
        write_flux(flux)
    model = build_model(load_flux(flux, format="nf4"), torch.float32)
    asker = Asker(node_id="1", prompt={"1": {"class_type": "AtelierTrainLoRA", "inputs": {}}})
    data = training_data(base / "caches")
    Session(model, data, job(name), asker, validation(base)).train()


def job(name: str) -> Any:
    from atelier.trainers.config import job_from_json

    own = JOBS[name]
    every = {"gradient_accumulation": 2, "batch_size": 2, "compute_dtype": "fp32"}
    return job_from_json(
        {
            **{"name": "killed", "length": {"amount": NUM_STEPS}},
            **{"checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": 2},
            **{"lora": own["lora"], "train": own["train"] | every},
        }
    )


def validation(base: Path) -> Any:
    import torch
    from atelier.nodes.validation import EncodedPrompt, Sampler, Validation
    from atelier.trainers.rhythm import Rhythm
    from executor import nano_vae
    from training import CONTEXT, TEXT_TOKENS, VECTOR, training_data

    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(1, TEXT_TOKENS, CONTEXT, generator=generator)
    pooled = torch.randn(1, VECTOR, generator=generator)
    text = [[embeds, {"pooled_output": pooled, "guidance": 2.5}]]
    return Validation(
        rhythm=Rhythm(every=LOOK_EVERY),
        vae=nano_vae(),
        prompts=(EncodedPrompt(name="one", text="one", positive=text, negative=text),),
        sampler=Sampler(steps=8),
        held_out=training_data(base / "held out", ((64, 64),) * 2),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
