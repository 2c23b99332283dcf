"""The parts of the explorer about one pixel: why it has its label, and its patch among the others."""

import ipywidgets as w

from toco_core.errors import ToCoError
from toco_core.widgets import draw, report, why
from toco_core.widgets.canvas import Canvas
from toco_core.widgets.markup import Markup, Panel
from toco_core.widgets.session import Session

SMALL = 224  # width of the maps of tokens
SPREAD = {"flex_flow": "row wrap", "align_items": "flex-start", "grid_gap": "14px"}


class WhyPanel(w.VBox):
    """Why the clicked pixel has its label; hidden where nothing is known."""

    def __init__(self, session: Session):
        self.session = session
        self.words, self.votes = Panel(), Panel()
        labels = ("neighbours that vote", "where the score comes from", "patches that token contrast pulls and pushes")
        self.maps = [Canvas(width=176, label=label) for label in labels]
        maps = w.Box(self.maps)
        maps.add_class("toco-votes")
        super().__init__([self.words, maps, self.votes])
        self.add_class("toco-pinned")

    def draw(self) -> None:
        """For the active side."""
        session = self.session
        try:
            found, image = session.why(session.active), session.picture.image
        except ToCoError:  # a view tells what the model lacks
            found = None
        self.layout.display = None if found else "none"
        if not found:
            return
        settings = session.sides[session.active].settings
        self.words.put(why.why_html(found, settings))
        self.votes.put(why.votes_html(found) if found.trace else Markup())
        pictures = [None, None, None]
        if found.trace:
            pictures[:2] = why.votes_picture(found, image), why.influence_picture(found, image)
        if found.pairs:
            patch = session.analysis(session.active).patch_at(*session.place)
            pictures[2] = why.pairs_picture(found, image, patch)
        titles = ("votes in a step", f"after {settings.par_iterations} steps", "PTC pulls, pushes")
        for canvas, picture, title in zip(self.maps, pictures, titles, strict=True):
            canvas.layout.display = "none" if picture is None else None
            if picture is not None:
                canvas.picture, canvas.title = draw.encoded(picture), title


class TokenPanel(w.HBox):
    """The framed patch among the others, over the blocks too, and where the class token looks. `head` is the control of
    the attention head."""

    def __init__(self, session: Session, head: w.Widget):
        self.session = session
        self.maps = [
            Canvas(width=SMALL, label="cosine similarity to the framed patch"),
            Canvas(width=SMALL, label="attention of the class token"),
        ]
        self.maps[0].words = "cosine; click another patch to compare it"
        self.curve, self.titles = Panel(), [Panel(), Panel()]
        narrow = {"layout": w.Layout(width=f"{SMALL + 6}px")}
        similar = w.VBox([self.titles[0], self.maps[0]], **narrow)
        attention = w.VBox([self.titles[1], self.maps[1], head], **narrow)
        super().__init__([similar, self.curve, attention], layout=w.Layout(**SPREAD))
        self.add_class("toco-tokens")

    def draw(self) -> None:
        """For the active side; the curve for both."""
        session = self.session
        side, settings = session.active, session.sides[session.active].settings
        found = session.tokens(side)
        size = draw.shown_size(session.picture.image.shape[:2], 2 * SMALL)
        self.maps[0].picture = draw.encoded(draw.similarity_picture(found.similarity, size, found.patch))
        head = min(settings.head, len(found.attention))
        picture, top = draw.attention_picture(found.attention, size, head=head)
        self.maps[1].picture = draw.encoded(picture)
        title = report.heading(f"similar to the frame, block {settings.block}")
        self.titles[0].put(title, draw.colour_bar("similarity"))
        which = f"head {head} of {len(found.attention)}" if head else f"mean of {len(found.attention)} heads"
        self.maps[1].words = f"{which}; 1 would be an even spread"
        title = report.heading(f"class token looks at, block {settings.block}")
        self.titles[1].put(title, draw.colour_bar("attention", top=top))
        names = "AB" if len(session.sides) == 2 else ["all other patches"]
        curves = {name: session.tokens(i).by_block for i, name in enumerate(names)}
        layer = session.subject(side).model.layer
        title = report.heading("the framed patch: mean similarity to all others")
        self.curve.put(title, draw.curve_svg(curves, block=settings.block, layer=layer))
