"""Stages run once, again when something they depend on changed, and from where an interrupted run stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.errors import RunError
from tools.stages import Stage, Stamps, run_stages

ROOT = Path(__file__).resolve().parents[2]


def appending(folder: Path, name: str, after: tuple[str, ...] = (), text: str = "x") -> Stage:
    """A stage that adds a line to `<name>.txt`, so that one sees how often it ran."""
    code = f"open({str(folder / f'{name}.txt')!r}, 'a').write({text!r} + '\\n'); print('made', {name!r})"
    return Stage(name, f"makes {name}", (sys.executable, "-c", code), (folder / f"{name}.txt",), after=after)


def runs(folder: Path, name: str) -> int:
    path = folder / f"{name}.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0


def run(folder: Path, *stages: Stage) -> dict[str, float]:
    return run_stages(stages, Stamps(folder / "stamps"), lambda line: None, os.environ)


def test_a_stage_runs_once(tmp_path: Path) -> None:
    one, two = appending(tmp_path, "one"), appending(tmp_path, "two", ("one",))
    assert list(run(tmp_path, one, two)) == ["one", "two"]
    run(tmp_path, one, two)
    assert (runs(tmp_path, "one"), runs(tmp_path, "two")) == (1, 1)


def test_a_changed_command_runs_again_with_all_that_use_it(tmp_path: Path) -> None:
    one, two, three = appending(tmp_path, "one"), appending(tmp_path, "two", ("one",)), appending(tmp_path, "three")
    run(tmp_path, one, two, three)
    run(tmp_path, appending(tmp_path, "one", text="y"), two, three)
    assert [runs(tmp_path, name) for name in ("one", "two", "three")] == [2, 2, 1]


def test_a_changed_file_runs_the_stage_again(tmp_path: Path) -> None:
    source = tmp_path / "source.txt"
    source.write_text("a")
    one = replace(appending(tmp_path, "one"), reads=(source,))
    run(tmp_path, one)
    os.utime(source, (1, 1))
    run(tmp_path, one)
    assert runs(tmp_path, "one") == 1
    source.write_text("b")
    run(tmp_path, one)
    assert runs(tmp_path, "one") == 2


def test_a_lost_result_is_made_again(tmp_path: Path) -> None:
    one = appending(tmp_path, "one")
    run(tmp_path, one)
    one.results[0].unlink()
    run(tmp_path, one)
    assert runs(tmp_path, "one") == 1


def test_a_failure_stops_and_is_tried_again(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    code = f"import os, sys; sys.exit(0 if os.path.exists({str(flag)!r}) else 3)"
    bad = Stage("bad", "fails at first", (sys.executable, "-c", code), (), after=("one",))
    one, last = appending(tmp_path, "one"), appending(tmp_path, "last", ("bad",))
    with pytest.raises(RunError, match="exit code 3"):
        run(tmp_path, one, bad, last)
    assert runs(tmp_path, "last") == 0
    flag.touch()
    run(tmp_path, one, bad, last)
    assert (runs(tmp_path, "one"), runs(tmp_path, "last")) == (1, 1)


def test_a_missing_result_is_a_error(tmp_path: Path) -> None:
    empty = Stage("empty", "does nothing", (sys.executable, "-c", ""), (tmp_path / "never",))
    with pytest.raises(RunError, match="never"):
        run(tmp_path, empty)


def test_what_a_different_version_left_is_forgotten(tmp_path: Path) -> None:
    one = appending(tmp_path, "one")
    forgotten: list[int] = []
    watched = replace(one, clean_up=lambda: forgotten.append(1))
    run(tmp_path, watched)
    run(tmp_path, watched)
    assert forgotten == []
    run(tmp_path, replace(appending(tmp_path, "one", text="y"), clean_up=watched.clean_up))
    assert forgotten == [1]


def test_an_answer_is_retained(tmp_path: Path) -> None:
    retained = tmp_path / "kept" / "answer.txt"
    run(tmp_path, replace(appending(tmp_path, "one"), output_file=retained))
    assert retained.read_text() == "made one\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_stage_goes_on_with_its_resume_arguments(tmp_path: Path, number: signal.Signals) -> None:
    """The signal reaches the command, which leaves a partial result; the next run gets the arguments to resume it."""
    script = tmp_path / "driver.py"
    script.write_text(f"""
import os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tools.stages import Stage, Stamps, run_stages
folder = Path({str(tmp_path)!r})
child = '''
import signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def leave(number, frame):
    (folder / "half").write_text("x")
    sys.exit(0)
signal.signal(signal.SIGTERM, leave); signal.signal(signal.SIGINT, leave)
if "--go-on" in sys.argv:
    (folder / "whole").write_text("x"); sys.exit(0)
(folder / "started").write_text("x")
time.sleep(60)
'''
def resume():
    return ["--go-on"] if (folder / "half").exists() else []
stage = Stage("slow", "sleeps", (sys.executable, "-c", child, str(folder)), (folder / "whole",), resume=resume)
try:
    run_stages([stage], Stamps(folder / "stamps"), print, os.environ)
except KeyboardInterrupt:
    sys.exit(130)
""")
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    assert process.wait(timeout=30) == 130
    assert (tmp_path / "half").exists()
    assert subprocess.run([sys.executable, str(script)], check=False, timeout=60).returncode == 0
    assert (tmp_path / "whole").exists()
