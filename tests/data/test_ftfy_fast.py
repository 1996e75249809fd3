"""Mending Unicode gives what ftfy gives, and costs little where there is nothing to fix.

A step of ftfy that the quick searches do not know would break the first tests, a clean line sent to ftfy the last one.
"""

import ftfy
import pytest
from ftfy.badness import MOJIBAKE_CATEGORIES
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron.data.preprocess import ftfy_fast
from megatron.data.preprocess.ftfy_fast import mended
from megatron.errors import ConfigError

TEXTS = [
    "plain text\nof two lines\t\x0c",
    "“curly” ‘quotes’ ʼand dashes – — …",
    "schÃ¶n, voilÃ le travail, â€œquotedâ€\x9d",
    "a < b &amp; c\n&lt;tag&gt; &eacute; &#233; &#xe9;",
    "&amp;lt; first, then a < b\nand &lt; again",
    "ﬁ ﬂ Ĳ ＬＯＵＤ　Ｕﾀｰﾝ",
    "line\r\nline\rline\u2028line\u2029line\x85line",
    "e\u0301 is composed; “e”\u0301",
    "\x1b[36;44mblue\x1b[0m \x00\x07\x7f \ufeff \ufffc",
    "Â  a line that starts so\nÃ  and one more",
    "a Â b, naïve café, Œuvre œ! Ä€ x°² ×²",
    "a\u0302\u0323 " + "x" * 300 + "é" * 5,
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_equals_ftfy(text):
    assert mended(text) == ftfy.fix_text(text)


TELLING = "".join(TEXTS) + "".join(chars for chars in MOJIBAKE_CATEGORIES.values()).replace("\\", "")


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(
        alphabet=st.one_of(
            st.sampled_from(TELLING),
            st.sampled_from("ab <&;\n'\"’“â€œÃÂ œŒ°é à"),
            st.characters(exclude_categories=()),
        ),
        max_size=40,
    )
)
def test_any_text_equals_ftfy(text):
    assert mended(text) == ftfy.fix_text(text)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), encoding=st.sampled_from(["latin-1", "cp1252", "mac_roman", "cp437", "cp1251"]))
def test_text_in_a_wrong_encoding_equals_ftfy(text, encoding):
    wrong = text.encode("utf-8", "replace").decode(encoding, "replace")
    assert mended(wrong) == ftfy.fix_text(wrong)


def test_texts_longer_than_a_part_of_ftfy():
    """Ftfy parts a line of more than a million characters."""
    text = "é “x” " * 170_000 + "ﬁ" + "y" * 1_000_000 + "&lt;"
    assert mended(text) == ftfy.fix_text(text)


def test_a_clean_text_never_reaches_ftfy(monkeypatch):
    monkeypatch.setattr(ftfy_fast._mender(), "_fix_line", None)
    text = "Ünïcödé – and plain lines\n" * 100 + "“quoted”\n"
    assert mended(text) == text.replace("“", '"').replace("”", '"')


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    with pytest.raises(ConfigError, match="pip install ftfy"):
        ftfy_fast._Mender()
