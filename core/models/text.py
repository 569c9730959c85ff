"""CLIP's text side: the tokeniser and the text tower of open_clip, for prompts, zero-shot classifiers and features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from core.models.layouts.keys import State, WeightsError, few
from core.models.misfit import problems_of
from core.models.weights import unwrap

SLOTS = 77


@cache
def _bpe() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def tokenize(texts: Sequence[str], slots: int = SLOTS) -> Tensor:
    """(N, slots) int64 of CLIP's byte-pair ids between a start and an end token, zeros behind them.

    What does not fit is cut off, the end token included, as in the released training and evaluation; `pool` then takes
    the largest id that is left.
    """
    ids = torch.zeros(len(texts), slots, dtype=torch.int64)
    for row, text in zip(ids, texts, strict=True):
        kept = tokens(text)[:slots]
        row[: len(kept)] = torch.tensor(kept)
    return ids


def tokens(text: str) -> list[int]:
    """All ids of a sentence, with the start and the end token."""
    bpe = _bpe()
    return [bpe.sot_token_id, *bpe.encode(text), bpe.eot_token_id]


def pool_position(ids_NS: Tensor) -> Tensor:
    """(N,): where a sentence's vector is taken, at its largest id: the end token's unless that was cut off."""
    return ids_NS.argmax(dim=-1)


class TextTower(nn.Module):
    """A CLIP text tower: token ids (N, S) -> projected vectors (N, E), pooled at the largest id."""

    def __init__(self, width: int, layers: int, heads: int, dim: int, slots: int = SLOTS, vocabulary: int = 49408,
                 quick_gelu: bool = True) -> None:  # fmt: skip
        super().__init__()
        from open_clip.transformer import QuickGELU, TextTransformer

        self.model = TextTransformer(
            context_length=slots, vocab_size=vocabulary, width=width, heads=heads, layers=layers, output_dim=dim,
            pool_type="argmax", act_layer=QuickGELU if quick_gelu else nn.GELU,
        )  # fmt: skip
        self.slots = slots

    def forward(self, ids_NS: Tensor) -> Tensor:
        return cast(Tensor, self.model(ids_NS))

    @torch.no_grad()
    def encode(self, texts: Sequence[str], batch: int = 256) -> Tensor:
        """(N, E) float32 of sentences, on the tower's device."""
        device = next(self.parameters()).device
        ids_NS = tokenize(texts, self.slots)
        return torch.cat([self(part.to(device)).float() for part in torch.split(ids_NS, batch)])


def text_tower(state: Mapping[str, Any], quick_gelu: bool = True) -> TextTower:
    """The text tower in a CLIP checkpoint of OpenAI's key layout, sized by its arrays; image keys are left aside.

    Raises WeightsError when a key is missing or of another shape.
    """
    sizes, tensors = check_text_tower(state)
    tower = TextTower(**sizes, quick_gelu=quick_gelu)
    own = tower.model.state_dict()
    tower.model.load_state_dict({key: tensors[key].float() if key in tensors else own[key] for key in own})
    return tower.eval().requires_grad_(False)


def check_text_tower(state: Mapping[str, Any]) -> tuple[dict[str, Any], State]:
    """Arguments of the text tower in a checkpoint, and its tensors, of which no numbers are looked at.

    Raises WeightsError as text_tower.
    """
    tensors = {key.removeprefix("text."): value for key, value in unwrap(state).items()}
    try:
        slots, width = tensors["positional_embedding"].shape
        vocabulary, dim = tensors["token_embedding.weight"].shape[0], tensors["text_projection"].shape[1]
    except KeyError as error:
        raise WeightsError(f"no CLIP text tower: {error.args[0]} is missing from the weights") from None
    except (ValueError, IndexError):
        raise WeightsError("no CLIP text tower: its tables have not two axes") from None
    layers = len({key.split(".")[2] for key in tensors if key.startswith("transformer.resblocks.")})
    sizes: dict[str, Any] = {"width": width, "layers": layers, "heads": max(1, width // 64), "dim": dim, "slots": slots,
             "vocabulary": vocabulary}  # fmt: skip
    try:
        with torch.device("meta"):
            own = TextTower(**sizes).model.state_dict()
    except (AssertionError, RuntimeError) as error:
        raise WeightsError(f"no CLIP text tower can have {sizes}: {error}") from None
    given = {key: value for key, value in tensors.items() if key in own}
    if missing := sorted(own.keys() - given.keys() - {"attn_mask"}):
        raise WeightsError(f"no whole CLIP text tower: missing {few(missing)}")
    if problems := problems_of(own, own | given):
        raise WeightsError("\n  ".join(["no CLIP text tower", *problems]))
    return sizes, given
