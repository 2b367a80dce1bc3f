"""What is said of a training before it starts: whether it fits, and what would."""

import dataclasses
import math
import sys
from typing import Any

import pytest
import torch
from atelier.trainers import preflight
from atelier.trainers.devices import SystemMemory
from atelier.trainers.flux import FluxConfig
from atelier.trainers.load import FluxFile
from atelier.trainers.lora_settings import LoraSettings
from atelier.trainers.memory import Workload, estimate_training, store_bytes, streamed_bytes
from atelier.trainers.plan import Plan
from atelier.trainers.preflight import choose_format
from atelier.trainers.speed_settings import SpeedSettings
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


PLENTY = SystemMemory(free=10**12, total=10**12)


def describe(plan: Plan, free_bytes: int, ram: SystemMemory = PLENTY) -> list[str]:
    return preflight.describe(plan, free_bytes, ram)


def require_fits(plan: Plan, free_bytes: int, ram: SystemMemory = PLENTY) -> list[str]:
    return preflight.require_fits(plan, free_bytes, ram)


def plan(device: str = "cuda", streaming: str = "auto", **workload: Any) -> Plan:
    return Plan(
        config=CONFIG,
        format="bf16",
        weights=store_bytes(CONFIG, "bf16"),
        workload=dataclasses.replace(WORKLOAD, **workload),
        device=torch.device(device),
        streaming=streaming,
    )


def beside_weights(format: str = "bf16", **workload: Any) -> int:
    changed = dataclasses.replace(WORKLOAD, **workload)
    return estimate_training(CONFIG, format, changed).beside_weights


def test_the_hosts_own_copy_is_counted_too() -> None:
    with_copy = dataclasses.replace(plan(), other_copy=2 * 10**9)
    assert "The MODEL's own copy takes 2.00 GB more of system memory." in describe(with_copy, 0)
    assert not any("own copy" in line for line in describe(plan(), 0))


def gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def block_bytes(kind: str, per_parameter: float) -> float:
    """Of all matrices of one kind of block, from the shapes in the file."""
    matrices = flux_shapes(**SIZES).items()
    sizes = [torch.Size(s).numel() for n, s in matrices if n.startswith(kind) and len(s) == 2]
    return per_parameter * sum(sizes)


BF16_BLOCKS = block_bytes("double_blocks.", 2) + block_bytes("single_blocks.", 2)
LARGEST = block_bytes("double_blocks.0.", 2)
AMPLE = 10**12


@pytest.mark.parametrize(
    ("streaming", "expected"),
    [
        ("off", 0),
        ("auto", 0),
        ("ram", BF16_BLOCKS),
        # Two, each rounded up to a power of two as pinned memory is.
        ("disk", 2 * 2 ** math.ceil(math.log2(LARGEST))),
    ],
)
def test_system_memory_holds_the_blocks_that_are_streamed(streaming: str, expected: float) -> None:
    assert plan(streaming=streaming).ram(AMPLE).weights == expected


def test_with_less_room_more_blocks_wait_in_system_memory() -> None:
    """What the device cannot take, and at most two more blocks, whose room the slots have."""
    whole = plan().needed.total
    for missing in (1, 10**7, 2 * 10**7):
        assert missing <= plan().ram(whole - missing).weights <= missing + 3 * LARGEST
    assert plan().ram(whole).weights == 0
    assert plan().ram(plan().least_bytes).weights == BF16_BLOCKS


def test_what_is_loaded_already_is_not_counted_twice() -> None:
    """Its bytes are taken by streamed blocks, or are free when the model has gone to the device."""
    lies_in_ram = dataclasses.replace(plan(streaming="ram"), in_ram=store_bytes(CONFIG, "bf16"))
    beside = lies_in_ram.ram(AMPLE).total - lies_in_ram.weights
    tight = SystemMemory(free=beside, total=10**12)
    assert f"System memory is enough: {gb(beside + lies_in_ram.weights)} are free for it." in (
        require_fits(lies_in_ram, AMPLE, tight)
    )
    for short in (
        require_fits(lies_in_ram, AMPLE, dataclasses.replace(tight, free=beside - 1)),
        require_fits(dataclasses.replace(lies_in_ram, in_ram=0), AMPLE, tight),
    ):
        assert any(line.startswith("System memory is short: ") for line in short)


