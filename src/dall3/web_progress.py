"""Status and remaining time of a running call, for the page."""

from __future__ import annotations

import time
from collections.abc import Generator
from typing import TypeVar

from dall3.errors import require
from dall3.estimate import Countdown, Pace, time_text
from dall3.generate import Previews, WithResult
from dall3.output import Preview
from dall3.parts import Parts
from dall3.request import Request
from dall3.web_uploads import Limits

PAUSE = 0.3  # seconds between two previews, at least
COST = 4  # pause after a preview, at least, as a multiple of the time that decoding and showing it took
Result = TypeVar("Result")
Steps = Generator[tuple[str, Preview | None], None, Result]  # the status, and a preview if there is one


def left_text(seconds: float) -> str:
    """The time left; below 10 minutes with one decimal place."""
    return (
        f"about {seconds / 60:.1f} min left" if 99.5 <= seconds < 600 else f"{time_text(max(round(seconds), 1))} left"
    )


def status_text(preview: Preview) -> str:
    texts = {"drawing": "drawing tokens", "ranking": "ranking the candidates", "refining": "refining"}
    count = f": {preview.step} of {preview.total}" if preview.total > 1 else ""
    left = preview.seconds_left
    return f"{texts[preview.stage]}{count}" + ("" if left is None else f", {left_text(left)}")


def follow(pace: Pace, steps: Previews[Result], limits: Limits, drawn: bool = False) -> Steps[Result]:
    """Run the steps of a call. Yields the status and a preview, None before the first step; returns the result.

    drawn: the candidates are drawn and ranked already. Raises ValueError if the call would take too long.
    """
    yield "measuring how long this takes", None
    seconds = pace.refining() + (0.0 if drawn else pace.drawing() + pace.ranking())
    allowed = time_text(limits.seconds).removeprefix("about ")
    require(
        seconds <= limits.seconds,
        f"this takes {time_text(seconds)}, and the page allows up to {allowed}; choose fewer "
        "candidates, images or denoising steps",
    )
    yield f"starting, {left_text(seconds)}", None
    previews, stage, shown_at, cost = WithResult(Countdown(pace).watch(steps)), "", 0.0, 0.0
    for preview in previews:
        now = time.perf_counter()
        if preview.stage != stage or now - shown_at >= max(PAUSE, COST * cost):
            yield status_text(preview), preview
            stage, shown_at = preview.stage, time.perf_counter()
            cost = shown_at - now
    return previews.result


def pace_of_wall(parts: Parts, request: Request) -> Pace:
    """The pace of a wall, whose images are not refined."""
    pace = Pace(parts, request)
    pace.stages, pace.upscaler = [], None
    return pace
