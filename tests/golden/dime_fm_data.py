"""Data units of the DIME-FM cases: crops and transforms, tables and their indexes, sentences and their stream."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from core.data.features import TsvFeatures, place_of_texts
from core.data.pillow import crop_pil, eval_pil, resize_pil, standardised
from core.data.seeded import seeded_boxes, seeded_crop
from core.data.sentences import CorruptText, candidates, sentence
from core.data.source import DataError
from core.data.tsv import ROLES, Table, format_index, open_tables, route, row_offsets
from core.data.tsv_source import open_tsv_source
from core.folder import FileStore
from tests.golden.networks import norm_of
from tests.golden.runner import Case, Check

Checks = Iterator[Check]
OFTEN = 2000  # draws of a sentence, so that all candidates come up
INDEX = re.compile("idx|index|offset")  # in the name of an array that is one


def crop_boxes(case: Case) -> Checks:
    size = (int(case["image_hw"][0]), int(case["image_hw"][1]))
    boxes = seeded_boxes(int(case["seed"]), len(case["boxes"]), size, case["scale"].tolist(), case["ratio"].tolist())
    yield "boxes", boxes, case["boxes"], 0.0


def _numbers(case: Case, prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in case if key.startswith(prefix)]


def transform_train(case: Case) -> Checks:
    norm = norm_of(case)
    for k in _numbers(case, "image_"):
        image = torch.from_numpy(case[f"image_{k}"]).permute(2, 0, 1)
        short = resize_pil(image, [int(case[f"resized_size_{k}"].min())])
        yield f"resized_size_{k}", short.shape[:0:-1], case[f"resized_size_{k}"], 0.0
        if "torch_seed_of_image" in case:
            box, flip = seeded_crop(int(case["torch_seed_of_image"][int(k)]), (short.shape[1], short.shape[2]))
            yield f"crop_top_left_h_w_{k}", box, case[f"crop_top_left_h_w_{k}"], 0.0
            yield f"flip_{k}", flip, bool(case[f"flip_{k}"]), 0.0
        side = 2 * len(case[f"out_uint8_stride2_{k}"])
        crop = crop_pil(short, case[f"crop_top_left_h_w_{k}"], bool(case[f"flip_{k}"]), side)
        yield from _pixels(f"out_uint8_stride2_{k}", crop.permute(1, 2, 0)[::2, ::2], case, 1)
        out = standardised(crop, norm)
        yield f"out_norm_stride16_{k}", out[:, ::16, ::16], case[f"out_norm_stride16_{k}"], 0.02
        moments = [out.mean(), out.std(correction=0)]
        yield f"out_norm_mean_std_{k}", moments, case[f"out_norm_mean_std_{k}"], 1e-3


def _pixels(name: str, got: Any, case: Case, levels: int) -> Checks:
    """Shapes agree and no pixel is further off than so many grey levels."""
    got, want = np.asarray(got).astype(int), np.asarray(case[name]).astype(int)
    yield f"shape of {name}", got.shape, want.shape, 0.0
    yield name, np.abs(got - want).max(initial=0) <= levels, True, 0.0


def eval_transform(case: Case) -> Checks:
    norm = norm_of(case)
    for k in _numbers(case, "image_"):
        image = torch.from_numpy(case[f"image_{k}"]).permute(2, 0, 1)
        side = int(case[f"center_shape_{k}"][-1])
        found = {
            "center": eval_pil(image, side, side, "bicubic", norm),
            "squash": standardised(resize_pil(image, [side, side]), norm),
        }
        for name, out in found.items():
            yield f"{name}_stride8_{k}", out[:, ::8, ::8], case[f"{name}_stride8_{k}"], 0.02
            yield f"{name}_mean_{k}", out.double().mean(), case[f"{name}_mean_{k}"], 0.02
            yield f"{name}_shape_{k}", out.shape, case[f"{name}_shape_{k}"], 0.0


def lineidx(case: Case) -> Checks:
    """The index of a table read whole, and in pieces of a few bytes, as a large one is."""
    for k in _numbers(case, "tsv_"):
        table, want = case[f"tsv_{k}"].tobytes(), case[f"lineidx_{k}"].tobytes()
        pieces = [table[i : i + 3] for i in range(0, len(table), 3)]
        yield f"lineidx_{k}", format_index(row_offsets(iter([table]))), want, 0.0
        yield f"lineidx_{k} in pieces", format_index(row_offsets(iter(pieces))), want, 0.0


def lineidx_bad(case: Case) -> Checks:
    """Every index that does not hold the byte offsets of its table is refused, at the latest when rows are read."""
    for name in (name for name in case if "tsv" in name and not INDEX.search(name)):
        table = _content(case[name])
        right = format_index(row_offsets(iter([table])))
        number = "".join(re.findall(r"\d+", name))
        for other in (other for other in case if INDEX.search(other) and number in other):
            content = _content(case[other])
            yield other, _refused(table, content), content.split() != right.split(), 0.0


def _content(given: Any) -> bytes:
    """Of a file that is recorded as its bytes, as text, or (an index) as numbers."""
    array = np.asarray(given)
    if array.dtype.kind in "US":
        return str(array.item()).encode()
    return array.tobytes() if array.dtype == np.uint8 else format_index(array.astype(np.int64).ravel())


def _refused(table: bytes, index: bytes) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        store = FileStore(Path(folder))
        store.put("x.tsv", table)
        store.put("x.lineidx", index)
        try:
            opened = Table(store, "x.tsv")
            for row in range(len(opened)):
                opened.cells(row)
        except DataError:
            return True
        return False


def tsv(case: Case) -> Checks:
    store = FileStore(case.path.resolve())
    source, tables = open_tsv_source(store), {role: open_tables(store, role) for role in ROLES}
    assert source is not None
    images, image_feat, texts, text_feat = (tables[role] for role in ROLES)
    assert images is not None
    assert image_feat is not None
    assert texts is not None
    assert text_feat is not None
    yield "n_images", len(source), int(case["n_images"]), 0.0
    yield "image_keys", [source.read(i).key for i in range(len(source))], case["image_keys"], 0.0
    yield "image_chunk_sizes", images.sizes, case["image_chunk_sizes"], 0.0
    pairs = [texts.pair(i) for i in range(len(texts))]
    yield "text_keys", [key for key, _ in pairs], case["text_keys"], 0.0
    yield "text_payload", [payload for _, payload in pairs], case["text_payload"], 0.0
    yield "text_chunk_sizes", texts.sizes, case["text_chunk_sizes"], 0.0
    stored = TsvFeatures(image_feat).read(np.arange(len(image_feat)))["teacher"]
    for i in range(int(case["n_images"])):
        yield from _pixels(f"image_{i}", source.picture(i), case, 2)
        yield f"image_feat_{i}", stored[i], case[f"image_feat_{i}"], 0.0
    vectors = TsvFeatures(text_feat)
    yield "text_feats", vectors.read(np.arange(len(vectors)))["teacher"], case["text_feats"], 0.0


def tsv_route(case: Case) -> Checks:
    found = route(case["files"], case["dataroot"])
    for role, paths in case["expected"].items():
        yield f"expected.{role}", found[role], paths, 0.0


def text_decode(case: Case) -> Checks:
    for number, item in enumerate(case["items"]):
        payload, many = item["payload"], item.get("n_distinct_over_many_draws", 1)
        if item.get("raises"):
            yield f"{number} is refused", _is_corrupt(payload), True, 0.0
            continue
        found = set(candidates(payload))
        drawn = {sentence(payload, draw) for draw in np.random.RandomState(item.get("seed", 0)).random(OFTEN)}
        yield f"{number} text", item["text"] in found, True, 0.0
        yield f"{number} drawn", drawn <= found, True, 0.0
        if item.get("allowed"):
            yield f"{number} allowed", sorted(found), sorted(set(item["allowed"])), 0.0
            yield f"{number} all drawn", len(drawn), len(found), 0.0
        yield f"{number} distinct", many <= len(found), True, 0.0  # of many prompts, draws miss a few


def _is_corrupt(payload: str) -> bool:
    try:
        candidates(payload)
    except CorruptText:
        return True
    return False


def text_stream(case: Case) -> Checks:
    for name in (name for name in case if name.startswith("img")):
        images, texts = (int(part) for part in name.removeprefix("img").split("_txt"))
        want = case[name]
        yield name, [[place_of_texts(step, texts)[1] for step in range(images)] for _ in want], want, 0.0
