"""Copied into the development environment: lets a CUDA build of torchvision be imported beside a CPU build of torch.

Such a torchvision cannot load its compiled operators, and its import then stops where it describes two of them. This hook
defines those two, without an implementation, just before torchvision is imported; matching builds are left alone, and torch
is not imported a moment earlier than torchvision would. No part of the pack: users' machines have matching builds.
"""

import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class TorchvisionFinder:
    """Hands out torchvision's ordinary spec, with `define_missing_operators` run before the module."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target) if name == "torchvision" else None
        if spec is None or spec.loader is None or spec.origin is None:
            return None
        exec_module = spec.loader.exec_module

        def exec_after_defining(module):
            define_missing_operators(Path(spec.origin).parent)
            exec_module(module)

        spec.loader.exec_module = exec_after_defining
        return spec


def define_missing_operators(torchvision_folder):
    import torch

    version_text = (torchvision_folder / "version.py").read_text(encoding="utf-8")
    if torch.version.cuda is None and re.search(r"__version__ = '[^']*\+cu", version_text):
        for schema in SCHEMAS:
            torch.library.define(f"torchvision::{schema.split('(')[0]}", schema[schema.index("(") :])


sys.meta_path.insert(0, TorchvisionFinder)
