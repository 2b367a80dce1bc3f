"""Which blocks of a network are run as one, which are computed again in backward, and which image
tokens go around them: said before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from .speed_settings import SpeedSettings
from .tread import Route, routes_around


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Blocks in a row that are run as one."""

    start: int
    stop: int
    """One behind the last."""
    recomputed: bool
    """Whether only their inputs are kept, and they run once more in backward."""
    route: Route | None = None
    """The one that leads around them."""


def segments_of(
    speed: SpeedSettings, num_blocks: int, *, gradient_checkpointing: bool, kept_blocks: int = 0
) -> tuple[Segment, ...]:
    """The blocks of a network in the order in which they run.

    Args:
        kept_blocks: with selective checkpointing, how many blocks keep their activations: the
            first, so that what is needed grows evenly with their number.

    Raises:
        ValueError: a TREAD route does not fit the network.
    """
    routes = routes_around(speed.tread, num_blocks)
    edges = {edge for route in routes for edge in (route.start, route.stop)}
    in_one = speed.checkpointing == "interval" and gradient_checkpointing
    length = speed.checkpointing_interval if in_one else 1
    segments, start = list[Segment](), 0
    while start < num_blocks:
        stop = min([start + length, num_blocks, *(edge for edge in edges if edge > start)])
        is_kept = speed.checkpointing == "selective" and start < kept_blocks
        segment = Segment(
            start=start,
            stop=stop,
            recomputed=gradient_checkpointing and not is_kept,
            route=next((r for r in routes if r.start <= start < r.stop), None),
        )
        segments.append(segment)
        start = stop
    return tuple(segments)


def without_effect(speed: SpeedSettings, *, gradient_checkpointing: bool) -> list[str]:
    """A sentence for every setting that does nothing beside the others."""
    lines = []
    if speed.checkpointing != "all" and not gradient_checkpointing:
        lines.append(
            f"The checkpointing '{speed.checkpointing}' of Speed Settings has no effect: "
            "gradient_checkpointing is off, so no block is computed twice."
        )
    is_changed = speed.checkpointing_interval != SpeedSettings.checkpointing_interval
    if is_changed and speed.checkpointing != "interval":
        lines.append(
            "The setting checkpointing_interval has no effect: checkpointing is "
            f"{speed.checkpointing}, not interval."
        )
    return lines


def slower_than_wished(speed: SpeedSettings, *, dropout: float, has_masks: bool) -> list[str]:
    """A sentence for everything that keeps these settings from their effect.

    Args:
        dropout: that of the LoRA.
    """
    lines = []
    if speed.compile and dropout:
        lines.append(
            "The dropout of the LoRA breaks compiled blocks apart at each layer that learns, so "
            "that compiling gains less. Set dropout to 0, or turn compile off."
        )
    if speed.tread and has_masks:
        lines.append(
            "TREAD keeps the tokens under the white of masks: it saves less here, and the "
            "training takes more memory than the estimate says."
        )
    return lines


@dataclass(frozen=True, kw_only=True)
class Run:
    """Segments in a row that are alike."""

    count: int
    blocks: tuple[int, int]
    """Double and single blocks of each."""
    recomputed: bool
    route: Route | None


def runs_of(segments: Sequence[Segment], depth: int) -> tuple[Run, ...]:
    """The segments of a network with `depth` double blocks, the alike ones together."""
    runs = list[Run]()
    for segment in segments:
        doubles = max(0, min(segment.stop, depth) - segment.start)
        blocks = doubles, segment.stop - segment.start - doubles
        run = Run(count=1, blocks=blocks, recomputed=segment.recomputed, route=segment.route)
        if runs and replace(runs[-1], count=1) == run:
            run = replace(run, count=runs.pop().count + 1)
        runs.append(run)
    return tuple(runs)


def shortened(runs: Sequence[Run], *, but: int | None = None) -> tuple[Run, ...]:
    """One segment of each run, and two of that at `but`."""
    return tuple(replace(run, count=1 + (number == but)) for number, run in enumerate(runs))


def segments_in(runs: Sequence[Run]) -> tuple[Segment, ...]:
    """The segments of a network of these runs alone, its routes as long as they are there."""
    alike = [run for run in runs for _ in range(run.count)]
    edges = [0, *accumulate(sum(run.blocks) for run in alike)]
    around: dict[Route, list[int]] = {}
    for run, *both in zip(alike, edges, edges[1:], strict=False):
        if run.route:
            around.setdefault(run.route, []).extend(both)
    routes = {r: replace(r, start=places[0], stop=places[-1]) for r, places in around.items()}
    return tuple(
        Segment(
            start=start,
            stop=stop,
            recomputed=run.recomputed,
            route=routes[run.route] if run.route else None,
        )
        for run, start, stop in zip(alike, edges, edges[1:], strict=False)
    )
