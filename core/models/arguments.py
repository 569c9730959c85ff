"""What a recipe may hand to `timm.create_model` for a network of its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.merge import ConfigError

SHAPE = ("pretrained_window_size", "pretrained_window_sizes")  # of SwinV2's positions: they load nothing
# Timm would read files and addresses by them, past the checks and recorded hashes of `weights`.
LOADING = ("checkpoint_path", "cache_dir")
# They wrap the network or put it elsewhere, and nothing could be taken from it.
WRAPPING = ("features_only", "feature_cfg", "feature_cls", "out_indices", "kwargs_filter", "scriptable", "exportable",
            "no_jit", "device", "dtype")  # fmt: skip


def check_arguments(args: Mapping[str, Any], field: str) -> None:
    """field: the network's in the recipe, for messages.  Raises ConfigError for what would not be as it is stated."""
    for name, value in args.items():
        where = f"{field}.args.{name}"
        if name in LOADING or (name.startswith("pretrained") and name not in SHAPE):
            raise ConfigError(
                f"{where}: weights are never loaded by timm itself, past their checks and hashes; remove it and name "
                f"them in {field}.weights: hub:<id>, file:///x, s3://x, store:x or run:<id>"
            )
        if name in WRAPPING:
            raise ConfigError(f"{where}: makes something else of the network, with which nothing works here; remove it")
        if value is None:
            raise ConfigError(
                f"{where}: timm drops null and keeps its own default; write what is meant: 0, false or '' for none (as "
                f"init_values: 0), or remove it for the default"
            )
