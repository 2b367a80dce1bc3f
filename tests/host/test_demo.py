"""The demo: its small parts, and the whole of it on two subjects with very few steps."""

import json
from pathlib import Path

import demo
import demo_graph
import demo_pictures
import demo_sheet
import numpy as np
import progress
import pytest
from comfy_server import ROOT, ComfyServer, Event, GraphError
from PIL import Image
from safetensors import safe_open

NUM_SUBJECTS = 2
FEW_STEPS = (
    "AtelierTrainLoRA.length=3",
    "AtelierTrainLoRA.learning_rate=0.02",
    "AtelierTrainLoRA.batch_size=1",
    "AtelierTrainLoRA.sample_every=0",
    "AtelierTrainLoRA.sample_steps=1",
    "Without the LoRA.steps=2",
    "With the LoRA.steps=2",
)
FIELDS = {
    *("comfyui_version", "steps", "train_seconds", "loss_first", "loss_last"),
    *("eval_loss_base", "eval_loss_lora", "eval_loss_empty_caption"),
    *("style_score_base", "style_score_lora", "style_score_true"),
    *("subject_score_base", "subject_score_lora", "judge_accuracy_openmoji"),
    *("lora_path", "peak_rss_mb"),
}


def make_graph() -> demo_graph.Graph:
    def node(class_type: str, title: str | None = None, **inputs) -> dict:
        return {"class_type": class_type, "inputs": inputs, "_meta": {"title": title}}

    return {
        "load": node("Loader"),
        "text": node("CLIPTextEncode", "Prompt", clip=["load", 1], text="a"),
        "train": node("AtelierTrainLoRA", model=["load", 0], positive=["text", 0], seed=5),
        "one": node("KSampler", model=["load", 0], positive=["text", 0], seed=9),
        "two": node("KSampler", model=["train", 1], positive=["text", 0], seed=9),
        "before": node("SaveImage", "Before", images=["one", 0]),
        "after": node("SaveImage", "After", images=["two", 0]),
    }


def test_other_prompts_repeat_only_what_depends_on_the_prompt() -> None:
    graph = make_graph()
    whole = demo_graph.with_prompts(graph, ["b", "c"])
    added = whole.keys() - graph.keys()
    assert {key.split(".")[0] for key in added} == {"text", "one", "two", "before", "after"}
    assert len(added) == 10
    assert {key: whole[key] for key in graph} == make_graph()
    after = whole[whole[demo_graph.output_of(graph, "After", 1)]["inputs"]["images"][0]]["inputs"]
    assert after["model"] == ["train", 1]
    assert after["seed"] == 10
    assert whole[after["positive"][0]]["inputs"] == {"clip": ["load", 1], "text": "c"}


def test_a_node_that_the_demo_needs_is_named_when_it_is_missing() -> None:
    with pytest.raises(GraphError, match="has 0 nodes called 'After', not one"):
        demo_graph.node_called({"1": {"class_type": "SaveImage", "inputs": {}}}, "After")


def test_captions_name_the_nano_models_subjects_with_the_new_artwork() -> None:
    table = json.loads((ROOT / "assets" / "nano" / "subjects.json").read_text(encoding="utf-8"))
    phrase = table["phrases"]["openmoji"]
    for part, split in (("train", "lora"), ("held_out", "heldout")):
        expected = {
            (subject["code"], f"{subject['name']}, {phrase}")
            for subject in table["subjects"]
            if subject["split"] == split
        }
        subjects = demo_pictures.load_subjects(part)
        assert {(subject.code.lower(), subject.caption) for subject in subjects} == expected


def test_first_and_last_losses_are_means_over_a_tenth_of_the_steps() -> None:
    losses = [float(step) for step in range(40)]
    trained = demo.Trained(Path("a"), Path("b"), losses, 1.25)
    assert trained.figures() == {
        "steps": 40,
        "train_seconds": 1.2,
        "loss_first": 1.5,
        "loss_last": 37.5,
    }


def test_the_sheet_shows_every_picture_of_every_row() -> None:
    colours = [(20 * number, 10, 200) for number in range(demo_sheet.COLUMNS + 1)]
    row = demo_sheet.Row("row", [Image.new("RGB", (8, 8), colour) for colour in colours])
    names = [str(number) for number in range(len(colours))]
    sheet = demo_sheet.contact_sheet(names, [row, row], title="a", subtitle="b", footnote="c")
    counts = dict(map(reversed, sheet.getcolors(1 << 20)))
    assert all(counts[colour] >= 2 * (demo_sheet.PICTURE_PX - 1) ** 2 for colour in colours)


def test_progress_names_each_node_once_and_shows_what_it_reports(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", -1)
    shown = progress.NodeProgress(make_graph())
    shown(Event("executing", {"node": "train"}))
    shown(Event("progress_text", {"node": "train", "text": "loss 0.5  0:01 left"}))
    shown(Event("progress", {"node": "train", "value": 1, "max": 2}))
    shown(Event("executing", {"node": "before"}))
    shown(Event("progress", {"node": "before", "value": 2, "max": 2}))
    shown(Event("execution_success"))
    assert capsys.readouterr().out.splitlines() == [
        "AtelierTrainLoRA",
        "  [########--------] loss 0.5 0:01 left",
        "Before",
        "  [################] 2/2",
    ]
    assert shown.seconds.keys() == {"train", "before"}


@pytest.fixture(scope="module")
def out_dir(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the demo writes."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    demo.main(server, folder, settings=FEW_STEPS, num_held_out=NUM_SUBJECTS)
    return folder


@pytest.fixture(scope="module")
def summary(out_dir: Path) -> dict:
    return json.loads((out_dir / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_holds_every_number(summary: dict) -> None:
    assert summary.keys() >= FIELDS
    assert summary["steps"] == 3
    assert summary["comfyui_version"].count(".") == 2
    assert all(0 <= value <= 1 for name, value in summary.items() if "score" in name)
    assert summary["eval_loss_lora"] != summary["eval_loss_base"]
    assert summary["peak_rss_mb"] > 100
    assert summary["train_seconds"] > 0


def test_the_lora_is_a_file_of_the_settings(summary: dict, out_dir: Path) -> None:
    path = Path(summary["lora_path"])
    assert path.parent == out_dir
    with safe_open(path, "np") as file:
        assert file.metadata()["atelier.steps"] == "3"


def test_the_pictures_have_their_sizes(out_dir: Path) -> None:
    assert Image.open(out_dir / "loss.png").size == (960, 540)
    sheet = Image.open(out_dir / "before_after.png")
    assert sheet.width >= NUM_SUBJECTS * demo_sheet.PICTURE_PX
    assert sheet.height >= 3 * demo_sheet.PICTURE_PX


def test_base_and_lora_paint_different_pictures(server: ComfyServer, out_dir: Path) -> None:
    graph = demo_graph.load(server.object_info(), FEW_STEPS)
    rows = demo.paint(server, graph, demo_pictures.load_subjects("held_out")[:NUM_SUBJECTS])
    base, lora = (np.stack([np.asarray(p) for p in rows[name]]) for name in ("base", "lora"))
    assert base.shape == (NUM_SUBJECTS, 128, 128, 3)
    assert not np.array_equal(base[0], base[1])
    assert all(not np.array_equal(one, other) for one, other in zip(base, lora, strict=True))
