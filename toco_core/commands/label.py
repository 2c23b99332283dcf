"""Label photographs from a shell."""

import argparse

from toco_core.errors import ToCoError
from toco_core.predict import label
from toco_core.predict.export import IMAGES, METHODS
from toco_core.predict.label import TAGS, label_photographs


def label_command(arguments: list[str]) -> int:
    """Run `toco label`."""
    parser = argparse.ArgumentParser(
        prog="toco label", description=label.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="folder of a run, a shipped run (full), or a checkpoint of the release")
    parser.add_argument("photographs", help="a folder of photographs, a list of tags (tags.csv), or one photograph")
    parser.add_argument("folder", help="new folder, or one of an earlier call")
    methods = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    parser.add_argument("--method", default="par", choices=METHODS, help=f"{methods} (default par)")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="probability above which the classifier names a class (0.5)"
    )
    parser.add_argument("--tags", default="auto", choices=TAGS, help="; ".join(f"{k}: {v}" for k, v in TAGS.items()))
    for name, of in (("beta", "cam"), ("beta-l", "par and crf"), ("beta-h", "par and crf")):
        parser.add_argument(f"--{name}", type=float, help=f"threshold of {of} (default: the run's)")
    parser.add_argument("--images", default="copy", choices=IMAGES, help="the photographs beside the labels (copy)")
    parser.add_argument("--no-overlays", dest="overlays", action="store_false", help="write no overlays")
    chosen = vars(parser.parse_args(arguments))
    made = label_photographs(chosen.pop("run"), chosen.pop("photographs"), chosen.pop("folder"), **chosen)
    print(f"{made.folder}: {made.n_photographs} photographs with labels, {made.n_new} of them new")
    print(", ".join(f"{name} {n}" for name, n in made.images_per_class.items()))
    if made.skipped:
        print(f"{len(made.skipped)} skipped, see {made.folder / 'skipped.txt'}:")
        for file, reason in list(made.skipped.items())[:5]:
            print(f"  {ToCoError(reason if reason.startswith(file) else f'{file}: {reason}')}")
    return 0
