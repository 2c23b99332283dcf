"""Write a page from a shell."""

from pathlib import Path

from toco_core.commands import command_parser
from toco_core.data import read_image
from toco_core.machine.precision import passes_of
from toco_core.predict import page
from toco_core.predict.image import ImagePredictor
from toco_core.predict.models import open_model
from toco_core.predict.page import write_page


def page_command(arguments: list[str]) -> int:
    """Run `toco page`."""
    parser = command_parser("page", page.__doc__)
    parser.add_argument(
        "run", help="folder of a run or of `toco share`, a shipped run (full), or a checkpoint of the release"
    )
    parser.add_argument("photograph", help="a picture")
    parser.add_argument("file", help="the page, .html")
    chosen = parser.parse_args(arguments)
    opened, image = open_model(chosen.run), read_image(Path(chosen.photograph))
    predictor = ImagePredictor(opened.model, opened.config, passes=passes_of(opened.model, opened.config))
    predictor.set_image(image)
    title = Path(chosen.photograph).name
    print(write_page(predictor, chosen.file, title=title, class_names=opened.class_names, model=opened.name))
    return 0
