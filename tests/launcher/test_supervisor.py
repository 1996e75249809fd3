"""deepy.py owns the exit code and the signals, shows what failed, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.launcher.conftest import Deepy, wait_until_gone

# A worker that stops when asked, as train.py does, and writes the signal that it received.
STOPS = """
    received = []
    for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(each, lambda number, _: received.append(number))
    def note(name, text):
        with open(f"{name}.{rank}", "w") as file:
            file.write(f"{text}\\n")
    note("ready", os.getpid())
    while not received:
        time.sleep(0.02)
    time.sleep(SAVING)
    note("saved", received[0])
"""


def test_all_workers_done_is_zero_and_rank_0_is_live_while_the_others_are_retained(deepy: Deepy) -> None:
    code, out, err = deepy.run("print('said by', rank); print('aside', rank, file=sys.stderr)")
    assert code == 0
    assert out == "said by 0\n"
    assert "aside 0\n" in err and "aside 1" not in err
    logs = [(deepy.folder / f"run/work/rank_{rank}.log").read_text() for rank in range(2)]
    assert [sorted(log.splitlines()) for log in logs] == [["aside 0", "said by 0"], ["aside 1", "said by 1"]]


def test_a_long_path_of_temporary_files_is_no_obstacle(deepy: Deepy) -> None:
    folder = deepy.folder / ("a" * 60) / ("b" * 60)
    folder.mkdir(parents=True)
    deepy.environment["TMPDIR"] = str(folder)
    code, out, _ = deepy.run("print('rank', rank)")
    assert (code, out) == (0, "rank 0\n")


def test_scripts_named_as_modules_of_the_standard_library_are_no_obstacle(deepy: Deepy) -> None:
    for name in ("tokenize", "select", "token", "queue", "inspect"):
        (deepy.folder / f"{name}.py").write_text("raise SystemExit('this is a script of the user')")
    (deepy.folder / "beside.py").write_text("NAME = 'beside'")
    code, out, err = deepy.run("import beside; print(beside.NAME, 'PYTHONSAFEPATH' in os.environ)", "--num_gpus", "1")
    assert (code, out) == (0, "beside False\n"), err


def test_a_restart_appends_to_the_logs(deepy: Deepy) -> None:
    deepy.run("print('first')")
    deepy.run("print('second')")
    assert (deepy.folder / "run/work/rank_1.log").read_text() == "first\nsecond\n"
    assert len((deepy.folder / "run/work/launches.jsonl").read_text().splitlines()) == 2


KILLED = {signal.SIGKILL: 137, signal.SIGSEGV: 139, signal.SIGABRT: 134}
FAILURES = {
    "exit code": 'print("the disk is on fire", file=sys.stderr); sys.exit(3)',
    "traceback": 'raise ValueError("shape [3, 4] does not fit")',
    **{number.name: f'print("about to go", flush=True); os.kill(os.getpid(), {int(number)})' for number in KILLED},
}
"""What rank 1 does while rank 0 would go on for minutes."""
Ended = dict[str, tuple[int, str, str]]
"""Exit code, stdout and stderr."""


@pytest.fixture(scope="module")
def failed(light_deepspeed: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """How each failure ends. They run at once, since each waits until the time of grace is over."""
    started = {
        name: Deepy(tmp_path_factory.mktemp("failed"), light_deepspeed).start(f"""
            if rank == 1:
                {body}
            time.sleep(600)
        """)
        for name, body in FAILURES.items()
    }
    return {name: each.finish() for name, each in started.items()}  # rank 0 is not waited for


def test_a_failing_worker_gives_its_code_and_its_last_lines_first(failed: Ended) -> None:
    code, _, err = failed["exit code"]
    assert code == 3
    report = [line for line in err.splitlines() if "rank 1" in line]
    assert report[0] == "[rank 1] the disk is on fire"
    assert report[-1] == "rank 1 failed first, with exit code 3; its last lines are above"


def test_a_traceback_arrives_full(failed: Ended) -> None:
    code, _, err = failed["traceback"]
    assert code == 1
    assert "[rank 1] Traceback (most recent call last):" in err
    assert "[rank 1] ValueError: shape [3, 4] does not fit" in err


@pytest.mark.parametrize(("number", "code"), KILLED.items())
def test_a_worker_killed_by_a_signal_is_128_plus_its_number(failed: Ended, number: signal.Signals, code: int) -> None:
    got, _, err = failed[number.name]
    assert got == code
    assert f"rank 1 failed first, with signal {number.name}" in err and "[rank 1] about to go" in err


def test_the_first_failure_counts_not_the_ones_it_causes(deepy: Deepy) -> None:
    code, _, err = deepy.run("""
        if rank == 0:
            print("the cause")
            sys.exit(7)
        while not os.path.exists("over"):
            time.sleep(0.3)
            open("over", "w")
        sys.exit(1)
    """)
    assert code == 7
    assert "rank 0 failed first, with exit code 7" in err


STOPPED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture(scope="module")
def stopped(light_deepspeed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[int, str, list[str]]]:
    """By signal: exit code, stderr, and what the workers saved. Saving outlasts the launcher's polling, so all run at
    once.
    """
    started = {
        number: Deepy(tmp_path_factory.mktemp("stopped"), light_deepspeed).start(STOPS.replace("SAVING", "1.2"))
        for number in STOPPED
    }
    for number, each in started.items():
        each.wait_for("ready.0", "ready.1")
        each.process.send_signal(number)
    found = {}
    for number, each in started.items():
        code, _, err = each.finish()
        found[int(number)] = code, err, [(each.folder / f"saved.{rank}").read_text().strip() for rank in range(2)]
    return found


@pytest.mark.parametrize("number", STOPPED)
def test_a_stop_signal_reaches_the_workers_which_save_and_leave_with_zero(
    number: int, stopped: dict[int, tuple[int, str, list[str]]]
) -> None:
    code, err, saved = stopped[number]
    assert code == 0
    assert saved == [str(int(number))] * 2
    assert "the workers save and stop" in err


def test_a_stop_signal_sent_to_the_full_process_group_does_no_harm(deepy: Deepy) -> None:
    """Ctrl-C on a terminal signals every process of the foreground group; the workers are not in it."""
    started = deepy.start(STOPS.replace("SAVING", "0.2"))
    pids = started.wait_for("ready.0", "ready.1")
    assert all(os.getpgid(int(pid)) != os.getpgid(started.process.pid) for pid in pids)
    assert all(os.getsid(int(pid)) != os.getsid(started.process.pid) for pid in pids)
    started.process.send_signal(signal.SIGINT)
    assert started.finish()[0] == 0


def test_a_second_interrupt_ends_at_once(deepy: Deepy) -> None:
    started = deepy.start(STOPS.replace("SAVING", "600"))
    pids = started.wait_for("ready.0", "ready.1")
    started.process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    started.process.send_signal(signal.SIGINT)
    code, _, err = started.finish()
    assert code == 130
    assert "ended by SIGINT without saving" in err
    wait_until_gone(*(int(pid) for pid in pids), timeout=0.1)


def test_a_worker_that_a_stop_signal_ends_is_reported_as_such(deepy: Deepy) -> None:
    started = deepy.start("open(f'ready.{rank}', 'w').write('yes\\n'); time.sleep(600)")
    started.wait_for("ready.0", "ready.1")
    started.process.send_signal(signal.SIGTERM)
    code, _, err = started.finish()
    assert code == 143
    assert "ended by SIGTERM without saving" in err


GRANDCHILD = """
    import subprocess
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    for name, pid in (("worker", os.getpid()), ("rank", os.getppid()), ("child", child.pid)):
        with open(f"{name}.{rank}", "w") as file:
            file.write(f"{pid}\\n")
    time.sleep(600)
