"""The entry point's line: what is written is what is read."""

from __future__ import annotations

import shlex

from jobs.placement import Placement, demand
from jobs.ray import command, workers


def test_the_line_is_read_as_it_was_written() -> None:
    placement = Placement(8, "cuda", 4, nodes=2)
    line = command.line(
        "python", "demo-1", "s3://b/it's here", "job-1", "kubernetes:a b/ml", placement, 12, "eval,export"
    )
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "jobs.ray.entry"]
    found = vars(command.parser("jobs.ray.entry", "job", "at", "after").parse_args(words[3:]))
    assert found == {"run": "demo-1", "store": "s3://b/it's here", "job": "job-1", "at": "kubernetes:a b/ml",
                     "ranks": 8, "device": "cuda", "threads": 4, "cpus": 12, "after": "eval,export"}  # fmt: skip


def test_a_rank_takes_its_cpus_and_one_gpu() -> None:
    assert demand("cuda", 12) == {"CPU": 12.0, "GPU": 1.0}
    assert command.told(demand("cuda", 12)) == "12 CPUs and 1 GPU"
    assert command.told(demand("cpu", 1)) == "1 CPU"


def test_the_line_of_workers_is_read_as_it_was_written() -> None:
    words = ["-m", "jobs.extract", "--store", "s3://b/a folder", "--order", "0123"]
    line = shlex.split(command.workers("python", words, 8, {"CPU": 4.0, "GPU": 1.0}, 3))
    assert line[:3] == ["python", "-m", "jobs.ray.workers"]
    cut = line.index("--")
    read = workers._options(line[3:cut])
    assert (read.count, read.cpus, read.gpus, read.threads) == (8, 4.0, 1.0, 3)
    assert line[cut + 1 :] == words
