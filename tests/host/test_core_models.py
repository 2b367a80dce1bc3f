"""Train LoRA on the MODELs of ComfyUI's own loaders: on its parameters, without a copy (I1, I2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import host, live
from atelier.nodes.lora import ApplyLora
from atelier.nodes.native import build_model
from atelier.nodes.native_lora import add_lora, apply_lora, base_format
from atelier.nodes.native_ranges import SamplingRange
from atelier.nodes.parameters import flux_of_parameters
from atelier.nodes.train import TrainLora
from atelier.nodes.trainable import base_flux, model_to_train, without_patches
from atelier.trainers.flux import build_transformer, velocity
from atelier.trainers.job import read_job
from atelier.trainers.load import load_flux
from atelier.trainers.tensor_files import TensorFiles
from core_models import sd_15
from dense import dense_transformer
from executor import Give, Keep, Runner
from flux_files import flux_tensors, write_flux
from graphs import Graph, node
from lora_files import QKV, lora_tensors, write_loras
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import CONTEXT, VECTOR, training_data

CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def every_width_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions before 2026 take the number of heads of the true FLUX for granted."""
    detect = comfy.model_detection.detect_unet_config

    def detected(*args: Any, **options: Any) -> dict | None:
        config = detect(*args, **options)
        if config is not None and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // 128
        return config

    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", detected)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models with tiny FLUX files."""
    folder = tmp_path_factory.mktemp("models")
    write_flux(folder / "tiny.safetensors")
    write_flux(folder / "fill.safetensors", channels=384)
    write_flux(folder / "checkpoint.safetensors", prefix="model.diffusion_model.")
    save_file(fp8_values(), folder / "fp8_values.safetensors")
    in_fp8 = {n: v.to(FP8) if is_matrix(n, v) else v for n, v in fp8_values().items()}
    save_file(in_fp8, folder / "fp8_file.safetensors")
    write_scaled(folder / "scaled.safetensors")
    write_loras(folder / "loras")
    return folder


def fp8_values() -> dict[str, Tensor]:
    """The tensors of the tiny FLUX, rounded to fp8."""
    return {name: value.to(FP8).to(torch.bfloat16) for name, value in flux_tensors().items()}


def is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith(("double_blocks.", "single_blocks."))


SCALE = 0.37


