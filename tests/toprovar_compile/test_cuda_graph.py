"""Lanes without a device: what is captured, replayed and refused, told by graphs that only count."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from toprovar_compile import cuda_graph
from toprovar_compile.cuda_graph import Lane, Scale
from toprovar_compile.report import counters


class Recording:
    """Stands in for a captured graph: replaying runs the same function on the same memory."""

    def __init__(self, scale: Scale, fixed: list[Any], outputs: list[Any]) -> None:
        self.scale, self.fixed, self.outputs = scale, fixed, outputs
        self.replays = -1  # a capture launches the graph once

    def replay(self) -> None:
        self.replays += 1
        for out, new in zip(self.outputs, self.scale(self.fixed), strict=True):
            out.copy_(new)


@pytest.fixture(autouse=True)
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recording]]:
    made: list[Recording] = []

    def record(lane: Lane, scale: Scale, fixed: Any) -> tuple[Recording, list[Any]]:
        made.append(Recording(scale, list(fixed), [out.clone() for out in scale(fixed)]))
        return made[-1], made[-1].outputs

    monkeypatch.setattr(Lane, "_record", record)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(Lane, "recordable", staticmethod(lambda x: True))
    counters.reset()
    yield made
    counters.reset()


def scale(weight: Tensor, plan: str | None = None, program: str = "step") -> Scale:
    def run(args: Any) -> list[Tensor]:
        return [args[0] * args[1]]

    return Scale((program, (plan, 0)), run, lambda: None, lambda _: None, [0], (), group=plan)


def test_captured_at_the_second_run_and_replayed_on_new_values(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    for i in range(4):
        lane.begin()
        x = torch.tensor(float(i))
        assert lane.run(scale(weight), [x, weight])[0] == 3 * i
    assert [r.replays for r in recorded] == [2]


def test_a_weight_that_moved_runs_kernel_by_kernel_and_is_counted(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.nn.Parameter(torch.tensor(3.0), requires_grad=False)
    for _ in range(2):
        lane.begin()
        lane.run(scale(weight), [torch.tensor(1.0), weight])
    weight.data = torch.tensor(5.0)  # the same object in another place
    lane.begin()
    assert lane.run(scale(weight), [torch.tensor(1.0), weight])[0] == 5
    assert recorded[0].replays == 0
    assert counters.snapshot()["cuda_graph_miss: a weight or a cache is not where it was at capture"] == 1


def test_a_weight_that_moved_is_missed_at_every_scale(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.nn.Parameter(torch.tensor(3.0), requires_grad=False)
    scales = [replace(scale(weight), key=("step", s)) for s in range(2)]
    for _ in range(2):
        lane.begin()
        for each in scales:
            lane.run(each, [torch.tensor(1.0), weight])
    weight.data = torch.tensor(5.0)
    lane.begin()
    for each in scales:
        lane.run(each, [torch.tensor(1.0), weight])
    assert [r.replays for r in recorded] == [0, 0]


def test_what_a_graph_lends_is_read_where_it_is(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    for i in range(4):
        lane.begin()
        (x,) = lane.call("double", lambda a: [a * 2], [torch.tensor(float(i))], [], None)
        assert lane.run(scale(weight), [x, weight])[0] == 6 * i
        if i > 0:  # both are graphs
            assert [*lane._inputs.values()][-1] is x
            other = torch.tensor(5.0)
            assert lane.run(scale(weight), [other, weight])[0] == 15
            (x,) = lane.call("double", lambda a: [a * 2], [torch.tensor(7.0)], [], None)
            assert lane.run(scale(weight), [x, weight])[0] == 42


def doubled(a: Tensor) -> list[Tensor]:
    return [a * 2]


def test_what_ran_before_its_lane_was_known_becomes_a_graph_that_steps_read(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    for i in range(2):
        lane.begin()
        x = torch.tensor(2.0 * i)
        lane.ran("double", doubled, [torch.tensor(float(i))], [], None, [x])
        assert lane.run(scale(weight), [x, weight])[0] == 6 * i
    assert len(recorded) == 2
    for i in range(2, 4):
        lane.begin()
        (y,) = lane.call("double", doubled, [torch.tensor(float(i))], [], None)
        assert lane.run(scale(weight), [y, weight])[0] == 6 * i
        assert [*lane._inputs.values()][-1] is y
    assert [r.replays for r in recorded] == [2, 2]


def test_what_ran_in_another_precision_is_not_read_from_its_graph(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    for i in range(3):
        lane.begin()
        x = torch.tensor(2.0 * i, dtype=torch.float64)
        lane.ran("double", doubled, [torch.tensor(float(i))], [], None, [x])
        assert lane.run(scale(weight), [x, weight])[0] == 6 * i
    assert [*lane._inputs.values()][-1].dtype == torch.float64


def test_a_weight_changed_in_place_is_followed(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    for _ in range(2):
        lane.run(scale(weight), [torch.tensor(1.0), weight])
    weight.fill_(7.0)
    assert lane.run(scale(weight), [torch.tensor(2.0), weight])[0] == 14
    assert recorded[0].replays == 1


def test_graphs_of_plans_out_of_use_are_freed_and_captured_again(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    plans = [f"plan {i}" for i in range(cuda_graph._MAX_GROUPS + 1)]
    for plan in plans:
        for _ in range(2):
            lane.run(scale(weight, plan), [torch.tensor(1.0), weight])
    assert len(lane._graphs) == cuda_graph._MAX_GROUPS and len(recorded) == len(plans)
    assert lane.run(scale(weight, plans[0]), [torch.tensor(2.0), weight])[0] == 6
    assert len(recorded) == len(plans) + 1


def test_what_lies_between_steps_draws_from_its_generator() -> None:
    lane = Lane()

    def draw(x: Tensor, generator: torch.Generator) -> list[Tensor]:
        return [x + torch.rand(3, generator=generator)]

    one, other = (torch.Generator().manual_seed(1) for _ in range(2))
    got = lane.call("draw", draw, [torch.zeros(3)], [], one)
    assert torch.equal(got[0], torch.rand(3, generator=other))


def test_programs_share_the_place_of_a_tensor_until_they_are_given_different_ones(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)
    for x, y in ((1.0, 1.0), (2.0, 2.0), (3.0, 4.0), (5.0, 5.0)):
        lane.begin()
        same = torch.tensor(x)
        other = same if x == y else torch.tensor(y)
        assert lane.run(scale(weight, program="first"), [same, weight])[0] == 3 * x
        assert lane.run(scale(weight, program="second"), [other, weight])[0] == 3 * y
        assert lane.run(scale(weight, program="first"), [same, weight])[0] == 3 * x
    assert len(lane._inputs) == 2 and len({id(place) for place in lane._inputs.values()}) == 1


def test_two_inputs_of_a_program_never_share_a_place(recorded: list[Recording]) -> None:
    lane = Lane()

    def run(args: Any) -> list[Tensor]:
        return [args[0] - args[1]]

    both = Scale.stateless(("step", 0), run, [0, 1])
    x = torch.tensor(1.0)
    for a, b in ((x, x), (x, x), (torch.tensor(5.0), torch.tensor(2.0))):
        lane.begin()
        assert lane.run(both, [a, b])[0] == a - b


def test_a_condition_that_another_program_saw_first_is_still_new(recorded: list[Recording]) -> None:
    lane, weight = Lane(), torch.tensor(3.0)

    def step(program: str) -> Scale:
        return Scale((program, 0), lambda args: [args[0] * args[1]], lambda: None, lambda _: None, [0], [0])

    old, new = torch.tensor(1.0), torch.tensor(2.0)
    for _ in range(2):
        lane.begin()
        assert lane._put(step("first"), [old, weight])[1]
        assert lane._put(step("second"), [old, weight])[1]
        assert not lane._put(step("second"), [old, weight])[1]
    assert lane._put(step("first"), [new, weight])[1]
    assert lane._put(step("second"), [new, weight])[1]


def test_what_lies_between_steps_is_recorded_for_each_precision(
    recorded: list[Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane, x = Lane(), torch.ones(2)
    for enabled in (False, True, False, True):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device, enabled=enabled: enabled)
        lane.begin()
        lane.call("advance", lambda a: [a * 2], [x], [], None)
    assert len(recorded) == 2


def test_graphs_that_run_between_others_share_no_memory_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph writes what it computes on the way where one that was recorded later keeps its outputs."""
    handles = iter(range(10))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    lane, step = Lane(), scale(torch.ones(()))
    decoder = Scale.stateless(("decode", None), list, [0])
    lent = Scale.stateless(("advance", None), list, [0], lent=True)
    pools = [lane.pool(part) for part in (step, decoder, lent, step, decoder, lent)]
    assert pools[0] == pools[3] and pools[1] == pools[4] and len(set(pools)) == 4
