"""Every number of an experiment: records that refuse wrong values, and the recipes that fill them."""

from toco_core.config.crops import CropConfig
from toco_core.config.data import DataConfig
from toco_core.config.experiment import TrainConfig, field_sections, override
from toco_core.config.fields import Config, did_you_mean, option
from toco_core.config.labels import LabelConfig
from toco_core.config.losses import LossConfig
from toco_core.config.model import ModelConfig
from toco_core.config.recipes import RECIPES, changed_batch, coco, configured, photographs, shortened, tiny, voc
from toco_core.config.release import ReleaseBehaviour
from toco_core.config.schedule import ScheduleConfig, lr_at
