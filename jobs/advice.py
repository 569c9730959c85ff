"""`make features ADVISE=1`: store or recompute, from what teachers and store take on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.placement import gpu_count
from jobs.table import table

if TYPE_CHECKING:
    from core.features.work import Work
    from core.recipe import Recipe
    from jobs.cluster import Cluster

GB = 1e9
HEAD = ["stage", "views", "codec", "GB", "img/s, teachers", "img/s, student", "GB/s read", "GB/s to break even",
        "hours live", "hours stored", "hours saved", "price saved", "price stored a month"]  # fmt: skip


def advise(recipe: Recipe, works: list[Work], root: str, site: Cluster) -> str:
    """Hours are those of one device such as this; the student's time follows from the teachers' by FLOPs."""
    from core.features.measure import read_rate

    trained = [work for work in works if work.split == "train" and work.inputs.teachers]
    if not trained:
        return "training of this recipe computes no teacher outputs: what it needs is always stored"
    read = read_rate(root) / max(gpu_count(), 1)  # devices of a machine read at once
    rows, verdicts = zip(*(_stage(recipe, work, root, read, site) for work in trained), strict=True)
    return "\n".join([table(HEAD, list(rows)), *verdicts])


def _stage(recipe: Recipe, work: Work, root: str, read: float, site: Cluster) -> tuple[list[str], str]:
    from core.features import run
    from core.features.advise import Advice, Rates
    from core.flops import stage_cost

    inputs, cost = work.inputs, stage_cost(recipe, work.inputs.name)
    seconds = run.teachers_seconds(work, root)
    student = seconds * 3 * (cost.student + cost.heads) / sum(cost.teachers.values())
    rows, codec = work.any_set.ends[-1], inputs.recipe.data.codec
    advice = Advice(Rates(student, seconds, read), run.total_bytes(work) // (rows * work.views),
                    inputs.steps * inputs.settings.batch, rows, work.views)  # fmt: skip
    saved = advice.saved_hours()
    numbers = [advice.stored_bytes / GB, 1 / seconds, 1 / student, read / GB, advice.even_rate / GB, advice.live_hours,
               advice.stored_hours(read), saved]  # fmt: skip
    prices = [saved * site.price_per_gpu_hour, advice.stored_bytes / GB * site.price_per_gb_month]
    shown = [f"{number:,.4g}" for number in numbers] + [f"{price:,.2f}" if price else "not known" for price in prices]
    return [inputs.name, str(work.views), codec, *shown], f"  {inputs.name}: {advice.verdict()}"
