"""The explorer's image as a page that needs no kernel: see `predict.page`."""

from toco_core.predict.image import AUXILIARY
from toco_core.predict.page import page_html
from toco_core.widgets.session import Session
from toco_core.widgets.subjects import AUXILIARY as AUXILIARY_HEAD
from toco_core.widgets.subjects import CLASSIFIER, DECODER

HEADS = {CLASSIFIER: "classifier", AUXILIARY_HEAD: "auxiliary", DECODER: "decoder"}
TAKEN = ("show", "strength", "beta", "beta_l", "beta_h", "par_iterations", "par_dilations", "cam_scales", "flip")


def session_page(session: Session, side: int = 0) -> str:
    """The HTML of the image at hand, under all settings, beginning with those of a side.

    Raises ToCoError for a model without a trained classifier.
    """
    subject, settings, picture = session.subject(side), session.sides[side].settings, session.picture
    blocks = {"final": subject.model.depth, "auxiliary": AUXILIARY, "block": settings.block}
    classes, _ = session.classes(side)
    return page_html(
        session.analysis(side).predictor,
        title=picture.name,
        class_names=session.analysis(side).class_names,
        model=subject.name,
        mask=picture.mask,
        mask_names=session.joint(side).names,
        classes=classes or None,
        settings={name: getattr(settings, name) for name in TAKEN} | {"block": blocks[settings.cam]},
        has=tuple(HEADS[head] for head in subject.has if head in HEADS),
    )
