"""Which images of a batch share no class: whose views may count among each other's negatives in class token contrast
(`ctc_batch_negatives`)."""

from jaxtyping import Bool
from torch import Tensor

from toco_core.errors import ToCoError


def unrelated_images(step) -> Bool[Tensor, "B B"]:
    """Whether two images of the batch share no class; an image is related to itself.

    Raises ToCoError where the step holds a part of its batch only.
    """
    if step.parts > 1:
        raise ToCoError(f"ctc_batch_negatives with a batch in {step.parts} parts is not allowed: one process, one part")
    image_labels = step.batch.image_labels
    apart = (image_labels @ image_labels.T == 0).fill_diagonal_(False)
    return apart.to(step.batch.images.device, non_blocking=True)
