"""Progress bars: on a terminal only, with the lines that are printed meanwhile above them."""

import contextlib
import os
import sys
import threading
from typing import Any

from tqdm import tqdm

from .terminal import WholeLines

USUAL_COLUMNS, USUAL_ROWS = 79, 24  # the last column stays free, where some terminals begin a new line
LARGE = 1_000_000  # totals from here on are shown as 1.00M


class ProgressBar(tqdm):
    """A bar of tqdm on stderr that disappears when it closes. Without a terminal it shows nothing.

    total: how many items there are; None if that isn't known yet. initial: how many are done already.
    rate: items per second, shown until the bar has measured it.
    hidden: whether this process shows nothing, such as all but the first of several.
    among_lines: whether lines are printed to stdout meanwhile, so that stdout must be a terminal, too: what goes
    through a pipe to the same terminal would otherwise come out amid the bar.
    options: of tqdm.
    """

    monitor_interval = 0  # no thread that redraws it: training forks processes
    _lock = threading.RLock()  # tqdm's own is a semaphore of the system, which a killed run would leave behind

    def __init__(
        self,
        total: int | None = None,
        initial: int = 0,
        rate: float | None = None,
        unit: str = "img",
        hidden: bool = False,
        among_lines: bool = False,
        **options: Any,
    ):
        disable = hidden or not takes_bars(sys.stderr) or (among_lines and not takes_bars(sys.stdout))
        options = {"unit_scale": (total or 0) >= LARGE, "mininterval": 0.2, **_size(sys.stderr), **options}
        self._rate = rate
        self._redirection = contextlib.ExitStack()
        # What is printed before tqdm has drawn anything goes its usual way.
        super().__init__(total=total, initial=initial, unit=unit, disable=disable, leave=False, **options)
        if not disable:
            for name in ("stdout", "stderr"):
                above = self._redirection.enter_context(contextlib.closing(_AboveBar(getattr(sys, name), self)))
                self._redirection.enter_context(getattr(contextlib, f"redirect_{name}")(above))

    def advance_to(self, number: int) -> None:
        """`number` items are done."""
        self.update(number - self.n)

    @property
    def format_dict(self) -> dict[str, Any]:
        """What tqdm puts into the bar."""
        values = dict(super().format_dict)
        return {**values, "rate": self._rate} if self.n == self.initial and self._rate else values

    def close(self) -> None:
        super().close()
        self._redirection.close()


class _AboveBar:
    """A stream whose whole lines are written while the bar is away from the screen."""

    def __init__(self, stream: Any, bar: ProgressBar):
        self._stream, self._bar, self._lines = stream, bar, WholeLines()

    def write(self, text: str) -> int:
        lines = self._lines.add(text)
        if lines:
            self._bar.clear()
            self._stream.write(lines)
            self._stream.flush()
            self._bar.refresh()
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Writes what doesn't end in a newline. The stream itself stays open."""
        self._stream.write(self._lines.rest)
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _size(stream: Any) -> dict[str, Any]:
    """The options of tqdm for the terminal's size, which some, such as serial consoles, don't tell."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        if min(os.get_terminal_size(stream.fileno())) > 0:
            return {"dynamic_ncols": True}  # it may change
    return {"ncols": USUAL_COLUMNS, "nrows": USUAL_ROWS}


def takes_bars(stream: Any) -> bool:
    """Whether a stream is a terminal on which a line can be overwritten."""
    try:
        return os.environ.get("TERM") != "dumb" and stream.isatty()
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False
