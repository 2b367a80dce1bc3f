"""A small judge of pictures: which artwork is this, and which subject? torch and safetensors only.

Trained by `judge_training.py` on real pictures; the artwork half has never seen a subject that
the base or the LoRA knows.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

ARTWORKS = ("noto", "fluent", "twemoji", "openmoji")
STYLE_WIDTHS, SUBJECT_WIDTHS = (24, 48, 64, 64), (32, 64, 96, 128)


def classifier(widths: tuple[int, ...], num_classes: int) -> nn.Sequential:
    """Pictures [B, 3, 128, 128] in 0..1 to logits [B, classes]."""
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [
            nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]
    layers += [
        nn.Conv2d(widths[-1], widths[-1], 3, padding=1, bias=False),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
    ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)
    )


class Judge:
    """Both classifiers; `subjects` are codes in the order of the probabilities."""

    def __init__(self, style_net: nn.Module, subject_net: nn.Module, subjects: list[str]) -> None:
        self.style_net, self.subject_net, self.subjects = (
            style_net.eval(),
            subject_net.eval(),
            subjects,
        )

    def style(self, images_BCHW: Tensor) -> Tensor:
        """Probabilities [B, 4] in the order of `ARTWORKS` for RGB pictures of 128 x 128 in 0..1."""
        return probabilities(self.style_net, images_BCHW)

    def subject(self, images_BCHW: Tensor) -> Tensor:
        """Probabilities [B, len(subjects)] for RGB pictures of 128 x 128 in 0..1."""
        return probabilities(self.subject_net, images_BCHW)


@torch.no_grad()
def probabilities(network: nn.Module, images_BCHW: Tensor) -> Tensor:
    if images_BCHW.shape[1:] != (3, 128, 128):
        raise ValueError(
            f"The judge takes pictures [B, 3, 128, 128], not {list(images_BCHW.shape)}."
        )
    return network(images_BCHW.float()).softmax(-1)


def load_judge(path: str | Path) -> Judge:
    """Reads `judge.safetensors`; runs on the CPU in fp32."""
    with safe_open(str(path), "pt") as file:
        subjects = json.loads(file.metadata()["subjects"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    nets = classifier(STYLE_WIDTHS, len(ARTWORKS)), classifier(SUBJECT_WIDTHS, len(subjects))
    for name, net in zip(("style.", "subject."), nets, strict=True):
        net.load_state_dict(
            {
                key.removeprefix(name): value
                for key, value in tensors.items()
                if key.startswith(name)
            }
        )
        net.float()
    return Judge(*nets, subjects)
