"""The terminal: one live line where lines can be rewritten, plain lines elsewhere."""

import io
import math

import pytest

from megatron.metrics.console import Console, duration, is_live

RECORD = {
    "train/lm_loss": 4.1234,
    "train/learning_rate": 3e-4,
    "train/grad_norm": 1.02,
    "train/loss_scale": 1.0,
    "runtime/iteration_time": 0.5,
    "runtime/tokens_per_sec": 12345.0,
    "runtime/model_flops_utilization": 0.412,
}


def screen(text, width=200):
    """What a terminal shows: carriage return and erase-line undone."""
    lines, current = [], ""
    for chunk in text.replace("\r\x1b[2K", "\x00").replace("\n", "\n\x01").split("\x01"):
        ended = chunk.endswith("\n")
        for part in chunk.rstrip("\n").split("\x00"):
            current = part if "\x00" in chunk else current + part
        if ended:
            lines.append(current)
            current = ""
    return [*lines, current] if current else lines


def test_plain_lines_hold_everything():
    out = io.StringIO()
    Console(out, live=False).train(1200, RECORD, 3000)
    assert out.getvalue() == (
        "iteration 1,200/3,000 | loss 4.1234 | 12,345 tokens/s | MFU 41.2 % | 15m 00s left"
        " | lr 3.00e-04 | grad norm 1.02\n"
    )


def test_live_lines_replace_each_other_and_messages_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = io.StringIO()
    console = Console(out, live=True)
    console.train(1, RECORD, 10)
    console.message("saved")
    console.train(2, RECORD, 10)
    console.evaluation(2, "validation", {"validation/lm_loss": 3.21})
    console.close()
    shown = screen(out.getvalue())
    assert shown[:2] == ["saved", "validation at iteration 2 | lm_loss 3.2100"]
    assert len(shown) == 3 and shown[2].startswith("iteration 2/10")


def test_progress_moves_the_live_line_only_so_often_and_never_a_plain_one(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    now = [0.0]
    out = io.StringIO()
    console = Console(out, live=True, clock=lambda: now[0])
    console.train(1, RECORD, 100)
    console.progress(2)
    assert "iteration 2/" not in out.getvalue()
    now[0] = 1.0
    console.progress(3)
    assert "iteration 3/100 | loss 4.1234" in out.getvalue()
    plain = io.StringIO()
    quiet = Console(plain, live=False, clock=lambda: now[0])
    quiet.train(1, RECORD, 100)
    before = plain.getvalue()
    now[0] = 9.0
    quiet.progress(2)
    assert plain.getvalue() == before


def test_the_live_line_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = io.StringIO()
    Console(out, live=True).train(1, RECORD, 10)
    assert len(out.getvalue().removeprefix("\r\x1b[2K")) < 40


def test_the_launcher_decides_over_the_pipe():
    assert is_live(io.StringIO(), {"NEOX_TTY": "1"})
    assert not is_live(io.StringIO(), {})

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert is_live(Terminal(), {})
    assert not is_live(Terminal(), {"NEOX_TTY": "0"})


@pytest.mark.parametrize(
    ("seconds", "reported"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (200, "3m 20s"),
        (7500, "2h 05m"),
        (356400, "4d 03h"),
        (math.nan, "?"),
    ],
)
def test_duration(seconds, reported):
    assert duration(seconds) == reported
