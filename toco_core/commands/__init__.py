"""The one command line, a module per command."""

import argparse


def command_parser(name: str, text: str | None, **options) -> argparse.ArgumentParser:
    """Make the parser of `toco <name>`, whose help shows a text as it stands."""
    form = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=f"toco {name}", description=text, formatter_class=form, **options)
