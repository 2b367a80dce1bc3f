"""Lines of block weights, and which names they hold for."""

from __future__ import annotations

import pytest
from atelier.trainers.block_weights import parse_block_weights

NAME = "diffusion_model.double_blocks.12.img_attn.qkv.weight"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("double_blocks", True),
        ("double_blocks.12", True),
        ("double_blocks.1", False),
        ("double_blocks.1*", True),
        ("double_blocks.10-12", True),
        ("double_blocks.0-11", False),
        ("double_blocks.12-18.img_attn", True),
        ("double_blocks.*.img_attn", True),
        ("double_blocks.*.qkv", False),
        ("img_*.qkv", True),
        ("blocks", False),
        ("*blocks", True),
        ("12", True),
        ("double_blocks.12.img_attn.qkv.weight.lora", False),
        ("img.attn", False),
        ("i.g_attn", False),
    ],
)
def test_a_pattern_is_parts_in_a_row(pattern: str, matches: bool) -> None:
    assert parse_block_weights(f"{pattern}: 0.25").of(NAME) == (0.25 if matches else 1.0)


def test_the_last_line_that_matches_holds() -> None:
    weights = parse_block_weights("\ndouble_blocks: 0.5\n double_blocks.12 : -2 \n\nimg_mlp: 3\n")
    assert weights.of(NAME) == -2
    assert weights.of("double_blocks.3.img_attn.qkv") == 0.5
    assert weights.of("double_blocks.3.img_mlp.0") == 3
    assert weights.of("single_blocks.3.linear1") == 1


def test_patterns_that_match_nothing_are_told() -> None:
    weights = parse_block_weights("double_blocks: 1\nsingle_blocks.7-9: 0\ntriple: 0")
    names = [NAME, "single_blocks.6.linear1"]
    assert weights.matching_none(names) == ["single_blocks.7-9", "triple"]


@pytest.mark.parametrize("line", ["double_blocks", "double_blocks: strong", ": 1", "a: nan", "a:"])
def test_a_line_that_is_no_pattern_with_a_number_is_one_sentence(line: str) -> None:
    with pytest.raises(ValueError, match=r"Each line of block_weights is .*, got "):
        parse_block_weights(f"single_blocks: 1\n{line}")
