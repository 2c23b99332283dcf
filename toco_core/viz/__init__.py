"""Pictures: images under their CAM, labels in VOC's colours, curves. Functions take an `ax` and return it.

CAMs are always shown from 0 to 1 and never stretched, so that two overlays can be compared; labels have PASCAL VOC's
colours, and what is ignored (255) is grey. Figures carry their own light background: they read the same on a dark page.
"""

from toco_core.viz.curves import (
    CROP_CURVES,
    LiveCurves,
    compared_curves,
    crop_curves,
    error_points,
    layer_figure,
    loss_curves,
    score_curves,
    threshold_curves,
    training_figure,
    variant_points,
)
from toco_core.viz.pictures import (
    class_legend,
    contact_sheet,
    crop_boxes,
    label_colours,
    label_over_image,
    overlay,
    picture_rows,
    poster,
    region_colours,
    show,
    titled_row,
)
from toco_core.viz.scores import (
    TRUTH_COLOURS,
    class_bars,
    composition_bars,
    confusion_matrix,
    iou_bars,
    label_histogram,
    method_bars,
    threshold_heatmap,
)
from toco_core.viz.similarity import (
    SIMILARITY_COLOURS,
    attention_map,
    by_block,
    colour_scale,
    logit_matrix,
    similarity_explorer,
    similarity_map,
    similarity_matrix,
    token_similarity,
)
from toco_core.viz.theme import (
    FLAG_COLOURS,
    IGNORE_GREYS,
    KIND_COLOURS,
    KIND_NAMES,
    METHOD_COLOURS,
    METHODS,
    NAMES,
    OWN_TERM_COLOURS,
    RUN_COLOURS,
    SCORE_COLOURS,
    TERM_COLOURS,
    is_live,
    name_colours,
    plain_text,
    use_theme,
)
