"""Computes the tests of a file with one thread, by importing the fixture there.

For networks this small several threads only wait for each other: on busy cores a step of training
takes 60 times longer with two.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
