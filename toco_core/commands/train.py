"""Train a recipe with some fields changed.

    toco train tiny layer=9 steps=100
    torchrun --nproc-per-node 4 -m toco_core train voc dataset=VOCdevkit/VOC2012 seed=1

The run's folder is printed at the end; the same call goes on where it was interrupted. Where `steps` is named, the
first steps of the terms keep their share of the schedule. With `torchrun`, `batch_size` is that of all processes.
"""

import contextlib
import sys

from toco_core.commands import command_parser
from toco_core.commands.fields import field_help
from toco_core.config import RECIPES, TrainConfig, changed_batch, configured
from toco_core.config.parameters import named_values
from toco_core.data import TrainVal, open_data
from toco_core.errors import BrokenFile, ToCoError
from toco_core.machine import distributed
from toco_core.runs.folder import Run
from toco_core.train.budget import step_memory
from toco_core.train.loop import train


def train_command(arguments: list[str]) -> int:
    """Run `toco train`; with `torchrun`, as one of its processes."""
    if arguments and not arguments[0].startswith("-"):
        recipe_named(arguments[0])  # before `--help`: what follows an unknown word is no help about it
    shown = next((RECIPES[word] for word in arguments if word in RECIPES), TrainConfig)
    epilog = field_help(shown()) if {"-h", "--help"} & {*arguments} else ""
    parser = command_parser("train", __doc__, epilog=epilog, allow_abbrev=False)
    parser.add_argument("recipe", metavar=f"{{{','.join(sorted(RECIPES))}}}")
    parser.add_argument(
        "fields", nargs="*", default=[], metavar="NAME=VALUE", help="fields of the config that differ: see below"
    )
    parser.add_argument("--save-every", type=int, default=0, metavar="STEPS", help="checkpoints between validations")
    parser.add_argument("--keep-every", type=int, default=0, metavar="STEPS", help="checkpoints that stay")
    parser.add_argument("--skip-nonfinite", type=int, default=0, metavar="N", help="steps that may be left out")
    parser.add_argument("--film", type=int, default=0, metavar="STEPS", help="frames of the training's film between")
    parser.add_argument("--changed-data", action="store_true", help="go on although images or labels have changed")
    parser.add_argument("--leave-out-broken", action="store_true", help="train without the files that cannot be used")
    chosen, unknown = parser.parse_known_intermixed_args(arguments)
    options = vars(chosen)
    if unknown:
        raise ToCoError(f"{unknown[0]} is not allowed: fields are given as NAME=VALUE, for instance layer=9")
    recipe = recipe_named(options.pop("recipe"))
    config = configured(recipe, **named_values(options.pop("fields")))
    broken = "leave out" if options.pop("leave_out_broken") else "stop"
    with distributed.joined(config.device) as share:
        data = open_data(config.data, broken=broken)
        if share.first and not Run.of(config).finished:
            say_before(config, recipe, data, share.n)
        trained = train(config, data=data, **options)
        if share.first:
            print(trained.run.folder)
    return 0


def recipe_named(word: str) -> TrainConfig:
    """The recipe of a name. Raises ToCoError for what is none; the first word of `toco` may be meant for a command."""
    if word not in RECIPES:
        known = f"one of {', '.join(sorted(RECIPES))} comes first, for instance `toco train tiny layer=9`"
        raise ToCoError(f"{word!r:.90} is not a recipe: {known}; `toco --help` lists the other commands")
    return RECIPES[word]()


def say_before(config: TrainConfig, recipe: TrainConfig, data: TrainVal, processes: int) -> None:
    """What one would like to know before hours of training: memory, and a batch that is not the recipe's."""
    with contextlib.suppress(BrokenFile):  # training tells of all of them, and of what to do
        print(step_memory(config, data, processes=processes))
    if changed := changed_batch(config, recipe):
        print(changed)
    sys.stdout.flush()
