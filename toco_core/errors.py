"""The one error type that tells a user what to change."""

from collections.abc import Iterable

MOST = 2000  # characters of a message; values that are longer are cut in the middle


class ToCoError(ValueError):
    """Wrong input. The message is one line: the thing, its value, and what is allowed.

    Names and values from files may hold anything. What would not print (line breaks, control characters of a terminal,
    bytes that are no text) is shown as its escape, and a message of more than `MOST` characters loses its middle.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


class BrokenFile(ToCoError):
    """A file of the data that cannot be used: the same call fails again until it is mended."""


def one_line(text: str) -> str:
    """Show what would not print as its escape, and cut a text of more than `MOST` characters in the middle."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= MOST else f"{text[: MOST - 500]} [...] {text[-490:]}"


def refuse_other(allowed: Iterable[str], **given: object) -> None:
    """Raise ToCoError for the first value that is none of the allowed ones."""
    for name, value in given.items():
        if value not in allowed:
            raise ToCoError(f"{name} = {value!r} is not allowed: one of {', '.join(allowed)}")


def in_a_line(error: Exception) -> str:
    """Tell of an error where no traceback is shown: ours as it is, another with its kind."""
    return str(error) if isinstance(error, ToCoError) else f"{type(error).__name__}: {error}"
