"""SIGTERM and SIGINT during training: the step is finished and saved before the process ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interruption:
    """The signal that came, if any."""

    signum: int | None = None

    def __bool__(self) -> bool:
        return self.signum is not None

    def stop(self, message: str) -> None:
        """End as the signal would have: KeyboardInterrupt for SIGINT, exit status 143 for SIGTERM."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + int(self.signum or signal.SIGTERM))


@contextmanager
def caught() -> Iterator[Interruption]:
    """Note the first SIGTERM or SIGINT instead of dying of it; a second one acts at once.

    Outside the main thread Python allows no signal handlers, and signals act as they would without this.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    # getsignal gives None for a handler that Python did not install and cannot put back.
    handlers = {signum: signal.getsignal(signum) or signal.SIG_DFL for signum in (signal.SIGTERM, signal.SIGINT)}
    # What is ignored stays so: a shell starts jobs in the background without SIGINT.
    before = {signum: handler for signum, handler in handlers.items() if handler != signal.SIG_IGN}

    def note(signum: int, frame: FrameType | None) -> None:
        interruption.signum = signum
        for number, handler in before.items():
            signal.signal(number, handler)

    for signum in before:
        signal.signal(signum, note)
    try:
        yield interruption
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
