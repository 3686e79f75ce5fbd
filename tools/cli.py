"""What every tool shares: one-line errors and exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pipeline import streams
from pipeline.errors import IO_FAILED, USAGE, BadSample, ExpressError, StorageError, leave
from train import environment


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and whose help begins with what to paste."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Help)
        super().__init__(allow_abbrev=False, **options)

    def format_help(self) -> str:
        usage, _, rest = super().format_help().partition("\n\n")
        if not self.description:
            return f"{usage}\n\n{rest}"
        description, options = rest[: len(self.description)], rest[len(self.description) :]
        return f"{description.strip()}\n\n{usage}\n\n{options.strip()}\n"

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"error: {message} (see {self.prog} --help)\n")


def new_file(name: str) -> Path:
    """The type of an option that names a file to write: a name that cannot be one is rejected before any work."""
    path = Path(os.path.realpath(name)) if os.path.islink(name) else Path(name)
    if path.exists() and not path.is_file():  # publishing it would put a file in the place of /dev/stdout
        raise argparse.ArgumentTypeError(f"{name} is a folder, a device or a pipe; name a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def add_files(p: argparse.ArgumentParser, **helps: str) -> None:
    """Options that name files to write."""
    for name, text in helps.items():
        p.add_argument(f"--{name}", type=new_file, metavar="FILE", help=text)


def printable(name: str) -> str:
    """A file's name on one line, without what would steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in name)


def add_model_options(p: argparse.ArgumentParser) -> None:
    """How a MODEL is meant, of every tool that takes one."""
    p.add_argument("--checkpoint", choices=("best", "latest"), default="best", help="of a run (%(default)s)")
    p.add_argument("--raw", action="store_true", help="the weights themselves, even if their average was kept")
    p.add_argument("--preset", default="", metavar="NAME", help="what weights without a model card are of")


def open_model(path: Path, args: argparse.Namespace) -> Any:
    """The Classifier that a MODEL is, as the options of `add_model_options` and --data.shards ask for it."""
    from train.classifier import open_classifier

    return open_classifier(
        path, preset=args.preset, which=args.checkpoint, averaged=not args.raw, shards=str(args.shards)
    )


def run(main: Callable[[], None], *, ranks: bool = False) -> NoReturn:
    """Runs a tool: an error of the user's is one line and its exit code.

    ranks: whether launchers may start several processes of it. Local rank 0 reports what all of them find wrong.
    """
    streams.prepare(outlive_readers=False)
    try:
        try:
            if ranks:
                environment.check_launch()
            main()
        finally:
            sys.stdout.flush()
    except ExpressError as err:
        if ranks and environment.launched("LOCAL_RANK") and not isinstance(err, BadSample | StorageError):
            time.sleep(1)  # launchers end all ranks after the first: perhaps before local rank 0 has printed it
        else:
            print(f"error: {printable(str(err))}", file=sys.stderr)
        sys.exit(err.code)
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as err:
        print(f"error: {os.fsdecode(err.filename or 'storage')}: {err.strerror or err}", file=sys.stderr)
        sys.exit(IO_FAILED)
    except KeyboardInterrupt:
        streams.clear_line()
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    leave(0)
