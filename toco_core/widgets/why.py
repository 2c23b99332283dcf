"""Why this pixel: what a session knows about one pixel, in charts, pictures and sentences."""

from typing import NamedTuple

import cv2
import numpy as np
import torch

from toco_core.conventions import IGNORE
from toco_core.predict.pixel import PARTrace, TokenPairs, decoder_probabilities, token_pairs, trace_par
from toco_core.widgets import draw
from toco_core.widgets.analysis import Analysis
from toco_core.widgets.markup import Markup, drawing, element
from toco_core.widgets.settings import Settings
from toco_core.widgets.subjects import AUXILIARY, CLASSIFIER, DECODER

SIDE = 224  # pixels of a small picture
HEAVIEST = 6  # neighbours in the table
LIKELY = 4  # classes of the decoder that are named


class Reasons(NamedTuple):
    """About one pixel. `names` and `colours`: background first, then the chosen classes (places in `Joint.names`)."""

    pixel: tuple[int, int]  # row and column of the native image
    names: tuple[str, ...]
    places: tuple[int, ...]
    cams: np.ndarray  # value of each chosen class
    trace: PARTrace | None
    pairs: TokenPairs | None
    decoder: list[tuple[str, int, float]]  # name, place, probability: the likeliest ones


def reasons(
    analysis: Analysis, settings: Settings, classes: tuple[int, ...], joint, place: tuple[float, float]
) -> Reasons:
    """Collect what is known at a place (fractions of the image). What the model has no head for is left out."""
    (H, W), model = analysis.size, analysis.images.shape[-2:]
    row, column = min(int(place[0] * H), H - 1), min(int(place[1] * W), W - 1)
    places = tuple(int(joint.of_model[k]) for k in (0, *classes))
    names, cams, trace, pairs, decoder = tuple(joint.names[p] for p in places), np.zeros(0), None, None, []
    thresholds = {"beta_l": settings.beta_l, "beta_h": settings.beta_h}
    if CLASSIFIER in analysis.subject.has and classes:
        maps, seen = analysis.cams(settings, classes), (row * model[0] // H, column * model[1] // W)
        cams = maps[0, :, seen[0], seen[1]].cpu().numpy()
        par = {"iterations": settings.par_iterations, "dilations": settings.par_dilations, "scale": settings.par_scale}
        trace = trace_par(analysis.predictor.unit.cpu(), maps, seen, **thresholds, **par, known=analysis.par_kept)
    if AUXILIARY in analysis.subject.has and classes:
        patch, which = analysis.patch_at(*place), {"scales": settings.cam_scales, "flip": settings.flip}
        pairs = token_pairs(analysis.predictor, patch, classes, **thresholds, **which)
    if DECODER in analysis.subject.has:
        values = decoder_probabilities(analysis.predictor, (row, column))
        top = torch.argsort(values, descending=True)[:LIKELY].tolist()
        decoder = [(joint.names[joint.of_model[k]], int(joint.of_model[k]), float(values[k])) for k in top]
    return Reasons((row, column), names, places, cams, trace, pairs, decoder)


# ---- sentences and charts


def why_html(found: Reasons, settings: Settings) -> Markup:
    """The panel: CAM against the thresholds, PAR step by step, its heaviest votes, the decoder, token contrast."""
    title = element("div", f"why this pixel? row {found.pixel[0]}, column {found.pixel[1]}", class_="toco-heading")
    parts = [title]
    if len(found.cams):
        parts += [element("div", seed_sentence(found, settings)), _cam_chart(found, settings)]
    if found.trace:
        parts += [element("div", par_sentence(found)), _par_chart(found)]
    if found.decoder:
        said = ", ".join(f"{name} {value:.2f}" for name, _, value in found.decoder)
        parts.append(element("div", element("b", "decoder: "), said))
    if found.pairs:
        parts.append(element("div", element("b", "PTC: "), pairs_sentence(found)))
    if len(parts) == 1:
        parts.append(element("div", "no class is chosen, or the model has no trained head"))
    return element("div", *parts, class_="toco-why")


def seed_sentence(found: Reasons, settings: Settings) -> str:
    """Which side of the thresholds the strongest class is on."""
    k = int(found.cams.argmax())
    name, value = found.names[k + 1], float(found.cams[k])
    if value >= settings.beta_h:
        return f"CAM: {name} {value:.2f} is at least beta_h {settings.beta_h:g}: {name}"
    if value <= settings.beta_l:
        return f"CAM: the highest, {name} {value:.2f}, is at most beta_l {settings.beta_l:g}: background"
    return f"CAM: {name} {value:.2f} is between beta_l {settings.beta_l:g} and beta_h {settings.beta_h:g}: uncertain"


def par_sentence(found: Reasons) -> str:
    """The label before PAR and the steps at which it changes."""
    labels = [found.trace.slot(t) for t in range(len(found.trace.high))]
    changes = [(t, label) for t, label in enumerate(labels) if t and label != labels[t - 1]]
    said = ", ".join(f"{_name(found, label)} after step {t}" for t, label in changes)
    return f"PAR: {_name(found, labels[0])} at first" + (
        f", {said}" if said else f", and after {len(labels) - 1} steps"
    )


def pairs_sentence(found: Reasons) -> str:
    """How many patches token contrast pulls and pushes from here, and how alike they are now."""
    pairs = found.pairs
    if pairs.label == IGNORE:
        return "the auxiliary CAM is uncertain here: this patch is left alone"
    said = [f"this patch counts as {_name(found, pairs.label)}"]
    for relation, word in ((1, "pulled together with"), (0, "pushed apart from")):
        chosen = pairs.relation == relation
        cosine = f" (mean |cos| {float(pairs.cosine[chosen].abs().mean()):.2f})" if chosen.any() else ""
        said.append(f"{word} {int(chosen.sum())} patches{cosine}")
    return ", ".join(said)


def votes_html(found: Reasons) -> Markup:
    """The neighbours that count most in each step."""
    rows = [element("tr", *(element("th", word) for word in ("neighbour", "votes", "weight")))]
    for vote in found.trace.votes[:HEAVIEST]:
        scores = found.trace.starts[:, vote.y, vote.x]
        name = found.names[int(scores.argmax())]
        where = (
            f"{abs(vote.dy):g} {'up' if vote.dy < 0 else 'down'}, {abs(vote.dx):g} {'left' if vote.dx < 0 else 'right'}"
        )
        cells = (where, f"{name} {float(scores.max()):.2f}", f"{100 * vote.weight:.1f} %")
        rows.append(element("tr", *(element("td", cell) for cell in cells)))
    return element("table", *rows, class_="toco-table")


def _name(found: Reasons, slot: int) -> str:
    return "uncertain" if slot == IGNORE else found.names[slot]


def _cam_chart(found: Reasons, settings: Settings, width: int = 300) -> Markup:
    """A bar per class, with lines at the two thresholds."""
    left, right, step = 84, 40, 18
    span, height = width - left - right, step * len(found.cams) + 18
    parts = []
    for i, value in enumerate(found.cams):
        top = i * step + 3
        bar = {"x": left, "y": top, "width": f"{max(value, 0.004) * span:.1f}", "height": step - 6}
        parts.append(element("rect", **bar, fill=draw.class_colour(found.places[i + 1]), stroke="currentColor"))
        parts.append(element("text", _short(found.names[i + 1]), x=left - 6, y=top + 10, text_anchor="end"))
        parts.append(element("text", f"{value:.2f}", x=f"{left + value * span + 5:.1f}", y=top + 10))
    for beta, name, anchor in ((settings.beta_l, "beta_l", "end"), (settings.beta_h, "beta_h", "start")):
        at = f"{left + beta * span:.1f}"
        parts.append(element("line", x1=at, x2=at, y1=0, y2=height - 15, stroke="currentColor", stroke_dasharray="3 2"))
        parts.append(element("text", name, x=at, y=height - 4, text_anchor=anchor))
    return drawing(*parts, width=width, height=height, label="CAM of each class against the thresholds")


def _par_chart(found: Reasons, width: int = 300, height: int = 128) -> Markup:
    """Score of background and each class after every step; solid against beta_h, dashed against beta_l."""
    left, right, top, bottom = 30, 78, 6, 28
    steps = len(found.trace.high) - 1
    parts = []

    def place(t: int, value: float) -> str:
        x = left + t / max(steps, 1) * (width - left - right)
        return f"{x:.1f},{top + (1 - value) * (height - top - bottom):.1f}"

    for tick in (0, 0.5, 1):
        y = top + (1 - tick) * (height - top - bottom)
        parts.append(element("line", x1=left, x2=width - right, y1=y, y2=y, stroke="currentColor", opacity=".2"))
        parts.append(element("text", f"{tick:g}", x=left - 5, y=y + 4, text_anchor="end"))
    ends = []
    for scores, dash in ((found.trace.low, "3 3"), (found.trace.high, "")):
        for slot, name in enumerate(found.names):
            points = " ".join(place(t, float(value)) for t, value in enumerate(scores[:, slot]))
            colour = draw.class_colour(found.places[slot]) if slot else "#888"
            line = {"points": points, "fill": "none", "stroke_dasharray": dash}
            rim = {"stroke": "currentColor", "stroke_width": 3.5, "opacity": ".35"}  # no colour is lost on its ground
            parts += [element("polyline", **line, **rim), element("polyline", **line, stroke=colour, stroke_width=2)]
            if not dash:
                ends.append((top + (1 - float(scores[-1, slot])) * (height - top - bottom), name))
    rows = _apart([y + 4 for y, _ in sorted(ends)], 11, most=height - bottom + 4)
    for y, (_, name) in zip(rows, sorted(ends), strict=True):
        parts.append(element("text", _short(name), x=width - right + 5, y=f"{y:.1f}"))
    words = f"step 0 to {steps} of PAR; solid: beta_h, dashed: beta_l"
    parts.append(element("text", words, x=left - 26, y=height - 6))
    return drawing(*parts, width=width, height=height, label="scores at the pixel after each step of PAR")


def _apart(heights: list[float], step: float, *, most: float) -> list[float]:
    """Rising heights moved so that none is nearer than `step` to the next, and none above `most`."""
    found = []
    for y in heights:
        found.append(max(y, found[-1] + step) if found else y)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], most - step * (len(found) - 1 - i))
    return found


