"""Export, Merge and Extract LoRA in ComfyUI's executor."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.sd
import executor
import folder_paths
import pytest
import torch
from atelier.nodes.lora_choice import FROM_WIRE, NONE
from atelier.nodes.lora_extract import ExtractLora
from atelier.nodes.lora_files import ExportLora, MergeLoras
from atelier.nodes.native import build_model
from atelier.trainers.load import load_flux
from atelier.trainers.lora_file import LoraTensors, lora_facts, read_lora
from comfy_server import ComfyServer
from core_flux import core_model_of
from dense import stored_tensors
from executor import Give, Runner
from flux_files import write_flux
from graphs import node, write_base
from lora_keys import written_by
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

NODES = [ExportLora, MergeLoras, ExtractLora]


@pytest.fixture
def loras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of LoRAs, with three of them in it."""
    import nodes

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    kinds: dict[str, Any] = {kind.GET_SCHEMA().node_id: kind for kind in NODES}
    for name, kind in (kinds | {"Keep": executor.Keep, "Give": Give}).items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, kind)
    monkeypatch.setattr(Give, "values", {})
    folder = tmp_path / "output" / "loras"
    folder.mkdir(parents=True)
    paths = folder_paths.folder_names_and_paths["loras"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], paths[1]))
    metadata = {
        **{"ss_tag_frequency": json.dumps({"10_x": {"ohwx": 9}}), "ss_steps": "70"},
        **{"lora_adapter_metadata": "{}", "modelspec.hash_sha256": "0x00"},
        "modelspec.architecture": "flux-1-schnell/lora",
    }
    for trainer in ("kohya", "ai_toolkit", "simpletuner_lycoris"):
        save_file(written_by(trainer), folder / f"{trainer}.safetensors", metadata=metadata)
    return folder


def graph(node_id: str, output: int = 0, **inputs: Any) -> dict[str, Any]:
    """One node and a Keep; inputs that are no numbers and texts come over wires."""
    wired = {k: v for k, v in inputs.items() if not isinstance(v, (str, int, float))}
    Give.values.update(wired)
    given = {f"give_{k}": {"class_type": "Give", "inputs": {"name": k}} for k in wired}
    links = {k: [f"give_{k}", 0] for k in wired}
    return {
        **given,
        "node": {"class_type": node_id, "inputs": {**inputs, **links}},
        "keep": {"class_type": "Keep", "inputs": {"value": ["node", output]}},
    }


def export(lora_name: str = "kohya.safetensors", **inputs: Any) -> dict[str, Any]:
    values = {"format": "diffusers", "dtype": "fp32", "rank": 0, "name": "made"}
    return graph("AtelierExportLoRA", lora_name=lora_name, **{**values, **inputs})


def merge(*files: tuple[str, float], rank: int = 0) -> dict[str, Any]:
    slots: dict[str, Any] = {}
    for number in range(1, 5):
        name, weight = files[number - 1] if number <= len(files) else (NONE, 1.0)
        slots |= {f"lora_{number}": name, f"weight_{number}": weight}
    return graph("AtelierMergeLoRAs", rank=rank, **slots)


