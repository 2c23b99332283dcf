"""Score a run: mIoU and IoU per class in percent, thresholds chosen on val. What was scored is kept beside the run.

    toco evaluate runs/<run> --out scores.json

notebooks/evaluate.ipynb has more: several scales, the dense CRF, which class is taken for which, the worst images.
"""

import math

from toco_core.commands import command_parser
from toco_core.errors import ToCoError
from toco_core.evaluation.scores import SCORED, RunScores, reported_part, score_run
from toco_core.machine.writing import write_file
from toco_core.runs.folder import as_json
from toco_core.runs.opened import open_run
from toco_core.runs.shipped import shipped_runs
from toco_core.viz import KIND_NAMES


def evaluate_command(arguments: list[str]) -> int:
    """Run `toco evaluate`."""
    parser = command_parser("evaluate", __doc__)
    parser.add_argument("run", help="folder of a run, or a shipped run (full)")
    parser.add_argument("--out", metavar="FILE", help="also write all numbers to this file, JSON")
    chosen = parser.parse_args(arguments)
    shipped = shipped_runs().get(chosen.run)
    opened = open_run(shipped.folder if shipped else chosen.run)
    part, source = reported_part(opened.data)
    if not source.n_masks:
        raise ToCoError(
            f"{opened.config.data.dataset}: none of the {len(source)} images of {part} has a mask to score by"
        )
    scores, class_names = score_run(opened), source.class_names
    print(scores_table(scores, class_names))
    if chosen.out:
        write_file(chosen.out, as_json(scores._asdict() | {"classes": class_names}))
    return 0


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
