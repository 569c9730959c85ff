"""Handwritten digits (scikit-learn's 1,797 grey 8x8 scans, upsampled to 32x32) and two small teachers trained on them.

The teachers differ in what they learn: one classifies the digits, one reconstructs masked patches and sees no label.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as to_safetensors
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from core.cache import ShardCache
from core.data.loader import train_batches
from core.data.shards import write_shards
from core.data.source import Source, open_source
from core.data.views import View, apply_colour, draw_colour
from core.models.students import create
from core.models.vit import as_vit, forward_taps
from core.recipe import Recipe, Teacher
from core.storage import Store, open_store, resolve

SIDE, PATCHES_MASKED, STEPS, BATCH = 32, 0.5, 400, 64
CACHE_BYTES = 100_000_000
SPLITS = {"train": (0, 1257), "heldout": (1257, 1437), "test": (1437, 1797)}
DATA = {f"store:data/digits/{split}": split for split in SPLITS}
Say = Callable[[str], None]


def provides(recipe: Recipe) -> list[str]:
    """Addresses this module can make."""
    return [*DATA, *_TRAINERS]


def prepare(recipe: Recipe, root: str, say: Say) -> None:
    """Make what the recipe names and the store lacks: data splits first, then teachers (tens of seconds each)."""
    store = open_store(root)
    wanted = {recipe.data.source, recipe.data.heldout, recipe.evaluate.train, recipe.evaluate.test}
    teachers = {t.weights: t for t in recipe.teachers.values() if t.weights in _TRAINERS}
    needs_train = any(store.size(uri.removeprefix("store:")) is None for uri in teachers)
    for uri, split in DATA.items():
        if uri in wanted or (split == "train" and needs_train):
            _write_split(store, uri.removeprefix("store:"), split, say)
    lacking = {uri: t for uri, t in sorted(teachers.items()) if store.size(uri.removeprefix("store:")) is None}
    for uri in lacking:
        say(f"training teacher {uri}: {_TRAINERS[uri].__doc__}")
    if lacking:
        # One process each, one thread each: networks this small lose more than they gain by intra-op threads.
        with ProcessPoolExecutor(len(lacking), mp_context=get_context("spawn")) as pool:
            for done in [pool.submit(_train_teacher, uri, teacher, root) for uri, teacher in lacking.items()]:
                done.result()


def _write_split(store: Store, prefix: str, split: str, say: Say) -> None:
    if store.size(f"{prefix}/index.json") is not None:
        return
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.target))[slice(*SPLITS[split])]
    say(f"writing {len(order)} handwritten digits (8x8 scans, upsampled to {SIDE}x{SIDE}) to {store.uri}/{prefix}")
    samples = ((f"digit-{i:04d}", _png(digits.images[i]), "png", int(digits.target[i])) for i in order)
    write_shards(samples, store, prefix, shard_bytes=100_000, classes=[str(c) for c in range(10)])


def _png(scan: np.ndarray) -> bytes:
    image = Image.fromarray((scan * (255 / 16)).astype(np.uint8), "L").resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _batches(source: Source, view: View, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(B, 3, S, S) normalised images and (B,) labels."""
    batches = train_batches(source, [view], seed=7, batch=BATCH, micro_batch=BATCH, block=4096, start_step=0,
                            stop_step=steps, rank=0, world=1, workers=0, prefetch=1)  # fmt: skip
    for (micro,) in batches:
        colour = draw_colour(view, 7, micro.epoch, micro.index.numpy(), 0)
        labels = torch.tensor([source.label(int(i)) for i in micro.index])
        yield apply_colour(micro.views[view.name], colour), labels


class Supervised(nn.Module):
    """supervised: cross-entropy on the class token"""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit, self.head = vit, nn.Linear(int(vit.embed_dim), 10)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.vit(images)), labels, label_smoothing=0.1)


class Masked(nn.Module):
    """self-supervised: reconstructs the pixels of masked patches, sees no label"""

    def __init__(self, vit: VisionTransformer) -> None:
        super().__init__()
        self.vit, self.patch = vit, int(vit.patch_embed.patch_size[0])
        self.head = nn.Linear(int(vit.embed_dim), 3 * self.patch**2)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        patches = F.unfold(images, self.patch, stride=self.patch).transpose(1, 2)  # (B, N, 3 p^2)
        mask = torch.rand(patches.shape[:2]) < PATCHES_MASKED
        seen = F.fold((patches * ~mask[..., None]).transpose(1, 2), images.shape[-2:], self.patch, stride=self.patch)
        tokens = self.vit.norm(forward_taps(self.vit, seen)[-1])
        # The class token joins the prediction of every patch, so it learns what the image shows.
        predicted = self.head(tokens[:, 1:] + tokens[:, :1])
        loss: Tensor = ((predicted - patches) ** 2).mean(-1)[mask].mean()
        return loss


_TRAINERS: dict[str, type[nn.Module]] = {
    "store:teachers/digits_supervised.safetensors": Supervised,
    "store:teachers/digits_masked.safetensors": Masked,
}


def _train_teacher(uri: str, teacher: Teacher, root: str) -> None:
    """Train one teacher in this process and put its weights into the store."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vit = as_vit(create(teacher.name, teacher.args, None, "teachers"))
    task, key = _TRAINERS[uri](vit).train(), uri.removeprefix("store:")
    adam = torch.optim.AdamW(task.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 1e-3, total_steps=STEPS)
    view = View(name="image", size=SIDE, scale=(0.5, 1.0), flip=0.0, jitter=0.3, gray=0.0, blur=0.0, solarise=0.0)
    with tempfile.TemporaryDirectory() as folder:
        source = open_source(resolve("store:data/digits/train", root), ShardCache(Path(folder), CACHE_BYTES))
        for step, (images, labels) in enumerate(_batches(source, view, STEPS), 1):
            loss = task(images, labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
            schedule.step()
            if step % 100 == 0:
                print(f"  {key}: step {step}/{STEPS}  loss {loss.item():.3f}", flush=True)
    open_store(root).put(key, to_safetensors({k: v.detach().contiguous() for k, v in vit.state_dict().items()}))
