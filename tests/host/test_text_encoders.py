"""The CLIP face: ComfyUI's own text encoders over the store, in ComfyUI's executor, beside the same
encoders with dense weights that other code has quantized and unpacked (DESIGN I2)."""

from __future__ import annotations

import asyncio
import io
import re
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import folder_paths
import numpy as np
import pytest
import text_files
import torch
from atelier.nodes import host, loader_memory, loaders
from atelier.nodes.caches import EncodePrompts
from atelier.nodes.dataset import ImageFolderDataset
from atelier.nodes.encoders import build_clip, prompt_encoder
from atelier.nodes.loaders import LoadQuantizedTextEncoders
from atelier.nodes.native import StorePatcher
from atelier.nodes.native_clip import build_text_encoders
from atelier.nodes.sampling import encode_prompt
from atelier.trainers.formats import FORMATS
from atelier.trainers.text_encoders import load_text_encoders
from comfy_server import ComfyServer, GraphError
from dense import ROUND_TRIPS
from executor import NANO, Give, Keep, Runner
from graphs import Graph, node, sampled
from PIL import Image
from safetensors.torch import load_file, save_file
from text_files import CLIP_L, T5XXL, is_packed, small_clip, small_t5, write_folder, write_pair
from torch import Tensor

TEXT = "a (red:1.4) cat on a mat"
MLP = "text_model_encoder_layers_1_mlp_fc1"
"""A LoRA's name of the MLP, [512, 128], of the second layer of CLIP-L."""
EXTRAS = ("flux", "hooks", "model_merging")
TOLERANCE = 2e-5
SERVED = {"clip_l": "small_clip_l.safetensors", "t5xxl": "small_t5xxl.safetensors"}
"""Files of the server, which other tests share: their graphs must not find these by true names."""

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"), small_clip(), small_t5())


def our_clip(pair: tuple[Path, Path], format: str) -> Any:
    return build_text_encoders(load_text_encoders(*pair, format=format), [])


def dense_clip(folder: Path, format: str, seed: int = 0) -> Any:
    """ComfyUI's own CLIP of what the format keeps of the same weights, in float32."""
    t5 = {
        name: ROUND_TRIPS[format if is_packed(name) else "bf16"](tensor).float()
        for name, tensor in small_t5(seed + 1).items()
    }
    clip = {name: tensor.float() for name, tensor in small_clip(seed).items()}
    return build_clip(write_folder(folder, clip, t5))


