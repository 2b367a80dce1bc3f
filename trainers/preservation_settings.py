"""What the model shall keep of what it knows, and which parts of pictures count."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .checks import require

_LETTER = r"[^\W\u2e80-\U0003ffff]"
"""Of scripts that write words apart; those of East Asia do not."""


@dataclass(frozen=True, kw_only=True)
class PreservationSettings:
    """Masks, class pictures and class captions. Datasets of regularization pictures and of class
    pictures say themselves that they are."""

    unmasked_weight: float = 0.0
    """What the black parts of masks count, 0 to 1; grey ones count at least as much."""
    normalize_masks: bool = False
    """Count a picture alike whatever the area of its mask: its weights are divided by their mean.
    Pictures with small masks then make rougher steps."""
    prior_weight: float = 1.0
    """What the loss of class pictures is multiplied by."""
    trigger: str = ""
    """The word in captions for what is learned. With it, what the model draws for the class word
    is kept: a second forward and backward pass and one without the LoRA at each such batch, more
    than twice the time."""
    class_word: str = ""
    """What stands in place of the trigger in class captions."""
    class_weight: float = 1.0
    """What the loss of class captions is multiplied by."""

    def __post_init__(self) -> None:
        require(
            0 <= self.unmasked_weight <= 1,
            f"The setting unmasked_weight must be between 0 and 1, got {self.unmasked_weight}. "
            "0.1 is usual.",
        )
        for name in ("prior_weight", "class_weight"):
            value = getattr(self, name)
            require(
                0 < value < math.inf,
                f"The setting {name} must be above 0, got {value}. 1 is usual.",
            )
        require(
            bool(self.trigger.strip()) == bool(self.class_word.strip()),
            "Class captions need both a trigger, such as 'sks dog', and a class word, such as "
            f"'dog', got {self.trigger!r} and {self.class_word!r}. Write both, or neither.",
        )
        require(
            not self.keeps_class or self.trigger.strip() not in self.class_word,
            f"The class word {self.class_word!r} holds the trigger {self.trigger!r}, so that class "
            "captions would call up what is learned. Write another class word.",
        )

    @property
    def keeps_class(self) -> bool:
        """Whether class captions are trained beside the others."""
        return bool(self.trigger.strip())

    def class_caption(self, text: str) -> str | None:
        """The text with the class word for the trigger; None if it does not hold the trigger as a
        word, or words, of its own."""
        trigger = self.trigger.strip()
        if not trigger:
            return None
        whole = rf"(?<!{_LETTER}){re.escape(trigger)}(?!{_LETTER})"
        changed, count = re.subn(whole, lambda _: self.class_word.strip(), text)
        return changed if count else None
