"""Benchmarks of imagenet-express beside its peers.

    python tools/bench loader --images imagenet-sample.tar
    python tools/bench shards --images imagenet-sample.tar
    python tools/bench train
    python tools/bench saves
    python tools/bench feed --images imagenet-sample.tar
    python tools/bench order
    python tools/bench accuracy --images cifar10.tar.xz
    python tools/bench fig1 --images cifar10.tar.xz

Each prints a table and, with --json FILE, writes every single measurement with hardware, versions and command.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

from tools import cli
from tools.bench import accuracy, feed, fig1, loader, order, saves, shards, train


def main() -> None:
    p = cli.Parser(prog="bench", description=__doc__)
    kinds = p.add_subparsers(dest="kind", required=True, metavar="BENCH")
    loader.add_arguments(kinds.add_parser("loader", help="images a second, decoded and cropped"))
    shards.add_arguments(kinds.add_parser("shards", help="images a second, from class folders to verified shards"))
    train.add_arguments(kinds.add_parser("train", help="training steps on synthetic images"))
    saves.add_arguments(kinds.add_parser("saves", help="what a checkpoint costs a run"))
    feed.add_arguments(kinds.add_parser("feed", help="the Python work of handing images to DALI"))
    order.add_arguments(kinds.add_parser("order", help="what the order costs and how well a window mixes"))
    accuracy.add_arguments(kinds.add_parser("accuracy", help="CIFAR-10 by three recipes: an hour and a half"))
    fig1.add_arguments(kinds.add_parser("fig1", help="the paper's figure 1: ReLU against tanh"))
    args = p.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.run(main)
