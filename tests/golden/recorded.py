"""Which arrays of a method's files are results, and the one table of those that are deliberately not compared.

Every other result must be compared with what the product computes, or the case fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

DIME_FM_INPUTS = (
    "seed|image_hw|scale|ratio|mean|std|image_\\d+|tsv_\\d+|x[12]|.*_img|teacher_text|temps|weights|flags_.*|columns"
    "|world_size|wrong_.*|B|d|epochs|warmup_.*|n_iter|.*_lr|(binary_)?labels|scores|multilabel|binary(_scores)?|.*_labels"
    "|score_formula|wd_log_range|use_left_only|val_fraction|(train|val)_[xy]|init_text_weights|lr|weight_decay|momentum"
    "|batch(_size)?|sample_order|metric|width|layers|heads|embed_dim|patch|resolution|ln_eps|shrink_.*|param_keys_sorted"
    "|sorted_param_keys|depths|window|proj_dim|images|init/.*|betas|eps|per_step_columns|torch_seed_.*|text_embeddings"
    "|image_features|image_seed|texts|items|dataroot|files"
)

# Of names of arrays, by method: those that are results. Methods that do not mark their results name their inputs.
RESULTS = {
    "unic": r"out\..*",
    "dime_fm": f"(?!({DIME_FM_INPUTS})$).*",
    "proteus": r"(o|g|w|ema|final|norm)/.*|(out|out_cls|neck_out|inter_.*|probs|top1)(_\d.*)?|lr_used.*|best_.*"
               r"|.*_(out|idx|score|scores)|cls(_masked)?|patch_tokens.*|prenorm|no_decay.*|decay_shapes|frozen|optimizer"
               r"|in_dims|losses|lr|wd|lr_history|values|n_valid|ap|map|loss|grad|missing|unexpected|converted_keys"
               r"|n_masked|pos_embed_resized|indices|num_selected|num_samples|masks_weight|upperbound|scaled_lr"
               r"|mask_indices",
}
# Any other method's, until it says more.
ANY_METHOD = r"(out|o|g|w|ema|final|grad|expected)([./_].*)?|ref_.+"



class Left(NamedTuple):
    """Why arrays are not compared, and in which cases."""

    why: str
    when: Callable[[Any], bool] = lambda case: True


def _no_weight(*places: int) -> Callable[[Any], bool]:
    """Of Proteus: no term that these entries of `lambdas` (token, feature, patch) weigh is part of the loss."""
    return lambda case: not any(case["lambdas"][place] for place in places)


def _is_nan(name: str) -> Callable[[Any], bool]:
    return lambda case: bool(case[name] != case[name])


DRAWN = ("image_0", "init/")
RELEASE_ALONE = "the product makes no head of weight 0 and no mask token for it; the release decays theirs unused"

# Method -> pattern of names -> why these are not compared.
LEFT_OUT: dict[str, dict[str, Left]] = {
    "unic": {
        r"in\.draws.*": Left("the draws of in.u once more, in the order in which the release's loop consumes them"),
        r"in\.test_labels": Left("of images whose predictions are compared; no score of them is recorded"),
        r"out\.final\.encoder\.mask_token": Left("in no student of the product: the release neither uses nor moves it"),
    },
    "dime_fm": {
        r"seed": Left("of arrays that are recorded themselves", lambda case: any(k.startswith(DRAWN) for k in case)),
        r"(fp16|bf16)_logits": Left("what half precision would give"),
        r"acc": Left("the toolkit gives no accuracy where a class has no sample", _is_nan("acc")),
    },
    "proteus": {
        r"y_(train|val)": Left("of a fit of unknown strength whose scores are recorded", lambda case: "scores" in case),
        r"w/patch_head\..*|(w/student\.backbone|ema)[./]mask_token": Left(RELEASE_ALONE, _no_weight(2)),
        r"w/fea_head\..*": Left(RELEASE_ALONE, _no_weight(1)),
        r"w/token_head\..*": Left(RELEASE_ALONE, _no_weight(0, 1)),
    },
}

# Methods whose tolerances are those of each number; in the others, of the largest number of an array.
EACH = {"unic"}


def is_result(method: str, name: str) -> bool:
    return bool(re.fullmatch(RESULTS.get(method, ANY_METHOD), name))


def left_out(method: str, name: str, case: Any) -> bool:
    table = LEFT_OUT.get(method, {})
    return any(re.fullmatch(pattern, name) and left.when(case) for pattern, left in table.items())
