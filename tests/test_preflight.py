"""What is said of a training before it starts: whether it fits, and what would."""

import dataclasses

import pytest
import torch
from atelier.trainers.config import LoraSettings
from atelier.trainers.flux import FluxConfig
from atelier.trainers.load import FluxFile
from atelier.trainers.memory import Workload, estimate_training, store_bytes, streamed_bytes
from atelier.trainers.preflight import Plan, choose_format, describe, require_fits
from flux_files import flux_shapes

SIZES = {"width": 256, "depth": 3, "depth_single": 4, "context": 128, "vector": 64}
CONFIG = FluxConfig.from_shapes(flux_shapes(**SIZES))
WORKLOAD = Workload(
    width=256,
    height=192,
    prompt_length=77,
    batch_size=2,
    lora=LoraSettings(rank=8),
    dtype=torch.bfloat16,
    gradient_checkpointing=False,
    accumulates=False,
)


def plan(device: str = "cuda", streaming: str = "auto", **workload: int) -> Plan:
    return Plan(
        config=CONFIG,
        format="bf16",
        weights=store_bytes(CONFIG, "bf16"),
        workload=dataclasses.replace(WORKLOAD, **workload),
        device=torch.device(device),
        streaming=streaming,
    )


def beside_weights(**workload: int) -> int:
    changed = dataclasses.replace(WORKLOAD, **workload)
    return estimate_training(CONFIG, "bf16", changed).beside_weights


def test_the_hosts_own_copy_is_counted_too() -> None:
    with_copy = dataclasses.replace(plan(), other_copy=2 * 10**9)
    assert "The MODEL's own copy takes 2.00 GB more of system memory." in describe(with_copy, 0)
    assert not any("own copy" in line for line in describe(plan(), 0))


def test_all_of_it_fits() -> None:
    whole = store_bytes(CONFIG, "bf16") + beside_weights()
    assert describe(plan(), whole)[-1] == f"It fits: {whole / 1e9:.2f} GB are free."
    assert not describe(plan(), whole - 1)[-1].startswith("It fits: ")


@pytest.mark.parametrize("streaming", ["auto", "ram", "disk"])
def test_with_streamed_blocks_less_is_enough(streaming: str) -> None:
    least = streamed_bytes(CONFIG, "bf16") + beside_weights()
    streamed = "It fits when blocks are streamed, which happens by itself: "
    assert describe(plan(streaming=streaming), least)[-1].startswith(streamed)
    lines = describe(plan(streaming=streaming), least - 1)
    assert any("needed with every block streamed, and" in line for line in lines)


def test_without_streaming_the_weights_count_whole() -> None:
    fits_streamed = streamed_bytes(CONFIG, "bf16") + beside_weights()
    lines = describe(plan(streaming="off"), fits_streamed)
    assert any(line.startswith("This training does not fit: ") for line in lines)
    size = f"{fits_streamed / 1e9:.2f} GB"
    assert f"With block_streaming auto of Load Quantized FLUX {size} are enough." in lines


def test_a_cpu_streams_from_disk_only() -> None:
    whole = store_bytes(CONFIG, "bf16") + beside_weights()
    least = streamed_bytes(CONFIG, "bf16") + beside_weights()
    assert plan("cpu", "auto").least_bytes == plan("cpu", "ram").least_bytes == whole
    assert plan("cpu", "disk").least_bytes == least
    lines = describe(plan("cpu"), least)
    assert any(line.startswith("With block_streaming disk ") for line in lines)
    assert not any("system memory" in line for line in lines)


@pytest.mark.parametrize(
    ("device", "streaming", "loaded"),
    [("cuda", "off", 0), ("cpu", "auto", store_bytes(CONFIG, "bf16")), ("cpu", "disk", 0)],
)
def test_what_is_not_enough_is_refused(device: str, streaming: str, loaded: int) -> None:
    """The weights lie in a CPU's memory already, unless they come from disk."""
    enough = plan(device, streaming).least_bytes - loaded
    assert require_fits(plan(device, streaming), enough)[-1].startswith("It fits")
    with pytest.raises(ValueError, match=r"^This training does not fit: "):
        require_fits(plan(device, streaming), enough - 1)


def test_on_a_cpu_activations_are_in_ram_anyway() -> None:
    assert plan("cuda", activations_in_ram=True).least_bytes < plan("cuda").least_bytes
    assert plan("cpu", activations_in_ram=True).least_bytes == plan("cpu").least_bytes
    assert not any("activations_in_ram" in line for line in describe(plan("cpu"), 0))


def test_weights_that_the_host_keeps_wider_count_as_they_are() -> None:
    wide = dataclasses.replace(plan(streaming="off"), weights=2 * store_bytes(CONFIG, "bf16"))
    assert wide.least_bytes - plan(streaming="off").least_bytes == store_bytes(CONFIG, "bf16")


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("gradient_checkpointing", {"gradient_checkpointing": True}),
        ("activations_in_ram", {"activations_in_ram": True}),
        ("a batch size of 1", {"batch_size": 1}),
        ("pictures of 128x96", {"width": 128, "height": 96}),
    ],
    ids=["checkpointing", "activations", "batch", "pictures"],
)
def test_what_does_not_fit_is_answered_by_what_does(words: str, change: dict[str, int]) -> None:
    enough = streamed_bytes(CONFIG, "bf16") + beside_weights(**change)
    said = f"With {words} {enough / 1e9:.2f} GB are enough."
    assert said in describe(plan(), enough)
    assert said not in describe(plan(), enough - 1)


def test_where_no_single_change_is_enough_several_are_named() -> None:
    assert describe(plan(), 0)[-1].startswith("No single change is enough")


@pytest.mark.parametrize(
    ("file", "share", "chosen"),
    [
        (FluxFile(CONFIG, None), 1.0, "bf16"),
        (FluxFile(CONFIG, None), 0.6, "int8"),
        (FluxFile(CONFIG, None), 0.0, "nf4"),
        (FluxFile(CONFIG, "fp4"), 1.0, "fp4"),
    ],
    ids=["bf16", "int8", "nf4", "packed already"],
)
def test_auto_takes_the_most_exact_that_fits(file: FluxFile, share: float, chosen: str) -> None:
    assert choose_format(file, int(share * store_bytes(CONFIG, "bf16"))) == chosen
