"""Every sentence that the code may show a user, as a template: "… got {0}. 4 to 32 is usual."

A message is what a `ValueError`, a `require` or the progress of a node is given, and a string with
the look of one: a capital or a value first, a full stop or a unit last, words between. Docstrings
and the texts of schemas, which have their own files, are none.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SENTENCE = re.compile(r"(?s)[A-Z{'0-9].*[a-z]{2,}[ :].*[.}]")
SCHEMA_TEXTS = {"tooltip", "description"}
SHOWN_BY = {
    "show_text": re.compile(r"(?s).*\{0\}.*"),
    "require": re.compile(r"(?s).*[a-z]{2,} .*[.}]"),
    "ValueError": re.compile(r"(?s).*[a-z]{2,} .*[.}]"),
}
"""What these are given is shown, also if it starts with a small letter."""


def message_templates() -> set[str]:
    """The templates of all messages in `trainers/` and `nodes/`."""
    found: set[str] = set()
    for folder in ("trainers", "nodes"):
        for path in sorted((ROOT / folder).glob("*.py")):
            found |= templates_in(ast.parse(path.read_text(encoding="utf-8")))
    return found


def templates_in(tree: ast.AST) -> set[str]:
    hidden: set[ast.AST] = set()
    shown: dict[ast.AST, re.Pattern] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr):  # a docstring
            hidden.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg in SCHEMA_TEXTS:
            hidden.update(ast.walk(node.value))
        elif isinstance(node, ast.JoinedStr):  # the parts of an f-string are no strings of theirs
            hidden.update(part for value in node.values for part in ast.walk(value))
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            if function in SHOWN_BY:
                shown.update(dict.fromkeys(node.args, SHOWN_BY[function]))
    texts = {node: template(node) for node in ast.walk(tree) if node not in hidden}
    return {
        text
        for node, text in texts.items()
        if text is not None and shown.get(node, SENTENCE).fullmatch(text)
    }


def template(node: ast.AST) -> str | None:
    """A string with its values numbered in the order of their appearance, or None."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if not isinstance(node, ast.JoinedStr):
        return None
    numbers = iter(range(len(node.values)))
    return "".join(
        str(part.value) if isinstance(part, ast.Constant) else f"{{{next(numbers)}}}"
        for part in node.values
    )
