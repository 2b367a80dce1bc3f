"""Prompts of lines and of SimpleTuner's prompt library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from atelier.trainers.prompt_list import prompts_of_library, prompts_of_lines


def test_every_line_that_is_not_empty_is_a_prompt() -> None:
    found = prompts_of_lines("  a cat \n\n\r\n\ta dog, running\n ")
    assert found == (("a cat", "a cat"), ("a dog, running", "a dog, running"))
    assert prompts_of_lines("") == prompts_of_lines(" \n ") == ()


def test_a_long_prompt_is_named_by_its_first_words() -> None:
    long = "a photograph of a cat that sits on a wall and looks at the sea"
    (found,) = prompts_of_lines(long)
    assert found.text == long
    assert found.name == "a photograph of a cat that sits on a wa…"
    assert len(found.name) == 40


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_library_gives_its_prompts_in_their_order(tmp_path: Path, encoding: str) -> None:
    """Those of SimpleTuner's documentation, also as Windows' editor saves them."""
    library = {"nickname": "the prompt goes here", "anime_<token>": "ein Bär, 熊"}
    path = tmp_path / "user_prompt_library.json"
    path.write_text(json.dumps(library, ensure_ascii=False), encoding=encoding)
    assert prompts_of_library(path) == tuple(library.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"^The prompt library 'library\.json' cannot be read: .*line 1"),
        ("", r"^The prompt library 'library\.json' cannot be read: "),
        ("\xff\xfe", r"^The prompt library 'library\.json' cannot be read: .*utf-8"),
        ('["a cat"]', r"^'library\.json' is not a prompt library\. It must be a JSON object of n"),
        ('{"a": 1}', r"^'library\.json' is not a prompt library\."),
        ('{"a": {"prompt": "b"}}', r"^'library\.json' is not a prompt library\."),
        ('"a cat"', r"^'library\.json' is not a prompt library\."),
    ],
)
def test_what_is_no_library_is_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "library.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        prompts_of_library(path)


def test_a_library_that_is_gone_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^The prompt library 'gone\.json' cannot be read: "):
        prompts_of_library(tmp_path / "gone.json")
