"""Cluster files: strict, and the examples are good."""

from __future__ import annotations

from pathlib import Path

import pytest

from core.config import ConfigError
from jobs.cluster import Cluster, load, names


def test_the_three_examples_load_and_explain_themselves() -> None:
    assert names() == ["apptainer", "bare", "pyxis"]
    for name in names():
        assert load(name).about
        assert Path(__file__).parents[2].joinpath(f"jobs/clusters/{name}.yaml").read_text().startswith("# ")
    assert [load(name).container for name in names()] == ["apptainer", "", "pyxis"]


def test_no_name_leaves_everything_to_slurm() -> None:
    assert load("") == Cluster()


def test_ranks_of_a_node_are_its_gpus_unless_they_are_counted() -> None:
    assert Cluster().per_node == 1
    assert Cluster(gpus_per_node=8).per_node == 8
    assert Cluster(gpus_per_node=8, tasks_per_node=4).per_node == 4


def test_an_unknown_cluster_is_told_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r"did you mean pyxis.*there is: apptainer, bare, pyxis"):
        load("pyxi")


@pytest.mark.parametrize(
    ("text", "words"),
    [("partion: gpu", "unknown field partion; did you mean partition"),
     ("\npartition: gpu\ntime_min: soon", ":3: "),
     ("time_min: -1", "time_min: must not be negative"),
     ("container: docker\nimage: x", "container: must be one of apptainer, pyxis"),
     ("container: pyxis", "image: an image needs"), ("image: x.sif", "image: an image needs"),
     ("python: venv/bin/python", "python: must be a path from the root"),
     ("gpu_type: h100", "gpu_type: needs gpus_per_node"),
     ("cpus_per_task: 0", "cpus_per_task: must be at least 1"),
     ("shared: [scratch]", "shared: must be a path from the root"),
     ("store: /scratch", "store: '/scratch' is neither"),
     ("mounts: [/data]", "mounts: '/data' is not HOST:INSIDE"),
     ("env: {A B: x}", "env: 'A B' cannot be a variable"),
     ("extra: {Nice One: x}", "extra: 'Nice One' is not an option of sbatch"),
     ("extra: {nodes: '4'}", "extra: nodes is Retort's own to set"),
     ('partition: "gpu\\n#SBATCH --uid=0"', "partition: must be one line"),
     ('extra: {comment: "a\\nrm -rf"}', "in one line"), ('setup: ["a\\nb"]', "setup: must be one line"),
     ('env: {A: "x\\ny"}', "env: A must be one line")],
)  # fmt: skip
def test_a_mistake_is_named_with_field_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
