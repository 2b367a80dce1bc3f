"""The FLUX.1-dev workflow on files of its true names, shapes and widths, cut in depth.

The transformer has one double and one single block of the 19 and 38; T5-XXL is replaced by an
encoder of its width with one layer, in a diffusers folder, because the core loader knows only the
full size. Everything else is whole.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import workflow
from comfy_server import ComfyServer
from flux_files import write_flux
from graphs import write_pictures
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "workflows" / "atelier_flux1_dev_qlora.json"
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
AUTOENCODER = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3}
AUTOENCODER |= {"ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": []}


def write_autoencoder(path: Path) -> None:
    """FLUX's autoencoder in the original names, random."""
    from comfy.ldm.models.autoencoder import AutoencodingEngine

    module = "comfy.ldm.modules.diffusionmodules.model"
    network = AutoencodingEngine(
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{module}.Encoder", "params": {**AUTOENCODER, "dropout": 0.0}},
        decoder_config={"target": f"{module}.Decoder", "params": {**AUTOENCODER, "dropout": 0.0}},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, tensor in network.state_dict().items():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        is_norm = ".norm" in name and name.endswith("weight")
        tensors[name] = torch.ones_like(tensor) if is_norm else torch.zeros_like(tensor)
        if tensor.ndim > 1:
            tensors[name] = torch.randn(tensor.shape) / fan_in**0.5
    save_file({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, path)


def write_text_encoders(folder: Path) -> None:
    """CLIP-L whole; T5 of T5-XXL's width with one layer."""
    clip = CLIPTextModel(CLIPTextConfig(**CLIP_L, num_hidden_layers=12, projection_dim=768))
    t5 = T5EncoderModel(
        T5Config(
            d_model=4096,
            d_ff=256,
            d_kv=64,
            num_heads=64,
            num_layers=1,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )
    )
    clip.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
    t5.to(torch.bfloat16).save_pretrained(folder / "text_encoder_2")


def small(graph: dict[str, Any], folder: str) -> dict[str, Any]:
    """The workflow's graph for 64x64 pixels, two steps, and text encoders of our folder."""
    sizes = {"width": 64, "height": 64, "length": 2, "gradient_accumulation": 1, "steps": 1}
    for entry in graph.values():
        inputs = entry["inputs"]
        if entry["class_type"] == "AtelierEncodePrompts":
            inputs["length"] = 77
            continue
        inputs |= {name: value for name, value in sizes.items() if name in inputs}
        if entry["class_type"] == "AtelierImageFolderDataset":
            inputs["folder"] = "my_pictures"
        if entry["class_type"] == "AtelierTrainLoRA":
            inputs |= {"sample_every": 0, "sample_steps": 1}
    (clip,) = (key for key, entry in graph.items() if entry["class_type"] == "DualCLIPLoader")
    graph[clip] = {
        "class_type": "AtelierLoadQuantizedFlux",
        "inputs": {"model": f"diffusers/{folder}", "format": "nf4", "compute_dtype": "auto"},
    }
    for entry in graph.values():
        for name, value in entry["inputs"].items():
            if value == [clip, 0]:
                entry["inputs"][name] = [clip, 1]
    return graph


@pytest.mark.slow
def test_the_flux_dev_workflow_trains_and_paints_on_cut_files(server: ComfyServer) -> None:
    models = server.base_directory / "models"
    write_flux(
        models / "diffusion_models" / "flux1-dev.safetensors", width=3072, context=4096, vector=768
    )
    write_autoencoder(models / "vae" / "ae.safetensors")
    write_text_encoders(models / "diffusers" / "cut")
    (models / "diffusers" / "cut" / "transformer").mkdir()
    write_flux(models / "diffusers" / "cut" / "transformer" / "model.safetensors")
    write_pictures(server.base_directory / "input" / "my_pictures", count=1)
    graph = small(workflow.load(WORKFLOW, server.object_info()), "cut")
    entry = server.run(graph)
    saved = [image for out in entry["outputs"].values() for image in out.get("images", [])]
    prefixes = {image["filename"].split("_")[0] for image in saved}
    assert {"before", "after", "samples"} <= prefixes
    (run,) = (server.base_directory / "output" / "atelier").glob("my_flux_lora-*")
    settings = json.loads((run / "run.json").read_text())
    assert settings["lora"]["rank"] == 4
    lora = server.base_directory / "output" / "loras" / f"{run.name}-2.safetensors"
    # One double block: 4 matrices of 3072 x 3072; one single block: 3; each 2 x 3072 x 4, float32.
    assert lora.stat().st_size >= 7 * 2 * 3072 * 4 * 4
