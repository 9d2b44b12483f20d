import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from toprovar_compile import calibrate, cli, measure, models
from toprovar_compile.bench import emoji_var as bench
from toprovar_compile.bench import fae as bench_fae
from toprovar_compile.errors import OptionError, PlanError
from toprovar_compile.measure import Way
from toprovar_compile.models.bsq import BSQVAEConfig
from toprovar_compile.models.emoji_infinity import EmojiInfinity, init_weights
from toprovar_compile.models.infinity import InfinityConfig
from toprovar_compile.models.var import VAR
from toprovar_compile.models.word_text import WordTextConfig
from toprovar_compile.plan import Plan

NAMES = ["red apple", "rocket", *(f"thing {i}" for i in range(2, 10))]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_var: VAR) -> Callable[..., Any]:
    """The command line with a tiny model in place of the shipped ones, and no compilation."""
    monkeypatch.setattr(tiny_var, "class_names", NAMES)
    folder = tmp_path / "weights"
    folder.mkdir()
    plan = Plan.keep_share(tiny_var.schedule, 3, 0.5, 4, bucket=4, fingerprint=tiny_var.fingerprint())
    monkeypatch.setattr(tiny_var, "plan", plan)
    (folder / "classes.json").write_text(json.dumps([{"name": n, "code": "", "base": 0} for n in NAMES]))

    def load(name: str, device: object = None) -> VAR:
        if name != "tiny":
            raise OptionError(f"there is no model {name!r}", where="models.load")
        return tiny_var

    monkeypatch.setattr(models, "load", load)
    monkeypatch.setattr(models.loading, "folder_of", lambda name: folder)
    models.loading._classes.cache_clear()
    monkeypatch.setattr(measure, "inductor_way", lambda mode=None: Way("inductor", lambda m: m))
    monkeypatch.setattr(measure, "toprovar_way", lambda plan, name="toprovar", **_: Way(name, lambda m: m, plan))
    yield lambda *arguments: CliRunner().invoke(cli.app, list(map(str, arguments)))
    models.loading._classes.cache_clear()