"""
PIDS = [f"{name}.{rank}" for name in ("worker", "rank", "child") for rank in range(2)]


def _launcher_of(rank_pid: str) -> int:
    return int(Path(f"/proc/{rank_pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_nothing_survives_a_kill_of_deepy_itself(deepy: Deepy) -> None:
    started = deepy.start(GRANDCHILD)
    pids = started.wait_for(*PIDS)
    launcher = _launcher_of(pids[2])
    started.process.kill()
    started.process.wait()
    wait_until_gone(launcher, *(int(pid) for pid in pids))


def test_nothing_survives_a_failure_or_the_death_of_the_launcher(deepy: Deepy) -> None:
    started = deepy.start(GRANDCHILD)
    pids = started.wait_for(*PIDS)
    os.kill(_launcher_of(pids[2]), signal.SIGKILL)
    code, _, _ = started.finish()
    assert code == 137
    wait_until_gone(*(int(pid) for pid in pids), timeout=0.1)


def test_nothing_survives_a_worker_that_fails(deepy: Deepy) -> None:
    started = deepy.start(GRANDCHILD)
    pids = started.wait_for(*PIDS)
    os.kill(int(pids[0]), signal.SIGKILL)
    code, _, _ = started.finish()
    assert code == 137
    wait_until_gone(*(int(pid) for pid in pids), timeout=0.1)


def test_a_child_left_behind_by_a_worker_that_succeeded_is_ended(deepy: Deepy) -> None:
    code, _, _ = deepy.run(GRANDCHILD.replace("time.sleep(600)\n", "sys.exit(0)\n"))
    assert code == 0
    wait_until_gone(*(int((deepy.folder / name).read_text()) for name in PIDS), timeout=0.1)


def test_rank_0_reads_the_users_input_and_the_others_none(deepy: Deepy) -> None:
    started = deepy.start("print(repr(sys.stdin.read()), file=open(f'read.{rank}', 'w'))")
    started.process.communicate("a question\n", timeout=30)
    assert (deepy.folder / "read.0").read_text() == "'a question\\n'\n"
    assert (deepy.folder / "read.1").read_text() == "''\n"


def test_the_logs_keep_what_a_live_line_showed_last(deepy: Deepy) -> None:
    code, out, _ = deepy.run(r"print('\x1b[2Kstep 1\r\x1b[2Kstep 2'); print('done', end='')")
    assert code == 0
    assert out == "\x1b[2Kstep 1\n\x1b[2Kstep 2\ndone"  # text mode reads a carriage return as a line's end
    assert (deepy.folder / "run/work/rank_0.log").read_text() == "step 2\ndone\n"
