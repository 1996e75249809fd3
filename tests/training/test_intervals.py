"""When a run saves, evaluates and leaves."""

from megatron.training import intervals


def saves(limit: int, **settings: object) -> list[int]:
    defaults: dict[str, object] = {"scale": "linear", "factor": None, "extra": ()}
    return [step for step in range(limit + 1) if intervals.save_due(step, **{**defaults, **settings})]  # type: ignore[arg-type]


def test_linear_saves_at_multiples() -> None:
    assert saves(10, factor=4) == [4, 8]


def test_log_saves_at_powers() -> None:
    assert saves(40, scale="log", factor=2) == [1, 2, 4, 8, 16, 32]


def test_extra_saves_include_the_start() -> None:
    assert saves(10, extra=(0, 3)) == [0, 3]


def test_intervals() -> None:
    assert [step for step in range(9) if intervals.every(step, 4)] == [4, 8]
    assert not any(intervals.every(step, None) or intervals.every(step, 0) for step in range(9))


def test_reasons_to_leave() -> None:
    def reason(iteration: int, seconds: float) -> str | None:
        return intervals.exit_due(iteration, interval=5, elapsed_seconds=seconds, duration_minutes=2)

    assert reason(4, 10) is None
    assert "exit_interval" in (reason(5, 10) or "")
    assert "exit_duration" in (reason(4, 121) or "")
