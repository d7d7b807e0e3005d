"""Wrong letters are read back exactly, right ones never touched."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from afina.loaders.data.mojibake import CONTROL, INVISIBLE, is_mojibake, mend, mend_value

RIGHT = [
    "Café “naïve” – déjà vu, Grüße €5 😀 École",
    "Привет, мир",
    "日本語のテキスト",
    "Ελληνικά",
    "«CAFÉ» “Ä” IRMÃ»",  # capitals before closing quotation marks are meant
    "Ã and Â alone, São, Âncora, ÇA, É",
    "10 °C ± 2 µm © ®",
    "plain",
]


def wrong(text: str, encoding: str) -> str:
    """UTF-8 read in another encoding, as browsers read it: bytes without a character become control characters."""
    return "".join(
        shown if (shown := bytes([b]).decode(encoding, "ignore")) else chr(b)
        for b in text.encode()
    )  # fmt: skip


@pytest.mark.parametrize("text", RIGHT)
def test_what_is_right_stays(text: str) -> None:
    assert mend(text) == text
    assert not is_mojibake(text)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
@pytest.mark.parametrize("text", RIGHT[:4])
def test_what_was_read_wrongly_is_read_back(text: str, encoding: str) -> None:
    broken = wrong(text, encoding)
    assert is_mojibake(broken)
    assert mend(broken) == text
    assert mend(wrong(broken, encoding)) == text  # one time upon the other
    assert not is_mojibake(mend(broken))


def test_wrong_words_beside_right_ones() -> None:
    assert mend("“right” but itâ€™s dÃ©jÃ\xa0 vu — € 5") == "“right” but it’s déjà vu — € 5"
    stuck = "«cafÃ©»"  # the run of characters holds a right one too, and is no UTF-8
    assert mend(stuck) == stuck
    assert is_mojibake(stuck)


def test_a_single_sequence_of_a_rare_kind_is_no_evidence() -> None:
    assert mend("CAFÉ™") == "CAFÉ™"
    assert not is_mojibake("CAFÉ™")


@settings(max_examples=300, derandomize=True)
@given(st.text(st.characters(max_codepoint=0x2FFF, exclude_categories=("Cs", "Cc", "Cn")), max_size=40))
def test_mending_is_done_in_one_go_and_only_where_it_is_exact(text: str) -> None:
    once = mend(text)
    assert mend(once) == once
    if "Ã" not in text and "Â" not in text and "â" not in text and text.isascii():
        assert once == text
    assert not is_mojibake(text.encode("ascii", "ignore").decode())


def test_values_keep_their_shape() -> None:
    value = {"a": ["x", {"b": "y", "n": 1}], "t": True, "z": None}
    assert mend_value(value, str.upper) == {"a": ["X", {"b": "Y", "n": 1}], "t": True, "z": None}


def test_what_counts_as_control_and_invisible() -> None:
    assert CONTROL.sub("", "a\x00b\tc\r\nd\x85\ufeffe") == "ab\tc\r\nde"
    assert INVISIBLE.sub("", "a\u200bb\u202ec\u200dd") == "abc\u200dd"  # joiners are part of emoji and of scripts