def write_scaled(path: Path) -> None:
    """The matrices of the blocks as fp8 with a factor, as ComfyUI's `float8_e4m3fn` layers."""
    tensors, layers = {}, {}
    for name, value in fp8_values().items():
        tensors[name] = value
        if is_matrix(name, value):
            tensors[name] = value.to(FP8)
            tensors[name.replace(".weight", ".weight_scale")] = torch.tensor(SCALE)
            layers[name.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(tensors, path, metadata)


def write_old_scaled(path: Path) -> None:
    """All Linears as fp8 with a factor, as in the `scaled_fp8` files of 2025."""
    tensors = {"scaled_fp8": torch.zeros(2, dtype=FP8)}
    for name, value in fp8_values().items():
        tensors[name] = value
        if value.ndim == 2:
            tensors[name] = value.to(FP8)
            tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(SCALE)
    save_file(tensors, path)


@pytest.fixture(autouse=True)
def comfyui(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """ComfyUI's nodes and ours in this process, with folders of their own."""
    import nodes

    kinds = {"Give": Give, "Keep": Keep}
    kinds |= {"AtelierTrainLoRA": TrainLora, "AtelierApplyLoRA": ApplyLora}
    for name, kind in kinds.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folders = {"diffusion_models": models, "checkpoints": models, "loras": models / "loras"}
    for kind, folder in folders.items():
        entry = ([str(folder)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
    data = training_data(tmp_path / "caches")
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 20, CONTEXT, generator=generator)
    pooled = torch.randn(1, VECTOR, generator=generator)
    values = {"latents": data.latents, "prompts": data.prompts, "vae": executor.nano_vae()}
    values["positive"] = [[embeds, {"pooled_output": pooled, "guidance": 2.5}]]
    values["empty"] = {"samples": torch.zeros(1, 16, 8, 8)}
    monkeypatch.setattr(Give, "values", values)
    yield
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module", autouse=True)
def networks_are_forgotten() -> Iterator[None]:
    yield
    executor.forget_networks()


def unet(name: str, weight_dtype: str = "default") -> dict:
    return node("UNETLoader", unet_name=f"{name}.safetensors", weight_dtype=weight_dtype)


def given(model: Any) -> dict:
    Give.values["model"] = model
    return node("Give", name="model")


def ours(models: Path, name: str) -> dict:
    loaded = load_flux(models / f"{name}.safetensors", format="bf16")
    return given(build_model(loaded, torch.float32))


def train_graph(loader: dict, *, sampling: bool = False, **train: Any) -> Graph:
    settings = {"name": "test", "length": 3, "unit": "steps", "rank": 4, "targets": "all+ffs"}
    settings |= {"learning_rate": 1e-2, "batch_size": 2, "gradient_accumulation": 1, "seed": 0}
    settings |= {"guidance": 1.0, "compute_dtype": "fp32", "gradient_checkpointing": True}
    settings |= {"checkpoint_every": 250, "sample_every": 1, "sample_steps": 2, "sample_seed": 7}
    caches = {name: [name, 0] for name in ("latents", "prompts")}
    graph = {name: node("Give", name=name) for name in ("latents", "prompts", "vae", "positive")}
    if sampling:
        caches |= {name: [name, 0] for name in ("vae", "positive")}
    trained = node("AtelierTrainLoRA", model=["load", 0], **caches, **{**settings, **train})
    return {**graph, "load": loader, "train": trained, "keep": node("Keep", value=["train", 0])}


def trained(loader: dict, **train: Any) -> dict[str, Tensor]:
    """The tensors of the LoRA that is trained on what the loader gives."""
    return Runner().run(train_graph(loader, **train))


def run_folders(tmp_path: Path) -> list[Path]:
    return sorted(path.parent for path in (tmp_path / "output").rglob("metrics.jsonl"))


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def content(model: Any) -> str:
    """A hash of the network's bytes when the host has taken all patches off."""
    comfy.model_management.load_models_gpu([model])
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.diffusion_model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load(models: Path, name: str, **options: Any) -> Any:
    with torch.inference_mode():  # as a node
        return comfy.sd.load_diffusion_model(
            str(models / f"{name}.safetensors"), model_options=options
        )


LOADERS: dict[str, Callable[[Path], tuple[dict, str]]] = {
    "as the host chooses": lambda models: (unet("tiny"), "tiny"),
    "bf16": lambda models: (given(load(models, "tiny", dtype=torch.bfloat16)), "tiny"),
    "fp8": lambda models: (unet("tiny", "fp8_e4m3fn"), "fp8_values"),
    "checkpoint": lambda models: (
        node("CheckpointLoaderSimple", ckpt_name="checkpoint.safetensors"),
        "tiny",
    ),
}
"""A loader of ComfyUI's, and the file of the weights that it holds."""


@pytest.mark.parametrize("kind", LOADERS)
def test_the_lora_is_the_one_that_our_loader_leads_to(models: Path, kind: str) -> None:
    loader, file = LOADERS[kind](models)
    assert_same(trained(loader), trained(ours(models, file)))


def training_velocity(transformer: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return velocity(
            transformer,
            torch.randn(2, 16, 12, 8, generator=generator),
            sigma=torch.tensor([0.7, 0.2]),
            prompt_embeds=torch.randn(2, 20, CONTEXT, generator=generator),
            pooled=torch.randn(2, VECTOR, generator=generator),
            guidance=2.5,
        )


def assert_computes(model: Any, tensors: dict[str, Tensor]) -> None:
    """The training network over a core MODEL is diffusers' dense one with these weights."""
    base = base_flux(model)
    ours = training_velocity(build_transformer(base.store, base.config, torch.float32))
    expected = training_velocity(dense_transformer(tensors))
    assert torch.max(torch.abs(ours - expected)) <= 1e-5


def test_fp8_weights_compute_as_the_numbers_that_they_are(models: Path) -> None:
    model = load(models, "tiny", dtype=FP8)
    assert model.model.diffusion_model.img_in.weight.dtype == FP8
    assert_computes(model, {name: value.float() for name, value in fp8_values().items()})


def test_fp8_layers_with_a_factor_are_multiplied_by_it(models: Path) -> None:
    model = load(models, "scaled")
    weight = model.model.diffusion_model.double_blocks[0].img_mlp[0].weight
    assert type(weight) not in (Tensor, torch.nn.Parameter)
    scaled = {
        name: value.float() * (SCALE if is_matrix(name, value) else 1.0)
        for name, value in fp8_values().items()
    }
    assert_computes(model, scaled)


def test_scaled_fp8_files_are_multiplied_by_their_factors(models: Path, tmp_path: Path) -> None:
    write_old_scaled(tmp_path / "old.safetensors")
    model = load(tmp_path, "old")
    scaled = {
        name: value.float() * (SCALE if value.ndim == 2 else 1.0)
        for name, value in fp8_values().items()
    }
    assert_computes(model, scaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8])
def test_pictures_in_the_middle_change_neither_the_lora_nor_the_model(
    models: Path, dtype: torch.dtype
) -> None:
    model = load(models, "tiny", dtype=dtype)
    before = content(model)
    sampled = trained(given(model), sampling=True, name="sampled")
    after = content(model)
    assert_same(sampled, trained(given(load(models, "tiny", dtype=dtype)), name="plain"))
    assert after == before


def test_a_run_goes_on_after_its_lora_was_merged_for_sampling(models: Path, tmp_path: Path) -> None:
    model = load(models, "tiny", dtype=torch.bfloat16)
    before = content(model)
    graph = train_graph(given(model))
    sampler = node(
        "KSampler",
        model=["train", 1],
        positive=["positive", 0],
        negative=["positive", 0],
        latent_image=["empty", 0],
        seed=5,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    graph |= {"empty": node("Give", name="empty"), "sampler": sampler}
    graph["keep"] = node("Keep", value=["sampler", 0])
    Runner().run(graph)
    assert model.backup  # the LoRA is in the weights
    longer = trained(given(model), length=5)
    assert len(run_folders(tmp_path)) == 1
    assert content(model) == before
    assert_same(
        longer, trained(given(load(models, "tiny", dtype=torch.float32)), length=5, name="o")
    )


def test_a_cancelled_run_goes_on_on_the_same_weights(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(models, "tiny", dtype=torch.bfloat16)
    before = content(model)

    def cancel(done: int, total: int, *_: Any, **__: Any) -> None:
        if (done, total) == (1, 3):  # newer hosts skip some between the first and the last
            comfy.model_management.interrupt_current_processing()

    with monkeypatch.context() as patched:
        patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
        with pytest.raises(RuntimeError):
            trained(given(model), sampling=True)
    assert content(model) == before
    resumed = trained(given(model))
    assert content(model) == before
    assert_same(resumed, trained(ours(models, "tiny")))


def test_a_run_is_answered_from_disk_after_a_restart(models: Path, tmp_path: Path) -> None:
    first = trained(given(load(models, "tiny", dtype=torch.bfloat16)))
    (folder,) = run_folders(tmp_path)
    metrics = (folder / "metrics.jsonl").read_text()
    for dtype in (torch.bfloat16, torch.float32):  # the same numbers
        assert_same(trained(given(load(models, "tiny", dtype=dtype))), first)
    assert run_folders(tmp_path) == [folder]
    assert (folder / "metrics.jsonl").read_text() == metrics
    trained(given(load(models, "tiny", dtype=FP8)))
    assert len(run_folders(tmp_path)) == 2


@pytest.mark.parametrize("part", [0.1, 0.6])
def test_a_partially_loaded_model_trains_the_same(
    models: Path, monkeypatch: pytest.MonkeyPatch, part: float
) -> None:
    expected = trained(given(load(models, "tiny", dtype=torch.bfloat16)), name="whole")
    model = load(models, "tiny", dtype=torch.bfloat16)
    model.offload_device = torch.device("cpu", 0)  # not the load device, as on a GPU
    load_model = comfy.model_management.LoadedModel.model_load
    parts = []

    def limited(self, lowvram_model_memory=0, force_patch_weights=False):
        if self.model.model is not model.model:
            return load_model(self, lowvram_model_memory, force_patch_weights)
        room = part * model.model_size() - self.model_loaded_memory()
        loaded = load_model(self, room, force_patch_weights)
        parts.append(self.model_loaded_memory() / model.model_size())
        return loaded

    monkeypatch.setattr(comfy.model_management.LoadedModel, "model_load", limited)
    trained(given(model), sampling=True, length=2)
    assert_same(trained(given(model), sampling=True), expected)
    assert max(parts) < 1


def test_no_matrix_is_copied(models: Path) -> None:
    model = load(models, "tiny", dtype=torch.float32)
    network, store = model.model.diffusion_model, base_flux(model).store
    assert len(store.packed) == 23
    for name, matrix in store.packed.items():
        parameter = network.get_parameter(name)
        assert matrix.dequantize(torch.float32).data_ptr() == parameter.data_ptr()


def refusal(model: Any) -> str:
    with pytest.raises(RuntimeError) as error:
        trained(given(model))
    return str(error.value)


def test_a_model_that_is_no_flux_is_refused(models: Path) -> None:
    assert "is not a FLUX.1: it has no 'img_in.weight'" in refusal(sd_15())


def test_a_fill_model_is_refused(models: Path) -> None:
    assert "takes 96 latent channels" in refusal(load(models, "fill"))


def paged_model(models: Path, monkeypatch: pytest.MonkeyPatch, name: str, **options: Any) -> Any:
    """A MODEL as newer ComfyUIs load it for NVIDIA cards, of which a CPU has none."""
    patcher = comfy.model_patcher
    if not hasattr(patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI pages no weights")
    with monkeypatch.context() as patched:
        patched.setattr(patcher, "CoreModelPatcher", patcher.ModelPatcherDynamic)
        model = load(models, name, load_device=torch.device("meta"), **options)
    assert model.is_dynamic()
    return model


@pytest.fixture
def paged(models: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    return paged_model(models, monkeypatch, "tiny", dtype=torch.bfloat16)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was shown on the node."""
    found: list[str] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: found.append(text))
    return found


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors whose bytes our loader has read."""
    found: list[str] = []
    view = TensorFiles._view

    def noted(self: TensorFiles, name: str) -> Tensor:
        found.append(name)
        return view(self, name)

    monkeypatch.setattr(TensorFiles, "_view", noted)
    return found


def test_a_model_whose_weights_are_paged_trains_on_its_file(
    models: Path, paged: Any, texts: list[str]
) -> None:
    lora = trained(given(paged), name="paged")
    start = texts[0].splitlines()
    assert_same(lora, trained(ours(models, "tiny"), name="ours"))
    sentence = "so the training reads 'tiny.safetensors' a second time, in bf16."
    size = f"The MODEL's own copy takes {paged.model_size() / 1e9:.2f} GB"
    assert sum(line.endswith(sentence) for line in start) == 1
    assert any(size in line for line in start)


def test_the_file_of_a_paged_model_is_read_when_the_training_starts(
    models: Path, paged: Any, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it once, before the first step."""
    at_start: list[int] = []
    at_step: list[int] = []
    monkeypatch.setattr(host, "show_text", lambda text, node_id: at_start.append(len(reads)))
    monkeypatch.setattr(live.Reporter, "step", lambda self, step: at_step.append(len(reads)))
    first = trained(given(paged))
    assert at_start == [0]
    assert {*at_step} == {len(flux_tensors())}
    assert sorted(reads) == sorted(flux_tensors())
    reads.clear()
    assert_same(trained(given(paged)), first)  # from disk
    assert reads == []
    assert_same(trained(ours(models, "tiny")), first)  # it is the run of our loader's MODEL
    reads.clear()
    trained(given(paged), length=5)
    assert sorted(reads) == sorted(flux_tensors())


def test_a_finished_run_on_a_paged_model_says_nothing_of_its_file(
    paged: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(given(paged))
    texts.clear()
    monkeypatch.setattr(host, "free_system_memory", lambda: 0)
    monkeypatch.setattr(host, "free_memory", lambda: 0)
    trained(given(paged))
    (text,) = texts
    assert text.startswith("3 steps = 1.5 epochs.")
    assert "tiny.safetensors" not in text
    assert "memory" not in text


@pytest.mark.parametrize("memory", ["free_memory", "free_system_memory"])
def test_a_paged_model_that_does_not_fit_is_not_read(
    paged: Any, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    monkeypatch.setattr(host, memory, lambda: -paged.model_size())
    first = {
        "free_memory": "This training does not fit: ",
        "free_system_memory": "ComfyUI pages the weights of this MODEL in and out ",
    }
    message = refusal(paged)
    assert message.startswith(first[memory])
    assert "Load Quantized FLUX" in message
    assert reads == []
    assert not run_folders(tmp_path)


@pytest.mark.parametrize("name", ["fp8_file", "scaled"])
def test_the_fp8_of_a_paged_models_file_is_trained_on_as_it_is(
    models: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = paged_model(models, monkeypatch, name, **({} if name == "scaled" else {"dtype": FP8}))
    scale = SCALE if name == "scaled" else 1.0
    expected = {
        name: value.float() * (scale if is_matrix(name, value) else 1.0)
        for name, value in fp8_values().items()
    }
    held = model_to_train(model)
    assert held.base.format == "fp8"
    held.load()
    network = build_transformer(held.base.store, held.base.config, torch.float32)
    difference = training_velocity(network) - training_velocity(dense_transformer(expected))
    assert torch.max(torch.abs(difference)) <= 1e-5
    trained(given(model))
    assert f"'{name}.safetensors' a second time, in fp8." in texts[0]


def test_a_paged_model_that_is_cast_to_fp8_when_used_trains_on_the_files_numbers(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with weight_dtype fp8 of Load Diffusion Model: ComfyUI pages the file's own bytes."""
    held = model_to_train(paged_model(models, monkeypatch, "tiny", dtype=FP8))
    assert held.base.format == "bf16"


def test_a_paged_checkpoint_trains_on_its_file(models: Path) -> None:
    path = models / "checkpoint.safetensors"
    model, *_ = comfy.sd.load_checkpoint_guess_config(
        str(path), output_vae=False, output_clip=False
    )
    if not hasattr(model, "is_dynamic"):
        pytest.skip("this ComfyUI pages no weights")
    model.is_dynamic = lambda: True  # core loads checkpoints to its own device, here the CPU
    held = model_to_train(model)
    expected = load_flux(path, format="bf16")
    assert (held.base.path, held.base.identity) == (str(path), expected.identity)
    assert held.base.store.num_bytes == expected.store.num_bytes
    store = held.load().model.atelier.store
    assert held.base.store.packed is store.packed
    assert store.content_hash() == expected.store.content_hash()


def test_sample_pictures_of_a_paged_model_are_its_own(
    models: Path, paged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load(models, "tiny", dtype=torch.bfloat16)
    trained(given(plain), sampling=True, name="plain")
    with monkeypatch.context() as patched:
        patched.setattr(paged, "load_device", CPU)  # where its clones with a LoRA sample
        paged.register_load_device(CPU)
        trained(given(paged), sampling=True, name="paged")
    pictures = {
        name: [path.read_bytes() for path in sorted(tmp_path.rglob(f"{name}-*/samples/*.png"))]
        for name in ("plain", "paged")
    }
    assert len(pictures["plain"]) == 4
    assert pictures["paged"] == pictures["plain"]


def test_a_lora_on_a_paged_model_computes_along(models: Path, paged: Any) -> None:
    own = build_model(load_flux(models / "tiny.safetensors", format="bf16"), torch.float32)
    loras = [
        trained(given(with_loras(model, *ON_THE_MODEL["one"])), name=name)
        for name, model in {"paged": paged, "own": own}.items()
    ]
    assert_same(*loras)


@pytest.mark.parametrize("loaded_by", [None, (load_flux, ("tiny.safetensors",))])
def test_a_paged_model_of_an_unknown_file_is_refused(models: Path, loaded_by: Any) -> None:
    model = load(models, "tiny")
    model.is_dynamic = lambda: True  # so that this also runs where ComfyUI pages no weights
    model.cached_patcher_init = loaded_by
    with pytest.raises(ValueError, match="the file they came from is not known"):
        model_to_train(model)


def test_weights_in_an_unknown_packing_are_refused(models: Path) -> None:
    model = load(models, "tiny")
    linear = model.model.diffusion_model.double_blocks[0].img_mlp[0]
    packed = torch.zeros(linear.weight.shape, dtype=torch.uint8)
    linear.weight = torch.nn.Parameter(packed, requires_grad=False)
    assert "'double_blocks.0.img_mlp.0.weight' as Tensor in torch.uint8" in refusal(model)


def test_the_job_file_asks_for_the_models_file(models: Path, tmp_path: Path) -> None:
    trained(unet("tiny"))
    (folder,) = run_folders(tmp_path)
    path = folder / "job.json"
    with pytest.raises(ValueError, match="whose file is not known"):
        read_job(path)
    values = {**json.loads(path.read_text()), "model": str(models / "tiny.safetensors")}
    path.write_text(json.dumps(values))
    assert read_job(path).format == "bf16"


# ----- LoRAs that are on the MODEL already


def with_loras(model: Any, *loras: tuple[str, float]) -> Any:
    with torch.inference_mode():  # as a node
        for kind, strength in loras:
            model = add_lora(model, lora_tensors(kind), strength)
    return model


def native_velocity(model: Any) -> Tensor:
    """What ComfyUI's network gives for the inputs of `training_velocity`."""
    comfy.model_management.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        return model.model.diffusion_model(
            torch.randn(2, 16, 12, 8, generator=generator),
            torch.tensor([0.7, 0.2]),
            context=torch.randn(2, 20, CONTEXT, generator=generator),
            y=torch.randn(2, VECTOR, generator=generator),
            guidance=torch.full((2,), 2.5),
        )


ON_THE_MODEL = {
    "one": [("plain", 0.7)],
    "negative": [("without_alpha", -1.3)],
    "two on the same rows": [("plain", 0.7), ("without_alpha", -1.3)],
    "the final layer": [("final_layer", 0.8), ("original_final_layer", -0.6)],
}


@pytest.mark.parametrize("name", ON_THE_MODEL)
def test_the_training_network_computes_what_comfyui_merges(models: Path, name: str) -> None:
    model = load(models, "tiny", dtype=torch.float32)
    before, plain = content(model), native_velocity(model)
    patched = with_loras(model, *ON_THE_MODEL[name])
    merged = native_velocity(patched)
    assert model.backup  # ComfyUI has the LoRAs in the weights
    base = base_flux(patched)
    comfy.model_management.load_models_gpu([unpatched := without_patches(patched)])
    assert not unpatched.backup
    network = build_transformer(base.store, base.config, torch.float32, base.frozen)
    assert torch.max(torch.abs(merged - plain)) > 0.01
    assert torch.max(torch.abs(training_velocity(network) - merged)) <= 1e-5
    assert content(unpatched) == before


def test_the_weights_of_the_hosts_model_are_in_ram_until_it_loads_them(models: Path) -> None:
    model = load(models, "tiny", dtype=torch.bfloat16)
    store = flux_of_parameters(model).store
    tensors = model.model.state_dict().values()  # the sampling's table of sigmas among them
    assert store.bytes_in_ram == sum(tensor.nbytes for tensor in tensors)
    comfy.model_management.load_models_gpu([model])
    assert store.bytes_in_ram == 0


LOADED_WITH_LORAS = {
    "ours": ours,
    "the core's in bf16": lambda models, name: given(load(models, name, dtype=torch.bfloat16)),
    "the core's in fp32": lambda models, name: given(load(models, name, dtype=torch.float32)),
}


def lora_graph(loader: dict, *, first: str = "LoraLoader", strength: float = 0.7, **train: Any):
    """Train LoRA on a MODEL with two LoRAs, by the core's loader and by ours."""
    if first == "LoraLoader":
        name = {"lora_name": "plain.safetensors", "strength_model": strength}
        one = node("LoraLoaderModelOnly", model=["load", 0], **name)
    else:
        name = {"lora_name": "plain.safetensors", "strength": strength}
        one = node("AtelierApplyLoRA", model=["load", 0], **name)
    second = {"lora_name": "without_alpha.safetensors", "strength": -0.4}
    graph = train_graph(loader, **train)
    graph |= {"one": one, "two": node("AtelierApplyLoRA", model=["one", 0], **second)}
    graph["train"]["inputs"]["model"] = ["two", 0]
    return graph


@pytest.mark.parametrize("kind", ["ours", "the core's in fp32"])  # bf16 rounds what is merged
def test_the_model_output_has_the_loras_of_its_input_and_the_new_one(
    models: Path, tmp_path: Path, kind: str
) -> None:
    graph = lora_graph(LOADED_WITH_LORAS[kind](models, "tiny"))
    new = Runner().run(graph)
    (file,) = (tmp_path / "output" / "loras").glob("*.safetensors")
    saved = load_file(file)
    assert_same(saved, new)
    assert {name.split(".")[1] for name in saved} == {
        "transformer_blocks",
        "single_transformer_blocks",
    }
    graph["keep"] = node("Keep", value=["train", 1])
    found = Runner().run(graph)
    expected = load(models, "tiny", dtype=torch.float32)
    expected = with_loras(expected, ("plain", 0.7), ("without_alpha", -0.4))
    without = native_velocity(expected)
    wanted = native_velocity(add_lora(expected, saved, 1.0))
    assert torch.max(torch.abs(wanted - without)) > 0.01
    assert torch.max(torch.abs(native_velocity(found) - wanted)) <= 1e-5


def test_every_loader_and_every_model_lead_to_the_same_lora(models: Path, tmp_path: Path) -> None:
    results = [
        Runner().run(lora_graph(loader(models, "tiny"), first=first, name=f"{number}{first}"))
        for number, loader in enumerate(LOADED_WITH_LORAS.values())
        for first in ("LoraLoader", "ApplyLora")
    ]
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("kind", LOADED_WITH_LORAS)
def test_pictures_with_the_loras_change_neither_the_training_nor_the_model(
    models: Path, tmp_path: Path, kind: str
) -> None:
    loader = LOADED_WITH_LORAS[kind](models, "tiny")
    model = Give.values["model"]
    before = content(model)
    sampled = Runner().run(lora_graph(loader, sampling=True, name="sampled"))
    assert content(model) == before
    assert_same(sampled, Runner().run(lora_graph(loader, name="plain")))
    pictures = [*(tmp_path / "output").rglob("samples/step-000000-*.png")]
    plain = train_graph(loader, sampling=True, name="sampled")
    Runner().run(plain)
    pictures += [*{*(tmp_path / "output").rglob("samples/step-000000-*.png")} - {*pictures}]
    first, second = (picture.read_bytes() for picture in pictures)
    assert first != second  # the first picture is of the MODEL with its LoRAs


def test_a_changed_strength_is_another_run_and_the_same_one_is_answered_from_disk(
    models: Path, tmp_path: Path
) -> None:
    loader = ours(models, "tiny")
    one = Runner().run(lora_graph(loader))
    (folder,) = run_folders(tmp_path)
    metrics = (folder / "metrics.jsonl").read_text()
    assert_same(Runner().run(lora_graph(loader, first="ApplyLora")), one)
    assert (folder / "metrics.jsonl").read_text() == metrics
    other = Runner().run(lora_graph(loader, strength=0.8))
    assert len(run_folders(tmp_path)) == 2
    assert any(not torch.equal(other[name], one[name]) for name in one)


def test_a_model_that_is_loaded_with_its_loras_trains_as_one_that_is_not(
    models: Path, tmp_path: Path
) -> None:
    expected = Runner().run(lora_graph(given(load(models, "tiny", dtype=torch.bfloat16))))
    model = load(models, "tiny", dtype=torch.bfloat16)
    patched = with_loras(model, ("plain", 0.7), ("without_alpha", -0.4))
    native_velocity(patched)
    assert model.backup
    assert_same(trained(given(patched), name="merged"), expected)
    one, other = ((folder / "run.json").read_text() for folder in run_folders(tmp_path))
    assert one == other  # but for the name, the same run


@pytest.mark.parametrize("loader", [ours, lambda models, name: given(load(models, name))])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("lokr", "lokr"), ("loha", "loha"), ("dora", "DoRA"), ("difference", "diff")],
)
def test_patches_that_are_no_plain_loras_are_refused(
    models: Path, tmp_path: Path, loader: Callable, kind: str, name: str
) -> None:
    loader(models, "tiny")
    message = refusal(with_loras(Give.values["model"], ("plain", 1.0), (kind, 0.5)))
    assert f"carries a patch of the kind '{name}' on 'diffusion_model.double_blocks.0" in message
    assert not run_folders(tmp_path)


def test_a_merged_model_is_refused(models: Path) -> None:
    one, other = (load(models, name) for name in ("tiny", "fp8_values"))
    merged = one.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    assert "a patch of the kind 'model merge'" in refusal(merged)


@pytest.mark.parametrize(
    ("name", "options", "format"),
    [
        ("tiny", {"dtype": torch.bfloat16}, "bf16"),
        ("fp8_file", {"dtype": torch.float16}, "fp16"),
        ("fp8_file", {"dtype": FP8}, "fp8"),
        ("scaled", {}, "fp8"),
        ("old", {}, "fp8"),
    ],
)
def test_the_format_of_a_core_model_is_that_of_its_weights(
    models: Path, tmp_path: Path, name: str, options: dict, format: str
) -> None:
    write_old_scaled(tmp_path / "old.safetensors")
    model = load(tmp_path if name == "old" else models, name, **options)
    assert base_format(model) == format


def test_a_lora_of_another_flux_is_refused(models: Path) -> None:
    tensors = {f"{QKV}.lora_A.weight": torch.ones(2, 384), f"{QKV}.lora_B.weight": torch.ones(9, 2)}
    for loader in (ours, lambda models, name: given(load(models, name))):
        loader(models, "tiny")
        patched, _ = comfy.sd.load_lora_for_models(Give.values["model"], None, tensors, 1.0, 0.0)
        assert (
            "its 'double_blocks.0.img_attn.qkv' is 9 x 384, and that of this model 768"
            in refusal(patched)
        )


def test_a_lora_for_a_part_of_the_sampling_takes_paged_weights_from_their_file(paged: Any) -> None:
    """Which must not be paged: ComfyUI says so when a hook is put on there."""
    span = SamplingRange(end_percent=0.5)
    applied = apply_lora(paged, lora_tensors("plain"), 1.0, span=span)
    assert applied.reads_file_again
    assert not applied.model.is_dynamic()
    [patches] = applied.model.hook_patches.values()
    assert len(patches["diffusion_model.double_blocks.0.img_attn.qkv.weight"]) == 2
    again = apply_lora(paged, lora_tensors("plain"), 0.5, span=span)
    assert again.model.model is applied.model.model
    paged.cached_patcher_init = None
    with pytest.raises(ValueError, match="cannot act in a part of the sampling"):
        apply_lora(paged, lora_tensors("plain"), 1.0, span=span)


def test_a_lora_in_bypass_mode_is_refused(models: Path) -> None:
    model = load(models, "tiny").clone()
    model.set_injections("bypass_lora", [])  # as the loader of newer hosts does
    assert "carries a LoRA in bypass mode" in refusal(model)
