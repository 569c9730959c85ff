"""Gradients of a loss that couples the whole global batch, such as a contrastive one, without holding its activations.

Every rank runs its micro-batches once without a graph, gathers all outputs, differentiates the loss by them, and then
runs each micro-batch again with the gradients of its own outputs. With one micro-batch a rank the second pass is not
needed. Outputs and targets are trees of tensors whose first axis is the sample's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from core.comm import Comm
from core.methods.base import Batch, Report

if TYPE_CHECKING:
    from core.data.samples import MicroBatch
    from core.stage import Stage


def backward(stage: Stage, step: int, micros: list[MicroBatch]) -> tuple[Tensor, Report]:
    """Loss and report of the whole global batch, equal on all ranks; gradients are left in the engine."""
    batches = [stage.batch(micro) for micro in micros]
    targets = gather([stage.targets(batch) for batch in batches], stage.comm)

    def forward(number: int) -> Any:
        stage.seed_network(step, micros[number])
        return stage.engine.forward(batches[number])

    with torch.set_grad_enabled(len(micros) == 1):
        outputs = [forward(number) for number in range(len(micros))]
    leaves, tree = tree_flatten(gather([tree_map(torch.detach, each) for each in outputs], stage.comm))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss, report = stage.method.losses(tree_unflatten(leaves, tree), targets, _whole(batches, stage.comm))
    grads = torch.autograd.grad(loss, leaves)
    total = len(micros) * stage.comm.world
    for number in range(len(micros)):
        own = outputs[number] if len(micros) == 1 else forward(number)
        rank_first = stage.comm.rank * len(micros) + number
        pieces = [g.chunk(total)[rank_first] for g in grads]
        # The engine averages over micro-batches; these gradients are parts of one sum.
        stage.engine.backward(total * sum((x * g).sum() for x, g in zip(tree_flatten(own)[0], pieces, strict=True)))
    return loss.detach(), report


def gather(parts: list[Any], comm: Comm) -> Any:
    """Trees of tensors (B, ...) of this rank's micro-batches -> one tree (all B, ...) in canonical order."""
    flat = [tree_flatten(part)[0] for part in parts]
    joined = [comm.gather(torch.stack(same)).flatten(0, 1) for same in zip(*flat, strict=True)]
    return tree_unflatten(joined, tree_flatten(parts[0])[1])


def _whole(batches: list[Batch], comm: Comm) -> Batch:
    """The global batch without its images."""
    index = comm.gather(torch.stack([batch.index.to(comm.device) for batch in batches])).flatten()
    return replace(batches[0], views={}, extra={}, labels=None, index=index.cpu(), micro=0)
