"""Write ONNX from a shell."""

from toco_core.commands import command_parser
from toco_core.predict import portable
from toco_core.predict.portable import write_onnx
from toco_core.runs.opened import open_run


def onnx_command(arguments: list[str]) -> int:
    """Run `toco onnx`."""
    parser = command_parser("onnx", portable.__doc__)
    parser.add_argument("run", help="folder of a run, or a shipped run (full)")
    parser.add_argument("file", help="the ONNX file to write")
    chosen = parser.parse_args(arguments)
    print(write_onnx(open_run(chosen.run, device="cpu").model, chosen.file))
    return 0
