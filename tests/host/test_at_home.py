"""A quantized MODEL among ComfyUI's own nodes, which make of it what they make of the core's.

Every graph runs twice in ComfyUI's executor: on our MODEL, and on the core's MODEL that holds the
same weights densely (`core_flux`). The packed bytes are the same afterwards (I2).
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.samplers
import comfy.utils
import executor
import folder_paths
import pytest
import torch
from atelier.nodes.native import StorePatcher, build_model
from atelier.trainers.load import load_flux
from atelier.trainers.packed_copy import PackedCopies
from core_flux import core_controlnet, core_model
from executor import Give, Keep, Runner
from flux_files import write_flux
from graphs import Graph, node
from lora_files import KINDS, write_loras
from safetensors.torch import load_file
from torch import Tensor

FORMAT = "nf4"
STEPS = 2
CPU = torch.device("cpu")
EXTRAS = [
    *("custom_sampler", "edit_model", "flux", "hooks"),
    *("lora_extract", "model_advanced", "model_merging", "perpneg", "torch_compile"),
]


def reversed_block(kind: str) -> Callable[[Any], Any]:
    """A patch that replaces block 0 of a kind: the features of what it gives, in reverse."""

    def replace(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        return {**out, "img": out["img"].flip(-1)}

    return lambda model: model.set_model_patch_replace(replace, "dit", kind, 0)


def scaled_batch(args: dict) -> list[Tensor]:
    """As the core computes the prompts of a step, each a little less."""
    names = ("model", "conds", "input", "sigma", "model_options")
    return [0.9 * out for out in comfy.samplers.calc_cond_batch(*(args[name] for name in names))]


def reversed_values(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> dict[str, Tensor]:
    return {"q": q, "k": k, "v": v.flip(-1)}


PATCHES: dict[str, Callable[[Any], Any]] = {
    "cfg": lambda model: model.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + 0.7 * (args["cond"] - args["uncond"])
    ),
    "post_cfg": lambda model: model.set_model_sampler_post_cfg_function(
        lambda args: 0.9 * args["denoised"]
    ),
    "wrapper": lambda model: model.set_model_unet_function_wrapper(
        lambda apply, args: 0.9 * apply(args["input"], args["timestep"], **args["c"])
    ),
    "double_block": reversed_block("double_block"),
    "single_block": reversed_block("single_block"),
    "pre_cfg": lambda model: model.set_model_sampler_pre_cfg_function(
        lambda args: [args["conds_out"][0], 0.5 * args["conds_out"][1]]
    ),
    "calc_cond_batch": lambda model: model.set_model_sampler_calc_cond_batch_function(scaled_batch),
    "denoise_mask": lambda model: model.set_model_denoise_mask_function(
        lambda sigma, mask, extra_options: 0.5 * mask
    ),
    "post_input": lambda model: model.set_model_post_input_patch(
        lambda args: {**args, "img": args["img"].flip(-1)}
    ),
    "rope": lambda model: model.set_model_rope_options(
        scale_x=1.5, shift_x=1.0, scale_y=0.5, shift_y=2.0, scale_t=1.0, shift_t=3.0
    ),
    "attn1": lambda model: model.set_model_attn1_patch(reversed_values),
    "attn1_output": lambda model: model.set_model_attn1_output_patch(
        lambda out, extra_options: out.flip(-1)
    ),
    "attn2": lambda model: model.set_model_attn2_patch(reversed_values),
    "every_double_block": lambda model: model.set_model_double_block_patch(
        lambda args: {**args, "img": args["img"].flip(-1)}
    ),
}
ASKED_FOR_BY_SOME = {
    f"patch {name}" for name in ("attn1", "attn1_output", "attn2", "every_double_block")
}
"""Patches that the FLUX of some versions does not look for, nor of 0.3.75 any of these."""


class Patch:
    """A node that clones a MODEL and puts one of `PATCHES` on the clone."""

    FUNCTION, CATEGORY, RETURN_TYPES = "patch", "test", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": ("MODEL",), "name": ("STRING", {})}}

    def patch(self, model: Any, name: str) -> tuple:
        patched = model.clone()
        PATCHES[name](patched)
        return (patched,)


def lora(model: str, name: str, strength: float) -> dict:
    return node(
        "LoraLoaderModelOnly",
        model=[model, 0],
        lora_name=f"{name}.safetensors",
        strength_model=strength,
    )


def hooked(strength: float) -> Graph:
    """A LoRA hook on the prompt `positive`, as the node `told`."""
    return {
        "hook": node(
            "CreateHookLora",
            lora_name="plain.safetensors",
            strength_model=strength,
            strength_clip=0.0,
        ),
        "told": node(
            "ConditioningSetProperties",
            cond_NEW=["positive", 0],
            strength=1.0,
            set_cond_area="default",
            hooks=["hook", 0],
        ),
    }


def with_guider(**guider: Any) -> Graph:
    """SamplerCustomAdvanced with a guider of these inputs."""
    return {
        "noise": node("RandomNoise", noise_seed=5),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node(
            "BasicScheduler", model=["model", 0], scheduler="simple", steps=STEPS, denoise=1.0
        ),
        "guider": node(**guider),
        "out": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["euler", 0],
            sigmas=["sigmas", 0],
            latent_image=["empty", 0],
        ),
    }


MASKED: Graph = {"masked": node("SetLatentNoiseMask", samples=["reference", 0], mask=["mask", 0])}

GUIDERS: dict[str, Graph] = {
    "basic guider": with_guider(
        class_type="BasicGuider", model=["model", 0], conditioning=["positive", 0]
    ),
    "cfg guider": with_guider(
        class_type="CFGGuider",
        model=["model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        cfg=3.0,
    ),
    **{
        f"dual cfg guider, {style}": with_guider(
            class_type="DualCFGGuider",
            model=["model", 0],
            cond1=["positive", 0],
            cond2=["third", 0],
            negative=["negative", 0],
            cfg_conds=2.0,
            cfg_cond2_negative=3.0,
            style=style,
        )
        for style in ("regular", "nested")
    },
    "perp-neg guider": with_guider(
        class_type="PerpNegGuider",
        model=["model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        empty_conditioning=["third", 0],
        cfg=3.0,
        neg_scale=0.8,
    ),
    "dual model guider": with_guider(
        class_type="DualModelGuider",
        model=["model", 0],
        model_negative=["other model", 0],
        positive=["positive", 0],
        negative=["negative", 0],
        cfg=3.0,
    ),
}
GUIDERS_SINCE_2026 = {"DualModelGuider"}
GUIDERS_OF_OTHER_MODELS = {"LTXVDualCFGGuider"}

GRAPHS: dict[str, Graph] = {
    "ksampler": {},
    **GUIDERS,
    "flux guidance": {
        "told": node("FluxGuidance", conditioning=["positive", 0], guidance=1.5),
    },
    "model sampling": {
        "patched": node(
            "ModelSamplingFlux",
            model=["model", 0],
            max_shift=2.0,
            base_shift=1.0,
            width=64,
            height=64,
        )
    },
    **{f"lora {kind}": {"patched": lora("model", kind, 0.8)} for kind in KINDS},
    "chained loras, one negative": {
        "first": node(
            "LoraLoader",
            model=["model", 0],
            clip=["no clip", 0],
            lora_name="plain.safetensors",
            strength_model=1.0,
            strength_clip=0.0,
        ),
        "second": lora("first", "without_alpha", -0.7),
        "patched": lora("second", "lokr", 0.5),
    },
    **{
        f"patch {name}": {
            "patched": node("Patch", model=["model", 0], name=name),
            **(MASKED if name == "denoise_mask" else {}),
        }
        for name in PATCHES
    },
    "patch perp-neg": {
        "patched": node(
            "PerpNeg", model=["model", 0], empty_conditioning=["third", 0], neg_scale=0.8
        )
    },
    "reference latents": {
        "told": node("ReferenceLatent", conditioning=["positive", 0], latent=["reference", 0])
    },
    "controlnet": {
        "told": node(
            "ControlNetApplyAdvanced",
            positive=["positive", 0],
            negative=["negative", 0],
            control_net=["controlnet", 0],
            image=["image", 0],
            strength=0.8,
            start_percent=0.0,
            end_percent=1.0,
        )
    },
    "lora hook on one prompt": {
        **hooked(0.8),
    },
    "lora hook beside a lora": {
        "patched": lora("model", "lokr", 0.5),
        **hooked(-0.8),
    },
    "merged models": {
        "patched": node(
            "ModelMergeSimple", model1=["model", 0], model2=["other model", 0], ratio=0.3
        )
    },
}


def whole(graph: Graph) -> Graph:
    """The graph with its loaders, its sampler and the node that keeps the latents."""
    given = ("model", "other model", "positive", "negative", "third", "empty", "no clip")
    given += ("reference", "controlnet", "image", "mask")
    sampler = node(
        "KSampler",
        model=["patched" if "patched" in graph else "model", 0],
        positive=["told" if "told" in graph else "positive", 0],
        negative=["negative", 0],
        latent_image=["masked" if "masked" in graph else "empty", 0],
        seed=5,
        steps=STEPS,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return {
        **{name: node("Give", name=name) for name in given},
        "out": sampler,
        **graph,
        "keep": node("Keep", value=["out", 0]),
    }


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StorePatcher, StorePatcher]]:
    """Two of our MODELs, of different weights."""
    folder = tmp_path_factory.mktemp("flux")
    files = [write_flux(folder / f"{seed}.safetensors", seed=seed) for seed in (0, 1)]
    first, second = (build_model(load_flux(file, format=FORMAT), torch.float32) for file in files)
    yield first, second
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def cores() -> Iterator[tuple[Any, Any]]:
    """The core's MODELs of the same weights."""
    yield core_model(FORMAT, 0), core_model(FORMAT, 1)
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    write_loras(folder)
    return folder