def test_demo_writes_a_sheet_and_numbers(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("demo", "--model", "tiny", "-n", 3, "-o", tmp_path / "out", "--warm")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert [image["name"] for image in data["images"]][:2] == ["red apple", "rocket"]
    assert len({image["label"] for image in data["images"]}) == 3
    assert [way["name"] for way in data["ways"]] == ["eager", "inductor", "toprovar"]
    assert data["ways"][2]["token_share"][-1] < 1
    assert data["sampling"]["cfg"] == 1.5
    Image.open(tmp_path / "out" / "demo.png").verify()
    assert "toprovar" in result.output
    assert "SSIM" in result.output


def test_generate_writes_one_picture_an_image(run: Callable[..., Any], tmp_path: Path, tiny_var: VAR) -> None:
    result = run(
        "generate", "rocket", "3", "--model", "tiny", "-n", 2, "--seed", 5, "--backend", "eager", "-o", tmp_path
    )
    assert result.exit_code == 0, result.output
    found = sorted(path.name for path in tmp_path.glob("*.png"))
    assert found == ["rocket-5.png", "rocket-6.png", "thing-3-5.png", "thing-3-6.png"]
    from toprovar_compile.demo import to_image

    expected = to_image(tiny_var(torch.tensor([1]), seed=6)[0])
    assert Image.open(tmp_path / "rocket-6.png").tobytes() == expected.tobytes()


def test_sampling_options_reach_the_model(run: Callable[..., Any], tmp_path: Path, tiny_var: VAR) -> None:
    from toprovar_compile.demo import to_image

    run("generate", "1", "--model", "tiny", "--cfg", 3, "--top-k", 2, "--backend", "eager", "-o", tmp_path)
    expected = to_image(tiny_var(torch.tensor([1]), seed=0, cfg=3.0, top_k=2)[0])
    assert Image.open(tmp_path / "rocket-0.png").tobytes() == expected.tobytes()


def test_calibrate_writes_a_plan(run: Callable[..., Any], tmp_path: Path, tiny_var: VAR) -> None:
    path = tmp_path / "plan.json"
    result = run(
        "calibrate", "--model", "tiny", "--prompts", 2, "-o", path, "--set", "tau=0.3", "--set", "restore=identity"
    )
    assert result.exit_code == 0, result.output
    plan = Plan.load(path)
    assert plan.restore == "identity"
    plan.check_model(tiny_var.fingerprint(), tiny_var.schedule, 3)
    assert f"wrote {path}" in result.output.replace("\n", "")


def test_bench_passes_its_options_on(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bench.Settings] = []

    def fake(settings: bench.Settings, folder: Path, log: object) -> Path:
        seen.append(settings)
        path = folder / "r.json"
        machine = {"hardware": "none"}
        path.write_text(json.dumps({"benchmark": "emoji-var", "images": [], "machine": machine, "ways": []}))
        return path

    monkeypatch.setattr(bench, "run", fake)
    result = run("bench", "emoji-var", "--classes", 3, "--plan", "dense", "--plan", "exit=4", "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert seen == [bench.Settings(classes=3, plans=("dense", "exit=4"))]


def test_bench_fae_passes_its_options_on(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bench_fae.Settings] = []

    def fake(settings: bench_fae.Settings, folder: Path, log: object) -> Path:
        seen.append(settings)
        path = folder / "r.json"
        path.write_text(json.dumps({"machine": {"hardware": "none", "precision": "float16"}, "rows": []}))
        return path

    monkeypatch.setattr(bench_fae, "run", fake)
    result = run("bench", "fae", "--dtype", "float16", "--models", "var", "--rounds", 5, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert seen == [bench_fae.Settings(dtype="float16", models="var", rounds=5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--model", "tinny"), "there is no model 'tinny'"),
        (("demo", "--model", "tiny", "--device", "gpu"), "'gpu' is not a device"),
        (("demo", "--model", "tiny", "--plan", "densse"), "did you mean 'dense'"),
        (("generate", "nothing", "--model", "tiny"), "no class of tiny is called 'nothing'"),
        (("generate", "10", "--model", "tiny"), "there is no class 10"),
        (("generate", "1", "--model", "tiny", "--backend", "toprova"), "did you mean 'toprovar'"),
        (("bench", "emoji-vr"), "did you mean 'emoji-var'"),
        (("bench", "fae", "--dtype", "bfloat"), "did you mean 'bfloat16'"),
        (("calibrate", "-o", "x", "--model", "tiny", "--set", "tau"), "expected KEY=VALUE"),
        (("calibrate", "-o", "x", "--model", "tiny", "--set", "tua=1"), "did you mean 'tau'"),
    ],
)
def test_errors_are_one_readable_line(run: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    (line,) = result.output.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_errors_inside_the_compiler_are_found() -> None:
    ours = PlanError("wrong")
    wrapped = RuntimeError("backend failed")
    wrapped.inner_exception = ours  # type: ignore[attr-defined]
    try:
        try:
            raise ours
        except PlanError as error:
            raise ValueError("x") from error
    except ValueError as error:
        assert cli.find_own_error(error) is ours
    assert cli.find_own_error(wrapped) is ours
    assert cli.find_own_error(ValueError("x")) is None


def test_other_errors_keep_their_traceback(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(calibrate, "calibrate", broken)
    result = run("calibrate", "-o", "x", "--model", "tiny")
    assert isinstance(result.exception, ZeroDivisionError)


def test_explain_prints_what_ran(monkeypatch: pytest.MonkeyPatch, tiny_var: VAR) -> None:
    monkeypatch.setattr(models, "load", lambda name, device: tiny_var)
    result = CliRunner().invoke(cli.app, ["explain", "tiny", "--plan", "keep=0.5,from=4,bucket=4"])
    assert result.exit_code == 0, result.output
    assert "graph 0: step" in result.output
    assert "3 layers" in result.output
    assert "prune" in result.output


def test_a_backend_error_is_one_readable_line(monkeypatch: pytest.MonkeyPatch, tiny_var: VAR) -> None:
    monkeypatch.setattr(models, "load", lambda name, device: tiny_var)
    result = CliRunner().invoke(cli.app, ["explain", "tiny", "--plan", "dense", "--inner", "eagre"])
    assert result.exit_code == 2
    assert result.output.startswith("error: option 'inner' is 'eagre'")


def test_every_command_has_help() -> None:
    runner = CliRunner()
    commands = [[name] for name in ("demo", "generate", "bench", "calibrate", "explain", "doctor")]
    for command in (*commands, ["bench", "emoji-var"], ["bench", "fae"]):
        result = runner.invoke(cli.app, [*command, "--help"])
        assert result.exit_code == 0


def test_generate_takes_prompts(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = WordTextConfig(("a", "key", "two"), depth=1, max_words=8)
    vae = BSQVAEConfig(4, 8, (1, 2), 1, shuffle=2, groups=4)
    cfg = InfinityConfig(1, 64, 2, text_channels=128, text_maxlen=8, text_pad=8, vae=vae)
    model = EmojiInfinity(cfg, text, (1, 2, 4)).eval().requires_grad_(False)
    init_weights(model)
    monkeypatch.setattr(models, "load", lambda name, device=None: model)
    out = tmp_path / "out.png"
    result = run("generate", "a key", "--model", "emoji-infinity", "--plan", "dense", "--cfg", 2, "-o", out)
    assert result.exit_code == 0, result.output
    assert "3/3" in result.output and model.on_scale is None
    from toprovar_compile.demo import to_image

    assert Image.open(out).tobytes() == to_image(model("a key", seed=0, cfg=2.0)[0]).tobytes()
    result = run("generate", "a key", "two keys", "--model", "emoji-infinity", "--backend", "eager", "-o", tmp_path)
    assert result.exit_code == 0 and (tmp_path / "two-keys-0.png").exists(), result.output
    result = run("generate", "a key", "a", "--model", "emoji-infinity", "-o", out)
    assert result.exit_code == cli.EXIT_ERROR and "a folder" in result.output
