"""An explorer that looks into one image at a time: set the image once, then every question is answered at once.

`Session` is the explorer without a browser, `Explorer` the same with controls, for JupyterLab and voila.
"""

from toco_core.widgets.background import Background
from toco_core.widgets.expectations import Expectations, measure_expectations
from toco_core.widgets.explorer import Explorer
from toco_core.widgets.gallery import Gallery
from toco_core.widgets.laboratory import Laboratory
from toco_core.widgets.pictures import Pictures, open_pictures
from toco_core.widgets.player import Player
from toco_core.widgets.session import Session
from toco_core.widgets.settings import Settings
from toco_core.widgets.subjects import Subject, Subjects, finished_runs, of_run, open_subject

__all__ = [
    "Background",
    "Expectations",
    "Explorer",
    "Gallery",
    "Laboratory",
    "Pictures",
    "Player",
    "Session",
    "Settings",
    "Subject",
    "Subjects",
    "finished_runs",
    "measure_expectations",
    "of_run",
    "open_pictures",
    "open_subject",
]
