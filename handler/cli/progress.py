"""How far a long command is, on stderr: a bar with rate and time left on a terminal, else a line every few seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_INTERVAL_S = 5.0


class Reporter:
    """Called with (what is being done, documents done, documents in all or 0), as builds, compaction and verification do.

    The rate is that of the documents since this process began to see them: those of an interrupted run do not count.
    """

    def __init__(self, noun: str = "documents") -> None:
        self._noun = noun
        self._bar: Progress | None = None
        self._first: tuple[float, int] | None = None
        self._said_s = time.monotonic()

    def __enter__(self) -> Reporter:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<7}"),
                BarColumn(),
                TextColumn("{task.fields[said]}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._task = self._bar.add_task("", total=None, said="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        said = self._sentence(now_s, done, total)
        if self._bar is not None:
            self._bar.update(self._task, description=what, completed=done, total=total if done and total else None, said=said)
        elif now_s - self._said_s >= LINE_INTERVAL_S:
            self._said_s = now_s
            sys.stderr.write(f"tartan: {what} {said}\n")
            sys.stderr.flush()

    def _sentence(self, now_s: float, done: int, total: int) -> str:
        """12,000 of 300,000 documents, 1,234/s, 3m54s left"""
        if not done:
            return ""
        parts = [f"{done:,} of {total:,} {self._noun}" if total else f"{done:,} {self._noun}"]
        if self._first is None or done < self._first[1]:
            self._first = (now_s, done) if done else None
        elif done > self._first[1]:
            rate = (done - self._first[1]) / max(now_s - self._first[0], 1e-9)
            parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s")
            if total > done:
                parts.append(f"{duration((total - done) / rate)} left")
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """45s, 3m05s, 2h10m"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
