import importlib.util
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from toprovar_compile import measure
from toprovar_compile.errors import MissingDependencyError, OptionError
from toprovar_compile.measure import Job, Outcome, Quality, Way
from toprovar_compile.models.var import VAR

CPU = torch.device("cpu")
JOBS = [Job(1, "one", 5), Job(2, "two", 6), Job(3, "three", 7)]


def test_every_job_runs_after_the_warm_up_in_order() -> None:
    calls: list[tuple[int, int, dict[str, Any]]] = []
    steps: list[tuple[str, int]] = []

    def generate(labels: Tensor, *, seed: int, **sampling: Any) -> Tensor:
        calls.append((int(labels), seed, sampling))
        return torch.full((1, 3, 4, 4), seed / 10)

    outcome = measure.run_way(
        Way("fake", lambda model: generate),
        nn.Identity(),
        JOBS,
        device=CPU,
        sampling={"cfg": 2.0},
        warmup=2,
        on_image=lambda phase, done: steps.append((phase, done)),
    )
    order = [(1, 5), (1, 5), (1, 5), (2, 6), (3, 7)]
    assert calls == [(label, seed, {"cfg": 2.0}) for label, seed in order]
    assert steps == [("compile", 0), ("compile", 1), ("compile", 2), ("run", 1), ("run", 2), ("run", 3)]
    assert (len(outcome.warmup), len(outcome.seconds)) == (2, 3)
    assert outcome.images[:, 0, 0, 0].tolist() == pytest.approx([0.5, 0.6, 0.7])


def test_compile_time_is_what_the_warm_up_took_longer() -> None:
    images = torch.zeros(3, 3, 4, 4)
    assert Outcome("w", (10.0, 2.0), (1.0, 2.0, 3.0), images).compile_time == 8.0
    assert Outcome("w", (1.5,), (1.0, 2.0, 3.0), images).compile_time == 0.0


def test_closeness_of_equal_images_is_capped() -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    ssim, psnr = measure.closeness(images, images)
    found = Quality.of(ssim, psnr)
    assert found == Quality(pytest.approx(1.0), pytest.approx(1.0), measure.PSNR_CAP, measure.PSNR_CAP)
    assert Quality.decibels(found.psnr) == "equal"
    assert Quality.decibels(31.25) == "31.2"


def test_the_worst_image_counts_apart() -> None:
    found = Quality.of(torch.tensor([1.0, 0.5]), torch.tensor([40.0, 20.0]))
    assert found == Quality(0.75, 0.5, 30.0, 20.0)


def test_jobs_are_drawn_from_the_classes(tiny_var: VAR) -> None:
    jobs = measure.choose_jobs(tiny_var, 10, seed=3)
    assert {job.label for job in jobs} == set(range(10))
    assert [job.seed for job in jobs] == list(range(3, 13))
    assert jobs == measure.choose_jobs(tiny_var, 10, seed=3)
    assert jobs != measure.choose_jobs(tiny_var, 10, seed=4)
    with pytest.raises(OptionError, match="11 classes"):
        measure.choose_jobs(tiny_var, 11, seed=0)


def test_class_names_have_a_stand_in(tiny_var: VAR) -> None:
    tiny_var.class_names = None
    assert measure.class_name(tiny_var, 3) == "class 3"
    tiny_var.class_names = [f"name {i}" for i in range(10)]
    assert measure.class_name(tiny_var, 3) == "name 3"


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:x"])
def test_unknown_devices_are_errors(name: str) -> None:
    with pytest.raises(OptionError, match="device"):
        measure.pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda() -> None:
    assert measure.pick_device() == CPU
    with pytest.raises(OptionError, match="toprovar doctor"):
        measure.pick_device("cuda")


def test_the_machine_is_named() -> None:
    facts = measure.machine(CPU)
    assert facts["torch"] == torch.__version__
    assert facts["precision"] == "float32"
    assert re.search("attention", facts["attention"])


def test_missing_metrics_are_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"toprovar_compile\[metrics\]"):
        measure.require_metrics("demo")


def test_eager_is_the_model_itself(tiny_var: VAR) -> None:
    assert measure.eager_way().prepare(tiny_var) is tiny_var


def test_cold_caches_use_another_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/nowhere")
    with measure.cold_caches():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != "/nowhere"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/nowhere"
