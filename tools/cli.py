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


def add_model_options(p: argparse.ArgumentParser) -> None:
    """How a MODEL is meant, of every tool that takes one."""
    p.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="of a run (%(default)s)")
    p.add_argument("--raw", action="store_true", help="the weights themselves, also where their average was kept")
    p.add_argument("--preset", default="", metavar="NAME", help="what weights without a model card are of")


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
