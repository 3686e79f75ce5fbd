"""What every tool shares: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import IO_FAILED, USAGE, ExpressError


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message} (see {self.prog} --help)\n")


def run(main: Callable[[], None]) -> NoReturn:
    """Runs a tool: an error of the user's is one line and its exit code."""
    try:
        main()
    except ExpressError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(err.code)
    except OSError as err:
        print(f"error: {err.filename or 'storage'}: {err.strerror or err}", file=sys.stderr)
        sys.exit(IO_FAILED)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)