def _short(name: str) -> str:
    return name if len(name) < 13 else name[:11] + "…"


# ---- pictures


def votes_picture(found: Reasons, image: np.ndarray) -> np.ndarray:
    """The neighbours of one step over a part of the image: area by weight, colour by the class that each votes for."""
    trace, (h, w) = found.trace, found.trace.size
    small = draw.ground(cv2.resize(image, (w, h), interpolation=cv2.INTER_AREA))
    reach = max(max(abs(v.y - trace.pixel[0]), abs(v.x - trace.pixel[1])) for v in trace.votes) + 2
    y, x = trace.pixel
    window = cv2.copyMakeBorder(small, *(reach,) * 4, cv2.BORDER_CONSTANT, value=(128, 128, 128))
    window = window[y : y + 2 * reach + 1, x : x + 2 * reach + 1]
    scale = SIDE / (2 * reach + 1)
    picture = cv2.resize(np.ascontiguousarray(window), (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)
    heaviest = trace.votes[0].weight
    for vote in trace.votes:
        middle = tuple(round((at - here + reach + 0.5) * scale) for at, here in ((vote.x, x), (vote.y, y)))
        slot = int(trace.starts[:, vote.y, vote.x].argmax())
        colour = tuple(draw.LABEL_COLOURS[found.places[slot]].tolist()) if slot else (160, 160, 160)
        radius = max(2, round(13 * (vote.weight / heaviest) ** 0.5))
        cv2.circle(picture, middle, radius + 1, draw.LIGHT, -1, cv2.LINE_AA)
        cv2.circle(picture, middle, radius, colour, -1, cv2.LINE_AA)
    middle = round((reach + 0.5) * scale)
    cv2.drawMarker(picture, (middle, middle), draw.DARK, cv2.MARKER_CROSS, 18, 4)
    cv2.drawMarker(picture, (middle, middle), draw.LIGHT, cv2.MARKER_CROSS, 16, 2)
    return picture


def influence_picture(found: Reasons, image: np.ndarray) -> np.ndarray:
    """Where the score after the last step comes from: bright pixels count most (square root, largest is 1)."""
    size = draw.shown_size(image.shape[:2], SIDE)
    share = found.trace.rows[-1].sqrt()
    value = (share / share.max().clamp(min=1e-12)).numpy().astype(np.float32)
    return draw.cam_picture(draw.ground(draw.enlarged(image, size)), draw.resized(value, size), strength=0.8)


def pairs_picture(found: Reasons, image: np.ndarray, patch: int) -> np.ndarray:
    """Patches over the image: green: pulled together with the framed one, orange: pushed apart, hatched: left alone."""
    size = draw.shown_size(image.shape[:2], SIDE)
    relation = draw.resized(found.pairs.relation.numpy().astype(np.uint8), size)
    colours = np.zeros((*size, 3), np.uint8)
    colours[relation == 1], colours[relation == 0] = draw.POSITIVE, draw.NEGATIVE
    ignored = relation == IGNORE
    colours[ignored] = draw.label_colours(np.full(size, IGNORE, np.uint8))[ignored]
    picture = cv2.addWeighted(draw.ground(draw.enlarged(image, size)), 0.4, colours, 0.6, 0)
    return draw.with_patch(picture, tuple(found.pairs.relation.shape), patch)
