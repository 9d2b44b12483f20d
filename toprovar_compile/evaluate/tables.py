"""Comparisons as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHOWN = (0.2, 0.3, 0.4, 0.5, 0.7)
_NEAR = 0.4
_CLOSE = 0.92  # mean SSIM that the fastest plans are shown for
_TOLD = (
    ("score", "scores"),
    ("minus unpruned", "minus_unpruned"),
    ("named", "named"),
    ("features", "feature_distance"),
    ("Fréchet", "frechet"),
)
"""Columns that stand only where a judge said something, with the entry of a row that they show."""


def markdown(results: Mapping[str, Any]) -> str:
    """All tables of one comparison, as `compare.run` writes it."""
    machine, count = results["machine"], len(results["labels"])
    done, left = results["plans"], results["not_measured"]
    parts = [
        f"{results['model']['name']}, {count} images, {machine['hardware']}, torch {machine['torch']}, "
        f"{machine['precision']}; {len(done)} plans. Intervals are 95 %, from resampled images.",
        _section("Best mean SSIM for at most so many tokens", _frontiers(results["frontiers"])),
        _section("Ours minus theirs", _against(results["ours_against"])),
        _section("Entropy minus another score, plans of equal shape", _pairs(results["pairs"])),
        _section(f"Compiled: the fastest plan of each policy with a mean SSIM of at least {_CLOSE}", _fastest(done)),
        *_timing(results.get("timing", ())),
        _section("Every plan", _plans(r for r in done if r["policy"] not in ("ablation",) and not r["shape"])),
        _section(
            "Tokens drawn otherwise, scale by scale: of each policy the plan nearest to 40 % of the tokens",
            _flips(done),
        ),
        _section("The parts of the method", _plans(r for r in done if r["policy"] == "ablation")),
    ]
    unpruned = results.get("unpruned", {})
    if scores := unpruned.get("scores"):
        tasks = ", ".join(f"{k} {v['mean']:.2f}" for k, v in scores.items() if k != "overall")
        parts.append(
            f"EmojiEval of the unpruned images: {_interval(scores['overall'])}; {tasks}. *score* is that of a plan, "
            "*minus unpruned* the difference over the same prompts; *features* is the distance between the detector's "
            "features of the pruned and the unpruned image, as LPIPS has it, *Fréchet* that between the two sets."
        )
    if named := unpruned.get("named"):
        parts.append(
            f"A classifier of its own names {named['mean']:.1%} ({named['low']:.1%}..{named['high']:.1%}) of the "
            "unpruned images. *named* is that share for a plan; *features* is 1 - cosine between the classifier's "
            "features of the pruned and the unpruned image, *Fréchet* the distance between both sets of features."
        )
    if left:
        parts.append("Not measured, for lack of time: " + ", ".join(left) + ".")
    return "\n\n".join(part for part in parts if part)


def _frontiers(frontiers: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    rows = [["policy", *(f"{share:.0%}" for share in _SHOWN)]]
    for name, points in frontiers.items():
        by_share = {p["share"]: p for p in points}
        rows.append([name, *(_interval(by_share.get(share)) for share in _SHOWN)])
    return rows


def _against(differences: Mapping[str, Sequence[Mapping[str, float]]]) -> list[list[str]]:
    rows = [["policy", *(f"{share:.0%}" for share in _SHOWN)]]
    for name, points in differences.items():
        by_share = {p["share"]: p for p in points}
        rows.append([name, *(_interval(by_share.get(share), signed=True) for share in _SHOWN)])
    return rows


def _pairs(pairs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    others = list(dict.fromkeys(p["entropy_minus"] for p in pairs))
    shapes = list(dict.fromkeys(p["shape"] for p in pairs))
    found = {(p["shape"], p["entropy_minus"]): p["ssim"] for p in pairs}
    rows = [["shape", *(name.removeprefix("score: ") for name in others)]]
    return rows + [[s, *(_interval(found.get((s, o)), signed=True) for o in others)] for s in shapes]


def _plans(plans: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    rows = list(plans)
    told = [name for name, key in _TOLD if any(key in row for row in rows)]
    batches = _batches(rows)
    out = [["policy", "plan", "tokens", "SSIM", "worst", "PSNR dB", *told, *(f"x dense, {_calls(b)}" for b in batches)]]
    for row in rows:
        cells = [row["policy"], row["name"], f"{row['share']:.1%}", _interval(row["ssim"]), f"{row['ssim_worst']:.3f}"]
        judged = {
            "score": f"{row['scores']['overall']['mean']:.3f}" if "scores" in row else "-",
            "minus unpruned": _interval(row.get("minus_unpruned"), signed=True, digits=3),
            "named": f"{row['named']['mean']:.1%}" if "named" in row else "-",
            "features": f"{row['feature_distance']['mean']:.3f}" if "feature_distance" in row else "-",
            "Fréchet": f"{row['frechet']:.3g}" if "frechet" in row else "-",
        }
        out.append(
            [*cells, f"{row['psnr']['mean']:.2f}", *(judged[name] for name in told), *(_speed(row, b) for b in batches)]
        )
    return out


def _fastest(plans: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Of each policy the plan that is fastest in the largest batch that it was timed in."""
    batches = _batches(plans)
    out = [["policy", "plan", "tokens", "SSIM"]]
    out[0] += [f"{what}, {_calls(b)}" for b in batches for what in ("x dense", "scales alone")]
    best: dict[str, Mapping[str, Any]] = {}
    for row in (r for r in plans if r.get("times") and r["ssim"]["mean"] >= _CLOSE):
        known = best.setdefault(row["policy"], row)
        at = next((b for b in reversed(batches) if b in known["times"] and b in row["times"]), None)
        if at is not None and row["times"][at]["speedup"] > known["times"][at]["speedup"]:
            best[row["policy"]] = row
    for row in best.values():
        speeds = [_speed(row, b, key) for b in batches for key in ("speedup", "scales_speedup")]
        out.append([row["policy"], row["name"], f"{row['share']:.1%}", _interval(row["ssim"]), *speeds])
    return out


