"""A run small enough for a unit test, through the real code: UNIC, two random teachers, 48 noise images in shards."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from core.config import from_yaml, to_yaml
from core.data.shards import write_shards
from core.numerics import CURRENT
from core.recipe import Recipe
from core.registry import complete
from core.storage import open_store

RECIPE = """
name: toy
method: {name: unic, options: {hidden: 16, last_hidden: 24}}
student:
  {name: vit_tiny_patch16_224, args: &tiny {patch_size: 8, embed_dim: 24, depth: 2, num_heads: 2}, drop_path: 0.1}
teachers:
  one: {name: vit_tiny_patch16_224, args: {img_size: 16, <<: *tiny}, weights: random}
  two:
    {name: vit_tiny_patch16_224, args: {img_size: 16, <<: *tiny, embed_dim: 32, depth: 1}, weights: random}
data: {source: "store:data", block: 16}
train: {img_size: 16, steps: 6, batch: 8, micro_batch: 2, lr: 0.01, lr_batch: 0, warmup_steps: 1, precision: fp32}
launch: {device: cpu}
loader: {workers: 0}
checkpoint: {every_steps: 2, keep: 5}
log: {every_steps: 1, tensorboard: false}
"""


def recipe(**groups: dict[str, object]) -> Recipe:
    """The toy recipe with fields replaced: recipe(zero={"stage": 3}, train={"steps": 4})."""
    found = from_yaml(RECIPE)
    found.numerics = CURRENT
    for group, values in groups.items():
        for key, value in values.items():
            setattr(getattr(found, group), key, value)
    made = complete(from_yaml(to_yaml(found)))
    return replace(made, loader=found.loader, checkpoint=found.checkpoint)  # with folders, which are never stored


def store(folder: Path, images: int = 48) -> str:
    """URI of a store that holds the toy data."""
    root = f"file://{folder}"
    rng = np.random.default_rng(0)
    samples = ((f"{i:03d}", _png(rng), "png", i % 3) for i in range(images))
    write_shards(samples, open_store(root), "data", 20_000, ["a", "b", "c"])
    return root


def _png(rng: np.random.Generator) -> bytes:
    low = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize((24, 20), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()
