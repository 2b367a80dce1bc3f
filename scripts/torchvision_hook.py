"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

`environment.py` copies this into the environment that it makes. Such a torchvision cannot load its
compiled operators, and its import stops where it describes two of them. This hook defines those
two, without an implementation, just before torchvision runs; matching builds are left alone.
No part of the pack: users' machines have matching builds.
"""

import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class TorchvisionFinder:
    """Hands out torchvision's ordinary spec, with the operators defined before the module runs."""

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
        for name in OPERATORS:
            torch.library.define(f"torchvision::{name}", SCHEMA)


sys.meta_path.insert(0, TorchvisionFinder)
