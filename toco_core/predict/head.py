"""A timm model with its own ImageNet head behind the questions of `ImagePredictor`: named class maps of any photograph.

Its maps are relevances (see `class_maps`), since the head reads the class token. A head knows a thousand classes and a
label map at most 254: class k of an image is here its k-th most probable one.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from toco_core.config import ModelConfig, TrainConfig, override, photographs
from toco_core.data import EvalItem
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.predict.class_maps import RELEVANCE_THRESHOLDS, Classifier, relevance_maps
from toco_core.predict.image import ImagePredictor

RANKED = 100  # classes per image


class HeadPredictor(ImagePredictor):
    """See the module. `order` are the head's classes from 0, the most probable first, `scores` their probabilities."""

    def __init__(self, classifier: Classifier, model: ToCo, config: TrainConfig, **options):
        super().__init__(model, config, **options)
        self.classifier = classifier

    def set_item(self, item: EvalItem) -> None:
        super().set_item(item)
        with torch.no_grad(), self.passes():
            scores = self.classifier.model(self.images)[0].float().softmax(0).cpu().numpy()
        self.order: list[int] = np.argsort(-scores, kind="stable")[: self.model.n_classes].tolist()
        self.scores: np.ndarray = scores[self.order]
        short = short_names(self.classifier.class_names[1:])
        self.class_names = ("background", *(short[k] for k in self.order))

    def class_cam(
        self, k: int, *, block: int | None = None, scales: Sequence[float] | None = None, flip: bool = True
    ) -> Float[Tensor, "H W"]:
        """Relevance of class `k` of this image in [0, 1]; scales and mirroring change nothing.

        Raises ToCoError for an inner block, which the head does not read.
        """
        if block not in (None, self.model.depth):
            raise ToCoError(f"the head of {self.classifier.name} reads the last block's class token: no map of another")
        if ("relevance", k) not in self._kept:
            with self.passes():
                maps = relevance_maps(self.classifier.model, self.images, [self.order[k - 1]])
            self._kept["relevance", k] = maps[0, 0].detach()
        return self._kept["relevance", k]


def head_model(classifier: Classifier) -> tuple[ToCo, TrainConfig]:
    """The encoder of a classifier as a model with tokens to look at, and a config that sees images as it does."""
    name, cfg = classifier.name, classifier.model.pretrained_cfg
    n_classes = min(RANKED, len(classifier.class_names) - 1)
    model = ToCo(ModelConfig(backbone=name, pretrained=False, layer=1), n_classes).eval()
    state = classifier.model.state_dict()
    model.encoder.load_state_dict({key: state[key] for key in model.encoder.state_dict()})
    model.layer = max(1, model.depth - 2)
    side = cfg["input_size"][-1]
    return model, override(
        photographs(), backbone=name, layer=model.layer, crop_size=side, square_evaluation=True, cam_scales=(1.0,),
        **RELEVANCE_THRESHOLDS,
    )  # fmt: skip


def short_names(names: Sequence[str]) -> list[str]:
    """The first of the synonyms of each class; the whole name where another class begins with the same."""
    first = [name.split(",")[0].strip() for name in names]
    times = Counter(first)
    return [a if times[a] == 1 else name.replace(",", " or") for a, name in zip(first, names, strict=True)]
