"""Local views."""

from dataclasses import dataclass

from toco_core.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class CropConfig(Config):
    """Local views for class token contrast ("Class Token Contrast" in the paper)."""

    n_local: int = option(8, "Local views per image, besides the two global ones.", at_least=0, at_most=1000)
    local_size: int = option(96, "Height and width of a local view in pixels.", at_least=8, at_most=16384)
    local_resized: bool = option(
        False,
        """Resize local views to the image's size before they are encoded, so that their size does not tell them from
        global views. Off: they are encoded as they are cut, as published.""",
        added_later=True,
    )
    positive_threshold: float = option(
        0.2, "A crop is positive when the mean of its region values is above this.", at_least=0, at_most=2
    )
