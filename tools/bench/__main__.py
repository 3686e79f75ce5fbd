"""Benchmarks of imagenet-express beside its peers.

    python tools/bench loader --images imagenet-sample.tar
    python tools/bench loader --explain SHARDS
    python tools/bench shards --images imagenet-sample.tar
    python tools/bench train
    python tools/bench saves
    python tools/bench feed --images imagenet-sample.tar
    python tools/bench order
    python tools/bench accuracy --images cifar10.tar.xz
    python tools/bench fig1 --images cifar10.tar.xz

Each prints a table. With --json FILE it writes every single measurement with hardware, versions and command; after each
round it writes the file again, so an interrupted benchmark leaves the rounds that it finished, and nothing else.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools import cli
from tools.bench import accuracy, feed, fig1, harness, loader, order, saves, shards, train

MODULES = (loader, shards, train, saves, feed, order, accuracy, fig1)
BENCHMARKS = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def make_parser() -> cli.Parser:
    p = cli.Parser(prog="bench", description=__doc__)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="BENCH")
    for name, module in BENCHMARKS.items():
        own = kinds.add_parser(name, help=module.__doc__.splitlines()[0], description=module.__doc__)
        harness.add_options(own, module.OPTIONS)
        own.files(json="write all measurements there")
    return p


def main() -> None:
    args = make_parser().parse_args()
    benchmark = BENCHMARKS[args.kind]
    with harness.scratch_folder() as scratch:
        benchmark.run(args, harness.Record(args, benchmark.__doc__.splitlines()[0]), scratch)


if __name__ == "__main__":
    cli.run(main)
