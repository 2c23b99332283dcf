"""Look a data set over: what is there, what is missing, what is broken, what lies in two splits."""

import sys

from toco_core.commands import command_parser
from toco_core.data.survey import how_to_get, inventory, survey, surveyed_splits
from toco_core.errors import ToCoError


def check_command(arguments: list[str]) -> int:
    """Run `toco check`: print the inventory and, unless told otherwise, decode everything; 0 where nothing is wrong."""
    parser = command_parser("check", __doc__)
    parser.add_argument("dataset", help="folder or file of a data set, or 'scenes'")
    parser.add_argument("--split", action="append", help="only these splits (may be repeated)")
    parser.add_argument("--names-only", action="store_true", help="decode nothing")
    chosen = parser.parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    try:
        found = inventory(chosen.dataset)
        print(found)
        if chosen.names_only:
            return int(bool(found.missing))
        seen = survey(surveyed_splits(chosen.dataset, chosen.split or ()))
    except ToCoError as error:
        print(f"{error}\n{how_to_get(chosen.dataset)}".strip())
        return 1
    print(seen)
    return int(bool(seen.unreadable or seen.leaks or seen.odd_masks))
