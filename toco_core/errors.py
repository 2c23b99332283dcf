"""The one error type that tells a user what to change."""

LONGEST = 2000  # characters of a message


class ToCoError(ValueError):
    """Wrong input. The message is one line: the thing, its value, and what is allowed.

    Line breaks become spaces, other characters that no terminal shows (lone surrogates of a name that is not UTF-8,
    control characters) their escapes. The middle of a message of more than `LONGEST` characters is left out.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message), LONGEST))


def printable(text: str, longest: int | None = None) -> str:
    """Return `text` in one line of characters that every terminal shows, at most `longest` of them."""
    if longest is not None and len(text) > longest:
        text = f"{text[: longest * 2 // 3]} ... {text[-(longest // 3 - 5) :]}"
    if text.isprintable():
        return text
    line = " ".join(text.split("\n")).strip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
