"""How the blocks of the training face are run: which are computed again in backward, several of
them as one, and which image tokens go around them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checks import require
from .packages import importing
from .segments import Segment
from .speed_settings import SpeedSettings
from .tread import Kept, Route, draw_kept, routes_around


def require_speed(speed: SpeedSettings, num_blocks: int) -> None:
    """See that the settings fit a network of so many blocks.

    Raises:
        ValueError: a TREAD route does not, or diffusers is too old for them.
    """
    routes_around(speed.tread, num_blocks)
    if not speed.tread and speed.checkpointing != "interval":
        return
    with importing("diffusers"):
        from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
    # Before, single blocks took text and image as one.
    require(
        "encoder_hidden_states" in signature(FluxSingleTransformerBlock.forward).parameters,
        "TREAD and the checkpointing 'interval' need diffusers 0.35 or newer. Update diffusers, or "
        "turn them off in Speed Settings.",
    )


class BlockRunner:
    """Runs the blocks of a diffusers FLUX whenever gradients are wanted, in the place of its
    gradient checkpointing."""

    def __init__(self, transformer: Any, segments: Sequence[Segment]) -> None:
        """`segments` are of all its blocks."""
        self._transformer = weakref.ref(transformer)  # which holds this runner
        self._places = {id(block): place for place, block in enumerate(self._blocks)}
        self.segments = segments
        transformer.enable_gradient_checkpointing(self)

    @property
    def segments(self) -> Sequence[Segment]:
        return self._segments

    @segments.setter
    def segments(self, segments: Sequence[Segment]) -> None:
        """May change between two steps, as long as the routes stay: the result is the same."""
        self._segments = segments
        self._by_start = {segment.start: segment for segment in segments}
        self._routing: _Routing | None = None

    @contextmanager
    def routed(self, generator: torch.Generator, forced: Tensor | None) -> Iterator[None]:
        """Within it tokens go around blocks, by draws from `generator`. What is computed without
        gradients, or outside of it, sees all tokens.

        Args:
            forced: as `draw_kept` takes it.
        """
        self._routing = _Routing(generator, forced)
        try:
            yield
        finally:
            self._routing = None

    def __call__(self, block: nn.Module, *inputs: Any) -> Any:
        """What diffusers calls for each block in turn: its outputs for its inputs."""
        segment = self._by_start.get(self._places[id(block)])
        if segment is None:  # it was run as a part of the segment before
            return inputs[1], inputs[0]
        if segment.route is None or self._routing is None:
            return self._run(segment, *inputs)
        return self._run_routed(segment, self._routing, *inputs)

    def _run_routed(
        self,
        segment: Segment,
        routing: _Routing,
        image: Tensor,
        text: Tensor,
        condition: Tensor,
        positions: Any,
        options: dict[str, Any] | None,
    ) -> tuple[Tensor, Tensor]:
        """Text and image tokens, as blocks return them. Drawing, taking out and putting back are
        not computed again in backward."""
        route = segment.route
        assert route is not None
        if segment.start == route.start:
            image = routing.begin(route, image, positions)
        if options:  # all image tokens are seen, so it is the same whichever stay
            mask = options["attention_mask"]
            options = {"attention_mask": mask[..., : text.shape[1] + image.shape[1]]}
        text, image = self._run(segment, image, text, condition, routing.positions, options)
        return text, routing.end(image) if segment.stop == route.stop else image

    def _run(self, segment: Segment, *inputs: Any) -> Any:
        blocks = self._blocks[segment.start : segment.stop]
        if not segment.recomputed:
            return _in_turn(blocks, *inputs)
        # Nothing in them is random, so torch need not keep the state of its generators for them.
        return checkpoint(
            _in_turn,
            blocks,
            *inputs,
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
        )

    @property
    def _blocks(self) -> list[nn.Module]:
        transformer: Any = self._transformer()
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


class _Routing:
    """The routes of one micro-step: what is drawn, and the tokens that are on their way."""

    def __init__(self, generator: torch.Generator, forced: Tensor | None) -> None:
        self._generator, self._forced = generator, forced
        self._way: tuple[Kept, Tensor] | None = None
        self.positions: Any = None
        """cos and sin of the tokens that stay."""

    def begin(self, route: Route, image: Tensor, positions: Any) -> Tensor:
        """The image tokens that stay, of all [B, S, D]."""
        kept = draw_kept(route, len(image), image.shape[1], self._generator, self._forced)
        kept = Kept(kept.ids.to(image.device), kept.num_tokens)
        self._way, self.positions = (kept, image), kept.positions(positions)
        return kept.take(image)

    def end(self, image: Tensor) -> Tensor:
        """All image tokens, of those that stayed and the others before the route."""
        assert self._way is not None
        kept, before = self._way
        self._way = self.positions = None
        return kept.put_back(image, before)


def _in_turn(blocks: Sequence[nn.Module], *inputs: Any) -> Any:
    """What the last block returns: text and image tokens, which are inputs in the other order."""
    outputs = blocks[0](*inputs)
    for block in blocks[1:]:
        text, image = outputs
        outputs = block(image, text, *inputs[2:])
    return outputs
