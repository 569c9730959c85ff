"""Upstream key layouts by name, each with the way to timm's keys."""

from __future__ import annotations

from core.models.layouts import clip, plain, windowed
from core.models.layouts.keys import NESTED, Layout, State, any_starts, same


def _is_timm(state: State) -> bool:
    return bool(state)


def _never(state: State) -> bool:
    return False


# The first layout that fits is taken. Anything else counts as timm's own naming, which strict loading then checks.
LAYOUTS: dict[str, Layout] = {
    "proteus": Layout(any_starts("student.backbone."), plain.from_proteus),
    "fd": Layout(windowed.is_fd, windowed.from_fd),
    "unic": Layout(plain.is_unic, plain.from_unic),
    "dime_fm": Layout(clip.is_dime_fm, clip.from_dime_fm),
    "udi": Layout(plain.is_udi, plain.from_udi),
    "clip": Layout(clip.is_clip, clip.from_clip),
    "synclr": Layout(any_starts("visual.blocks."), plain.from_synclr),
    "esvit": Layout(windowed.is_esvit, windowed.from_esvit, nested=("student", *NESTED)),
    "swin": Layout(windowed.is_swin, windowed.from_swin),
    "dino": Layout(any_starts("backbone."), plain.from_dino),
    "ibot": Layout(_never, plain.from_dino),  # told from dino by nothing
    "beit": Layout(windowed.is_beit, windowed.from_beit),
    "deit3": Layout(plain.is_deit3, plain.from_deit3),
    "dinov2": Layout(plain.is_dinov2, plain.from_dinov2),
    "dbot_ft": Layout(lambda state: "fc_norm.weight" in state and "norm.weight" not in state, same),
    "timm": Layout(_is_timm, same),
}

__all__ = ["LAYOUTS", "NESTED", "Layout", "State"]
