"""Exceptions and checks that all modules share.

Every error message says what is wrong, what was expected, and what to do.
"""


class FetchError(OSError):
    """Weights are not on this machine and could not be downloaded."""


def require(holds: bool, message: str) -> None:
    """Raise ValueError with `message` if the condition `holds` is False."""
    if not holds:
        raise ValueError(message)
