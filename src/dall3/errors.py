"""Errors that several rooms raise. A message says what was wrong, what was expected and what to do."""


class FetchError(OSError):
    """Weights that are not here and could not be fetched."""


def require(holds: bool, message: str) -> None:
    """Raise ValueError with the message where a condition does not hold."""
    if not holds:
        raise ValueError(message)