@pytest.fixture(autouse=True)
def comfyui(tmp_path: Path, loras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's nodes, its folders, and what `Give` gives besides the models."""
    import nodes

    extras = Path(nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        file = extras / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    for name, kind in {"Give": Give, "Keep": Keep, "Patch": Patch}.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    entry = ([str(loras)], {".safetensors"})
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", entry)
    generator = torch.Generator().manual_seed(3)

    def prompt() -> list:
        pooled = torch.randn(1, 64, generator=generator)
        embeds = torch.randn(1, 20, 128, generator=generator)
        return [[embeds, {"pooled_output": pooled, "guidance": 3.5}]]

    values = {"positive": prompt(), "negative": prompt(), "no clip": None}
    values["empty"] = {"samples": torch.zeros(1, 16, 8, 8)}
    values["reference"] = {"samples": torch.randn(1, 16, 8, 6, generator=generator)}
    values["image"] = torch.rand(1, 64, 64, 3, generator=generator)
    values["controlnet"] = core_controlnet()
    values["third"] = prompt()
    values["mask"] = torch.zeros(1, 64, 64)
    values["mask"][:, 16:, :40] = 1.0
    monkeypatch.setattr(Give, "values", values)


def run(graph: Graph, models: tuple[Any, Any], *, caches: bool = True) -> Tensor:
    """The latents that the graph makes of the models."""
    Give.values |= {"model": models[0], "other model": models[1]}
    return Runner(caches=caches).run(whole(graph))["samples"]


def relative_difference(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max() / second.abs().max())


@pytest.fixture
def bytes_stay(ours: tuple[StorePatcher, StorePatcher]) -> Iterator[None]:
    before = [model.store.content_hash() for model in ours]
    yield
    assert [model.store.content_hash() for model in ours] == before


def skip_if_unknown(graph: Graph) -> None:
    """Newer hosts have guiders that older ones lack."""
    import nodes

    new = {entry["class_type"] for entry in graph.values()} & GUIDERS_SINCE_2026
    if not new <= nodes.NODE_CLASS_MAPPINGS.keys():
        pytest.skip(f"this ComfyUI has no {new}")


@pytest.mark.usefixtures("bytes_stay")
@pytest.mark.parametrize("name", list(GRAPHS))
def test_a_graph_gives_what_it_gives_on_the_cores_model(
    ours: tuple[StorePatcher, StorePatcher], cores: tuple[Any, Any], name: str
) -> None:
    skip_if_unknown(GRAPHS[name])
    result = run(GRAPHS[name], ours)
    assert relative_difference(result, run(GRAPHS[name], cores)) <= 1e-4
    plain = run({}, ours)
    if name != "ksampler" and name not in ASKED_FOR_BY_SOME and "masked" not in GRAPHS[name]:
        assert relative_difference(result, plain) > 1e-3
    assert relative_difference(plain, run({}, cores)) <= 1e-4  # nothing stayed on


def test_every_guider_of_the_host_is_among_the_graphs() -> None:
    import nodes

    extras = Path(nodes.__file__).parent / "comfy_extras"
    for file in extras.glob("nodes_*.py"):
        if "Guider.Output(" in file.read_text(encoding="utf-8"):
            assert asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    found = {
        name
        for name, kind in nodes.NODE_CLASS_MAPPINGS.items()
        if "GUIDER" in getattr(kind, "RETURN_TYPES", ())
    }
    tried = {graph["guider"]["class_type"] for graph in GUIDERS.values()}
    assert {"BasicGuider", "CFGGuider"} < found
    assert found - GUIDERS_OF_OTHER_MODELS == tried - (GUIDERS_SINCE_2026 - found)


@pytest.mark.usefixtures("bytes_stay")
def test_a_masked_latent_and_a_patch_of_its_mask(ours: tuple[StorePatcher, StorePatcher]) -> None:
    """That the patch counts, which is compared with the core among the graphs."""
    patched = run(GRAPHS["patch denoise_mask"], ours)
    assert relative_difference(patched, run(MASKED, ours)) > 1e-3


KINDS_OF_FLUX: dict[str, tuple[str, dict[str, int | bool]]] = {
    "dev": ("Flux", {}),
    "schnell": ("FluxSchnell", {"guidance": False}),
    "Fill": ("FluxInpaint", {"channels": 384}),
    "Canny and Depth": ("Flux", {"channels": 128}),
}
"""The host's class, and the sizes of a small file of that kind."""
INPAINT: Graph = {
    "vae": node("Give", name="vae"),
    "inpaint": node(
        "InpaintModelConditioning",
        positive=["positive", 0],
        negative=["negative", 0],
        vae=["vae", 0],
        pixels=["image", 0],
        mask=["mask", 0],
        noise_mask=True,
    ),
}
IN_INPAINT = {
    "positive": ["inpaint", 0],
    "negative": ["inpaint", 1],
    "latent_image": ["inpaint", 2],
}


@pytest.mark.parametrize("kind", list(KINDS_OF_FLUX))
def test_every_kind_of_flux_has_the_cores_class_and_gives_what_it_gives(
    tmp_path: Path, kind: str
) -> None:
    class_name, sizes = KINDS_OF_FLUX[kind]
    file = write_flux(tmp_path / "flux.safetensors", **sizes)
    model = build_model(load_flux(file, format=FORMAT), torch.float32)
    core = core_model(FORMAT, **sizes)
    assert type(model.model.model_config).__name__ == class_name
    assert type(model.model.model_config) is type(core.model.model_config)
    assert model.model.model_type == core.model.model_type
    graph: Graph = {}
    if "channels" in sizes:
        Give.values["vae"] = executor.nano_vae()
        sampler = whole({})["out"]
        graph = {**INPAINT, "out": {**sampler, "inputs": {**sampler["inputs"], **IN_INPAINT}}}
    result = run(graph, (model, None))
    executor.forget_networks()
    assert relative_difference(result, run(graph, (core, None))) <= 1e-4
    if graph:
        assert relative_difference(result, run({}, (model, None))) > 1e-3
    comfy.model_management.unload_all_models()


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StorePatcher, ...]]:
    """The first of our MODELs with all blocks in RAM, the second with all of them on disk."""
    folder, models = tmp_path_factory.mktemp("flux"), []
    for seed, streaming in enumerate(("ram", "disk")):
        file = write_flux(folder / f"{seed}.safetensors", seed=seed)
        copies = PackedCopies(folder / "packed")
        loaded = load_flux(file, format=FORMAT, streaming=streaming, copies=copies)
        models.append(build_model(loaded, torch.float32))
    yield tuple(models)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize(
    "name", ["lora lokr", "lora hook on one prompt", "merged models", "controlnet"]
)
def test_streamed_models_give_what_whole_ones_give(
    ours: tuple[StorePatcher, StorePatcher], streamed: tuple[StorePatcher, ...], name: str
) -> None:
    for order in (1, -1):
        assert torch.equal(run(GRAPHS[name], streamed[::order]), run(GRAPHS[name], ours[::order]))
        assert all(model.store.stream for model in streamed)


