"""The dataset nodes in ComfyUI's own executor, in this process, on the nano networks.

Two loaders of ComfyUI are replaced by ones that count their runs and read the nano files.
"""

import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.model_management
import executor
import folder_paths
import pytest
import torch
from atelier.nodes import folders, host, loader_memory
from atelier.nodes.caches import CacheLatents, EncodePrompts
from atelier.nodes.dataset import CombineDatasets, ImageFolderDataset, ScheduleDataset
from atelier.nodes.embeddings import ExportEmbeddings, ImportEmbeddings
from atelier.nodes.settings import CaptionSettingsNode, PictureSettingsNode
from executor import CountingLoader, Runner
from PIL import Image, ImageOps

NODES = [
    *(ImageFolderDataset, ScheduleDataset, CombineDatasets),
    *(CaptionSettingsNode, PictureSettingsNode, CacheLatents, EncodePrompts),
    *(ImportEmbeddings, ExportEmbeddings),
]
MODEL_FILES = {"vae": ["a.safetensors"], "text_encoders": ["c.safetensors", "t.safetensors"]}


@pytest.fixture(scope="module", autouse=True)
def networks_are_forgotten() -> Iterator[None]:
    yield
    executor.forget_networks()


def encoded_files() -> list[Path]:
    return list(folders.cache_folder("latents").rglob("*.safetensors"))


@pytest.fixture
def runner(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    import nodes

    tomorrow_ns = time.time_ns() + 86_400 * 10**9
    monkeypatch.setattr(loader_memory, "_STARTED_NS", tomorrow_ns)  # the files here are new
    classes = {node.GET_SCHEMA().node_id: node for node in NODES}
    classes |= {"VAELoader": executor.NanoVaeLoader, "DualCLIPLoader": executor.NanoClipLoader}
    classes |= {"OtherLoader": executor.NanoVaeLoader}
    classes |= {"Keep": executor.Keep, "Name": executor.Name}
    for name, node in classes.items():
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, name, node)
    return Runner()


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of ComfyUI's kind with two pictures in input/red and files for the loaders."""
    for name in ("input", "output"):
        (tmp_path / name).mkdir()
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(tmp_path / name))
    for kind, names in MODEL_FILES.items():
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"})
        )
        for name in names:
            (tmp_path / kind / name).write_bytes(b"weights")
    add_picture(tmp_path / "input" / "red", "one", (255, 0, 0))
    add_picture(tmp_path / "input" / "red", "two", (0, 255, 0))
    return tmp_path


