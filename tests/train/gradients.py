"""One of two ranks: how far the gradient that it receives lies from the expected and from the exact mean.

gradients.py COMPRESS RUN_DIR
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402 (the path comes first)
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from train.cli import parse  # noqa: E402
from train.distributed import make_accelerator  # noqa: E402

compress, run_dir = sys.argv[1:]
accelerator = make_accelerator(
    parse(["demo", "--data.shards", "x", "--train.compress", compress, "--run.dir", run_dir])
)
rank = accelerator.process_index
torch.manual_seed(0)
net = accelerator.prepare(nn.Linear(300, 50, bias=False))
x = torch.randn(2, 8, 300)[rank]
accelerator.backward((net(x) ** 2).mean())
found = accelerator.unwrap_model(net).weight.grad
torch.manual_seed(0)
reference = nn.Linear(300, 50, bias=False)
parts = torch.randn(2, 8, 300)
gradients = [torch.autograd.grad((reference(part) ** 2).mean(), reference.weight)[0] for part in parts]
if compress == "bf16":  # each rank sends half of its gradient, rounded; the sum is rounded too
    wanted = sum((g.bfloat16() / 2 for g in gradients[1:]), gradients[0].bfloat16() / 2).float()
else:
    wanted = sum(gradients) / 2
error = ((found - wanted).abs().max() / wanted.abs().max()).item()
exact = sum(gradients) / 2
rounding = ((found - exact).abs().max() / exact.abs().max()).item()
if rank == 0:
    print("error", error, "rounding", rounding)
dist.destroy_process_group()
