"""The command line of every tool: one-line errors and exit codes."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pipeline import streams
from pipeline.errors import USAGE, BadSample, ExpressError, StorageError, leave
from train import environment


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and whose help begins with a command to paste."""

    def __init__(self, description: str = "", **options: Any) -> None:
        wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34)
        super().__init__(formatter_class=wide, allow_abbrev=False, **options)
        self.about = description

    def option(self, name: str, default: Any, help: str, **more: Any) -> None:
        """An option of the default's type."""
        self.add_argument(f"--{name}", type=type(default), default=default, help=help, **more)

    def flag(self, name: str, help: str) -> None:
        self.add_argument(f"--{name}", action="store_true", help=help)

    def path(self, name: str, metavar: str, help: str, **more: Any) -> None:
        """Adds an option or argument that names an existing path."""
        self.add_argument(name, type=Path, metavar=metavar, help=help, **more)

    def files(self, **helps: str) -> None:
        """Options that name files to write."""
        for name, text in helps.items():
            self.add_argument(f"--{name}", type=new_file, metavar="FILE", help=text)

    def model_options(self) -> None:
        """Adds the options of every tool with a MODEL argument."""
        self.add_argument("--data.allow-http", dest="allow_http", action="store_true", help="shards also at http://")
        self.option("checkpoint", "best", "of a run (%(default)s)", choices=("best", "latest"))
        self.flag("raw", "the weights themselves, even if their average was kept")
        self.option("preset", "", "what weights without a model card are of", metavar="NAME")

    def workers(self) -> None:
        self.option("workers", 0, "processes (default: a core each)", metavar="N")

    def format_help(self) -> str:
        return f"{self.about.strip()}\n\n{super().format_help()}".lstrip()

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message} (see {self.prog} --help)\n")


def new_file(name: str) -> Path:
    """The type of an option that names a file to write: a name that cannot be one is rejected before any work."""
    path = Path(os.path.realpath(name)) if os.path.islink(name) else Path(name)
    if path.exists() and not path.is_file():  # publishing it would put a file in the place of /dev/stdout
        raise argparse.ArgumentTypeError(f"{name} is a folder, a device or a pipe; name a file")
    if not os.access(f"{path.parent}/", os.W_OK):
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} that you may write to")
    return path


def printable(name: str) -> str:
    """Returns a file's name on one line, without terminal control characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def open_model(path: Path, args: argparse.Namespace) -> Any:
    """Opens a MODEL as a Classifier, with the options of `Parser.model_options` and --data.shards."""
    from train.classifier import open_classifier

    return open_classifier(path, preset=args.preset, which=args.checkpoint, averaged=not args.raw, shards=args.shards)


def run(main: Callable[[], None], *, ranks: bool = False) -> NoReturn:
    """Runs a tool: a user's error becomes one line and an exit code.

    ranks: whether launchers may start it as several processes. Errors that all have are reported by local rank 0.
    """
    streams.prepare(outlive_readers=False)
    try:
        try:
            if ranks:
                environment.check_launch()
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ExpressError, OSError) as err:
        known = StorageError.of(err, "storage")
        if ranks and environment.launched("LOCAL_RANK") and not isinstance(known, BadSample | StorageError):
            time.sleep(1)  # launchers end all ranks after the first: perhaps before local rank 0 has printed it
        else:
            print(f"error: {printable(str(known))}", file=sys.stderr)
        sys.exit(known.code)
    except KeyboardInterrupt:
        streams.clear_line()
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    leave(0)
