"""The progress line: what it says and how often."""

import io

import pytest

from megatron.data.corpora.download import Transfer
from megatron.data.preprocess.pipeline import PreprocessProgress
from megatron.data.preprocess.progress_bar import ProgressLine, TransferLine, clock, describe

HALF = PreprocessProgress(documents=500, tokens=1_000_000, content_bytes=4_000_000, fraction=0.5, seconds=2.0)


def test_says_share_speed_and_time_left():
    assert describe(HALF) == " 50%  500 documents  1,000,000 tokens  2.0 MB/s  250 docs/s  0:02 left"


def test_a_known_number_of_documents_says_the_share():
    assert describe(HALF, known_documents=2000).startswith(" 25%")
    assert describe(HALF, known_documents=2000).endswith("0:06 left")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds, text):
    assert clock(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_live_on_a_terminal():
    stream = Terminal()
    line = ProgressLine(every=1, stream=stream)
    line(HALF)
    line(HALF)
    assert stream.getvalue() == "\r[##########..........]  " + describe(HALF).lstrip()
    line.close()
    assert stream.getvalue().endswith("\r")


def test_quiet_in_a_file():
    stream = io.StringIO()
    line = ProgressLine(every=1, stream=stream)
    line(HALF)
    line.close()
    assert stream.getvalue() == ""


def test_a_file_that_is_fetched():
    stream = Terminal()
    line = TransferLine(stream=stream)
    line(Transfer("a.zst", 25_000_000, 100_000_000))
    assert stream.getvalue() == "\ra.zst   25%  25.0 of 100.0 MB"
    line.close()
    other = TransferLine(stream=Terminal())
    other(Transfer("a.zst", 25_000_000, None))
    assert other._stream.getvalue() == "\ra.zst  25.0 MB"
