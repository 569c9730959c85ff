"""What a recipe will cost, before anything is queued: parameters, FLOPs, memory, hours, bytes, what is missing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from core.config import ConfigError, nearest
from jobs.errors import OK, USER, redact
from jobs.table import table

if TYPE_CHECKING:
    from core.flops import StageCost
    from core.recipe import Recipe, Train

# Dense bf16 peak in TFLOP/s and memory in GB, from the makers' data sheets.
GPUS = {"h100": (989.0, 80), "h200": (989.0, 141), "a100": (312.0, 80), "v100": (125.0, 32), "rtx4090": (165.0, 24)}
MFU = 0.5  # share of the peak that an excellent run reaches; GPU-hours scale with its inverse
IMAGENET = 1_281_167  # samples assumed when the data are not there yet
ACTIVATION_BYTES = 34  # per token, channel and block, with fused attention, in bf16
MIB, GB, HOUR = 2**20, 1e9, 3600.0


def plan(recipe: Recipe, root: str, gpu: str = "h100", gpus: int = 0, price: float = 0.0) -> dict[str, Any]:
    """Facts of a recipe on `gpus` of a kind (0: the recipe's number, or 8) at `price` an hour.  Raises ConfigError.

    `unfit`: what of its weights does not fit, for which a submission is refused.
    """
    if gpus < 0:
        raise ConfigError(f"GPUS: must not be negative, got {gpus}")
    if gpu not in GPUS:
        raise ConfigError(f"GPU: {gpu!r} is not known{nearest(gpu, list(GPUS))} (known: {', '.join(GPUS)})")
    from core.flops import stage_cost
    from jobs import inputs
    from jobs.placement import gpu_count

    lacks, (unfit, notes) = inputs.missing(recipe, root, gpu_count()), _weights(recipe, root)
    notes = [note for note in notes if not any(lack.what.startswith(f"{note.split(':')[0]}:") for lack in lacks)]
    count = gpus or recipe.launch.ranks or 8
    samples, known = _samples(recipe, root)
    stages = []
    for name in recipe.stage_names():
        cost = stage_cost(recipe, name)
        stages.append(_stage(recipe, name, cost, samples, gpu, count))
    return {
        "recipe": recipe.name, "gpu": gpu, "gpus": count, "mfu": MFU, "samples": samples, "samples_known": known,
        "student": recipe.student.name, "teachers": {k: t.name for k, t in sorted(recipe.teachers.items())},
        "stages": stages, "gpu_hours": (hours := sum(s["gpu_hours"] for s in stages)), "price": hours * price or None,
        "missing": [f"{m.what}\n    -> {m.how}" for m in lacks],
        "unfit": unfit, "notes": notes,
    }  # fmt: skip


def code(facts: dict[str, Any]) -> int:
    """Exit code of a verb that shows the facts."""
    return USER if facts["unfit"] else OK


def _weights(recipe: Recipe, root: str) -> tuple[str, list[str]]:
    """How weight files do not fit their networks, and what could not be compared."""
    from core.models.weights import WeightsError
    from jobs.preflight import check_weights

    try:
        return "", check_weights(recipe, root)
    except WeightsError as error:
        return redact(str(error)), []


def _samples(recipe: Recipe, root: str) -> tuple[int, bool]:
    from core.data.subset import training_source
    from core.storage import StoreError

    try:
        return len(training_source(recipe.data, recipe.seed, root)), True
    except (ValueError, StoreError):
        return round(IMAGENET * recipe.data.classes * recipe.data.share), False


def _stage(recipe: Recipe, name: str, cost: StageCost, samples: int, gpu: str, gpus: int) -> dict[str, Any]:
    settings = recipe.stage(name)
    per_epoch = samples // settings.batch
    steps = settings.steps or settings.epochs * per_epoch
    images = steps * settings.batch
    trainable = cost.student_params + cost.head_params
    return {
        "stage": name,
        "img_size": settings.img_size,
        "steps": steps,
        "images": images,
        "batch": settings.batch,
        "student_params": cost.student_params,
        "head_params": cost.head_params,
        "teacher_params": cost.teacher_params,
        "student_flops": cost.student,
        "head_flops": cost.heads,
        "teacher_flops": cost.teachers,
        "step_flops": cost.step,
        "gpu_hours": images * cost.step / (GPUS[gpu][0] * 1e12 * MFU) / HOUR,
        "images_per_s_per_gpu": GPUS[gpu][0] * 1e12 * MFU / cost.step,
        "memory_gb": {stage: _memory(settings, cost, trainable, gpus, stage) / GB for stage in (0, 1, 2, 3)},
        "checkpoint_bytes": 12 * trainable,
        "checkpoint_writes": -(-steps // recipe.checkpoint.every_steps),
        "features": _features(recipe, cost, images, samples, GPUS[gpu][0] * 1e12 * MFU),
    }


def _features(recipe: Recipe, cost: StageCost, images: int, samples: int, flops: float) -> dict[str, Any] | None:
    """What storing the teachers' outputs takes and saves, on devices that do so many FLOPs a second."""
    from core.features.advise import Advice, Rates
    from core.features.codec import row_bytes

    if not cost.outputs:
        return None
    codec, views = recipe.data.codec, recipe.data.views or 1
    rates = Rates(3 * (cost.student + cost.heads) / flops, sum(cost.teachers.values()) / flops)
    size = sum(row_bytes(codec, shapes) for shapes in cost.outputs.values())
    advice = Advice(rates, size, images, samples * recipe.data.repeats, views)
    return {
        "codec": codec, "views": views, "bytes_per_view": size, "bytes": advice.stored_bytes,
        "making_gpu_hours": advice.making_hours, "saved_gpu_hours": advice.saved_hours(),
        "even_bytes_per_s": advice.even_rate, "free_bytes_per_s": advice.free_rate, "verdict": advice.verdict(),
    }  # fmt: skip


def _memory(settings: Train, cost: StageCost, trainable: int, gpus: int, zero: int) -> float:
    """Bytes per GPU: weights, gradients, fp32 master copy and moments cut by ZeRO; teachers; activations (estimate)."""
    width = 2 if settings.precision == "bf16" else 4
    cut = [1, 1, 1] if zero == 0 else [gpus if zero >= part else 1 for part in (3, 2, 1)]
    states = trainable * (width / cut[0] + width / cut[1] + 12 / cut[2])
    activations = settings.micro_batch * cost.activation_units * ACTIVATION_BYTES * width / 2
    return states + width * sum(cost.teacher_params.values()) + activations


def render(facts: dict[str, Any]) -> str:
    note = "" if facts["samples_known"] else " (assumed: the data are not there yet)"
    missing = ["missing:", *(f"  {m}" for m in facts["missing"])] if facts["missing"] else ["nothing is missing"]
    unfit = ["does not fit:", *(f"  {line}" for line in facts["unfit"].splitlines())] if facts["unfit"] else []
    lines = [
        f"plan of {facts['recipe']} on {facts['gpus']} x {facts['gpu']} at {facts['mfu']:.0%} MFU",
        f"student {facts['student']}; teachers {', '.join(facts['teachers'].values()) or 'none'}",
        f"{facts['samples']:,} training images{note}",
        "",
        _costs(facts["stages"]),
        "",
        "memory per GPU in GB (activations estimated), by ZeRO stage, and checkpoints",
        _memories(facts["stages"]),
        "",
        *_stores(facts["stages"]),
        f"total: {facts['gpu_hours']:.3g} GPU-hours, {facts['gpu_hours'] / facts['gpus']:.3g} hours"
        + (f", price {facts['price']:,.2f}" if facts["price"] else ""),
        "",
        *missing,
        *unfit,
        *facts["notes"],
    ]
    return "\n".join(lines)


def _costs(stages: list[dict[str, Any]]) -> str:
    head = ["stage", "px", "steps", "student", "heads", "teachers", "student GF/img", "heads GF/img", "teachers GF/img",
            "step GF/img", "img/s/GPU", "GPU-hours"]  # fmt: skip
    rows = []
    for s in stages:
        parameters = (s["student_params"], s["head_params"], sum(s["teacher_params"].values()))
        sizes = [f"{n / 1e6:,.2f} M" for n in parameters]
        work = (s["student_flops"], s["head_flops"], sum(s["teacher_flops"].values()), s["step_flops"])
        flops = [f"{f / 1e9:,.4g}" for f in work]
        rate = [f"{s['images_per_s_per_gpu']:,.0f}", f"{s['gpu_hours']:.3g}"]
        rows.append([s["stage"], str(s["img_size"]), f"{s['steps']:,}", *sizes, *flops, *rate])
    return table(head, rows)


def _stores(stages: list[dict[str, Any]]) -> list[str]:
    """Lines on storing teacher outputs; none without teachers."""
    rows = [
        [s["stage"], f["codec"], str(f["views"]), f"{f['bytes_per_view'] / 1e3:,.1f}", f"{f['bytes'] / GB:,.1f}",
         f"{f['making_gpu_hours']:.3g}", f"{f['saved_gpu_hours']:.3g}", f"{f['even_bytes_per_s'] / GB:.2f}",
         f"{f['free_bytes_per_s'] / GB:.2f}"]
        for s in stages if (f := s["features"])
    ]  # fmt: skip
    if not rows:
        return []
    head = ["stage", "codec", "views", "kB/img", "GB", "GPU-hours to make", "saved at most", "GB/s/GPU to break even",
            "to lose nothing"]  # fmt: skip
    verdicts = [f"  {s['stage']}: {s['features']['verdict']}" for s in stages if s["features"]]
    return [
        "teacher outputs stored (make features) instead of computed in every epoch",
        table(head, rows),
        *verdicts,
        "",
    ]


def _memories(stages: list[dict[str, Any]]) -> str:
    rows = []
    for s in stages:
        per_stage = [f"{s['memory_gb'][zero]:.2f}" for zero in (0, 1, 2, 3)]
        rows.append([s["stage"], *per_stage, f"{s['checkpoint_bytes'] / MIB:,.1f} MiB", f"{s['checkpoint_writes']:,}"])
    return table(["stage", "0", "1", "2", "3", "checkpoint", "times"], rows)
