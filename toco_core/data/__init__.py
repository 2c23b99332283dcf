"""Images in, batches out: data sets in several layouts, random variation, loaders."""

from toco_core.data.augment import Views, training_views
from toco_core.data.files import read_image, read_mask
from toco_core.data.layouts.coco import COCOFolder
from toco_core.data.layouts.tags import ClassFolders, TagList
from toco_core.data.layouts.voc import VOC_CLASSES, VOCFolder, check
from toco_core.data.loader import (
    Batch,
    EvalItem,
    evaluation_items,
    to_unit,
    training_batches,
)
from toco_core.data.source import Layout, open_data, open_source, open_train_val, recognise, split_names
from toco_core.data.split import Report, Split, TrainVal, holdout

__all__ = [
    "VOC_CLASSES",
    "Batch",
    "COCOFolder",
    "ClassFolders",
    "EvalItem",
    "Layout",
    "Report",
    "Split",
    "TagList",
    "TrainVal",
    "VOCFolder",
    "Views",
    "check",
    "evaluation_items",
    "holdout",
    "open_data",
    "open_source",
    "open_train_val",
    "read_image",
    "read_mask",
    "recognise",
    "split_names",
    "to_unit",
    "training_batches",
    "training_views",
]