def _timing(timing: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the times are of, and what deciding costs."""
    if not timing:
        return []
    lines = []
    for batch in dict.fromkeys(about["batch"] for about in timing):
        parts = [about for about in timing if about["batch"] == batch]
        dense = [1e3 * value for about in parts for value in about["dense"]]
        least = [1e3 * about["one_scale"] for about in parts]
        lines.append(
            f"{_calls(str(batch))}: dense {_span(dense)} ms an image, and {_span(least)} ms for its first scale alone, "
            "decoding included"
        )
    rows = [["policy", "plan", "ms an image, decided before", "ms, deciding", "cost of deciding"]]
    for about in timing:
        for found in about["deciding"]:
            share = found["share"]
            cost = f"{share['mean']:+.2%} ({share['low']:+.2%}..{share['high']:+.2%})"
            ms = [f"{1e3 * found[key]:.2f}" for key in ("seconds", "seconds_deciding")]
            rows.append([found["policy"], found["name"], *ms, cost])
    text = (
        f"Times, {timing[0]['precision']}: {'; '.join(lines)}. *x dense* is of whole images; *scales alone* leaves out "
        "what the first scale and decoding take, which no plan saves. A plan that decides by image is timed with one "
        "image a call."
    )
    return [text, _section("What it costs to decide by image", rows)]


def _batches(plans: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({batch for row in plans for batch in row.get("times", ())}, key=int)


def _calls(batch: str) -> str:
    return "1 image a call" if batch == "1" else f"{batch} images"


def _speed(row: Mapping[str, Any], batch: str, key: str = "speedup") -> str:
    value = row.get("times", {}).get(batch, {}).get(key)
    return "-" if value is None else f"{value:.2f}"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _flips(plans: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    nearest: dict[str, Mapping[str, Any]] = {}
    for row in (r for r in plans if "flips" in r and r["policy"] != "ablation"):
        best = nearest.setdefault(row["policy"], row)
        if abs(row["share"] - _NEAR) < abs(best["share"] - _NEAR):
            nearest[row["policy"]] = row
    scales = max((len(row["flips"]) for row in nearest.values()), default=0)
    out = [["policy", "plan", *map(str, range(scales))]]
    for row in nearest.values():
        rates = ["-" if rate is None else f"{rate:.1%}" for rate in row["flips"]]
        out.append([row["policy"], row["name"], *rates])
    return out


def _interval(value: Mapping[str, float] | None, *, signed: bool = False, digits: int = 4) -> str:
    if value is None:
        return "-"
    form = f"{'+' if signed else ''}.{digits}f"
    return f"{value['mean']:{form}} ({value['low']:{form}}..{value['high']:{form}})"


def _section(title: str, rows: list[list[str]]) -> str:
    """A table under its title, nothing where it would have no rows."""
    if len(rows) < 2:
        return ""
    head, *body = rows
    rule = "|---|" + "---:|" * (len(head) - 1)
    return "\n".join([f"### {title}", "", _line(head), rule, *map(_line, body)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
