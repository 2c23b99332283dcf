"""Write the pseudo labels of a run."""

import argparse

from toco_core.commands import command_parser
from toco_core.conventions import IGNORED
from toco_core.data import Split
from toco_core.data.source import open_beside
from toco_core.data.split import joined
from toco_core.errors import ToCoError
from toco_core.predict.corrections import FORMATS, write_for_annotation
from toco_core.predict.export import IMAGES, METHODS, export, voc_archive
from toco_core.runs.opened import Opened, open_run

ALL = "all"  # the split of all images of a run


def export_command(arguments: list[str]) -> int:
    """Run `toco export`."""
    parser = command_parser("export", __doc__)
    parser.add_argument("run", help="folder of a run, or a shipped run (full)")
    parser.add_argument("folder", help="new folder, or one whose export was interrupted")
    parser.add_argument(
        "--split",
        default="train",
        help="split of the run's data set (default train); all: what it trains and what it validates on, with a list "
        "each",
    )
    add_label_options(parser)
    parser.add_argument("--archive", help="also write the archive for VOC's evaluation server to this file")
    chosen = parser.parse_args(arguments)
    refuse_without_images(chosen.format, chosen.images)
    try:
        opened = open_run(chosen.run)
        parts = {}
        if chosen.split == ALL:
            parts = {name: getattr(opened.data, name) for name in ("train", "val")}
            source = joined(list(parts.values()), ALL)
        else:
            source = split_of_run(opened, chosen.split)
        found = export(
            opened.model, source, chosen.folder, opened.config,
            method=chosen.method, beta=chosen.beta, beta_l=chosen.beta_l, beta_h=chosen.beta_h, images=chosen.images,
            split=chosen.split, parts={name: part.names for name, part in parts.items()},
        )  # fmt: skip
        print(f"{found.folder}: {found.n_images} label maps, {found.n_new} of them new")
        shares = [*found.pixels.items(), (IGNORED, found.ignored)]
        print(", ".join(f"{name} {100 * share:.1f} %" for name, share in shares))
        if chosen.format != "voc":
            print(write_for_annotation(found.folder, chosen.format, split=chosen.split))
        if chosen.archive:
            voc_archive(found.folder, chosen.archive, split=chosen.split)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt("stopped; the same call goes on from here") from stop
    return 0


def add_label_options(parser: argparse.ArgumentParser) -> None:
    """Add what `toco export` and `toco label` have in common: how labels are made, where their images go, for whom."""
    methods = "; ".join(f"{name}: {what}" for name, what in METHODS.items())
    default = "par; seg for a second network, whose classifiers were not trained"
    parser.add_argument("--method", choices=METHODS, help=f"{methods} (default {default})")
    for name, of in (
        ("beta", "cam and vote"),
        ("beta-l", "par and crf, below it background"),
        ("beta-h", "par and crf"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"threshold of {of} (default: the config's)")
    parser.add_argument("--images", default="copy", choices=IMAGES, help="the images beside the labels (default copy)")
    parser.add_argument(
        "--format",
        default="voc",
        choices=["voc", *FORMATS],
        help="; ".join(f"{k}: also {v}, to be corrected (see toco corrected)" for k, v in FORMATS.items()),
    )


def refuse_without_images(form: str, images: str) -> None:
    """Raise ToCoError where label maps are written for a tool, which shows them on their images, without these."""
    if form != "voc" and images == "none":
        raise ToCoError(f"images = 'none' is not allowed with format = {form!r}: the tool wants them, copy or link")


def split_of_run(opened: Opened, split: str) -> Split:
    """A split of the data set of a run; "train" and "val" are exactly the images that it trains and validates on."""
    config, data = opened.config.data, opened.data
    known = {config.train_split: data.train, config.val_split: data.val}
    return known[split] if split in known else open_beside(data.train, split)
