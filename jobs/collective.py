"""One rank of a trial all-reduce: `python -m jobs.collective cpu|cuda`; ends with 0 when the sum is right."""

from __future__ import annotations

import datetime
import os
import sys

from jobs.ranks_env import meet_in_file

TIMEOUT_S = 60


def main(device: str) -> int:
    import torch
    import torch.distributed as dist

    local = torch.device("cpu") if device == "cpu" else torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    backend = "gloo" if device == "cpu" else "nccl"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(backend, timeout=patience, store=meet_in_file(), rank=rank, world_size=world)
    value = torch.full((1 << 16,), float(rank + 1), device=local)
    dist.all_reduce(value)
    good = bool((value == world * (world + 1) / 2).all())
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