def test_a_model_that_is_not_loaded_needs_room_to_come_through() -> None:
    whole = store_bytes(CONFIG, "bf16")
    for in_ram, needed in ((None, whole), (0, plan().ram(AMPLE).total)):
        loading = dataclasses.replace(plan(), in_ram=in_ram)
        assert loading.ram_needed(AMPLE) == needed
    assert plan(streaming="disk").ram_needed(AMPLE) < whole


SAVING = {
    "activations_in_ram": True,
    "batch_size": 1,
    "gradient_checkpointing": True,
    "lora": LoraSettings(),
}


def test_short_system_memory_is_told_with_what_needs_less_of_it() -> None:
    loaded = dataclasses.replace(plan(streaming="ram", **SAVING), in_ram=0)
    parts = loaded.ram(AMPLE)
    without = parts.total - parts.activations
    for free, is_said in ((without, True), (without - 1, False)):
        lines = describe(loaded, AMPLE, SystemMemory(free=free, total=10**12))
        assert (f"Without activations_in_ram {gb(without)} are enough." in lines) == is_said
        assert lines[-1].startswith("It fits: ")  # the device
    from_disk = loaded.with_streaming("disk").ram_needed(AMPLE)
    said = f"With block_streaming disk of Load Quantized FLUX {gb(from_disk)} are enough."
    assert said in describe(loaded, AMPLE, SystemMemory(free=from_disk, total=10**12))


def test_a_change_must_fit_into_both_memories() -> None:
    """Without activations_in_ram the device is too small, with it the system's memory."""
    saving = dataclasses.replace(plan(**SAVING), in_ram=0)
    lines = describe(saving, saving.least_bytes, SystemMemory(free=0, total=10**12))
    assert not any("activations_in_ram" in line for line in lines)
    keeping = saving.with_workload(activations_in_ram=False)
    lines = describe(keeping, saving.least_bytes, SystemMemory(free=0, total=10**12))
    assert not any("activations_in_ram" in line for line in lines)
    lines = describe(keeping, saving.least_bytes, PLENTY)
    assert f"With activations_in_ram {gb(saving.least_bytes)} are enough." in lines


def test_only_more_than_the_machine_has_is_refused() -> None:
    """What is not free at the moment may be so when it is needed."""
    loaded = dataclasses.replace(plan(streaming="ram"), in_ram=0)
    needed = loaded.ram_needed(AMPLE)
    require_fits(loaded, AMPLE, SystemMemory(free=0, total=needed))
    with pytest.raises(ValueError, match=r"^This training does not fit: .* of system memory are "):
        require_fits(loaded, AMPLE, SystemMemory(free=0, total=needed - 1))


def test_the_parts_of_system_memory_are_said() -> None:
    lines = describe(plan(streaming="ram"), AMPLE)
    parts = plan(streaming="ram").ram(AMPLE)
    assert lines[1].startswith(f"Of system memory it takes {gb(parts.total)}: {gb(BF16_BLOCKS)} ")
    whole = f"Off the device, the weights take {gb(store_bytes(CONFIG, 'bf16'))} of system memory."
    assert lines[2] == whole
    assert whole not in describe(plan(streaming="disk"), AMPLE)


def test_where_there_is_one_memory_it_is_said_once() -> None:
    nothing = SystemMemory(free=0, total=0)
    assert len(require_fits(plan("cpu"), AMPLE, nothing)) == 2


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
        ("a rank of 4", {"lora": LoraSettings(rank=4, targets="all+ffs")}),
        ("the targets qlora", {"lora": LoraSettings(rank=64)}),
    ],
    ids=["checkpointing", "activations", "batch", "pictures", "rank", "targets"],
)
def test_what_does_not_fit_is_answered_by_what_does(words: str, change: dict[str, Any]) -> None:
    wide = plan(lora=LoraSettings(rank=64, targets="all+ffs"))
    enough = streamed_bytes(CONFIG, "bf16") + beside_weights(
        **{"lora": wide.workload.lora, **change}
    )
    said = f"With {words} {enough / 1e9:.2f} GB are enough."
    assert said in describe(wide, enough)
    assert said not in describe(wide, enough - 1)


