"""Ctrl-C and SIGTERM as a wish that the training loop grants after a whole step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """Within the block, notes SIGINT and SIGTERM in `number`; a second SIGINT interrupts at once, as usual.

    Outside the main thread, which alone may handle signals, it notes nothing.
    """

    def __init__(self) -> None:
        self.number = 0
        self._usual: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                self._usual[name] = signal.signal(name, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, usual in self._usual.items():
            signal.signal(name, usual if usual is not None else signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == self.number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number
