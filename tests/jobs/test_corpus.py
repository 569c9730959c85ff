from __future__ import annotations

import pytest

from core.features.select import Rules
from jobs.errors import UserError
from jobs.verbs.corpus import parse


def test_an_address_comes_first_and_rules_after_it() -> None:
    assert parse("store:data/chosen") == ("store:data/chosen", Rules())
    to, rules = parse("s3://bucket/x top=10 least=0.25 names=store:names.txt")
    assert (to, rules) == ("s3://bucket/x", Rules(top=10, least=0.25, names="store:names.txt"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top=3", "is no address"),
        ("store:x tops=3", "'tops' is not one of top, least.*top"),
        ("store:x top=many", "top must be of type int"),
        ("store:x top=0", "chooses nothing"),
    ],
)
def test_a_wrong_selection_is_refused_before_any_work(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(text)
