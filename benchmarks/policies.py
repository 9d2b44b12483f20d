"""Compare policies on emoji-VAR or emoji-infinity: FastVAR, SkipVAR, ToProVAR and other scores, by the eager reference.

    python benchmarks/policies.py --device cuda --minutes 8 --out benchmarks/results
    python benchmarks/policies.py --device cuda --minutes 9 --timing 4 --images 128 --out OUT   # times plans as well
    python benchmarks/policies.py --device cuda --shard 0/4 --timing 4 --out P0                 # one GPU of four; then
    python benchmarks/policies.py --merge P0 P1 P2 P3 --out benchmarks/results --update-docs
    python benchmarks/policies.py --images 16 --training 16 --batch 8 --policies fixed scores --out OUT   # a short look

Writes policies_{cpu,cuda}.json (policies_emoji_infinity_cuda.json of another model) after every plan, and the summary
(frontiers, intervals, pairs) and plots at the end, which comes at most one plan after `--minutes`. What the JSON in OUT
already has, of the same images and machine, is kept, so that a long comparison can be made in parts: `--policies fixed
fastvar skipvar toprovar tuned`, then `--policies scores ablation`; or at once by several processes, each with a
`--shard` and an OUT of its own, which `--merge` then reads. On the CPU an image takes about a second: choose few.
`--classifier DIR` also asks a classifier what it sees; prompts of emoji-infinity are EmojiEval's, and judged by it.
`--tuned plan.json` adds plans that `toprovar tune` wrote. `--update-docs` puts the tables into docs/fidelity.md or
docs/emoji_infinity.md, `--only-docs` does that alone, from the JSON files in --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

from toprovar_compile.errors import ToproVarError
from toprovar_compile.evaluate import compare
from toprovar_compile.evaluate.draw import curves, worst_images
from toprovar_compile.evaluate.merging import merge
from toprovar_compile.evaluate.tables import markdown
from toprovar_compile.files import write_bytes
from toprovar_compile.measure import pick_device
from toprovar_compile.policies.statistics import Statistics

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {"emoji-var": DOCS / "fidelity.md", "emoji-infinity": DOCS / "emoji_infinity.md"}
BEGIN, END = "<!-- results: begin (written by benchmarks/policies.py) -->", "<!-- results: end -->"


def main() -> int:
    default = compare.Settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default.model)
    parser.add_argument("--images", type=int, default=default.images)
    parser.add_argument("--training", type=int, default=default.training, help="images that train SkipVAR")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--batch", type=int, default=default.batch)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--minutes", type=float, default=default.minutes, help="start no new plan after this long")
    parser.add_argument("--timing", type=float, default=default.timing, help="minutes of these for timing")
    parser.add_argument("--timing-batches", type=int, nargs="+", default=[1], help="images a call when timing")
    parser.add_argument("--shard", type=_shard, default=default.shard, help="i/n: do part i, from 0, of n")
    parser.add_argument("--merge", type=Path, nargs="+", default=[], help="folders of parts to put together, no more")
    parser.add_argument("--policies", nargs="*", default=[], help="such as fastvar; default: all")
    parser.add_argument("--search", type=int, default=default.search, help="plans that a search tries; 0: none")
    parser.add_argument("--tuned", nargs="*", default=[], help="plan files to compare as well")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON and the plot")
    parser.add_argument("--classifier", type=Path, help="folder with the classifier.pt of examples/train_emoji")
    parser.add_argument("--update-docs", action="store_true")
    parser.add_argument("--only-docs", action="store_true")
    given = vars(parser.parse_args())
    folder, update, only, classifier, merged = (
        given.pop(k) for k in ("out", "update_docs", "only_docs", "classifier", "merge")
    )
    settings = compare.Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})
    if not only:
        try:
            if merged:
                path = merge(results_of(settings.model, merged), folder)
            else:
                judge = load_judge(classifier, settings.device) if classifier else None
                path = compare.run(settings, folder, lambda text: print(text, flush=True), judge)
            print(f"wrote {path}")
        except ToproVarError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    if update or only:
        page = PAGES[settings.model]
        if settings.model == default.model:
            draw_calibrations(folder)
        write_bytes(page, filled(page.read_text(), folder, settings.model).encode())
        print(f"wrote {page}")
    return 0


def _shard(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    return int(part), int(parts)


def results_of(model: str, folders: list[Path]) -> list[Path]:
    """The JSON files of a model in these folders."""
    names = [compare.result_name(model, device) for device in ("cuda", "cpu")]
    return [path for folder in folders for name in names if (path := folder / name).exists()]


def load_judge(run: Path, device: str) -> compare.Judge:
    """The classifier that `examples/train_emoji/train_classifier.py` trained in `run`."""
    sys.path.insert(0, str(DOCS.parent / "examples" / "train_emoji"))
    from train_classifier import load_classifier

    net = load_classifier(run, pick_device(device))
    seen: list[Tensor] = []
    net.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].cpu()))

    @torch.no_grad()
    def judge(images: Tensor) -> tuple[Tensor, Tensor]:
        seen.clear()
        parts = [net(x.to(next(net.parameters()).device) * 2 - 1).float().cpu() for x in images.split(64)]
        return torch.cat(parts), torch.cat(seen)

    return judge


def filled(page: str, results: Path, model: str) -> str:
    """The page with the tables of every published JSON of a model between its two markers."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    sections = []
    for path in results_of(model, [results]):
        sections.append(markdown(json.loads(path.read_text())))
        pictures = (("Frontiers", path.with_suffix(".png")), ("Worst images", worst_images(path)))
        sections += [f"![{name}]({os.path.relpath(picture, DOCS)})" for name, picture in pictures if picture.exists()]
    return "\n\n".join([head + BEGIN, *(sections or ["Nothing is published yet."]), END + tail])


def draw_calibrations(results: Path) -> None:
    """The picture of all calibrations that `eager_frontier.py` made."""
    for path in sorted(results.glob("eager_frontier_*.json"))[:1]:
        found = json.loads(path.read_text())["statistics"]
        curves([Statistics.from_json(data) for data in found], DOCS / "assets" / "statistics.png")


if __name__ == "__main__":
    sys.exit(main())
