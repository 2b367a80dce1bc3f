"""The table of docs/methods.md out of the results of methods.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from method_list import DEFAULT, Method, rows

PAGE = Path(__file__).resolve().parent.parent / "docs" / "methods.md"
HEAD = (
    "| | Rate | Eval loss | Style | Subject | Time | Memory | FLUX.1-dev |\n"
    "|---|---|---|---|---|---|---|---|"
)


def write_page(result: dict[str, Any]) -> None:
    """Put the table into the page, whose other text stays."""
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_table(page, result), encoding="utf-8", newline="\n")


def with_table(page: str, result: dict[str, Any]) -> str:
    """The page with the table of these results in place of the one in it."""
    return re.sub(
        r"(?s)(?<=<!-- table -->\n).*(?=<!-- end of the table -->)",
        lambda _: table(result["rows"]),
        page,
    )


def table(found: dict[str, dict[str, Any]]) -> str:
    """One table for each group of rows, in Markdown."""
    groups: dict[str, list[Method]] = {}
    for method in rows():
        if method.key in found:
            groups.setdefault(method.group, []).append(method)
    default = found.get("Default: the default", {})
    parts = []
    for group, methods in groups.items():
        lines = [line(method, found[method.key], default) for method in methods]
        parts.append("\n".join((f"### {group}\n", HEAD, *lines)))
    return "\n" + "\n\n".join(parts) + "\n\n"


def line(method: Method, found: dict[str, Any], default: dict[str, Any]) -> str:
    name = f"{method.name} ({method.note})" if method.note else method.name
    if "error" in found:
        return f"| {name} | *{found['error'].partition(': ')[2]}* | | | | | | |"
    rate = found["learning_rate"]
    time = found["seconds_per_step"] / default["seconds_per_step"]
    cells = (
        name,
        "" if rate == DEFAULT.train.learning_rate else f"{rate:g}",
        f"{found['eval_loss']:.3f} ({found['eval_loss'] / default['eval_loss'] - 1:+.1%})",
        f"{found['style_score']:.2f}",
        f"{found['subject_score']:.2f}",
        f"{time:.2f}",
        f"{found['peak_bytes'] / 1e6:.0f} MB",
        f"{found['flux1_dev_bytes'] / 1e9:.2f} GB",
    )
    return f"| {' | '.join(cells)} |"
