"""What is done as in the published release."""

import dataclasses
from dataclasses import dataclass

from toco_core.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class ReleaseBehaviour(Config):
    """Where the published release departs from its paper or from what it means to do. True does as the release does.

    The first eight lose information or are slips: off by default. The others shape the published results: on by
    default. `release_exact()` turns all of them on.
    """

    mirrored_valid_box: bool = option(
        False,
        """Take the valid box before the last random flip of the image. Off: half of the boxes would be mirrored, so
        that padding counts as image and image as padding.""",
    )
    independent_local_image: bool = option(
        False,
        """Flip and jitter the image that local views are cut from independently of the image that the region map
        belongs to.
        Off: half of the views would come from the mirrored place with the wrong flag, and flags are what CTC learns
        from.""",
    )
    pixel_box_on_tokens: bool = option(
        False,
        """Apply the valid box in pixels to labels at token scale. Off: an image padded by more than a grid's height or
        width would have no valid token for PTC.""",
    )
    nan_segmentation_loss: bool = option(
        False,
        """Let the segmentation loss be NaN where no foreground or no background pixel is valid. Off: the missing half
        counts 0; NaN times weight 0 is NaN and would end the training.""",
    )
    crops_in_padding: bool = option(
        False, "Allow local views to be centred on padding. Off: a black view says nothing about an image."
    )
    truncated_denormalisation: bool = option(
        False,
        """Truncate to whole grey levels when PAR's image is denormalised. Off: what rounding has put just below a level
        comes out one too low, 19 of 256 levels in the release and others here.""",
    )
    dropped_border: bool = option(
        False,
        """Ignore up to a patch minus one pixel at the right and at the bottom where a size is not a multiple of the
        patch. Off: the image is resized to the nearest multiple.""",
    )
    ptc_constant: bool = option(
        False,
        """Let PTC be at least the constant 1/2 where no two tokens share a class. Off: it is 0 there, with the same
        gradient, so that the curve shows only what is learned.""",
    )
    foreground_counts_double: bool = option(
        True,
        """Judge a local view by the mean of the region values 0 background, 1 uncertain, 2 foreground. On: the
        threshold 0.2 was chosen for it. Off: the share of uncertain and foreground pixels.""",
    )
    ctc_negatives_only_term: bool = option(
        True,
        """Add to CTC one term per image that holds negatives only. On: it pushes background views away even where
        an image has no positive view, and the published weight was chosen with it.""",
    )
    average_before_teacher: bool = option(
        True,
        """Update the moving average before the teacher's head is used. On: the published order. Off: after it,
        so that the teacher lags by one step more.""",
    )
    rate_jump: bool = option(
        True,
        """Let the polynomial decay count from step 0, so that the rate falls at the end of the warm-up (from 1.0 to
        0.932 on VOC). On: the published schedule. Off: the decay begins where the warm-up ends.""",
    )
    decay_all: bool = option(
        True, "Decay every trained parameter. On: as published. Off: biases and norms are not decayed."
    )
    always_blurred: bool = option(
        True, "Blur the main image a little every time. On: as published, and mild. Off: it is left sharp."
    )
    black_padding: bool = option(
        True, "Pad with black. On: as published. Off: with the data's mean colour, which is 0 after normalisation."
    )
    square_evaluation: bool = option(
        True, "Evaluate at `crop_size` square whatever the aspect. On: as published. Off: aspect is kept."
    )
    max_over_scales: bool = option(
        True, "Over several `seg_scales` take the maximum of the logits, not the mean. On: as published."
    )

    @classmethod
    def release_exact(cls) -> "ReleaseBehaviour":
        """Everything as the release does it, slips included."""
        return cls(**{f.name: True for f in dataclasses.fields(cls)})