def encoded(clip: Any, text: str = TEXT) -> tuple[Tensor, Tensor]:
    """What CLIP Text Encode gives: embeddings and the pooled vector."""
    ((cond, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return cond, extra["pooled_output"]


def distance(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> float:
    """The largest difference, where embeddings have a deviation near 1."""
    pairs = zip(left, right, strict=True)
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs)


@pytest.fixture(scope="module", autouse=True)
def networks_are_forgotten() -> Iterator[None]:
    yield
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_encodes_as_its_dense_weights_do(
    pair: tuple[Path, Path], tmp_path: Path, format: str
) -> None:
    ours = our_clip(pair, format)
    before = ours.cond_stage_model.atelier.store.content_hash()
    found = encoded(ours)
    assert found[0].shape[-1] == 128
    assert found[1].shape == (1, 128)
    assert distance(found, encoded(dense_clip(tmp_path, format))) <= TOLERANCE
    assert ours.cond_stage_model.atelier.store.content_hash() == before


def test_bf16_encodes_exactly_as_comfyui_does(pair: tuple[Path, Path], tmp_path: Path) -> None:
    core = build_clip(write_folder(tmp_path, small_clip(), small_t5()))
    assert distance(encoded(our_clip(pair, "bf16")), encoded(core)) == 0


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_pictures_get_the_embeddings_that_were_trained_on(
    pair: tuple[Path, Path], format: str
) -> None:
    """256 tokens, to which ComfyUI pads a prompt of FLUX."""
    clip, text = our_clip(pair, format), "a red cat on a mat"
    encode, _ = prompt_encoder(clip, 256)
    ((drawn, options),) = encode_prompt(clip, text, 2.5)
    assert distance(encode([text]), (drawn, options["pooled_output"])) <= 1e-6


def test_formats_differ(pair: tuple[Path, Path]) -> None:
    """So that the comparison above compares something."""
    exact, quantized = (encoded(our_clip(pair, format))[0] for format in ("bf16", "nf4"))
    assert 0.01 < float((exact - quantized).std() / exact.std()) < 0.5


def test_encoding_works_in_inference_mode_and_after_an_unload(pair: tuple[Path, Path]) -> None:
    clip = our_clip(pair, "nf4")
    with torch.inference_mode():
        first = encoded(clip)
        comfy.model_management.unload_all_models()
        assert distance(encoded(clip), first) == 0
    clip.patcher.detach()
    assert distance(encoded(clip), first) == 0


def test_a_clone_keeps_our_patcher(pair: tuple[Path, Path]) -> None:
    clip = our_clip(pair, "nf4")
    twice = clip.clone().clone()
    assert isinstance(clip, comfy.sd.CLIP)
    for one in (clip, twice):
        assert type(one.patcher) is StorePatcher
        assert one.patcher.is_clip
        assert one.patcher.model_size() == clip.cond_stage_model.atelier.store.num_bytes
    assert twice.patcher.is_clone(clip.patcher)
    assert type(twice) is type(clip)
    assert distance(encoded(twice), encoded(clip)) == 0


def test_a_clip_that_is_dropped_gives_its_memory_back_at_once(pair: tuple[Path, Path]) -> None:
    clip = our_clip(pair, "nf4")
    _, patched = comfy.sd.load_lora_for_models(None, clip, dict(LORAS["t5"]), 0, 0.5)
    encoded(clip)
    encoded(patched)
    store = weakref.ref(clip.cond_stage_model.atelier.store)
    del clip, patched
    assert store() is None


@pytest.mark.parametrize("name", ["t5", "clip_l"])
def test_the_sizes_that_comfyui_asks_for_hold_the_loras(pair: tuple[Path, Path], name: str) -> None:
    clip = our_clip(pair, "nf4")
    _, patched = comfy.sd.load_lora_for_models(None, clip, dict(LORAS[name]), 0, 0.5)
    in_float32 = [4 * tensor.numel() for tensor in LORAS[name].values() if tensor.dim() == 2]
    assert patched.patcher.model_size() == clip.patcher.model_size() + sum(in_float32)
    encoded(patched)
    assert patched.patcher.loaded_size() == patched.patcher.model_size()
    encoded(clip)
    assert clip.patcher.loaded_size() == clip.patcher.model_size()


def test_nothing_of_the_networks_lies_outside_the_store_but_norms(pair: tuple[Path, Path]) -> None:
    networks = our_clip(pair, "nf4").cond_stage_model
    own = {name for name, _ in networks.named_parameters() if "norm" not in name}
    assert own == {"clip_l.logit_scale", "t5xxl.logit_scale"}
    assert not any(parameter.is_meta for parameter in networks.parameters())


def test_states_name_the_stored_bytes_and_cost_nothing(pair: tuple[Path, Path]) -> None:
    """ComfyUI asks for names at every LoRA: true weights of T5-XXL would be 9.5 GB each time."""
    networks = our_clip(pair, "nf4").cond_stage_model
    store, state = networks.atelier.store, networks.state_dict()
    for name, weight in store.packed.items():
        part, _, rest = name.partition(".")
        assert state[f"{part}.transformer.{rest}"].data_ptr() == weight.data.data_ptr()
    table = store.plain["t5xxl.shared.weight"]
    assert state["t5xxl.transformer.shared.weight"].data_ptr() == table.data_ptr()


def draw(*shape: int, seed: int = 5) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LORAS: dict[str, Tensors] = {
    "clip_l": {
        f"lora_te1_{MLP}.lora_down.weight": draw(4, 128),
        f"lora_te1_{MLP}.lora_up.weight": draw(512, 4, seed=6),
        f"lora_te1_{MLP}.alpha": torch.tensor(2.0),
    },
    "t5": {
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": draw(4, 128),
        "lora_te2_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": draw(192, 4, seed=6),
        "lora_te2_encoder_block_1_layer_1_DenseReluDense_wo.lora_down.weight": draw(4, 192),
        "lora_te2_encoder_block_1_layer_1_DenseReluDense_wo.lora_up.weight": draw(128, 4, seed=6),
    },
    "lokr": {
        "lora_te2_encoder_block_1_layer_0_SelfAttention_k.lokr_w1": draw(8, 8),
        "lora_te2_encoder_block_1_layer_0_SelfAttention_k.lokr_w2": draw(24, 16, seed=6),
    },
    "everything": {
        "text_encoders.t5xxl.transformer.shared.diff": draw(32128, 128),
        "text_encoders.t5xxl.transformer.encoder.final_layer_norm.diff": draw(128),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.diff": draw(
            77, 128
        ),
        f"lora_te1_{MLP}.diff": draw(512, 128),
        f"lora_te1_{MLP}.diff_b": draw(512),
    },
}


def lora(name: str, strength: float, clip: str = "clip") -> dict:
    return node(
        "LoraLoader",
        model=["no model", 0],
        clip=[clip, 0],
        lora_name=f"{name}.safetensors",
        strength_model=0.0,
        strength_clip=strength,
    )


def hooked(*, schedule: bool) -> Graph:
    return {
        "hook": node(
            "CreateHookLora",
            lora_name="clip_l.safetensors",
            strength_model=0.0,
            strength_clip=0.9,
        ),
        "changed": node(
            "SetClipHooks",
            clip=["clip", 0],
            apply_to_conds=True,
            schedule_clip=schedule,
            hooks=["hook", 0],
        ),
    }


def with_clip(graph: Graph) -> Graph:
    """The nodes of a graph whose LoraLoaders hold the CLIP at output 1."""
    return {
        "changed": node("CLIPSetLastLayer", clip=["last", 1], stop_at_clip_layer=-1),
        **graph,
    }


GRAPHS: dict[str, Graph] = {
    "flux": {
        "text": node(
            "CLIPTextEncodeFlux", clip=["clip", 0], clip_l="a dog", t5xxl=TEXT, guidance=3.5
        )
    },
    "last layer": {
        "changed": node("CLIPSetLastLayer", clip=["clip", 0], stop_at_clip_layer=-2),
    },
    **{f"lora {name}": with_clip({"last": lora(name, 0.8)}) for name in LORAS},
    "two loras, one negative": {
        "first": lora("clip_l", 1.0),
        "last": {
            **lora("t5", -0.7),
            "inputs": {**lora("t5", -0.7)["inputs"], "clip": ["first", 1]},
        },
        "changed": node("CLIPSetLastLayer", clip=["last", 1], stop_at_clip_layer=-1),
    },
    "hook": hooked(schedule=False),
    "scheduled hook": hooked(schedule=True),
    "merged": {
        "changed": node("CLIPMergeSimple", clip1=["clip", 0], clip2=["other clip", 0], ratio=0.3),
    },
}


def whole(graph: Graph) -> Graph:
    """The graph with what it is given, CLIP Text Encode, and the node that keeps its output."""
    changed = "changed" if "changed" in graph else "clip"
    return {
        **{name: node("Give", name=name) for name in ("clip", "other clip", "no model")},
        "text": node("CLIPTextEncode", clip=[changed, 0], text=TEXT),
        **graph,
        "keep": node("Keep", value=["text", 0]),
    }


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Two of our CLIPs, of different weights."""
    folders = [tmp_path_factory.mktemp(f"ours{seed}") for seed in (0, 1)]
    pairs = [
        write_pair(folder, small_clip(seed), small_t5(seed + 1))
        for seed, folder in enumerate(folders)
    ]
    first, second = (our_clip(one, "nf4") for one in pairs)
    return first, second


@pytest.fixture(scope="module")
def cores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """ComfyUI's own CLIPs of the same weights."""
    first, second = (dense_clip(tmp_path_factory.mktemp("c"), "nf4", seed) for seed in (0, 1))
    return first, second


@pytest.fixture
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI's nodes, and its folders with files for them."""
    import nodes

    extras = Path(nodes.__file__).parent / "comfy_extras"
    for name in EXTRAS:
        file = extras / f"nodes_{name}.py"
        assert asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    classes: dict[str, Any] = {"Give": Give, "Keep": Keep}
    for kind in (LoadQuantizedTextEncoders, EncodePrompts, ImageFolderDataset):
        classes[kind.GET_SCHEMA().node_id] = kind
    for name, kind in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    for kind in ("loras", "text_encoders"):
        (tmp_path / kind).mkdir()
        entry = ([str(tmp_path / kind)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, entry)
    for name, tensors in LORAS.items():
        save_file(tensors, tmp_path / "loras" / f"{name}.safetensors")


def run(graph: Graph, clips: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    values = {"clip": clips[0], "other clip": clips[1], "no model": None}
    monkeypatch.setattr(Give, "values", values)
    return Runner().run(whole(graph))


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_give_what_the_cores_clip_gives(
    ours: tuple, cores: tuple, comfyui: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And each changes the conditioning, and leaves the store and the CLIP as they were."""
    store = ours[0].cond_stage_model.atelier.store
    before, plain = store.content_hash(), encoded(ours[0])
    found, expected = (run(GRAPHS[name], clips, monkeypatch) for clips in (ours, cores))
    assert len(found) == len(expected)
    for (cond, extra), (core_cond, core_extra) in zip(found, expected, strict=True):
        pair = (cond, extra["pooled_output"])
        assert distance(pair, (core_cond, core_extra["pooled_output"])) <= 5 * TOLERANCE
        assert distance(pair, plain) > 0.01
    assert store.content_hash() == before
    assert distance(encoded(ours[0]), plain) == 0


def test_a_lora_of_another_width_is_one_sentence(
    ours: tuple, comfyui: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wide = {name: draw(*(2 * size for size in t.shape)) for name, t in LORAS["t5"].items()}
    save_file(wide, tmp_path / "loras" / "t5.safetensors")
    graph = with_clip({"last": lora("t5", 1.0)})
    plain = encoded(ours[0])
    with pytest.raises(RuntimeError, match=r"A LoRA on this model was made for another one"):
        run(graph, ours, monkeypatch)
    assert distance(encoded(ours[0]), plain) == 0


def test_clip_save_writes_what_computes(
    ours: tuple, comfyui: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whole bf16 files with the LoRA merged, which load again."""
    graph = {
        "last": lora("t5", 0.8),
        "save": node("CLIPSave", clip=["last", 1], filename_prefix="saved"),
        "changed": node("CLIPSetLastLayer", clip=["last", 1], stop_at_clip_layer=-1),
    }
    found = run(graph, ours, monkeypatch)[0]
    clip_file, t5_file = (
        next((tmp_path / "output").glob(f"saved_{part}_*")) for part in ("clip_l", "t5xxl")
    )
    saved = load_file(t5_file)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    dense = ROUND_TRIPS["nf4"](small_t5()[name])
    lora_name = "lora_te2_" + name.removesuffix(".weight").replace(".", "_")
    up, down = (LORAS["t5"][f"{lora_name}.lora_{part}.weight"] for part in ("up", "down"))
    assert torch.equal(saved[name], (dense + 0.8 * (up @ down)).to(torch.bfloat16))
    assert all(t.dtype == torch.bfloat16 for name, t in saved.items() if name != "logit_scale")
    again = our_clip((clip_file, t5_file), "bf16")
    assert distance(encoded(again)[:1], (found[0],)) < 0.05


def test_identities_tell_formats_and_scales_apart(tmp_path: Path) -> None:
    """The codes of doubled weights are the same; only their scales are not."""
    doubled = {name: tensor * (1 + is_packed(name)) for name, tensor in small_t5().items()}
    pairs = [
        write_pair(tmp_path / str(index), small_clip(), t5)
        for index, t5 in enumerate((small_t5(), doubled))
    ]
    clips = [our_clip(pairs[0], format) for format in FORMATS] + [our_clip(pairs[1], "nf4")]
    identities = [prompt_encoder(clip, 77)[1] for clip in clips]
    assert len({*identities}) == len(FORMATS) + 1
    assert prompt_encoder(our_clip(pairs[0], "nf4"), 77)[1] == identities[[*FORMATS].index("nf4")]


def test_a_lora_changes_the_identity_and_being_on_does_not(ours: tuple) -> None:
    plain = prompt_encoder(ours[0], 77)[1]
    _, patched = comfy.sd.load_lora_for_models(None, ours[0], dict(LORAS["everything"]), 0, 0.5)
    found = prompt_encoder(patched, 77)[1]
    assert found != plain
    encoded(patched)
    assert prompt_encoder(patched, 77)[1] == found
    encoded(ours[0])
    assert prompt_encoder(ours[0], 77)[1] == plain


def loader(**inputs: Any) -> dict:
    values = {"clip_l": CLIP_L, "t5xxl": T5XXL, "format": "nf4"}
    return node("AtelierLoadQuantizedTextEncoders", **{**values, **inputs})


def test_encode_prompts_caches_and_a_full_cache_does_not_run_the_loader(
    comfyui: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_pair(tmp_path / "text_encoders", small_clip(), small_t5())
    monkeypatch.setattr(loader_memory, "_STARTED_NS", time.time_ns() + 86_400 * 10**9)
    loads: list[str] = []

    def counted(*paths: Path, **options: Any) -> Any:
        loads.append(options["format"])
        return load_text_encoders(*paths, **options)

    monkeypatch.setattr(loaders, "load_text_encoders", counted)
    folder = tmp_path / "input" / "red"
    folder.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(folder / "one.png")
    (folder / "one.txt").write_text("caption one", encoding="utf-8")
    dataset = {"folder": "red", "width": 64, "height": 64, "mode": "fixed", "repeats": 1}

    def graph(format: str) -> Graph:
        return {
            "data": node(
                "AtelierImageFolderDataset", **dataset, trigger="", missing_captions="error"
            ),
            "clip": loader(format=format),
            "prompts": node(
                "AtelierEncodePrompts", dataset=["data", 0], clip=["clip", 0], length=77
            ),
            "keep": node("Keep", value=["prompts", 0]),
        }

    cache = Runner().run(graph("nf4"))
    pair = (tmp_path / "text_encoders" / CLIP_L, tmp_path / "text_encoders" / T5XXL)
    expected = prompt_encoder(our_clip(pair, "nf4"), 77)[0](["caption one"])
    entry = cache.load("caption one")
    assert torch.equal(entry.prompt_embeds, expected[0][0])
    assert torch.equal(entry.pooled, expected[1][0])
    assert Runner().run(graph("nf4")) == cache
    assert loads == ["nf4"]
    assert Runner().run(graph("int8")) != cache
    assert loads == ["nf4", "int8"]


@pytest.fixture(scope="module")
def models(server: ComfyServer) -> Path:
    """Small text encoders that fit the nano FLUX, as single files and in diffusers' layout."""
    folder = server.base_directory / "models"
    clip = text_files.random_tensors(text_files.clip_shapes(width=64))
    (folder / "text_encoders").mkdir(parents=True, exist_ok=True)
    for tensors, name in zip((clip, small_t5()), SERVED.values(), strict=True):
        save_file(tensors, folder / "text_encoders" / name)
    whole_folder = write_folder(folder / "diffusers" / "text", clip, small_t5())
    (whole_folder / "transformer").mkdir()
    flux = whole_folder / "transformer" / "flux.safetensors"
    flux.write_bytes((NANO / "nano-flux.safetensors").read_bytes())
    return folder


def picture_graph(clip: list) -> Graph:
    return {
        "load": node(
            "AtelierLoadQuantizedFlux",
            model="diffusers/text",
            format="bf16",
            compute_dtype="fp32",
        ),
        "nano": node(
            "AtelierLoadQuantizedFlux", model="nano (built in)", format="bf16", compute_dtype="fp32"
        ),
        "clip": loader(format="bf16", **SERVED),
        "text": node("CLIPTextEncode", clip=clip, text="a red circle"),
        "guided": node("FluxGuidance", conditioning=["text", 0], guidance=2.5),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        **sampled("out", ["load", 0]),
    }


def test_a_server_paints_the_picture_of_its_own_text_encoders(
    server: ComfyServer, models: Path
) -> None:
    pictures = []
    for clip in (["clip", 0], ["load", 1]):
        (image,) = server.run(picture_graph(clip))["outputs"]["out.save"]["images"]
        pictures.append(np.asarray(Image.open(io.BytesIO(server.view(image)))))
    assert np.array_equal(*pictures)


def test_the_server_offers_the_files_of_text_encoders(server: ComfyServer, models: Path) -> None:
    info = server.object_info()["AtelierLoadQuantizedTextEncoders"]["input"]["required"]
    for name in SERVED:
        offered = info[name][1]["options"] if info[name][0] == "COMBO" else info[name][0]
        assert {*SERVED.values()} <= {*offered}


def test_a_wrong_file_is_one_sentence_in_the_error_box(server: ComfyServer, models: Path) -> None:
    graph = {
        "load": loader(**{**SERVED, "clip_l": SERVED["t5xxl"]}),
        "end": node("PreviewAny", source=["load", 0]),
    }
    with pytest.raises(GraphError, match=r"is not a whole CLIP-L text encoder") as caught:
        server.run(graph)
    assert str(caught.value).startswith("AtelierLoadQuantizedTextEncoders (load): ")
    assert "\n" not in str(caught.value)


def test_a_pickle_is_refused_before_the_graph_runs(server: ComfyServer, models: Path) -> None:
    torch.save({"shared.weight": torch.zeros(4, 4)}, models / "text_encoders" / "old.bin")
    graph = {
        "load": loader(**{**SERVED, "t5xxl": "old.bin"}),
        "end": node("PreviewAny", source=["load", 0]),
    }
    with pytest.raises(GraphError, match=re.escape("'old.bin' is a pickle")):
        server.run(graph)


def test_a_gpu_that_is_not_there_is_one_sentence(server: ComfyServer, models: Path) -> None:
    assert host.compute_device().type == "cpu"
    graph = {
        "load": loader(**SERVED, quantize_on="gpu"),
        "end": node("PreviewAny", source=["load", 0]),
    }
    with pytest.raises(GraphError, match=r"There is no GPU to quantize on"):
        server.run(graph)
