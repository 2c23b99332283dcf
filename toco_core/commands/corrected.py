"""Read corrected label maps back in from a shell."""

from toco_core.commands import command_parser
from toco_core.predict import corrections
from toco_core.predict.corrections import write_corrected
from toco_core.predict.export import IMAGES


def corrected_command(arguments: list[str]) -> int:
    """Run `toco corrected`."""
    parser = command_parser("corrected", corrections.__doc__)
    parser.add_argument("labels", help="folder that `toco export` or `toco label` wrote")
    parser.add_argument(
        "exported", help="Label Studio's export as JSON; CVAT's as Segmentation mask 1.1 (.zip or folder)"
    )
    parser.add_argument("folder", help="new folder: a data set in VOC layout")
    parser.add_argument("--split", help="list of the labels (default: the one that was exported)")
    parser.add_argument("--images", default="copy", choices=IMAGES, help="the images beside the labels (default copy)")
    chosen = parser.parse_args(arguments)
    found = write_corrected(chosen.labels, chosen.exported, chosen.folder, split=chosen.split, images=chosen.images)
    print(f"{found.folder}: {found.n_images} label maps, {len(found.corrected)} of them corrected")
    return 0
