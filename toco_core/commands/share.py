"""Share a run from a shell."""

from toco_core.commands import command_parser
from toco_core.runs import hub
from toco_core.runs.hub import push_to_hub, save_pretrained


def share_command(arguments: list[str]) -> int:
    """Run `toco share`."""
    parser = command_parser("share", hub.__doc__)
    parser.add_argument("run", help="folder of a finished run, or a shipped run (full)")
    parser.add_argument("folder", help="folder to write")
    parser.add_argument("--push", metavar="NAME/MODEL", help="also upload it to this repository of the Hub")
    parser.add_argument("--private", action="store_true", help="where the repository is made: only for you")
    chosen = parser.parse_args(arguments)
    print(save_pretrained(chosen.run, chosen.folder))
    if chosen.push:
        print(push_to_hub(chosen.run, chosen.push, private=chosen.private))
    return 0