def test_what_the_recipe_has_already_is_not_proposed() -> None:
    lines = "\n".join(describe(plan(lora=LoraSettings()), plan().least_bytes // 2))
    assert "rank" not in lines
    assert "targets" not in lines


@pytest.mark.parametrize("format", ["int8", "nf4", "int2"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_most_exact_format_that_fits_is_named(device: str, format: str) -> None:
    """With `off` and on a CPU, it is the weights that are too large."""
    enough = store_bytes(CONFIG, format) + beside_weights(format)
    said = f"With format {format} of Load Quantized FLUX {enough / 1e9:.2f} GB are enough."
    for free, is_said in ((enough, True), (enough - 1, False)):
        lines = describe(plan(device, "off"), free)
        assert (said in lines) == is_said
        assert sum("With format " in line for line in lines) == (1 if format != "int2" else is_said)


def test_a_model_of_a_core_loader_is_told_no_setting_that_it_lacks() -> None:
    core = dataclasses.replace(plan("cpu"), is_from_core=True)
    enough = store_bytes(CONFIG, "nf4") + beside_weights("nf4")
    lines = describe(core, enough)
    said = f"Loaded by Load Quantized FLUX in the format nf4, {enough / 1e9:.2f} GB are enough."
    assert said in lines
    assert not any("block_streaming" in line or "With format" in line for line in lines)


def test_where_no_single_change_is_enough_several_are_named() -> None:
    last = describe(plan(), 0)[-1]
    assert last.startswith("No single change is enough: take a smaller format")
    last = describe(dataclasses.replace(plan(), is_from_core=True), 0)[-1]
    assert last.startswith("No single change is enough: load the model by Load Quantized FLUX")


@pytest.mark.parametrize(
    ("file", "share", "chosen"),
    [
        (FluxFile(CONFIG, None), 1.0, "bf16"),
        (FluxFile(CONFIG, None), 0.6, "int8"),
        (FluxFile(CONFIG, None), 0.0, "nf4"),
        (FluxFile(CONFIG, "fp4"), 1.0, "fp4"),
        (FluxFile(CONFIG, "fp4"), 0.0, "fp4"),
        (FluxFile(CONFIG, "fp8"), 1.0, "fp8"),
        (FluxFile(CONFIG, "fp8"), 0.4, "nf4"),
    ],
    ids=["bf16", "int8", "nf4", "fp4 already", "fp4 anyway", "fp8 already", "too much fp8"],
)
def test_auto_takes_the_most_exact_that_fits(file: FluxFile, share: float, chosen: str) -> None:
    free = int(share * store_bytes(CONFIG, "bf16"))
    assert choose_format(file, free, torch.device("cuda")) == chosen


def test_auto_keeps_no_fp8_where_there_is_none() -> None:
    free = store_bytes(CONFIG, "fp8")
    assert choose_format(FluxFile(CONFIG, "fp8"), free, torch.device("mps")) == "int8"


def test_without_bitsandbytes_auto_takes_the_four_bits_that_do_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for free, chosen in ((store_bytes(CONFIG, "int8"), "int8"), (0, "int4")):
        assert choose_format(FluxFile(CONFIG, None), free, torch.device("cuda")) == chosen


def test_products_that_the_device_lacks_are_refused_before_the_start() -> None:
    on_cpu = plan("cpu", speed=SpeedSettings(products="8bit"))
    with pytest.raises(ValueError, match=r"^Products in 8 bits need an NVIDIA card: "):
        require_fits(on_cpu, 10**12)


def test_no_format_is_proposed_that_cannot_be_multiplied_in_8_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    for products, names in (
        ("dequantized", ["bf16", "int8", "nf4", "int2"]),
        ("8bit", ["bf16", "int8"]),
    ):
        changed = preflight._formats(plan(speed=SpeedSettings(products=products)))
        assert [other.format for other, _ in changed] == names
