"""One command line: `toco ...`, `python -m toco_core ...` and `torchrun -m toco_core ...`."""

import importlib
import io
import os
import sys

from .errors import ToCoError

COMMANDS = {  # name -> "module:function" in toco_core, and what it does
    "train": ("commands.train:train_command", "train a recipe; `toco train --help` lists every field of a config"),
    "evaluate": ("commands.evaluate:evaluate_command", "score a run, class by class"),
    "check": ("commands.check:check_command", "look a data set over: what is there, missing, broken, in two splits"),
    "export": ("commands.export:export_command", "write the pseudo labels of a run: VOC layout, COCO RLE"),
    "label": ("commands.label:label_command", "label new photographs: VOC, COCO RLE, overlays"),
    "corrected": (
        "commands.corrected:corrected_command",
        "read label maps back in that were corrected in Label Studio or CVAT",
    ),
    "page": ("commands.page:page_command", "write one image under all settings as an HTML page"),
    "film": ("commands.film:film_command", "write the film of a run (train with --film 20) as GIF or MP4"),
    "second": ("commands.second:second_command", "train a second network on label maps, edited or not"),
    "share": ("commands.share:share_command", "write a run's model with a model card, for the Hugging Face Hub"),
    "onnx": ("commands.onnx:onnx_command", "write the model of a run as ONNX"),
    "notebooks": ("commands.notebooks:copy_command", "copy the notebooks"),
    "lab": ("commands.notebooks:lab_command", "open JupyterLab on them"),
}

STOPPED = 130  # the exit status of what Ctrl-C ended
UNREAD = 141  # and of what was told to a pipe that nobody reads any more, as before `| head`


def main(arguments: list[str] | None = None) -> int:
    """Run a command; every other first word is a recipe to train."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a folder's name may be no text, or none of this terminal
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print("\n".join([__doc__, *(f"  toco {command:10} {said}" for command, (_, said) in COMMANDS.items())]))
        print("\n`toco <command> --help` says more; `toco tiny layer=9` is short for `toco train tiny layer=9`.")
        return 0
    if name not in COMMANDS:
        name, rest = "train", [name, *rest]
    module, function = COMMANDS[name][0].split(":")
    try:
        status = getattr(importlib.import_module(f"toco_core.{module}"), function)(rest)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at the end
        return UNREAD
    except ToCoError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    raise SystemExit(main())
