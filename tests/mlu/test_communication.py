"""The device names its communication backend; two ranks add a tensor through it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from opsin_device_mlu.device import open_device

ROOT = Path(__file__).parents[2]

RANK = """
import sys
from tests.mlu_sim import install

install()
import torch
import torch.distributed as dist
from opsin.api import BuildContext, Parallel
from opsin.kernels import Kernels
from opsin.layers import Linear
from opsin_device_mlu.device import open_device
from opsin_device_mlu.plugin import opsin_register_kernels

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
device = open_device(0)
dist.init_process_group(
    device.capabilities.communication, init_method=f"file://{rendezvous}", rank=rank, world_size=2
)
x = torch.full((3,), float(rank + 1), dtype=torch.float16, device="mlu")
dist.all_reduce(x)
y = torch.full((2,), rank, dtype=torch.int32, device="mlu")
dist.broadcast(y, src=1)
parts = [torch.zeros(3, dtype=torch.float16, device="mlu") for _ in range(2)]
dist.all_gather(parts, x * (rank + 1))
dist.barrier()
print(dist.get_backend(), x.device, x.tolist(), y.tolist(), [part.tolist() for part in parts])

# A row-parallel layer: each rank has half of the input's features, the sum over ranks is the whole product.
kernels = Kernels("mlu", opsin_register_kernels())
context = BuildContext(
    config={}, kernels=kernels, dtype=torch.float32, device="mlu", parallel=Parallel(rank=rank, world_size=2)
)
layer = Linear(context, 8, 4, bias=True, split="row")
torch.manual_seed(0)
weight, bias, rows = torch.randn(4, 8), torch.randn(4), torch.randn(5, 8)
for slot in layer.slots():
    slot.put(weight if slot.name == "weight" else bias)
given = layer(rows.chunk(2, dim=1)[rank].contiguous().to("mlu")).cpu()
print(torch.allclose(given, rows @ weight.t() + bias, atol=1e-5))
dist.destroy_process_group()
"""


def test_two_ranks_all_reduce_through_cncl(tmp_path: Path) -> None:
    assert open_device(0).capabilities.communication == "cncl"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "rendezvous")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors
        assert output.splitlines() == [
            "cncl mlu:0 [3.0, 3.0, 3.0] [1, 1] [[3.0, 3.0, 3.0], [6.0, 6.0, 6.0]]",
            "True",
        ]
