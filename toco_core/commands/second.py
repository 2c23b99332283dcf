"""Train a second network from a shell."""

from pathlib import Path

from toco_core.analysis import second_stage
from toco_core.analysis.second_stage import train_segmentation
from toco_core.commands import command_parser
from toco_core.config import override
from toco_core.config.fields import LARGEST
from toco_core.data import open_source
from toco_core.errors import ToCoError
from toco_core.machine.locks import alone
from toco_core.predict.models import open_model
from toco_core.runs.hub import SECOND, SECOND_LOSS, TRAINING, claim_new, refuse_other_files, write_pretrained

CARD = """

{backbone}, trained for {steps} steps by cross-entropy on the {n} label maps of `{labels}`, by toco_core.
Classes: {classes}. Only the decoder was trained: `--method seg`.
"""


def second_command(arguments: list[str]) -> int:
    """Run `toco second`."""
    parser = command_parser("second", second_stage.__doc__)
    parser.add_argument("run", help="folder of a run, or a shipped run (full): its backbone, sizes and rates are used")
    parser.add_argument("labels", help="folder with label maps in VOC layout")
    parser.add_argument("folder", help="folder to write, as `toco share` does")
    parser.add_argument("--split", default="train", help="list of the images to train on (train)")
    parser.add_argument("--steps", type=int, help="steps of training (default: the run's)")
    chosen = parser.parse_args(arguments)
    config = override(open_model(chosen.run).config, loss=SECOND_LOSS)
    if chosen.steps is not None and not 1 <= chosen.steps <= LARGEST:
        raise ToCoError(f"steps = {chosen.steps} is not allowed: at least 1, at most {LARGEST}")
    folder, steps = Path(chosen.folder), chosen.steps or config.schedule.steps
    refuse_other_files(folder)
    source = open_source(chosen.labels, chosen.split)
    with alone(folder, "trains"):
        claim_new(folder)
        model = train_segmentation(config, source, steps=steps, folder=folder / TRAINING)
        facts = {"backbone": config.model.backbone, "steps": steps, "n": len(source)}
        facts |= {"labels": Path(chosen.labels).name, "classes": ", ".join(source.class_names[1:])}
        card = SECOND + CARD.format(**facts)
        print(write_pretrained(folder, model.state_dict(), config, source.class_names, card))
    return 0
