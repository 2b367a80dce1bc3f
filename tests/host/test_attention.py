"""The attention backend of a MODEL: what samples with it, and that training does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from atelier.nodes.attention import AttentionBackend
from atelier.nodes.native import build_model
from atelier.nodes.trainable import model_to_train
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.load import load_flux
from comfy.ldm.modules import attention
from flux_files import write_flux
from torch import Tensor

SIGMA = torch.tensor([0.7, 0.2])
NUM_BLOCKS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = write_flux(tmp_path_factory.mktemp("flux") / "flux.safetensors", depth_single=2)
    return build_model(load_flux(path, format="bf16"), torch.float32)


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"latents": (2, 16, 12, 8), "prompt_embeds": (2, 20, 128), "pooled": (2, 64)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def native_velocity(model: Any) -> Tensor:
    """As a sampler asks, with the options that the MODEL carries."""
    values = inputs()
    model.load(torch.device("cpu"))
    with torch.inference_mode():
        return model.model.diffusion_model(
            values["latents"],
            SIGMA,
            context=values["prompt_embeds"],
            y=values["pooled"],
            guidance=torch.full((2,), 2.5),
            transformer_options=model.model_options["transformer_options"],
        )


def training_velocity(model: Any) -> Tensor:
    """Of the network that Train LoRA trains, with gradients."""
    base = model_to_train(model).base
    return velocity(
        build_transformer(base.store, base.config, torch.float32).train(),
        **inputs(),
        sigma=SIGMA,
        guidance=2.5,
    )


def test_torchs_own_attention_is_in_comfyui_and_gives_the_same(model: Any) -> None:
    (chosen,) = AttentionBackend.execute(model, "sdpa").args
    assert torch.max(torch.abs(native_velocity(chosen) - native_velocity(model))) <= 1e-5


@pytest.fixture
def sage(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes that a backend called sage is asked for: ComfyUI lists it as with its package,
    and it computes what no other does."""
    asked = list[torch.Size]()

    def first_value(q: Tensor, k: Tensor, v: Tensor, heads: int, **options: Any) -> Tensor:
        asked.append(q.shape)
        return attention.attention_pytorch(q, k, v, heads, **options) * 0.5

    monkeypatch.setitem(
        attention.REGISTERED_ATTENTION_FUNCTIONS, "sage", attention.wrap_attn(first_value)
    )
    return asked


def test_every_block_samples_with_the_backend_and_none_trains_with_it(
    model: Any, sage: list[torch.Size]
) -> None:
    plain, trained = native_velocity(model), training_velocity(model)
    (chosen,) = AttentionBackend.execute(model, "sage").args
    assert not torch.allclose(native_velocity(chosen), plain, atol=1e-3)
    assert len(sage) == NUM_BLOCKS
    assert torch.equal(training_velocity(chosen), trained)
    assert torch.equal(native_velocity(model), plain)
    assert len(sage) == NUM_BLOCKS


@pytest.mark.parametrize(
    ("backend", "package"), [("flash", "flash-attn"), ("sage", "sageattention")]
)
def test_a_backend_whose_package_is_absent_is_explained(
    model: Any, monkeypatch: pytest.MonkeyPatch, backend: str, package: str
) -> None:
    monkeypatch.delitem(attention.REGISTERED_ATTENTION_FUNCTIONS, backend, raising=False)
    with pytest.raises(ValueError, match=f"backend {backend} needs the package {package}, which"):
        AttentionBackend.execute(model, backend)
