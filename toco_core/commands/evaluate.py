"""Score a run: mIoU and IoU per class in percent, thresholds chosen on val. What was scored is kept beside the run.

    toco evaluate runs/<run> --out scores.json
    toco evaluate my_second --data photos/tags.csv     # of `toco second` or `toco share`; nothing is kept

notebooks/evaluate.ipynb has more: several scales, the dense CRF, which class is taken for which, the worst images.
"""

import math

from toco_core.commands import command_parser
from toco_core.config import override
from toco_core.data import open_data
from toco_core.errors import ToCoError
from toco_core.evaluation.scores import SCORED, RunScores, score_model, score_run
from toco_core.machine.writing import write_file
from toco_core.predict.models import NamedModel, open_model
from toco_core.runs.folder import as_json
from toco_core.runs.opened import open_run
from toco_core.viz import KIND_NAMES


def evaluate_command(arguments: list[str]) -> int:
    """Run `toco evaluate`."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("run", help="folder of a run, or a shipped run (full); with --data any that `toco label` takes")
    parser.add_argument(
        "--data", metavar="DATASET", help="score on this data set of the same classes, and keep nothing"
    )
    parser.add_argument("--out", metavar="FILE", help="also write all numbers to this file, JSON")
    chosen = parser.parse_args(arguments)
    if chosen.data:
        named = open_model(chosen.run)
        scores, class_names = scored_on(named, chosen.data), named.class_names
    else:
        opened = open_run(chosen.run)
        scores, class_names = score_run(opened), opened.data.train.class_names
    print(scores_table(scores, class_names))
    if chosen.out:
        write_file(chosen.out, as_json(scores._asdict() | {"classes": class_names}))
    return 0


def scored_on(named: NamedModel, dataset: str) -> RunScores:
    """Score a model on a data set, with the lists and sizes of its config. Raises ToCoError for other classes."""
    config = override(named.config, dataset=dataset)
    data = open_data(config.data)
    if data.train.class_names != named.class_names:
        raise ToCoError(
            f"{named.name} knows the classes {', '.join(named.class_names[1:])}, but {dataset} has "
            f"{', '.join(data.train.class_names[1:])}: the same ones in the same order are required"
        )
    return score_model(named.model, config, data)


def scores_table(scores: RunScores, class_names: tuple[str, ...]) -> str:
    """Lines of text: the protocol, the mean, every class; a dash for a class that is not there. A last one, where the
    mean is of the background alone."""
    heads = [KIND_NAMES[kind] for kind in SCORED]
    rows = {"mIoU": [scores.miou[kind] for kind in SCORED]}
    rows |= {name: [scores.iou[kind][c] for kind in SCORED] for c, name in enumerate(class_names)}
    first = max(map(len, rows))
    lines = [scores.protocol, " " * first + "".join(f"  {head}" for head in heads)]
    for name, values in rows.items():
        cells = ("-" if math.isnan(value) else f"{value:.1f}" for value in values)
        lines.append(name.ljust(first) + "".join(f"  {c:>{len(h)}}" for c, h in zip(cells, heads, strict=True)))
    if scores.of_background_alone:
        lines.append(f"no mask of {scores.part} shows a class, each mIoU is the background's IoU: see `toco check`")
    return "\n".join(lines)
