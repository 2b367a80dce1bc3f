"""Trains the LoRAs of styles/: `.dev/venv/bin/python assets/nano/styles.py --work DIR`.

Each style is a filter over pictures that the base knows, so a LoRA of rank 4 learns it in minutes.
Trained by the quickstart workflow in a headless ComfyUI.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from data import EmojiPictures, fetch_packages, load_subjects
from PIL import Image, ImageFilter, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

import demo_graph  # noqa: E402
import workflow  # noqa: E402
from comfy_server import ComfyServer  # noqa: E402

STYLES = Path(__file__).with_name("styles")
NUM_PICTURES = 36
SETTINGS = ("length=300", "rank=4", "learning_rate=0.001", "sample_every=0")


def pencil(picture: Image.Image) -> Image.Image:
    """Grey strokes on white paper: the picture divided by its blurred self."""
    grey = ImageOps.grayscale(picture)
    soft = np.asarray(grey.filter(ImageFilter.GaussianBlur(4)), dtype=np.float32)
    strokes = np.asarray(grey, dtype=np.float32) / np.maximum(soft, 1) * 255
    shaded = 0.75 * strokes.clip(0, 255) + 0.25 * np.asarray(grey)
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8)).convert("RGB")


def sunset(picture: Image.Image) -> Image.Image:
    """The lightness alone, from violet by orange to pale yellow."""
    grey = ImageOps.grayscale(picture)
    return ImageOps.colorize(grey, black="#3b1c5a", mid="#f0743e", white="#fff0b8")


def mosaic(picture: Image.Image) -> Image.Image:
    """Tiles of 8 pixels."""
    side = picture.width // 8
    return picture.resize((side, side), Image.Resampling.BOX).resize(
        picture.size, Image.Resampling.NEAREST
    )


FILTERS: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "pencil": ("pencil drawing", pencil),
    "sunset": ("sunset colours", sunset),
    "mosaic": ("mosaic of tiles", mosaic),
}
"""Name of the file: the words in its captions, and what is done to the pictures."""


def write_pictures(folder: Path, pictures: EmojiPictures, style: str) -> None:
    words, change = FILTERS[style]
    subjects = [one for one in load_subjects()["subjects"] if one["split"] == "train"]
    folder.mkdir(parents=True)
    for number, subject in enumerate(subjects[:: len(subjects) // NUM_PICTURES][:NUM_PICTURES]):
        artwork = ("noto", "fluent", "twemoji")[number % 3]
        source = Image.fromarray(pictures.picture(artwork, subject["code"]))
        change(source).save(folder / f"{number:02}.png")
        caption = f"{subject['name']}, {words}"
        (folder / f"{number:02}.txt").write_text(caption, encoding="utf-8")


def train(server: ComfyServer, style: str) -> Path:
    """The LoRA file of a style whose pictures lie in input/<style>."""
    info = server.object_info()
    graph = workflow.load(demo_graph.WORKFLOW, info)
    for setting in (*SETTINGS, f"name={style}"):
        workflow.apply_setting(graph, f"{demo_graph.TRAIN}.{setting}", info)
    workflow.apply_setting(graph, f"Pictures.folder={style}", info)
    for title in ("Before", "After", "Samples"):  # the training alone
        del graph[demo_graph.node_called(graph, title)]
    server.run(graph, timeout_s=1800)
    return next((server.base_directory / "output" / "loras").glob(f"{style}-*.safetensors"))


def keep(path: Path, style: str) -> None:
    """The file in bfloat16, half as large, with the words that call it."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    small = {
        name: tensor if name.endswith(".alpha") else tensor.to(torch.bfloat16)
        for name, tensor in tensors.items()
    }
    metadata["modelspec.trigger_phrase"] = FILTERS[style][0]
    STYLES.mkdir(exist_ok=True)
    save_file(small, STYLES / f"{style}.safetensors", metadata=metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the styles of the nano FLUX.")
    parser.add_argument("--work", type=Path, required=True, help="where packages are kept")
    parser.add_argument("--only", choices=list(FILTERS))
    options = parser.parse_args()
    fetch_packages(options.work / "packages")
    pictures = EmojiPictures(options.work / "packages")
    with tempfile.TemporaryDirectory() as base:
        comfyui = ROOT / ".dev" / "ComfyUI"
        with ComfyServer(comfyui, Path(base), arguments=("--cpu",)) as server:
            for style in [options.only] if options.only else FILTERS:
                folder = Path(base) / "input" / style
                write_pictures(folder, pictures, style)
                shutil.copytree(folder, options.work / style, dirs_exist_ok=True)
                keep(train(server, style), style)


if __name__ == "__main__":
    main()
