"""Images in, batches out: folders in VOC layout, random variation, loaders."""

from toco_core.data.augment import Views, training_views
from toco_core.data.files import read_image, read_mask
from toco_core.data.loader import (
    Batch,
    EvalItem,
    evaluation_items,
    to_unit,
    training_batches,
)
from toco_core.data.voc import (
    VOC_CLASSES,
    Report,
    TrainVal,
    VOCFolder,
    check,
    holdout,
    open_train_val,
    split_names,
)

__all__ = [
    "VOC_CLASSES",
    "Batch",
    "EvalItem",
    "Report",
    "TrainVal",
    "VOCFolder",
    "Views",
    "check",
    "evaluation_items",
    "holdout",
    "open_train_val",
    "read_image",
    "read_mask",
    "split_names",
    "to_unit",
    "training_batches",
    "training_views",
]
