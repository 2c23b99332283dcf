"""The one error type that tells a user what to change."""


class ToCoError(ValueError):
    """Wrong input. The message is one line: the thing, its value, and what is allowed."""
