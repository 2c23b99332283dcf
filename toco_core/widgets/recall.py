"""A session in words: as the notebook's parameters, which a papermill line or an address holds, and back.

`session` is a `Session`, whose methods of the same names these are.
"""

import json
from collections.abc import Mapping
from typing import Any

from toco_core.errors import ToCoError
from toco_core.widgets.settings import ARRANGEMENTS, VIEWS, Settings, differences, within


def parameters(session) -> dict[str, Any]:
    """The notebook's parameters that lead here: `restore` of a new session takes them. Settings that a session of
    this model begins with are left out."""
    side, found = session.sides[0], {}
    if side.subject != session.first:
        found["model"] = session.spec(0)
    found["image"] = session.picture.name
    found |= differences(side.settings, session.start(0))
    found["patch"] = _places_text([session.place] if session.place else [])
    if session.centres:
        found["crop_places"] = _places_text(session.centres)
    if len(session.sides) == 2:
        found["compare"] = session.spec(1)
        other = differences(session.sides[1].settings, within(side.settings, session.subject(1).model.depth))
        if other:
            found["other"] = json.dumps(other)
        if not session.linked:
            found["linked"] = False
    if session.views != VIEWS:
        found["views"] = ",".join(session.views)
    if session.arrange != ARRANGEMENTS[0]:
        found["arrange"] = session.arrange
    if any(session.curtain):
        found["curtain"] = ",".join(session.curtain)
    return found


def restore(session, values: Mapping[str, Any]) -> None:
    """Go where parameters lead: image, settings, patch, crop places, second model and its own settings.

    What is None or empty, and names that are not a session's, are passed over; the model is that of side A already,
    and the one named by `compare` is found as `Subjects.find` does. Raises ToCoError for a wrong value.
    """
    given = {name: value for name, value in values.items() if value not in (None, "")}
    if "image" in given:
        session.go(str(given["image"]))
    session.set(**{name: given[name] for name in Settings.help() if name in given})
    for place in _read_places("patch", given.get("patch", "")):
        session.click(*place)
    for place in _read_places("crop_places", given.get("crop_places", "")):
        session.place_crop(*place)
    other = _read_settings("other", given.get("other", "{}"))
    if "compare" in given or other:
        session.compare(True)
        if "compare" in given:
            session.use(session.subjects.find(str(given["compare"])), side=1)
        session.active, session.linked = 1, False
        try:
            session.set(**other)
        finally:
            session.active, session.linked = 0, given.get("linked", True)
    session.arrange_views(**{name: given[name] for name in ("arrange", "views", "curtain") if name in given})


def describe(session) -> str:
    """The state and its numbers in lines that are the same on every machine."""
    lines = [f"{session.picture.name} of {session.pictures.title}"]
    for i, side in enumerate(session.sides):
        s, joint = side.settings, session.joint(i)
        classes, _ = session.classes(i)
        shown = ", ".join(joint.names[joint.of_model[k]] for k in classes) or "no class"
        lines.append(f"{side.subject}: {s.show} ({s.cam} CAM of {shown}), beta_l {s.beta_l:g}, beta_h {s.beta_h:g}")
        found = session.view(i).numbers
        if found is not None:
            lines.append(f"  mIoU {100 * found.scores.miou:.0f} %, labelled pixels {100 * found.coverage:.0f} %")
    return "\n".join(lines)


def _places_text(places: list[tuple[float, float]]) -> str:
    return " ".join(f"{y:g},{x:g}" for y, x in places)


def _read_places(name: str, text: str) -> list[tuple[float, float]]:
    """The inverse: pairs `down,across` in fractions of the image, separated by blanks."""
    try:
        return [(float(y), float(x)) for y, x in (pair.split(",") for pair in str(text).split())]
    except ValueError:
        raise ToCoError(f"{name} = {text!r} is not allowed: down,across for each place, like 0.25,0.7") from None


def _read_settings(name: str, given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Settings written as JSON; papermill may have read them already."""
    try:
        found = json.loads(given) if isinstance(given, str) else dict(given)
    except (ValueError, TypeError):
        found = None
    if not isinstance(found, dict):
        raise ToCoError(f'{name} = {given!r} is not allowed: settings like {{"beta_h": 0.5}}')
    return found
