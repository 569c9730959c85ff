"""`make bench`: what a step of a recipe costs on this machine, and DeepSpeed's overhead over plain PyTorch."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from jobs.errors import OK
from jobs.settings import Settings
from jobs.table import table

RESULTS = Path("tests") / "perf" / "results"


def main(settings: Settings) -> int:
    """Benchmark RECIPE (default demo) on one rank; prints a table and keeps the figures as JSON."""
    import torch
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    from core.bench import bench
    from core.engine import init_distributed, pick_device, shutdown
    from jobs import inputs

    recipe = dataclasses.replace(settings, recipe=settings.recipe or "demo").load_recipe()
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    with tempfile.TemporaryDirectory(prefix="retort-bench-") as folder:
        root = settings.root(recipe) if settings.store else f"file://{folder}"
        for teacher in recipe.teachers.values():
            teacher.weights = "random"  # the weights' values cost nothing
        recipe.data.heldout = recipe.evaluate.train = recipe.evaluate.test = ""
        module = inputs.preparer(recipe)
        if module:
            module.prepare(recipe, root, print)
        device = pick_device(recipe.launch.device)
        recipe.launch.device = device.type
        torch.set_num_threads(1 if device.type == "cpu" else torch.get_num_threads())
        init_distributed(device, HashStore())
        result = bench(recipe, root)
        shutdown()
    print(render(result))
    RESULTS.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{recipe.name}-{result['device']}".lower()).strip("-")
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in {path}")
    return OK


def render(result: dict[str, Any]) -> str:
    head = (
        f"{result['recipe']} on {result['device']}, {result['world']} rank, {result['precision']}, torch "
        f"{result['torch']}, batch {result['batch']}, medians of {result['rounds']} rounds taken in turns"
    )
    rows = []
    for name, seconds in result["seconds_per_step"].items():
        low, _, high = result["quartiles"][name]
        ratio = result["ratio_to_plain"].get(name)
        rate, spread = f"{result['images_per_s'][name]:,.0f}", f"{1e3 * low:.1f}..{1e3 * high:.1f}"
        rows.append([name, f"{1e3 * seconds:.1f}", spread, rate, f"{ratio:.3f}" if ratio else ""])
    return f"{head}\n\n{table(['what', 'ms/step', 'quartiles', 'img/s', 'x plain PyTorch'], rows)}"
