"""Processes that train, measure, draw and save in ComfyUI's modules, to be killed at any moment.

    python -P tests/support/killed_training.py COMFYUI

Each line of its input is a folder. A process of its own trains there, or goes on with what was
trained: the run lies below output/atelier, the LoRA file in output/loras. It answers
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
            train_and_exit(Path(line.rstrip("\n")))
        answer(f"started {process}")
        answer(f"ended {os.waitpid(process, 0)[1]}")


def answer(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def train_and_exit(base: Path) -> None:
    code = 1
    try:
        os.dup2(2, 1)
        train(base)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)


def train(base: Path) -> None:
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
    Session(model, data, job(), asker, validation(base)).train()


def job() -> Any:
    from atelier.trainers.config import JobSettings, Length, TrainSettings
    from atelier.trainers.lora_settings import LoraSettings
    from atelier.trainers.optimizer_settings import OptimizerSettings

    return JobSettings(
        name="killed",
        length=Length(amount=NUM_STEPS),
        lora=LoraSettings(rank=16),
        train=TrainSettings(
            gradient_accumulation=2,
            batch_size=2,
            compute_dtype="fp32",
            learning_rate=1e-3,
            optimizer=OptimizerSettings(schedule="cosine", warmup_steps=2, ema_decay=0.9),
        ),
        checkpoint_every=CHECKPOINT_EVERY,
        keep_checkpoints=2,
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
