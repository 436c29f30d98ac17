"""SIGTERM as Ctrl-C, for the time of a job. Needs no torch."""

import contextlib
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt in a block, in place of an end without a message.

    A handler that is not the default one stays. Only the main thread may set handlers.

    >>> with contextlib.suppress(KeyboardInterrupt), sigterm_as_interrupt():
    ...     signal.raise_signal(signal.SIGTERM)
    ...     print("never printed")
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
