"""What forked worker processes owe their parent."""

from __future__ import annotations

import os
import signal
import threading
import time


def follow_the_parent() -> None:
    """A worker leaves Ctrl-C to the parent, and ends when the parent was killed: its queue alone would not tell it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
