"""One rank of a trial all-reduce: `python -m jobs.collective cpu|cuda`; ends with 0 when the sum is right."""

from __future__ import annotations

import datetime
import os
import sys

TIMEOUT_S = 60


def main(device: str) -> int:
    import torch
    import torch.distributed as dist

    local = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_S))
    value = torch.full((1 << 16,), float(dist.get_rank() + 1), device=local)
    dist.all_reduce(value)
    world = dist.get_world_size()
    good = bool((value == world * (world + 1) / 2).all())
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