def test_a_streamed_model_is_saved_whole(
    ours: tuple[StorePatcher, StorePatcher], streamed: tuple[StorePatcher, ...], tmp_path: Path
) -> None:
    saved = []
    for model in (ours[1], streamed[1]):
        run(
            {"save": node("ModelSave", model=["model", 0], filename_prefix="saved")}, (model, model)
        )
        saved.append(written(tmp_path))
        shutil.rmtree(tmp_path)
    assert all(torch.equal(saved[1][name], tensor) for name, tensor in saved[0].items())


@pytest.mark.usefixtures("bytes_stay")
@pytest.mark.parametrize("kind", ["ours", pytest.param("streamed", marks=pytest.mark.slow)])
def test_a_compiled_model_gives_what_it_gives_otherwise(
    ours: tuple[StorePatcher, ...],
    streamed: tuple[StorePatcher, ...],
    kind: str,
) -> None:
    """Also after the LoRAs have changed on what was compiled."""
    models = {"ours": ours, "streamed": streamed}[kind]
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name in ("ksampler", "lora plain", "ksampler"):
        graph = GRAPHS[name]
        source = "patched" if "patched" in graph else "model"
        # As inductor, which the node's users choose, but for the C++ compiler that it needs.
        compiled = node("TorchCompileModel", model=[source, 0], backend="aot_eager")
        sampler = whole({})["out"]
        sampler["inputs"]["model"] = ["compiled", 0]
        result = run({**graph, "compiled": compiled, "out": sampler}, models)
        assert relative_difference(result, run(graph, models)) <= 1e-4
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.usefixtures("bytes_stay")
def test_a_merge_of_ours_into_the_cores_model(
    ours: tuple[StorePatcher, StorePatcher], cores: tuple[Any, Any]
) -> None:
    graph = GRAPHS["merged models"]
    mixed = run(graph, (cores[0], ours[1]))
    assert relative_difference(mixed, run(graph, cores)) <= 1e-4


