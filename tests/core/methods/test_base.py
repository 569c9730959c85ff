from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from core.config import ConfigError
from core.methods.base import Info, check_widths, external_parameters


def test_parameters_read_from_outside_are_collected_from_the_modules_that_read_them() -> None:
    class Reader(nn.Linear):
        def external_parameters(self) -> list[nn.Parameter]:
            return [self.weight]

    whole = nn.Sequential(nn.Linear(1, 1), Reader(1, 1))
    assert list(external_parameters(whole)) == [(whole[1], whole[1].weight)]


def test_class_features_of_another_width_than_the_patches_are_refused_where_one_head_serves_both() -> None:
    info = Info("clip", 24, 2, 8, (4, 4), 1, has_cls=True, is_vit=True, img_size=32)
    check_widths({"a": info, "b": replace(info, projection=24)})
    with pytest.raises(
        ConfigError, match=r"teachers.b.cls: class features of 20 channels .* of 24; .* token or pooled"
    ):
        check_widths({"a": info, "b": replace(info, projection=20)})
