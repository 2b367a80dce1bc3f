"""Every text of the nodes exists in English and Simplified Chinese, and every node has a help page.

That the English ones are those of the schemas is held in tests/host/test_workflows.py.
"""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from messages import message_templates, templates_in

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("en", "zh")
CHINESE = re.compile(r"[\u4e00-\u9fff]")
MESSAGES = "atelierMessages"
VALUE = re.compile(r"\{\d+\}")
NAMES_IN_EVERY_LANGUAGE = {"CLIP", "VAE", "LoRA"}
NODE_IDS = sorted(
    match.group(1)
    for path in (ROOT / "nodes").glob("*.py")
    for match in re.finditer(r'node_id="(\w+)"', path.read_text(encoding="utf-8"))
)


def read(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8"))


def flat(texts: dict[str, Any], path: str = "") -> dict[str, str]:
    """{"a.b": text} of nested texts."""
    found = {}
    for key, value in texts.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


@pytest.mark.parametrize("name", ["nodeDefs.json", "main.json"])
def test_both_languages_have_the_same_texts(name: str) -> None:
    english, chinese = (read(language, name) for language in LANGUAGES)
    chinese.pop(MESSAGES, None)  # the English ones are in the code
    english, chinese = flat(english), flat(chinese)
    assert english.keys() == chinese.keys()
    assert all(english.values())
    assert all(chinese.values())


def test_every_message_of_the_code_has_a_chinese_one_and_no_other() -> None:
    assert read("zh", "main.json")[MESSAGES].keys() == message_templates()


def test_chinese_messages_have_the_values_of_the_english_ones() -> None:
    for english, chinese in read("zh", "main.json")[MESSAGES].items():
        assert CHINESE.search(chinese)
        assert sorted(VALUE.findall(chinese)) == sorted(VALUE.findall(english)), english


def test_the_collector_finds_messages_and_leaves_other_texts() -> None:
    code = '''
"""A docstring is no message."""
require(rank > 0, f"The rank must be above 0, got {rank!r}. " "4 is usual.")
Input("rank", tooltip="The rank of the LoRA.")
show_text(f"loss {loss:.3f}")
path = "a/b.safetensors"
raise ValueError(f"max_aspect must be 1 or more, got {aspect}.")
require(mode in MODES, "mode is unknown.")
'''
    assert templates_in(ast.parse(code)) == {
        "The rank must be above 0, got {0}. 4 is usual.",
        "loss {0}",
        "max_aspect must be 1 or more, got {0}.",
        "mode is unknown.",
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_node_is_translated(language: str) -> None:
    assert sorted(read(language, "nodeDefs.json")) == NODE_IDS


def test_the_chinese_texts_are_chinese() -> None:
    texts = flat(read("zh", "nodeDefs.json"))
    assert not [
        path
        for path, text in texts.items()
        if not CHINESE.search(text) and text not in NAMES_IN_EVERY_LANGUAGE
    ]


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_hold_no_letters_that_the_translator_reads_as_its_own(language: str) -> None:
    """vue-i18n replaces {name} and @:key, and takes | for a choice between plurals."""
    texts = flat(read(language, "nodeDefs.json"))
    assert not [path for path, text in texts.items() if re.search(r"[{}@|]", text)]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", NODE_IDS)
def test_every_node_has_a_help_page(node_id: str, language: str) -> None:
    page = (ROOT / "js" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8")
    title = read(language, "nodeDefs.json")[node_id]["display_name"]
    assert page.startswith(f"# {title}\n")


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_pages_name_only_inputs_that_exist(node_id: str, language: str) -> None:
    """The first column of a page's table names inputs of the node, by their ids."""
    page = (ROOT / "js" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    texts = read(language, "nodeDefs.json")[node_id]
    outputs = {text["name"] for text in read("en", "nodeDefs.json")[node_id]["outputs"].values()}
    assert named
    assert set(named) <= texts["inputs"].keys() | outputs


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("node_id", NODE_IDS)
def test_help_pages_quote_messages_that_exist(node_id: str, language: str) -> None:
    """The last table of a page has messages in its first column, with … for what varies."""
    page = (ROOT / "js" / "docs" / node_id / f"{language}.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| ([^|]+) \|", page.rpartition("|---|---|\n")[2], re.MULTILINE)
    chinese = read("zh", "main.json")[MESSAGES].values()
    messages = message_templates() if language == "en" else chinese
    assert quoted
    for text in (part for texts in quoted for part in texts.split(" / ")):
        pieces = [piece.strip() for piece in text.split("…") if piece.strip()]
        assert pieces, text
        assert any(all(piece in message for piece in pieces) for message in messages), text
