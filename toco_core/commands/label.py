"""Label photographs from a shell."""

from toco_core.commands import command_parser
from toco_core.commands.export import add_label_options, refuse_without_images
from toco_core.errors import ToCoError
from toco_core.predict import label
from toco_core.predict.corrections import write_for_annotation
from toco_core.predict.label import TAGS, label_photographs


def label_command(arguments: list[str]) -> int:
    """Run `toco label`."""
    parser = command_parser("label", label.__doc__)
    parser.add_argument(
        "run",
        help="folder of a run, of `toco share` or `toco second`, a shipped run (full), or a checkpoint of the release",
    )
    parser.add_argument("photographs", help="a folder of photographs, a list of tags (tags.csv), or one photograph")
    parser.add_argument("folder", help="new folder, or one of an earlier call")
    add_label_options(parser)
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability above which the classifier names a class (0.5)"
    )
    parser.add_argument("--tags", default="auto", choices=TAGS, help="; ".join(f"{k}: {v}" for k, v in TAGS.items()))
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="write no overlays")
    chosen = vars(parser.parse_args(arguments))
    form = chosen.pop("format")
    refuse_without_images(form, chosen["images"])
    made = label_photographs(chosen.pop("run"), chosen.pop("photographs"), chosen.pop("folder"), **chosen)
    print(f"{made.folder}: {made.n_photographs} photographs with labels, {made.n_new} of them new")
    print(", ".join(f"{name} {n}" for name, n in made.images_per_class.items()))
    if made.skipped:
        print(f"{len(made.skipped)} skipped, see {made.folder / 'skipped.txt'}:")
        for file, reason in list(made.skipped.items())[:5]:
            print(f"  {ToCoError(reason if reason.startswith(file) else f'{file}: {reason}')}")
    if form != "voc":
        print(write_for_annotation(made.folder, form))
    return 0
