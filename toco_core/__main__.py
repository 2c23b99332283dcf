"""One command line: `toco ...`, `python -m toco_core ...` and `torchrun -m toco_core ...`.

toco notebooks <folder>    copies the notebooks
toco lab <folder>          opens JupyterLab on them
toco label <run> <photographs> <folder>
                           labels new photographs: VOC, COCO RLE, overlays
toco page <run> <photograph> <file>
                           writes one image under all settings as an HTML page
toco share <run> <folder>  writes a run's model with a model card, for the Hugging Face Hub
toco onnx <run> <file>     writes the model of a run as ONNX
toco <recipe> ...          trains: see `train.launch`
"""

import importlib
import sys

from .errors import ToCoError

COMMANDS = {  # name -> "module:function", which takes the arguments after the name and returns the exit status
    "notebooks": "toco_core.commands.notebooks:copy_command",
    "lab": "toco_core.commands.notebooks:lab_command",
    "label": "toco_core.predict.label:label_command",
    "page": "toco_core.predict.page:page_command",
    "share": "toco_core.runs.hub:share_command",
    "onnx": "toco_core.predict.portable:onnx_command",
}

STOPPED = 130  # the exit status of what Ctrl-C ended


def main(arguments: list[str] | None = None) -> int:
    """Run a command; every other first word is a recipe to train."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = COMMANDS.get(arguments[0] if arguments else "")
    module, _, function = (command or "toco_core.train.launch:main").partition(":")
    try:
        return getattr(importlib.import_module(module), function)(arguments if command is None else arguments[1:]) or 0
    except ToCoError as error:
        raise SystemExit(f"error: {error}") from error
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        return STOPPED


if __name__ == "__main__":
    raise SystemExit(main())
