import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from toprovar_compile import demo
from toprovar_compile.demo import Demo
from toprovar_compile.measure import Job, Outcome, Quality, Way
from toprovar_compile.models.var import VAR
from toprovar_compile.plan import Plan
from toprovar_compile.schedule import ScaleSchedule

PLAN = Plan.keep_share(ScaleSchedule.from_patch_nums((1, 2, 4)), 2, 0.5, 2, bucket=4)
JOBS = (Job(3, "red apple", 0), Job(4, "a very long name that needs several lines", 1))


def _demo() -> Demo:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ways = (Way("eager", lambda m: m), Way("inductor", lambda m: m), Way("toprovar", lambda m: m, PLAN))
    outcomes = tuple(
        Outcome(way.name, (first,), (second, second), images)
        for way, first, second in zip(ways, (2.0, 60.0, 50.0), (2.0, 1.0, 0.5), strict=True)
    )
    same = Quality(1.0, 1.0, 100.0, 100.0)
    return Demo(ways, JOBS, outcomes, (same, same, Quality(0.95, 0.9, 30.0, 25.0)))


def test_speed_up_leaves_compilation_out() -> None:
    assert [_demo().speed_up(i) for i in range(3)] == [1.0, 2.0, 4.0]
    assert _demo().speed_up(2, over=1) == 2.0


def test_json_holds_every_number(tmp_path: Path) -> None:
    picture, text = demo.save(_demo(), tmp_path, {"model": {"name": "fake"}})
    data = json.loads(text.read_text())
    assert data["model"] == {"name": "fake"}
    assert [image["name"] for image in data["images"]] == [job.name for job in JOBS]
    eager, inductor, toprovar = data["ways"]
    assert eager["token_share"] is None
    assert inductor["compile_seconds"] == 59.0
    assert toprovar["compile_seconds"] == 49.5
    assert toprovar["token_share"] == [1.0, 1.0, 0.5]
    assert toprovar["ssim"] == 0.95
    assert Image.open(picture).size == (84 + 2 * 22, 42 + 3 * 22)


def test_the_sheet_shows_the_images_in_their_places() -> None:
    sheet = demo.contact_sheet(_demo())
    expected = demo.to_image(_demo().outcomes[2].images[1])
    x, y = 84 + 22, 42 + 2 * 22
    assert sheet.crop((x, y, x + 16, y + 16)).tobytes() == expected.tobytes()


def test_tables_are_readable() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    demo.show(_demo(), console)
    text = console.export_text()
    assert "toprovar" in text
    assert "equal" in text
    assert "4x4" in text


def test_a_scale_left_out_is_named() -> None:
    plan = Plan.keep_share(PLAN.schedule, 2, 1.0, 3, exit_scale=2)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(demo.scales_table(plan))
    assert "left out" in console.export_text()


def test_run_compares_with_the_first_way(tiny_var: VAR) -> None:
    def darker(model: VAR) -> object:
        def generate(labels: Tensor, *, seed: int) -> Tensor:
            return model(labels, seed=seed) * 0.5

        return generate

    phases: list[tuple[str, str, int]] = []
    found = demo.run(
        tiny_var,
        [Job(1, "one", 0), Job(2, "two", 1)],
        [Way("eager", lambda m: m), Way("again", lambda m: m), Way("darker", darker)],  # type: ignore[arg-type]
        device=torch.device("cpu"),
        sampling={},
        cold=False,
        on_image=lambda way, phase, done: phases.append((way.name, phase, done)),
    )
    assert found.qualities[1].psnr == 100.0
    assert found.qualities[2].ssim < 1.0
    assert found.qualities[2].ssim_worst <= found.qualities[2].ssim
    assert phases[:3] == [("eager", "compile", 0), ("eager", "compile", 1), ("eager", "run", 1)]
    assert torch.equal(found.outcomes[0].images[1:], tiny_var(torch.tensor([2]), seed=1))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_pictures_use_the_whole_range(value: float) -> None:
    image = demo.to_image(torch.full((3, 2, 2), value))
    assert image.getpixel((0, 0)) == (int(value * 255),) * 3