def add_picture(folder: Path, name: str, colour: tuple[int, int, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(folder / f"{name}.png")
    (folder / f"{name}.txt").write_text(f"caption {name}", encoding="utf-8")


def dataset_node(**inputs: Any) -> dict[str, Any]:
    values = {"folder": "red", "width": 64, "height": 64, "mode": "fixed", "repeats": 1}
    values |= {"trigger": "", "missing_captions": "error", **inputs}
    return {"class_type": "AtelierImageFolderDataset", "inputs": values}


def latents_graph(loader: str = "VAELoader", vae_name: Any = "a.safetensors") -> dict[str, Any]:
    latents = {"dataset": ["dataset", 0], "vae": ["vae", 0], "batch_size": 1}
    return {
        "dataset": dataset_node(),
        "name": {"class_type": "Name", "inputs": {}},
        "vae": {"class_type": loader, "inputs": {"vae_name": vae_name}},
        "latents": {"class_type": "AtelierCacheLatents", "inputs": latents},
        "keep": {"class_type": "Keep", "inputs": {"value": ["latents", 0]}},
    }


def prompts_graph(length: int = 77) -> dict[str, Any]:
    names = {"clip_name1": "c.safetensors", "clip_name2": "t.safetensors"}
    prompts = {"dataset": ["dataset", 0], "clip": ["clip", 0], "length": length}
    return {
        "dataset": dataset_node(),
        "clip": {"class_type": "DualCLIPLoader", "inputs": names},
        "prompts": {"class_type": "AtelierEncodePrompts", "inputs": prompts},
        "keep": {"class_type": "Keep", "inputs": {"value": ["prompts", 0]}},
    }


GRAPHS = {"latents": latents_graph(), "prompts": prompts_graph()}


def with_captions(graph: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The graph with Caption Settings before its dataset."""
    values = {"source": "text file", "instance_prompt": "", "column": "", "lines": "one"}
    values |= {"prefix": "", "suffix": "", "shuffle": False, "keep_tokens": 1, "variants": 8}
    values |= {"separator": ",", "dropout": 0.0, **inputs}
    settings = {"class_type": "AtelierCaptionSettings", "inputs": values}
    return {**graph, "dataset": dataset_node(captions=["settings", 0]), "settings": settings}


def with_pictures(graph: dict[str, Any], **inputs: Any) -> dict[str, Any]:
    """The graph with Picture Settings before its dataset."""
    values = {"crop": "center", "filter": "lanczos", "max_side": 0, "flip": False, **inputs}
    settings = {"class_type": "AtelierPictureSettings", "inputs": values}
    return {**graph, "dataset": dataset_node(pictures=["settings", 0]), "settings": settings}


def orders(first: str, *loose: str) -> set[str]:
    return {", ".join((first, *order)) for order in itertools.permutations(loose)}


def test_latents_of_all_pictures_are_cached(runner: Runner) -> None:
    cache = runner.run(latents_graph())
    shapes = [tuple(cache.load(entry.name).mean.shape) for entry in cache.entries]
    assert shapes == [(16, 8, 8)] * 2


@pytest.mark.parametrize("length", [77, 300])
def test_prompts_have_the_asked_length(runner: Runner, length: int) -> None:
    cache = runner.run(prompts_graph(length))
    assert [e.text for e in cache.entries] == ["caption one", "caption two", ""]
    assert cache.load("caption one").prompt_embeds.shape == (length, 128)


@pytest.mark.parametrize(
    ("settings", "size"),
    [({}, (320, 208)), ({"step": "64"}, (320, 192)), ({"enlarge": False}, (96, 64))],
)
def test_picture_settings_say_which_sizes_there_are(
    runner: Runner, workplace: Path, settings: dict[str, Any], size: tuple[int, int]
) -> None:
    """Of pictures of 100x67: 256x256 pixels in their shape are 313x209, and 96x64 fit in them."""
    for path in (workplace / "input" / "red").glob("*.png"):
        Image.new("RGB", (100, 67), "red").save(path)
    graph = with_pictures(latents_graph(), **settings)
    graph["dataset"]["inputs"] |= {"width": 256, "height": 256, "mode": "preserved"}
    graph["keep"]["inputs"]["value"] = ["dataset", 0]
    subset = runner.run(graph).subsets[0]
    assert {subset.size_of(record) for record in subset.records} == {size}


def test_every_order_of_an_instance_prompts_tags_is_encoded(runner: Runner) -> None:
    settings = {"source": "instance prompt", "instance_prompt": "sks, red, round", "shuffle": True}
    cache = runner.run(with_captions(prompts_graph(), **settings))
    texts = [entry.text for entry in cache.entries]
    assert len(texts) == 3
    assert set(texts) == {*orders("sks", "red", "round"), ""}
    first, other, empty = (cache.load(text).prompt_embeds for text in texts)
    assert not torch.equal(first, other)
    assert not torch.equal(first, empty)


def test_every_text_of_a_metadata_file_is_encoded(runner: Runner, workplace: Path) -> None:
    rows = [
        {"file_name": "one.png", "tags": ["one, red, round", "one, flat"]},
        {"file_name": "two.png", "tags": "two, green, square, matt"},
    ]
    path = workplace / "input" / "red" / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {"source": "metadata file", "column": "tags", "shuffle": True}
    cache = runner.run(with_captions(prompts_graph(), **settings))
    expected = orders("one", "red", "round") | orders("one", "flat")
    expected |= orders("two", "green", "square", "matt") | {""}
    assert {entry.text for entry in cache.entries} == expected


def test_a_changed_metadata_file_is_read_again(workplace: Path) -> None:
    before = ImageFolderDataset.fingerprint_inputs(folder="red")
    (workplace / "input" / "red" / "metadata.jsonl").write_text("{}", encoding="utf-8")
    assert ImageFolderDataset.fingerprint_inputs(folder="red") != before


def test_samples_know_their_texts_and_their_dropout(runner: Runner) -> None:
    settings = {"prefix": "a photo.", "suffix": "in colour", "dropout": 0.25}
    cache = runner.run(with_captions(latents_graph(), **settings))
    assert [(entry.texts, entry.dropout) for entry in cache.entries] == [
        ((("a photo. caption one in colour",),), 0.25),
        ((("a photo. caption two in colour",),), 0.25),
    ]


def test_the_mirror_image_is_that_of_a_mirrored_file(runner: Runner, workplace: Path) -> None:
    pictures = [workplace / "input" / "red" / f"{name}.png" for name in ("one", "two")]
    for index, path in enumerate(pictures):
        image = Image.new("RGB", (64, 64), (255, 255, 255))
        image.paste((200, 30, 60), (0, 16 * index, 24, 64))
        image.save(path)
    both = runner.run(with_pictures(latents_graph(), flip=True))
    assert [len(entry.keys) for entry in both.entries] == [2, 2]
    for path in pictures:
        ImageOps.mirror(Image.open(path)).save(path)
    mirrored = runner.run(latents_graph())
    for entry, expected in zip(both.entries, mirrored.entries, strict=True):
        upright, flipped = (both.load(key).mean for key in entry.keys)
        assert torch.equal(flipped, mirrored.load(expected.keys[0]).mean)
        assert not torch.allclose(upright, flipped, atol=1e-2)


def test_settings_that_cannot_be_are_refused(runner: Runner) -> None:
    with pytest.raises(RuntimeError, match="The instance prompt is empty"):
        runner.run(with_captions(prompts_graph(), source="instance prompt"))


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_full_cache_does_not_run_its_loader(runner: Runner, kind: str) -> None:
    first = runner.run(GRAPHS[kind])
    assert CountingLoader.runs == 1
    assert runner.run(GRAPHS[kind]) == first
    assert CountingLoader.runs == 0


@pytest.mark.parametrize("kind", GRAPHS)
def test_something_new_runs_the_loader(runner: Runner, workplace: Path, kind: str) -> None:
    runner.run(GRAPHS[kind])
    add_picture(workplace / "input" / "red", "three", (0, 0, 255))
    runner.run(GRAPHS[kind])
    assert CountingLoader.runs == 1


def test_another_length_runs_the_loader(runner: Runner) -> None:
    runner.run(prompts_graph(77))
    runner.run(prompts_graph(78))
    assert CountingLoader.runs == 1


@pytest.mark.parametrize(("kind", "name"), [("vae", "a"), ("text_encoders", "t")])
@pytest.mark.parametrize("change", ["time", "size"])
def test_a_changed_model_file_runs_the_loader(
    runner: Runner, workplace: Path, kind: str, name: str, change: str
) -> None:
    graph = GRAPHS["latents" if kind == "vae" else "prompts"]
    runner.run(graph)
    path = workplace / kind / f"{name}.safetensors"
    stat = path.stat()
    path.write_bytes(b"weights" if change == "time" else b"other weights")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (change == "time")))
    runner.run(graph)
    assert CountingLoader.runs == 1


@pytest.mark.parametrize(
    "graph",
    [
        latents_graph(loader="OtherLoader"),
        latents_graph(vae_name=["name", 0]),
        latents_graph(vae_name="missing.safetensors"),
    ],
    ids=["another node", "a linked name", "a missing file"],
)
def test_a_source_that_is_not_known_always_runs(runner: Runner, graph: dict[str, Any]) -> None:
    for _ in range(2):
        runner.run(graph)
        assert CountingLoader.runs == 1


def test_a_file_that_is_newer_than_this_comfyui_always_runs(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_memory, "_STARTED_NS", 0)
    for _ in range(2):
        runner.run(latents_graph())
        assert CountingLoader.runs == 1


def test_another_version_of_comfyui_runs_the_loader(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner.run(latents_graph())
    monkeypatch.setattr(host, "version", lambda: "another")
    runner.run(latents_graph())
    assert CountingLoader.runs == 1


def test_a_damaged_entry_is_encoded_anew_when_the_graph_is_queued_again(runner: Runner) -> None:
    cache = runner.run(latents_graph())
    mark = CacheLatents.fingerprint_inputs()
    for path in encoded_files():
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="missing or damaged"):
        [cache.load(entry.name) for entry in cache.entries]
    assert CacheLatents.fingerprint_inputs() != mark  # ComfyUI runs the node again
    again = runner.run(latents_graph())
    assert all(torch.isfinite(again.load(entry.name).mean).all() for entry in cache.entries)


def test_a_loader_that_cannot_be_remembered_runs_again(runner: Runner) -> None:
    """A file lies where the folder would be made."""
    folders.cache_folder("latents").mkdir(parents=True)
    (folders.cache_folder("latents") / "loaders").write_text("", encoding="utf-8")
    for _ in range(2):
        assert runner.run(latents_graph()).entries
        assert CountingLoader.runs == 1


def with_inputs(graph: dict[str, Any], node: str, **inputs: Any) -> dict[str, Any]:
    changed = {**graph[node], "inputs": {**graph[node]["inputs"], **inputs}}
    return {**graph, node: changed}


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("latents", {"latents": "one sample"}),
        ("latents", {"tile": "512"}),
        ("prompts", {"batch_size": 3}),
    ],
)
def test_what_belongs_to_the_keys_runs_the_loader(
    runner: Runner, workplace: Path, kind: str, inputs: dict[str, Any]
) -> None:
    """A tile only for pictures that are larger, a batch never."""
    graph = {**GRAPHS[kind], "dataset": dataset_node(width=576, height=64)}
    runner.run(graph)
    for loads in (kind == "latents", 0):
        runner.run(with_inputs(graph, kind, **inputs))
        assert CountingLoader.runs == loads


def test_prompts_encoded_at_once_equal_single_ones(runner: Runner, workplace: Path) -> None:
    single = runner.run(prompts_graph())
    loaded = [single.load(entry.text) for entry in single.entries]
    for path in folders.cache_folder("prompts").glob("*.safetensors"):
        path.unlink()
    batch = runner.run(with_inputs(prompts_graph(), "prompts", batch_size=2))
    for entry, expected in zip(batch.entries, loaded, strict=True):
        embeds = batch.load(entry.text)
        torch.testing.assert_close(
            embeds.prompt_embeds, expected.prompt_embeds, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(embeds.pooled, expected.pooled, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_cache_above_the_limit_is_refused(runner: Runner, kind: str) -> None:
    sides = {"width": 8192, "height": 8192} if kind == "latents" else {}
    graph = {**GRAPHS[kind], "dataset": dataset_node(**sides)}
    with pytest.raises(RuntimeError, match=r"^Caching this would take .* limit_gb allows"):
        runner.run(with_inputs(graph, kind, limit_gb=0.1 if sides else 1e-5))


def test_memory_that_is_not_enough_is_one_sentence(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: Any, **__: Any) -> None:
        raise comfy.model_management.OOM_EXCEPTION("no memory")

    monkeypatch.setattr(executor.nano_vae().first_stage_model.encoder, "forward", run_out)
    with pytest.raises(RuntimeError, match=r"^The GPU's memory is not enough to encode these pic"):
        runner.run(latents_graph())


def test_embeddings_go_to_the_recipe_and_come_back(runner: Runner, workplace: Path) -> None:
    (workplace / "input" / "red" / "two.txt").write_text("caption one", encoding="utf-8")
    write = {"dataset": ["dataset", 0], "prompts": ["prompts", 0], "name": "mine"}
    graph = prompts_graph()
    graph["write"] = {"class_type": "AtelierExportEmbeddings", "inputs": write}
    prompts = runner.run(graph)
    path = workplace / "output" / "atelier" / "embeddings" / "mine.parquet"
    assert runner.texts["write"] == [f"Rows written: 2, to {path}."]
    path.rename(workplace / "input" / "red" / "mine.parquet")
    assert "red/mine.parquet" in folders.dataset_files((".parquet",))
    read = {"dataset": ["dataset", 0], "file": "red/mine.parquet"}
    imported = runner.run(
        {
            "dataset": dataset_node(),
            "read": {"class_type": "AtelierImportEmbeddings", "inputs": read},
            "keep": {"class_type": "Keep", "inputs": {"value": ["read", 0]}},
        }
    )
    assert runner.texts["read"] == ["Captions imported: 1, of 77 tokens."]
    ours, theirs = (cache.load("caption one") for cache in (prompts, imported))
    assert torch.equal(ours.prompt_embeds, theirs.prompt_embeds)
    assert torch.equal(ours.pooled, theirs.pooled)


@pytest.mark.parametrize("name", ["", "../x.parquet", "/x.parquet", "none.parquet", "link.parquet"])
def test_a_parquet_file_outside_the_input_folder_is_refused(workplace: Path, name: str) -> None:
    (workplace / "x.parquet").write_bytes(b"PAR1")
    (workplace / "input" / "link.parquet").symlink_to(workplace / "x.parquet")
    with pytest.raises(ValueError, match=r"^The file .* is not below .*input\. Put it there"):
        folders.dataset_file(name)


def test_cancel_keeps_what_was_encoded(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    update = host.Progress.update
    seen = []

    def cancel_after_one(self: host.Progress, done: int, total: int) -> None:
        seen.append(done)
        if done == 1 and 0 in seen:  # only caching begins at 0
            comfy.model_management.interrupt_current_processing()
        update(self, done, total)

    with monkeypatch.context() as patched:
        patched.setattr(host.Progress, "update", cancel_after_one)
        with pytest.raises(RuntimeError, match="execution_interrupted"):
            runner.run(latents_graph())
    (kept,) = encoded_files()
    written_ns = kept.stat().st_mtime_ns
    runner.run(latents_graph())
    assert len(encoded_files()) == 2
    assert kept.stat().st_mtime_ns == written_ns


def test_the_dataset_node_shows_what_it_found(runner: Runner, workplace: Path) -> None:
    (workplace / "input" / "red" / "one.txt").write_text("", encoding="utf-8")
    keep = {"class_type": "Keep", "inputs": {"value": ["dataset", 0]}}
    runner.run({"dataset": dataset_node(width=128, repeats=3), "keep": keep})
    assert runner.texts["dataset"] == [
        "Pictures: 2, seen per epoch: 6.",
        "Pictures enlarged to the training size: one.png, two.png.",
        "Pictures with an empty caption: one.png.",
    ]


def test_two_datasets_are_encoded_by_one_node(runner: Runner, workplace: Path) -> None:
    """A folder at two sizes, by its masks, beside another for regularization."""
    add_picture(workplace / "input" / "blue", "three", (0, 0, 255))
    for name in ("one", "two"):
        add_picture(workplace / "input" / "masks", name, (255, 255, 255))
    graph = latents_graph()
    schedule = {"probability": 0.0, "start_step": 5, "is_regularization": True}
    graph |= {
        "red": dataset_node(more_sizes="128x64, 64x128", masks="masks", repeats=2),
        "blue": dataset_node(folder="blue"),
        "later": {
            "class_type": "AtelierScheduleDataset",
            "inputs": {"dataset": ["blue", 0], **schedule},
        },
        "dataset": {
            "class_type": "AtelierCombineDatasets",
            "inputs": {"dataset_1": ["red", 0], "dataset_2": ["later", 0]},
        },
    }
    cache = runner.run(graph)
    *red, blue = cache.subsets
    sizes = [[(e.width, e.height, e.repeats) for e in subset.entries] for subset in red]
    assert sizes == [[(w, h, 2)] * 2 for w, h in ((64, 64), (128, 64), (64, 128))]
    assert [subset.schedule.start_step for subset in cache.subsets] == [0, 0, 0, 5]
    assert [e.is_regularization for e in cache.entries] == [False] * 6 + [True]
    assert blue.name == "blue"
    for entry in cache.entries[:6]:
        (mask,) = entry.masks
        weights = cache.load_mask(mask)
        assert weights.shape == (entry.height // 8, entry.width // 8)
        assert weights.eq(1).all()
    assert runner.texts["dataset"][0] == "Pictures: 7, seen per epoch: 13."


def test_probabilities_for_some_datasets_only_are_one_sentence(
    runner: Runner, workplace: Path
) -> None:
    add_picture(workplace / "input" / "blue", "three", (0, 0, 255))
    values = {"probability": 1.0, "start_step": 0, "is_regularization": False}
    graph = latents_graph() | {
        "red": dataset_node(),
        "blue": dataset_node(folder="blue"),
        "often": {
            "class_type": "AtelierScheduleDataset",
            "inputs": {"dataset": ["blue", 0], **values},
        },
        "dataset": {
            "class_type": "AtelierCombineDatasets",
            "inputs": {"dataset_1": ["often", 0], "dataset_2": ["red", 0]},
        },
    }
    with pytest.raises(RuntimeError, match="The dataset 'red' has no probability and others have"):
        runner.run(graph)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"more_sizes": "768"}, "'768' is no size"),
        ({"more_sizes": "100x100"}, "multiple of 16 between 64 and 8192 pixels, got 100"),
        ({"masks": "../masks"}, "must lie below input/|not in list"),
    ],
)
def test_wrong_sizes_and_masks_are_told(runner: Runner, inputs: dict[str, str], words: str) -> None:
    graph = latents_graph() | {"dataset": dataset_node(**inputs)}
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=words):
        runner.run(graph)


def test_a_changed_mask_is_noticed(workplace: Path) -> None:
    add_picture(workplace / "input" / "masks", "one", (255, 255, 255))
    before = ImageFolderDataset.fingerprint_inputs(folder="red", masks="masks")
    Image.new("L", (64, 64), 9).save(workplace / "input" / "masks" / "one.png")
    assert ImageFolderDataset.fingerprint_inputs(folder="red", masks="masks") != before


@pytest.mark.parametrize(("length", "num_warnings"), [(77, 1), (256, 0), (512, 1)])
def test_a_length_unlike_clip_text_encodes_is_told(
    runner: Runner, length: int, num_warnings: int
) -> None:
    runner.run(prompts_graph(length))
    warnings = runner.texts["prompts"][1:]
    assert len(warnings) == num_warnings
    assert all("CLIP Text Encode will use 256 or more" in warning for warning in warnings)


def test_captions_that_are_cut_are_told(runner: Runner, workplace: Path) -> None:
    """Also when all of them are in the cache, and the CLIP is not even loaded."""
    (workplace / "input" / "red" / "one.txt").write_text("cat " * 300, encoding="utf-8")
    for loads in (1, 0):
        runner.run(prompts_graph(256))
        (warning,) = runner.texts["prompts"][1:]
        assert warning.startswith("Captions longer than 256 tokens, whose end is cut off: 1,")
        assert CountingLoader.runs == loads


def test_a_user_error_arrives_as_its_sentence(runner: Runner, workplace: Path) -> None:
    (workplace / "input" / "red" / "one.txt").unlink()
    with pytest.raises(RuntimeError, match=r"one\.png has no caption file one\.txt"):
        runner.run(latents_graph())


@pytest.mark.parametrize(
    ("change", "is_new"),
    [("caption", True), ("picture", True), ("another file", False), ("nothing", False)],
)
def test_the_fingerprint_follows_pictures_and_captions(
    workplace: Path, change: str, is_new: bool
) -> None:
    folder = workplace / "input" / "red"
    before = ImageFolderDataset.fingerprint_inputs(folder="red")
    if change == "caption":
        (folder / "one.txt").write_text("a longer caption", encoding="utf-8")
    if change == "picture":
        add_picture(folder, "three", (0, 0, 255))
    if change == "another file":
        (folder / "notes.md").write_text("x", encoding="utf-8")
    assert (ImageFolderDataset.fingerprint_inputs(folder="red") != before) == is_new
