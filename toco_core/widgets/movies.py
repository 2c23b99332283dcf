"""Sequences of pictures to play: one image over the blocks, over PAR's iterations, and a training over its steps.

A `Movie` works out a frame when it is asked for it, and keeps it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from toco_core.errors import ToCoError
from toco_core.train.film import SHOWN as FILMED
from toco_core.train.film import has_film, read_film
from toco_core.viz.movie import captioned, write_movie
from toco_core.widgets.session import Session
from toco_core.widgets.settings import LABELS

PAR_ITERATIONS = (*range(11), 12, 15, 20)


@dataclass(frozen=True)
class Movie:
    """Frames with captions."""

    title: str
    captions: tuple[str, ...]
    draw: Callable[[int], UInt8[np.ndarray, "H W 3"]]
    begins_at: int = 0
    """The frame that is shown first."""
    _kept: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.captions)

    def frame(self, i: int) -> UInt8[np.ndarray, "H W 3"]:
        """A frame without its caption, uint8 RGB."""
        if i not in self._kept:
            self._kept[i] = self.draw(i)
        return self._kept[i]

    def save(self, path: Path | str, *, seconds: float = 0.4) -> Path:
        """Write all frames with title and captions as GIF or MP4. Raises ToCoError as `write_movie` does."""
        frames = [captioned(self.frame(i), f"{self.title}: {caption}") for i, caption in enumerate(self.captions)]
        return write_movie(frames, path, seconds=seconds)


def over_blocks(session: Session, side: int = 0) -> Movie:
    """The image at hand after each block: the block's CAM, or the label that is shown, made of it.

    Raises ToCoError for a model without a trained classifier, as `Session.label` does.
    """
    settings, depth = session.sides[side].settings, session.subject(side).model.depth
    show = settings.show if settings.show in ("CAM label", "seed label", "pseudo label") else "CAM"
    options = [{"cam": "block", "block": block, "show": show} for block in range(1, depth + 1)]
    captions = tuple(f"block {block} of {depth}" for block in range(1, depth + 1))
    return Movie(f"{session.picture.name}, {show}", captions, _frames(session, side, options), depth - 1)


def over_par(session: Session, side: int = 0) -> Movie:
    """The pseudo label of the image at hand while it is refined, with the settings of a side."""
    options = [{"show": "pseudo label", "par_iterations": n} for n in PAR_ITERATIONS]
    captions = tuple(f"{n} iterations of PAR" for n in PAR_ITERATIONS)
    return Movie(f"{session.picture.name}, pseudo label", captions, _frames(session, side, options))


def over_training(folder: Path | str, show: str = "CAM") -> Movie:
    """The film of a run, see `train.film`. Raises ToCoError where the run has none."""
    film = read_film(folder)
    captions = tuple(f"step {step}" for step in film.steps)
    return Movie(
        f"{Path(folder).resolve().name}, {show}", captions, lambda i: film.picture(i, show=show), len(film.steps) - 1
    )


def run_folder(session: Session, side: int = 0) -> Path | None:
    """The folder of a side's model, where that is a run with a film."""
    folder = Path(session.subject(side).spec or session.sides[side].subject)
    return folder if has_film(folder) else None


def movies_of(session: Session, side: int = 0) -> dict[str, Callable[[], Movie]]:
    """What can be played of the image at hand: name -> movie."""
    found = {
        "over the blocks": lambda: over_blocks(session, side),
        "over PAR's iterations": lambda: over_par(session, side),
    }
    folder = run_folder(session, side)
    if folder is not None:
        found |= {f"over the training, {show}": lambda show=show: over_training(folder, show) for show in FILMED}
    return found


def _frames(session: Session, side: int, options: list[dict]) -> Callable[[int], np.ndarray]:
    """Draw what a session would show under other settings; the session stays, and may move on, meanwhile."""
    still = session.snapshot(side)

    def draw(i: int) -> np.ndarray:
        still.set(**options[i])
        view = still.view(0)
        if view.label is None and options[i]["show"] in (*LABELS, "CAM"):
            raise ToCoError("; ".join(view.notes) or "there is nothing to show")
        return view.picture

    return draw
