"""Orders of passes: those of torch's own schedules, and their times by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import schedules

from megatron.pipe_schedule.drawing import MOST_COLUMNS, MOST_RANKS, drawn
from megatron.pipe_schedule.layout import PipeLayout
from megatron.pipe_schedule.order import forward_order, order_of
from megatron.pipe_schedule.timing import PassTimes, in_flight, most_in_flight, step_bubble, timeline

THEIRS = {
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero_bubble": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}
LAYOUTS = [
    *(PipeLayout("interleaved", ranks, chunks) for ranks in (2, 3, 4, 6) for chunks in (2, 3)),
    *(PipeLayout(name, ranks, 2) for name in ("zero_bubble", "dualpipev") for ranks in (2, 3, 4, 6)),
]
ONE = [PipeLayout("1f1b", ranks) for ranks in (1, 2, 4)]


def torchs(layout: PipeLayout, micro_batches: int) -> list[list[str]]:
    """The passes of torch's schedule, such as 3F1."""
    stages = [
        SimpleNamespace(
            num_stages=layout.stages,
            group_size=layout.ranks,
            group_rank=0,
            stage_index=stage,
            submod=torch.nn.Identity(),
            stage_index_to_group_rank=None,
        )
        for stage in layout.stages_of(0)
    ]
    made = THEIRS[layout.schedule](stages, micro_batches)
    return [
        [str(each) for action in passes if action for each in action.sub_actions or (action,)]
        for _, passes in sorted(made.pipeline_order.items())
    ]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_orders_are_those_of_torch(layout: PipeLayout) -> None:
    taken = [count for count in range(1, 20) if layout.takes(count)]
    for count in taken:
        ours = [[f"{work.stage}{work.kind}{work.batch}" for work in passes] for passes in order_of(layout, count)]
        assert ours == torchs(layout, count), count
    for count in set(range(1, 20)) - set(taken):
        with pytest.raises(ValueError, match=r".+"):
            torchs(layout, count)
        with pytest.raises(ValueError, match=f"does not take {count} micro batches"):
            order_of(layout, count)


@pytest.mark.parametrize("layout", [*LAYOUTS, *ONE], ids=str)
def test_each_stage_is_on_one_rank(layout: PipeLayout) -> None:
    held = [layout.stages_of(rank) for rank in range(layout.ranks)]
    assert sorted(stage for stages in held for stage in stages) == list(range(layout.stages))
    for rank, stages in enumerate(held):
        assert [layout.rank_of(stage) for stage in stages] == [rank] * layout.chunks


@pytest.mark.parametrize(("ranks", "chunks", "count"), [(4, 1, 8), (2, 1, 8), (4, 2, 8), (4, 2, 16), (4, 4, 8)])
def test_bubbles_are_those_of_the_papers(ranks: int, chunks: int, count: int) -> None:
    """(p - 1) / (v m + p - 1), arXiv:2104.04473 section 2.2, whatever a backward pass takes."""
    layout = PipeLayout("interleaved" if chunks > 1 else "1f1b", ranks, chunks)
    for times in (PassTimes(), PassTimes(1, 0.5, 0.5), PassTimes(1, 2, 1)):
        bubble = timeline(layout, count, times).bubble
        assert bubble == pytest.approx((ranks - 1) / (chunks * count + ranks - 1))


@pytest.mark.parametrize("name", ["zero_bubble", "dualpipev"])
@pytest.mark.parametrize(("ranks", "count"), [(2, 8), (4, 8), (4, 32)])
def test_what_turns_back_idles_less(name: str, ranks: int, count: int) -> None:
    """Where the three passes take equally long, a rank waits for the p - 1 others once, for one pass of one stage."""
    step = timeline(PipeLayout(name, ranks, 2), count)
    assert step.end == 3 * count + (ranks - 1) / 2
    assert step.bubble == pytest.approx((ranks - 1) / 2 / step.end)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_an_evaluation_has_every_forward_pass_once(layout: PipeLayout) -> None:
    for rank, passes in enumerate(forward_order(layout, 5)):
        assert sorted(passes) == sorted(("F", stage, batch) for stage in layout.stages_of(rank) for batch in range(5))
        for stage in layout.stages_of(rank):
            assert [work.batch for work in passes if work.stage == stage] == list(range(5))


@pytest.mark.parametrize("layout", [*LAYOUTS, *ONE], ids=str)
def test_the_bubble_of_a_long_step_follows_from_a_short_one(layout: PipeLayout) -> None:
    for times in (PassTimes(), PassTimes(1, 2, 1), PassTimes(1, 1, 0)):
        for count in (3 * layout.stages, 12 * layout.ranks):
            step, bubble = step_bubble(layout, count, times)
            assert bubble == pytest.approx(timeline(layout, count, times).bubble), (times, count)
            assert len(step.passes[0]) <= 3 * 6 * layout.stages


def test_micro_batches_in_flight() -> None:
    """One stage a rank has as many as there are ranks after it; ZB-V holds 2 p chunks of a half each on every rank."""
    assert [one.total() for one in in_flight(PipeLayout("1f1b", 4), 100)] == [4, 3, 2, 1]
    assert [one.total() for one in in_flight(PipeLayout("1f1b", 4), 2)] == [2, 2, 2, 1]
    assert {one.total() for one in in_flight(PipeLayout("zero_bubble", 4, 2), 100)} == {8}
    assert in_flight(PipeLayout("dualpipev", 4, 2), 1) == in_flight(PipeLayout("dualpipev", 4, 2), 8)
    for layout in LAYOUTS:
        enough = [most_in_flight(order) for order in order_of(layout, 8 * layout.stages)]
        assert in_flight(layout, 8 * layout.stages) == enough, layout


@pytest.mark.parametrize(
    ("layout", "count", "nearest"),
    [
        (PipeLayout("interleaved", 4, 2), 11, (10, 12)),
        (PipeLayout("interleaved", 2, 2), 5, (4, 6)),
        (PipeLayout("dualpipev", 4, 2), 5, (8,)),
    ],
    ids=str,
)
def test_nearest_numbers_of_micro_batches(layout: PipeLayout, count: int, nearest: tuple[int, ...]) -> None:
    assert not layout.takes(count)
    assert layout.nearest(count) == nearest


def test_a_drawing_has_a_character_a_unit_of_time() -> None:
    assert drawn(timeline(PipeLayout("1f1b", 2), 3)) == ["rank 0 FF..IWFIW.IW", "rank 1 .FIWFIWFIW.."]
    lines = drawn(timeline(PipeLayout("zero_bubble", 2, 2), 2))
    assert lines[0].startswith("rank 0 FF.fiwfiw")
    assert lines[1].startswith("rank 1 .FfFfiw")
    assert [line.count("F") for line in lines] == [line.count("f") for line in lines] == [2, 2]


def test_a_drawing_of_a_large_schedule_is_cut() -> None:
    lines = drawn(timeline(PipeLayout("dualpipev", 32, 2), 64))
    assert len(lines) == MOST_RANKS + 1
    assert lines[MOST_RANKS // 2] == "..."
    assert max(map(len, lines)) <= len("rank 31 ") + MOST_COLUMNS
