"""Golden manifests, one for each recipe: `python -m tests.jobs.ray.golden` writes them anew."""

from __future__ import annotations

from pathlib import Path

from core.config import load, names
from jobs import cluster
from jobs.placement import Placement, spread
from jobs.ray import manifest
from jobs.ray.pods import Document

FOLDER = Path(__file__).parent / "manifests"
SITE = Path(__file__).parent / "cluster.yaml"


def text(name: str) -> str:
    """The manifest of a recipe on the cluster of cluster.yaml, under an id that does not change with the recipe."""
    recipe, site, run = load(name), cluster.load(str(SITE)), f"{name}-0123456789"
    placement = spread(recipe, site.per_node, site.gpus_per_node, site.cpus_per_task)
    return manifest.render(
        manifest.documents(recipe, site, placement, run, site.store, manifest.job_name(run), "kubernetes:gpu/distil")
    )


def crew() -> list[Document]:
    """Twelve workers of feature extraction on the same cluster."""
    recipe, site = load("unic-l"), cluster.load(str(SITE))
    return manifest.crew(recipe, site, Placement(1, "cuda", 3), 12, "unic-l-workers-0a1b2c", ["-m", "jobs.extract"])


def path(name: str) -> Path:
    return FOLDER / f"{name}.yaml"


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*.yaml"):
        old.unlink()
    for name in names():
        path(name).write_text(text(name))


if __name__ == "__main__":
    main()