@pytest.mark.usefixtures("bytes_stay")
@pytest.mark.parametrize("caches", [True, False])
def test_two_models_in_one_graph_do_not_mix(
    ours: tuple[StorePatcher, StorePatcher], caches: bool
) -> None:
    patched = {"patched": lora("model", "plain", 1.0)}
    alone = [run({}, ours), run({}, ours[::-1]), run(patched, ours)]
    sampler = whole({})["out"]
    graph = patched
    for name in ("other model", "patched"):
        inputs = {**sampler["inputs"], "model": [name, 0]}
        graph[f"out {name}"] = node("KSampler", **inputs)
        graph[f"keep {name}"] = node("Keep", value=[f"out {name}", 0])
    graph["out"] = sampler
    run(graph, ours, caches=caches)
    together = [kept["samples"] for kept in Keep.kept]
    assert len(together) == 3
    for latents in alone:
        assert any(torch.equal(latents, other) for other in together)


def test_every_step_has_a_preview(
    ours: tuple[StorePatcher, StorePatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    import latent_preview

    method = comfy.cli_args.LatentPreviewMethod.Latent2RGB
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", method)
    monkeypatch.setattr(latent_preview, "default_preview_method", method, raising=False)
    previews = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, image, **_: previews.append(image)
    )
    run({}, ours)
    shown = [preview for preview in previews if preview is not None]
    assert [image.size for _, image, _ in shown] == [(8, 8)] * STEPS


def test_a_changed_strength_moves_no_packed_byte(ours: tuple[StorePatcher, StorePatcher]) -> None:
    model = ours[0].clone()
    model.offload_device = torch.device("cpu", 0)  # not the load device, as on a GPU
    run({}, (model, ours[1]))
    before = model.store.bytes_moved
    for strength in (0.2, 0.9, -1.0):
        run({"patched": lora("model", "plain", strength)}, (model, ours[1]))
    assert model.store.bytes_moved == before
    comfy.model_management.unload_all_models()
    assert model.store.device == model.offload_device
    assert model.store.bytes_moved == before + model.store.num_bytes
    model.store.place(CPU)


@pytest.mark.usefixtures("bytes_stay")
def test_a_model_that_was_unloaded_samples_again(ours: tuple[StorePatcher, StorePatcher]) -> None:
    graph = {"patched": lora("model", "plain", 1.0)}
    first = run(graph, ours)
    comfy.model_management.unload_all_models()
    assert torch.equal(run(graph, ours), first)


@pytest.mark.usefixtures("bytes_stay")
@pytest.mark.parametrize("kind", ["ours", "streamed"])
@pytest.mark.parametrize("name", ["lora lokr", "lora hook on one prompt", "patch double_block"])
def test_a_cancelled_sampling_leaves_nothing_on_the_model(
    ours: tuple[StorePatcher, ...],
    streamed: tuple[StorePatcher, ...],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    name: str,
) -> None:
    """Cancel comes after a step, as in ComfyUI's own hook of the progress, and inside of one."""
    models = {"ours": ours, "streamed": streamed}[kind]
    whole_picture, plain = run(GRAPHS[name], models), run({}, models)

    def cancel(*_: Any, **__: Any) -> None:
        comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    block = models[0].model.diffusion_model.single_blocks[0]
    for inside in (False, True):
        with monkeypatch.context() as patched:
            if inside:
                patched.setattr(block, "forward", cancel)
            else:
                patched.setattr(comfy.utils, "PROGRESS_BAR_HOOK", cancel)
            with pytest.raises(RuntimeError, match="execution_interrupted"):
                run(GRAPHS[name], models)
        assert torch.equal(run({}, models), plain)
        assert torch.equal(run(GRAPHS[name], models), whole_picture)


def written(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.rglob("*.safetensors")
    return load_file(file)


@pytest.mark.usefixtures("bytes_stay")
def test_a_saved_model_holds_true_weights_in_bf16_with_the_lora(
    ours: tuple[StorePatcher, StorePatcher], tmp_path: Path, loras: Path
) -> None:
    graph = {
        "patched": lora("model", "without_alpha", 0.5),
        "save": node("ModelSave", model=["patched", 0], filename_prefix="saved"),
    }
    run(graph, ours)
    saved = written(tmp_path)
    store, prefix = ours[0].store, "model.diffusion_model."
    names = {name.removeprefix(prefix) for name in saved}
    assert {*store.packed} <= names
    assert {name for name in store.plain if name.endswith(".bias")} <= names
    for name, packed in store.packed.items():
        expected = packed.dequantize(torch.float32)
        if name == "double_blocks.0.img_attn.qkv.weight":
            tensors = load_file(loras / "without_alpha.safetensors")
            down, up = (value for _, value in sorted(tensors.items()))
            expected = expected + 0.5 * up @ down
        assert saved[prefix + name].dtype == torch.bfloat16
        assert torch.allclose(saved[prefix + name].float(), expected, rtol=2**-8, atol=1e-6), name


@pytest.mark.usefixtures("bytes_stay")
def test_a_saved_checkpoint_loads_in_our_loader_and_gives_the_same(
    ours: tuple[StorePatcher, StorePatcher], tmp_path: Path
) -> None:
    Give.values |= {"clip": executor.nano_clip(), "vae": executor.nano_vae()}
    graph = {
        "clip": node("Give", name="clip"),
        "vae": node("Give", name="vae"),
        "save": node(
            "CheckpointSave",
            model=["model", 0],
            clip=["clip", 0],
            vae=["vae", 0],
            filename_prefix="checkpoints/saved",
        ),
    }
    before = run(graph, ours)
    names = {*written(tmp_path)}
    executor.forget_networks()
    assert any(name.startswith("vae.") for name in names)
    assert any(name.startswith("text_encoders.") for name in names)
    (file,) = tmp_path.rglob("*.safetensors")
    again = build_model(load_flux(file, format="bf16"), torch.float32)
    # bf16 rounds the products of NF4's levels and scales, by up to 2^-9 each.
    assert relative_difference(run({}, (again, ours[1])), before) <= 0.02


@pytest.mark.usefixtures("bytes_stay")
def test_an_extracted_difference_is_that_of_the_weights(
    ours: tuple[StorePatcher, StorePatcher], tmp_path: Path
) -> None:
    graph = {
        "minus": node(
            "ModelMergeSubtract", model1=["model", 0], model2=["other model", 0], multiplier=1.0
        ),
        "extract": node(
            "LoraSave",
            filename_prefix="loras/extracted",
            rank=8,
            lora_type="full_diff",
            bias_diff=True,
            model_diff=["minus", 0],
        ),
    }
    run(graph, ours)
    extracted = written(tmp_path)
    first, second = (model.store for model in ours)
    for name in first.packed:
        weights = [store.packed[name].dequantize(torch.float32) for store in (first, second)]
        found = extracted[f"diffusion_model.{name.removesuffix('.weight')}.diff"].float()
        assert torch.allclose(found, weights[0] - weights[1], rtol=0.01, atol=1e-3), name
    bias = "final_layer.linear.bias"
    found = extracted["diffusion_model.final_layer.linear.diff_b"].float()
    assert torch.allclose(found, (first.plain[bias] - second.plain[bias]).float(), atol=1e-2)