def test_an_export_says_what_it_is(loras: Path) -> None:
    runner = Runner()
    assert runner.run(export(dtype="bf16", trigger_words="my cat")) == "made.safetensors"
    path = loras / "made.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        dtypes = {n: file.get_tensor(n).dtype for n in file.keys()}
    raw = path.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(body).hexdigest()}"
    assert metadata["modelspec.architecture"] == "flux-1-schnell/lora"
    assert metadata["modelspec.title"] == "made"
    assert "lora_adapter_metadata" not in metadata
    facts = lora_facts(read_lora(path))
    assert (facts.trigger_words, facts.steps) == (("my cat",), 70)
    kinds = {name.endswith(".alpha"): dtype for name, dtype in dtypes.items()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    said, of_t5 = runner.texts["node"]
    assert of_t5.startswith("The part for T5 does nothing in diffusers")
    assert said.startswith("Written: made.safetensors, 0.")


def test_a_lora_on_the_wire_keeps_its_metadata(loras: Path) -> None:
    lora = LoraTensors(written_by("ai_toolkit"), metadata={"atelier.base_format": "nf4"})
    found = Runner().run(export(FROM_WIRE, lora=lora, format="kohya", rank=2, output=1))
    assert lora_facts(found).base_format == "nf4"
    assert lora_facts(read_lora(loras / "made.safetensors")).base_format == "nf4"
    assert {t.shape[0] for n, t in found.items() if n.endswith("_proj.lora_down.weight")} == {2}


OF_OURS = {
    **{"atelier.rank": "4", "atelier.settings": json.dumps({"lora": {"rank": 4, "alpha": 8.0}})},
    **{"ss_network_dim": "4", "ss_network_alpha": "8.0"},
}


@pytest.mark.parametrize("metadata", [OF_OURS, {}])
def test_a_new_rank_is_in_the_metadata_too(loras: Path, metadata: dict[str, str]) -> None:
    lora = LoraTensors(written_by("ai_toolkit"), metadata=metadata)
    found = Runner().run(export(FROM_WIRE, lora=lora, format="kohya", rank=2, output=1))
    for made in (found, read_lora(loras / "made.safetensors")):
        assert (lora_facts(made).rank, lora_facts(made).alpha) == (2, 2.0)
        dims = [made.metadata.get(f"ss_network_{which}") for which in ("dim", "alpha")]
        assert dims == (["2", "2"] if metadata else [None, None])


REFUSED = [
    ({"lora_name": FROM_WIRE}, "Export LoRA has no LoRA: "),
    ({"lora_name": "gone.safetensors"}, "is not there any more"),
    ({"name": "kohya"}, "'kohya' is the name of the LoRA that is exported"),
    ({"name": "a/b"}, "cannot be a file name"),
    (
        {"lora_name": "simpletuner_lycoris.safetensors", "format": "kohya"},
        "is a LoKr, which no LoRA equals exactly. Set a rank",
    ),
]


@pytest.mark.parametrize(("inputs", "sentence"), REFUSED)
def test_what_cannot_be_exported_is_one_sentence(
    loras: Path, inputs: dict[str, Any], sentence: str
) -> None:
    before = {path: path.read_bytes() for path in loras.iterdir()}
    with pytest.raises(RuntimeError, match=sentence):
        Runner().run(export(**inputs))
    assert {path: path.read_bytes() for path in loras.iterdir()} == before


def other(name: str, tensor: Tensor) -> LoraTensors:
    """A LoRA of FLUX with one more tensor, or one in place of another."""
    return LoraTensors({**written_by("xlabs"), name: tensor})


QKV = "double_blocks.0.processor.qkv_lora1"
PROJ = "transformer.transformer_blocks.0.attn.to_out.0"
BAD_ON_THE_WIRE = [
    (other(f"{QKV}.dora_scale", torch.ones(768, 1)), "only some modules are DoRAs: .* comfyui"),
    (
        other(f"{PROJ}.lora_B.bias", torch.ones(256)),
        "has biases, first 'transformer.tr.* lora_bias",
    ),
    (other(f"{PROJ}.lora_B.style.bias", torch.ones(256)), "has biases, first 'transformer.tr"),
    (
        {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": torch.ones(2, 2)},
        "was not made for FLUX.1: of its 1 modules 1 are unknown, such as lora_unet_input",
    ),
    (
        {"transformer.transformer_blocks.30.attn.to_q.lora_up.weight": torch.ones(256, 256)},
        "was not made for FLUX.1: of its 1 modules 1 are unknown",
    ),
    (other(f"{QKV}.up.weight", torch.ones(768, 7)), "do not fit together: 'double_blocks.0"),
    (other(f"{QKV}.up.weight", torch.ones(512, 4)), "changes 512 rows of 256 .* 768 are needed"),
    (other(f"{QKV}.up.weight", torch.full((768, 4), torch.nan)), "not finite"),
    (other(f"{QKV}.up.weight", torch.ones(768, 0)), "rank 0"),
    (other(f"{QKV}.up.weight", torch.full((768, 4), 1e6)), "too large for fp16. Choose bf16"),
    (
        other("diffusion_model.double_blocks.0.img_attn.qkv.diff_b", torch.ones(768)),
        "diffusers cannot hold .* Choose comfyui",
    ),
]


@pytest.mark.parametrize(("tensors", "sentence"), BAD_ON_THE_WIRE)
def test_a_lora_that_is_wrong_is_one_sentence(
    loras: Path, tensors: dict[str, Tensor], sentence: str
) -> None:
    if "down" not in str([*tensors]):
        tensors = {**tensors, **{n.replace("up", "down"): t for n, t in tensors.items()}}
    with pytest.raises(RuntimeError, match=sentence):
        Runner().run(export(FROM_WIRE, lora=dict(tensors), dtype="fp16"))
    assert not (loras / "made.safetensors").exists()


def test_unknown_modules_are_left_out_and_told(loras: Path) -> None:
    runner, tensors = Runner(), written_by("kohya")
    tensors["lora_unet_double_blocks_0_img_new.alpha"] = torch.tensor(1.0)
    runner.run(export(FROM_WIRE, lora=tensors, format="comfyui"))
    assert runner.texts["node"][1:] == [
        "Left out, because FLUX.1 has no such modules: 1, such as "
        "lora_unet_double_blocks_0_img_new."
    ]


def test_different_ranks_are_told_for_the_formats_that_diffusers_gets_wrong(loras: Path) -> None:
    lora, texts = written_by("xlabs"), {}
    for part, dim in (("down", 0), ("up", 1)):
        name = f"double_blocks.0.processor.proj_lora1.{part}.weight"
        lora[name] = torch.cat([lora[name]] * 2, dim)
    for format in ("diffusers", "comfyui", "kohya"):
        runner = Runner()
        runner.run(export(FROM_WIRE, lora=lora, format=format))
        texts[format] = runner.texts["node"][1:]
    told = (
        "The modules have different ranks, 4 to 8: diffusers would read this file at another "
        "strength. Choose the format diffusers for it."
    )
    assert texts == {"diffusers": [], "comfyui": [told], "kohya": [told]}
    runner = Runner()
    runner.run(export(FROM_WIRE, lora=written_by("xlabs"), format="kohya"))
    assert runner.texts["node"][1:] == []


def told_of(lora: dict[str, Tensor], **inputs: Any) -> list[str]:
    """What an export says beside what it wrote."""
    runner = Runner()
    runner.run(export(FROM_WIRE, lora=lora, **inputs))
    return runner.texts["node"][1:]


def test_what_diffusers_does_not_load_is_told(loras: Path) -> None:
    t5 = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    lora = written_by("xlabs")
    lora |= {f"{t5}.lora_down.weight": torch.ones(4, 64), f"{t5}.lora_up.weight": torch.ones(64, 4)}
    assert told_of(lora, format="diffusers") == [
        "The part for T5 does nothing in diffusers, which loads none. For ComfyUI choose the "
        "format comfyui."
    ]
    assert told_of(lora, format="comfyui") == []


def test_what_a_dtype_makes_0_is_told(loras: Path) -> None:
    lora = other(f"{QKV}.up.weight", torch.full((768, 4), 2.0**-26))
    lora |= {"double_blocks.0.processor.proj_lora1.up.weight": torch.zeros(256, 4)}
    assert told_of(lora, dtype="fp16") == [
        "Too small for float16, and now 0: 3 tensors, such as "
        "'transformer.transformer_blocks.0.attn.to_q.lora_B.weight'. Choose fp32 or bf16."
    ]
    assert told_of(lora, dtype="bf16") == []


@pytest.mark.parametrize(("dtype", "error"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_a_small_difference_of_large_products_is_rounded_as_small(
    loras: Path, dtype: str, error: float
) -> None:
    """As PiSSA leaves it, in a DoRA, beside its product in float64."""
    lora, parts = written_by("peft_dora"), ("lora_A.weight", "lora_B.weight")
    first = next(n for n in lora if n.endswith(parts[0])).removesuffix(parts[0])
    a, b = (lora[first + part] for part in parts)
    lora[first + parts[0]] = torch.cat([1.001 * a, a])
    lora[first + parts[1]] = torch.cat([0.998 * b, -b], dim=1)
    found = Runner().run(export(FROM_WIRE, lora=lora, dtype=dtype, output=1))

    def product(tensors: dict[str, Tensor], module: str) -> Tensor:
        down, up = (tensors[module + part].double() for part in parts)
        alpha = float(tensors.get(f"{module}alpha", len(down)))
        return alpha / len(down) * (up @ down)

    wanted = product(lora, first)
    assert (product(found, first) - wanted).norm() < 2 * error * wanted.norm()
    assert found[f"{first}lora_magnitude_vector"].dtype == torch.float32
    others = [n for n in lora if not n.startswith(first) and n.endswith("lora_B.weight")]
    for name in others:  # of what need not be computed anew
        assert torch.equal(found[name], lora[name].to(found[name].dtype))
    assert others


def test_a_merge_says_what_it_is(loras: Path) -> None:
    runner = Runner()
    files = [("kohya.safetensors", 0.5), ("ai_toolkit.safetensors", -1.0)]
    found = runner.run(merge(*files, ("simpletuner_lycoris.safetensors", 1.0), rank=8))
    assert {t.shape[0] for n, t in found.items() if "lora_A" in n} <= {4, 8}
    assert lora_facts(found).trigger_words == ("ohwx",)
    assert json.loads(found.metadata["atelier.merged"])[1] == ["ai_toolkit", -1.0]
    said, of_lokrs, kept = runner.texts["node"]
    assert said.startswith("LoRAs merged: 3; modules: ")
    assert of_lokrs.startswith("Of the LoKrs of 'simpletuner_lycoris.safetensors', rank 8 keeps ")
    assert kept.startswith("Of the sum of the LoRAs, its new rank keeps ")


def test_a_merge_says_what_a_rank_takes_from_a_lokr(loras: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(size, size, generator=generator) for size in (4, 64)]
    module = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{module}.lokr_w{n}": factor for n, factor in enumerate(factors, 1)}
    save_file(tensors, loras / "lokr.safetensors")
    runner = Runner()
    runner.run(merge(("lokr.safetensors", 0.3), rank=7))
    energies = torch.linalg.svdvals(torch.kron(*factors).double()) ** 2
    share = float(energies[:7].sum() / energies.sum())
    assert 0.05 < share < 0.9
    assert runner.texts["node"][1:] == [
        f"Of the LoKrs of 'lokr.safetensors', rank 7 keeps {share:.1%} (squared).",
        "Of the sum of the LoRAs, its new rank keeps 100.0% (squared).",
    ]


BASE = ("modelspec.architecture", "ss_sd_model_name", "ss_base_model_version")


@pytest.mark.parametrize(
    ("said", "kept", "told"),
    [
        ([("a/lora", "a.st", "x"), ("a/lora", "a.st", "x")], ("a/lora", "a.st", "x"), ""),
        ([("a/lora", "a.st", "x"), ("a/lora", "b.st", "x")], ("a/lora", "", "x"), "a.st, b.st"),
        ([("a/lora", "a.st", ""), ("b/lora", "a.st", "")], ("", "a.st", ""), "a/lora, b/lora"),
        ([("a/lora", "", ""), ("", "", "")], ("", "", ""), ""),
    ],
)
def test_a_merge_names_the_base_that_all_name(
    loras: Path, said: list[tuple[str, ...]], kept: tuple[str, ...], told: str
) -> None:
    for number, values in enumerate(said):
        metadata = {key: value for key, value in zip(BASE, values, strict=True) if value}
        save_file(written_by("kohya"), loras / f"{number}.safetensors", metadata=metadata)
    runner = Runner()
    found = runner.run(merge(("0.safetensors", 1.0), ("1.safetensors", 1.0)))
    assert tuple(found.metadata.get(key, "") for key in BASE) == kept
    warning = f"The LoRAs were trained on different models: {told}. Their sum may do little on any "
    assert runner.texts["node"][1:] == ([f"{warning}of them."] if told else [])


def test_an_export_claims_no_base_that_the_file_does_not_name(loras: Path) -> None:
    Runner().run(export(FROM_WIRE, lora=written_by("kohya")))
    metadata = read_lora(loras / "made.safetensors").metadata
    assert [key for key in metadata if "architecture" in key] == []


def test_the_same_file_twice_is_told_and_no_file_refused(loras: Path) -> None:
    runner = Runner()
    runner.run(merge(("kohya.safetensors", 0.5), ("kohya.safetensors", 0.5)))
    assert "'kohya.safetensors' is there more than once" in runner.texts["node"][1]
    with pytest.raises(RuntimeError, match="There is no LoRA to merge"):
        runner.run(merge())
    save_file(written_by("onetrainer_dora"), loras / "dora.safetensors")
    with pytest.raises(RuntimeError, match="A DoRA cannot be merged with others"):
        runner.run(merge(("dora.safetensors", 1.0)))


def extract(model: Any, model_base: Any, **inputs: Any) -> dict[str, Any]:
    values = {"rank": 12, "energy": 1.0, **inputs}
    return graph("AtelierExtractLoRA", model=model, model_base=model_base, **values)


def changes(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ComfyUI adds to each matrix of a core MODEL."""
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    return {
        key: comfy.lora.calculate_weight(
            patches, torch.zeros_like(model.model.get_parameter(key)), key
        )
        for key, patches in patched.patches.items()
    }


def test_a_lora_on_a_quantized_model_is_extracted_again(loras: Path, tmp_path: Path) -> None:
    model = build_model(
        load_flux(write_flux(tmp_path / "flux.safetensors"), format="nf4"), torch.float32
    )
    tensors = written_by("simpletuner_comfyui")
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 0.5, 0.0)
    runner = Runner()
    found = runner.run(extract(patched, model))
    core = core_model_of(stored_tensors("bf16"))
    expected = {key: 0.5 * delta for key, delta in changes(core, tensors).items()}
    extracted = changes(core, dict(found))
    assert extracted.keys() == expected.keys()
    for key, delta in expected.items():
        assert torch.max(torch.abs(extracted[key] - delta)) <= 1e-4, key
    assert runner.texts["node"][0].startswith("Extracted: 100.0% of the squared difference; ")


def test_two_models_of_comfyui_give_the_lora_between_them(loras: Path) -> None:
    plain, name = stored_tensors("bf16"), "double_blocks.0.img_attn.proj"
    generator = torch.Generator().manual_seed(1)
    up, down = (torch.randn(256, 3, generator=generator) for _ in range(2))
    tuned = {n: t.clone() for n, t in plain.items()}
    tuned[f"{name}.weight"] += 0.1 * up @ down.T
    tuned[f"{name}.bias"] += 1
    runner = Runner()
    found = runner.run(extract(core_model_of(tuned), core_model_of(plain), energy=0.9999))
    module = f"diffusion_model.{name}"
    assert {n.removeprefix(module) for n in found} == {
        *(".lora_up.weight", ".lora_down.weight", ".alpha")
    }
    assert found[f"{module}.lora_down.weight"].shape == (3, 256)
    product = found[f"{module}.lora_up.weight"] @ found[f"{module}.lora_down.weight"]
    assert torch.max(torch.abs(product - 0.1 * up @ down.T)) <= 1e-4
    assert runner.texts["node"][1] == (
        "Biases and norms that differ too, and that a LoRA cannot hold: 1."
    )


def test_models_without_a_difference_are_refused(loras: Path) -> None:
    plain = stored_tensors("bf16")
    with pytest.raises(RuntimeError, match="The two MODELs have the same matrices"):
        Runner().run(extract(core_model_of(plain), core_model_of(plain)))


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ({"depth": 2}, "model has 2 double blocks, model_base 1 double blocks. Choose"),
        (
            {"guidance": False},
            "model has no guidance embedding, model_base a guidance embedding. Choose",
        ),
    ],
)
def test_models_of_two_kinds_are_refused(loras: Path, kind: dict[str, Any], told: str) -> None:
    other, plain = (core_model_of(stored_tensors("bf16", **one)) for one in (kind, {}))
    with pytest.raises(RuntimeError, match=told):
        Runner().run(extract(other, plain))


def test_the_nodes_and_comfyuis_loader_work_together(server: ComfyServer) -> None:
    """A LoRA that Load LoRA put on becomes a file, and half of that file twice becomes another."""
    models = server.base_directory / "models"
    write_base(models)
    tensors = written_by("simpletuner_comfyui")
    (models / "loras").mkdir(parents=True, exist_ok=True)
    save_file(tensors, models / "loras" / "wire.safetensors")
    base = {"model": "tiny.safetensors", "format": "bf16", "compute_dtype": "fp32"}
    loading = node("AtelierLoadQuantizedFlux", **base)
    on = node("LoraLoaderModelOnly", model=["load", 0], lora_name="wire.safetensors")
    on["inputs"]["strength_model"] = 1.0
    made = {"format": "kohya", "dtype": "fp32", "rank": 0}
    extracting = node(
        "AtelierExtractLoRA", model=["on", 0], model_base=["load", 0], rank=12, energy=1.0
    )
    export = node("AtelierExportLoRA", lora_name=FROM_WIRE, name="out", lora=["made", 0], **made)
    server.run({"load": loading, "on": on, "made": extracting, "out": export})

    slots = {f"lora_{n}": "out.safetensors" if n < 3 else NONE for n in range(1, 5)}
    weights = {f"weight_{n}": 0.5 for n in range(1, 5)}
    merging = node("AtelierMergeLoRAs", rank=12, **slots, **weights)
    export["inputs"] |= {"name": "twice", "format": "diffusers"}
    server.run({"made": merging, "out": export})

    core = core_model_of(stored_tensors("bf16"))
    found = read_lora(server.base_directory / "output" / "loras" / "twice.safetensors")
    there = changes(core, dict(found))
    for key, delta in changes(core, tensors).items():
        assert torch.max(torch.abs(there[key] - delta)) <= 1e-4, key
