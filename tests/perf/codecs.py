"""`make bench CODECS=1`: what storing teacher outputs in fewer bits costs: target cosine, and the demo's student.

The demo recipe is trained from stored features, one view of an image, in every codec; targets are compared with fp32.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from core.config import load
from core.features import run
from core.features.codec import CODECS, decode
from core.features.rows import Rows
from core.prepare import digits
from core.recipe import Recipe
from core.registry import complete
from core.storage import open_store
from core.train import train
from jobs.table import table
from tests.ranks import run_ranks

STEPS, VIEWS = 240, 2
RESULTS = Path("tests") / "perf" / "results"
HEAD = ["codec", "kB/view", "least cosine", "mean cosine", "loss, last 20 logged", "held-out loss"]


def recipe(codec: str, features: str) -> Recipe:
    wanted = load("demo", "", [f"train.steps={STEPS}", f"data.views={VIEWS}", f"data.codec={codec}", "launch.ranks=1"])
    return replace(complete(wanted), features=features)


def fill(root: str, codec: str) -> None:
    for work in run.works(recipe(codec, "off"), root, ["train", "heldout"]):
        run.store(work, root, torch.device("cpu"), lambda text: None)


def losses(root: str, codec: str) -> dict[str, float]:
    rows: list[dict[str, Any]] = []
    train(recipe(codec, "require"), open_store(f"{root}/runs/{codec}"), root, 1, rows.append, lambda: False)
    seen = [row["loss"] for row in rows if "loss" in row]
    held = [row["heldout_loss"] for row in rows if row.get("heldout_loss") is not None]
    return {"loss": float(np.mean(seen[-20:])), "heldout": held[-1]}


def cosines(root: str, codec: str) -> tuple[float, float]:
    """Least and mean cosine of a token with the same one in fp32, over all teachers' class and patch tokens."""
    least, means = 1.0, []
    pairs = (run.works(recipe(each, "off"), root, ["train"])[0].sets for each in (codec, "fp32"))
    for ours, exact in zip(*(sets.values() for sets in pairs), strict=True):
        index = np.arange(ours.ends[-1])
        a, b = (Rows(one, 1, None).read(0, index)[0] for one in (ours, exact))
        for kind in ("cls", "patch"):
            cosine = F.cosine_similarity(decode(kind, a).double(), decode(kind, b).double(), dim=-1)
            least, means = min(least, float(cosine.min())), [*means, float(cosine.mean())]
    return least, float(np.mean(means))


def main() -> int:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="codecs-") as folder:
        root = f"file://{folder}/store"
        digits.prepare(recipe("fp32", "off"), root, print)
        for codec in CODECS:
            run_ranks(fill, 1, root, codec, timeout_s=1800)
            work = run.works(recipe(codec, "off"), root, ["train"])[0]
            size = run.total_bytes(work) / work.any_set.ends[-1] / work.views / 1e3
            (seen,) = run_ranks(losses, 1, root, codec, timeout_s=1800)
            least, mean = cosines(root, codec)
            found[codec] = {"kB": size, "least": least, "mean": mean, **seen}
            print(f"{codec}: {found[codec]}", flush=True)
    digits_of = {"kB": 2, "least": 6, "mean": 7, "loss": 5, "heldout": 5}
    rows = [[codec, *(f"{v[name]:.{places}f}" for name, places in digits_of.items())] for codec, v in found.items()]
    print(f"\ndemo, {STEPS} steps from {VIEWS} stored views, torch {torch.__version__}\n\n{table(HEAD, rows)}")
    path = RESULTS / f"codecs-cpu-{platform.machine().replace('_', '-')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
