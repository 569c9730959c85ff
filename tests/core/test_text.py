"""Text of others: what a value may not hold, and what a terminal is not told."""

from __future__ import annotations

import pytest

from core.text import control, one_line, shown


@pytest.mark.parametrize(
    ("text", "found"),
    [("a b-c/ü", ""), ("a\nb", "\\n"), ("a\tb", "\\t"), ("\x1b[2J", "\\x1b"), ("\x7f", "\\x7f"), ("\x9b2J", "\\x9b"),
     ("a\u2028b", "\\u2028"), ("a\u202eb", "\\u202e"), ("\udcff", "\\udcff"), ("\U0001f44d\u200d\U0001f680", "")],
)  # fmt: skip
def test_the_first_control_character_is_named(text: str, found: str) -> None:
    assert control(text) == found


def test_a_text_may_have_several_lines_but_no_escapes() -> None:
    assert control("a\n\tb", lines=True) == ""
    assert control("a\n\x1b", lines=True) == "\\x1b"


@pytest.mark.parametrize(
    ("text", "harmless"),
    [("\x1b[31mred\x1b[0m", "red"), ("\x1b[2J\x1b[1;1Hx", "x"), ("\x1b]0;title\x07x", "x"), ("\x9b31mred", "red"),
     ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"), ("\x1bc\x1b(Bx", "x"), ("\x1b]52;c;aGk", "\\x1b]52;c;aGk"),
     ("over\rwritten", "over\\rwritten"), ("a\r\nb\tc", "a\nb\tc"), ("abc\x08\x08", "abc\\x08\\x08"),
     ("user\u202etxt.exe", "user\\u202etxt.exe"), ("\udcff", "\\udcff"),
     ("plain, ü, \U0001f680", "plain, ü, \U0001f680")],
)  # fmt: skip
def test_a_terminal_gets_lines_and_nothing_that_moves_it(text: str, harmless: str) -> None:
    assert shown(text) == harmless


def test_a_value_among_words_of_the_program_stays_in_its_line() -> None:
    assert one_line("x\nnext  make gc\x1b[2J") == "x\\nnext  make gc"


def test_long_texts_take_no_time_out_of_proportion() -> None:
    for piece in ("\x1b]", "\x90", "\x1b[", "\x1b[" + "1;" * 10):
        assert "\x1b" not in shown(piece * 20_000)
