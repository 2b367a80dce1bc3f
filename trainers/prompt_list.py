"""The prompts of a validation: one a line, or a library as SimpleTuner has it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .checks import require


class NamedPrompt(NamedTuple):
    """A prompt and the short name under which its pictures are shown."""

    name: str
    text: str


def prompts_of_lines(text: str) -> tuple[NamedPrompt, ...]:
    """One prompt for each line that is not empty, named by its first words."""
    lines = [line.strip() for line in text.splitlines()]
    return tuple(NamedPrompt(_short(line), line) for line in lines if line)


def prompts_of_pictures(text: str, num_pictures: int) -> list[str]:
    """The prompt of each picture: a line for each in their order, or one for all.

    Raises:
        ValueError: there are others than that.
    """
    prompts = [prompt.text for prompt in prompts_of_lines(text)]
    if len(prompts) == 1:
        prompts *= num_pictures
    require(
        len(prompts) == num_pictures,
        f"There are {num_pictures} pictures and {len(prompts)} lines of prompts. Write a line for "
        "each picture, or one for all.",
    )
    return prompts


def prompts_of_library(path: Path) -> tuple[NamedPrompt, ...]:
    """A JSON object of nickname to prompt: SimpleTuner's `user_prompt_library.json`.

    Raises:
        ValueError: if it is something else.
    """
    try:
        library = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"The prompt library '{path.name}' cannot be read: {error}.") from error
    if not isinstance(library, dict) or not all(isinstance(v, str) for v in library.values()):
        raise ValueError(
            f"'{path.name}' is not a prompt library. It must be a JSON object of names and "
            'prompts: {"portrait": "a portrait of sks"}.'
        )
    return tuple(NamedPrompt(name, text) for name, text in library.items())


def _short(text: str) -> str:
    return text if len(text) <= 40 else text[:39].rstrip() + "…"
