"""LoRA files: what is refused, what their metadata says, and the names that ComfyUI reads."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from atelier.trainers.lora_file import LoraTensors, lora_facts, read_lora
from atelier.trainers.lora_names import comfy_names
from lora_keys import written_by
from safetensors.torch import save_file
from torch import Tensor

MODULE = "transformer.transformer_blocks.0.attn.to_q"


def low_rank(rank: int = 4) -> dict[str, Tensor]:
    return {
        f"{MODULE}.lora_A.weight": torch.ones(rank, 8),
        f"{MODULE}.lora_B.weight": torch.ones(8, rank),
    }


def written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> Path:
    save_file(tensors, path, metadata=metadata or None)
    return path


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError, match=words[0]) as raised:
        read_lora(path)
    text = str(raised.value)
    assert all(word in text for word in (path.name.partition(".")[0], *words)), text
    assert text.count(". ") <= 1


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".safetensors"])
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_a_pickle_is_refused_under_any_name(tmp_path: Path, suffix: str, kind: str) -> None:
    path = tmp_path / f"style{suffix}"
    if kind == "torch":
        torch.save(low_rank(), path)
    else:
        path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "is a pickle", ".safetensors file")


def test_a_file_that_is_cut_short_or_gone_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "style.safetensors", low_rank())
    path.write_bytes(path.read_bytes()[:-8])
    refused(path, "cut short")
    path.write_bytes(b"<html>not found</html>")
    refused(path, "not a whole safetensors file")
    path.unlink()
    refused(path, "does not exist")


def test_a_file_without_a_lora_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", {"img_in.weight": torch.ones(2, 2)})
    refused(path, "is not a LoRA")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in low_rank().items()}
    tensors[f"{MODULE}.lora_B.weight"] = torch.full((8, 4), value).to(dtype)
    refused(written(tmp_path / "style.safetensors", tensors), "not finite", "lora_B")


def test_rank_0_is_refused(tmp_path: Path) -> None:
    refused(written(tmp_path / "style.safetensors", low_rank(0)), "rank 0", MODULE)


@pytest.mark.parametrize(
    ("trainer", "part"),
    [("kohya", "lora_up"), ("ai_toolkit", "lora_A"), ("xlabs", ".up."), ("lycoris_loha", "w2_b")],
)
def test_half_of_a_pair_is_refused(tmp_path: Path, trainer: str, part: str) -> None:
    tensors = written_by(trainer)
    del tensors[next(name for name in tensors if part in name)]
    refused(written(tmp_path / "style.safetensors", tensors), "is not whole", "without")


def test_a_missing_alpha_is_no_mistake(tmp_path: Path) -> None:
    assert read_lora(written(tmp_path / "style.safetensors", low_rank())).keys() == {*low_rank()}


@pytest.mark.parametrize(("stabilised", "alpha"), [(False, 8.0), (True, 16.0)])
def test_alphas_in_diffusers_metadata_become_tensors(
    tmp_path: Path, stabilised: bool, alpha: float
) -> None:
    """peft scales by alpha / rank, or by alpha / sqrt(rank); a file's alpha is over the rank."""
    settings = {"transformer.r": 4, "transformer.lora_alpha": 8}
    settings["transformer.use_rslora"] = stabilised
    path = written(
        tmp_path / "style.safetensors", low_rank(), lora_adapter_metadata=json.dumps(settings)
    )
    found = read_lora(path)
    assert found[f"{MODULE}.alpha"].item() == alpha
    assert lora_facts(found).alpha == 8.0


def facts(**metadata: str):
    return lora_facts(LoraTensors(low_rank(), metadata=metadata))


def test_facts_of_our_own_files() -> None:
    run = {"lora": {"alpha": 2.0}, "train": {"guidance": 3.5}}
    found = facts(
        **{
            "atelier.base_format": "nf4",
            "atelier.rank": "4",
            "atelier.steps": "250",
            "atelier.settings": json.dumps(run),
            "modelspec.title": "cats",
            "modelspec.architecture": "flux-1-dev/lora",
            "modelspec.trigger_phrase": "ohwx cat, watercolor",
        }
    )
    assert found.trigger_words == ("ohwx cat", "watercolor")
    assert (found.base_format, found.rank, found.alpha, found.steps) == ("nf4", 4, 2.0, 250)
    assert (found.guidance, found.title, found.trainer) == (3.5, "cats", "Atelier")


def test_facts_of_kohyas_files() -> None:
    tags = {"10_cat": {"ohwx": 40, "cat": 38, "sofa": 3}, "5_dog": {"ohwx": 10, " cat": 8}}
    found = facts(
        ss_network_dim="16",
        ss_network_alpha="8.0",
        ss_steps="1200",
        ss_guidance_scale="1.0",
        ss_sd_model_name="flux1-dev.safetensors",
        ss_tag_frequency=json.dumps(tags),
    )
    assert found.trigger_words == ("ohwx", "cat")
    assert (found.rank, found.alpha, found.steps, found.guidance) == (16, 8.0, 1200, 1.0)
    assert (found.base_name, found.trainer) == ("flux1-dev.safetensors", "sd-scripts")


@pytest.mark.parametrize("key", ["ss_fp8_base", "ss_fp8_base_unet"])
def test_kohyas_fp8_bases_are_known(key: str) -> None:
    assert facts(**{key: "True"}).base_format == "fp8"
    assert facts(**{key: "False"}).base_format is None
    assert facts(**{key: "True", "atelier.base_format": "nf4"}).base_format == "nf4"


def test_facts_of_ai_toolkits_files() -> None:
    found = facts(
        name="my_lora",
        training_info=json.dumps({"step": 2000, "epoch": 83}),
        software=json.dumps({"name": "ai-toolkit"}),
    )
    assert (found.title, found.steps, found.trainer, found.rank) == (
        *("my_lora", 2000, "ai-toolkit"),
        4,
    )


def test_metadata_of_any_form_is_no_mistake() -> None:
    found = facts(ss_tag_frequency="[1, 2]", training_info="{", ss_steps="many", software="x")
    assert (found.steps, found.trigger_words, found.rank) == (None, (), 4)
    assert lora_facts({"a": torch.ones(1)}).rank is None


@pytest.mark.parametrize(
    "trainer",
    [
        *("kohya", "ai_toolkit", "simpletuner_lycoris", "onetrainer_legacy", "onetrainer_dora"),
        *("comfyui", "onetrainer_original", "lycoris_loha"),
    ],
)
def test_names_that_comfyui_reads_stay(trainer: str) -> None:
    assert comfy_names(written_by(trainer)).keys() == written_by(trainer).keys()


def test_names_of_other_models_and_control_loras_stay() -> None:
    others = [
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.alpha",
        "transformer.double_blocks.0.img_attn_qkv.lora_A.weight",  # HunyuanVideo
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha",  # CLIP-G
        "diffusion_model.layers.0.attention.qkv.lora_A.weight",
    ]
    assert [*comfy_names(dict.fromkeys(others, torch.ones(1)))] == others
    control = ["img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"]
    assert [*comfy_names(dict.fromkeys(control, torch.ones(1)))] == control
