"""Numbers as text, for messages and logs."""

from __future__ import annotations


def size_text(size: float) -> str:
    """A size in bytes with a unit and three significant digits: "17 kB", "45.3 MB", "8.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:  # above, three digits round to 1000
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def counted(number: int, noun: str) -> str:
    """A number with a noun, in the plural if needed: "1 image", "2,000 images"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
