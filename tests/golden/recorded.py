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
    "fd": r"(grad|final|coords)/.*|[yz]|raw|post|whitened|rec|features|logits|rates|mean|std|min|max|numel|names|json"
          r"|mean_.*|head_cosine_.*|grad_.*|final_.*|group|lr_scale|weight_decay|lr|lrs|all_trainable|loss|acc|losses"
          r"|dir\d_.*|weights|biases|running_.*|eval_logits|.*_keys|scales|(mixup|cutmix)_(x|target)|cutmix_lam"
          r"|soft_ce_.*|dst|dst_table|index|bias|ijhw|teacher_after_norm",
    "udi": r"(grad|requires_grad|after|student1|teacher1)/.*"
           r"|s\d+/((student|teacher)_[gl]\d|loss|parts_.*|grad.*|center)|mask|heat|center1?|norms|cancelled_.*"
           r"|c\d+_(src_map|tgt_map|mask|pos)|box_ijhw|coord|out|unflip_a|seg_out|.*_mask|linspace_rates|y"
           r"|grad_x|top[15]|p\d+_s\d+|lr_scale|wd|init_ratio|n_groups|features|logits|feat0"
           r"|head_[wb]1|epoch_loss|lr_per_epoch|val_acc1|names|shapes|group|state_keys|resized|blurred|lr|momentum|temp"
           r"|attn|coords|ref_local|(src|tgt)_maps_.*|cls_.*|patch_srs|tokens_.*|inter_.*|last_attn|forward|param_order"
           r"|trainable|[a-z]",
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


def _with(*names: str) -> Callable[[Any], bool]:
    """Cases that have one of these arrays."""
    return lambda case: any(name in case for name in names)


def _but(*names: str) -> Callable[[Any], bool]:
    """Cases that have none of them."""
    return lambda case: not any(name in case for name in names)


DRAWN = ("image_0", "init/")
RELEASE_ALONE = "the product makes no head of weight 0 and no mask token for it; the release decays theirs unused"
INPUT = "what this unit is given, under the name of another unit's result"

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
    "fd": {
        r"meta": Left("a remark alone, where no unit reads it"),
        r"y": Left(INPUT, _with("alphas", "weight0")),
        r"z": Left(INPUT, _with("decoder_weight")),
        r"logits": Left(INPUT, _with("mixup_lam")),
        r"names": Left(INPUT, _with("json")),
        r"final/.*\.k_bias": Left("the product has no biases of keys, which have no effect; see layouts.windowed"),
    },
    "udi": {
        r"scale": Left("the areas that were drawn from it are recorded"),
        r"epoch": Left("the temperature of that epoch is recorded", _with("center_init")),
        r"s\d+/(student|teacher)_[gl]\d|s\d+/.*_mask": Left(INPUT, _with("center_init")),
        r"box_ijhw": Left(INPUT, _with("image")),
        r"attn": Left(INPUT, _with("threshold")),
        r"y": Left(INPUT, _with("head_w0")),
        r"x": Left(INPUT),
        r"p": Left(INPUT, _with("draw")),
        r"[abn]": Left(INPUT, _but("a_args", "b_args")),
        r"c\d+_mask": Left(INPUT, _with("c0_src")),
        r"temp|lr|momentum": Left(INPUT, _but("hp_lr")),
        r"wd": Left(INPUT, _but("hp_lr", "lr_scale")),
    },
}

# Methods whose tolerances are those of each number; in the others, of the largest number of an array.
EACH = {"unic"}


def is_result(method: str, name: str) -> bool:
    return bool(re.fullmatch(RESULTS.get(method, ANY_METHOD), name))


def left_out(method: str, name: str, case: Any) -> bool:
    table = LEFT_OUT.get(method, {})
    return any(re.fullmatch(pattern, name) and left.when(case) for pattern, left in table.items())
