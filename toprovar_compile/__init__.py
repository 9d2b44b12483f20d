"""toprovar_compile: a torch.compile backend for visual autoregressive (next-scale) image models.

Importing this package needs only torch; the parts below are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toprovar_compile import errors, models
    from toprovar_compile.bisecting import bisect_passes, minify
    from toprovar_compile.explaining import diff, explain
    from toprovar_compile.plan import Plan
    from toprovar_compile.prepare import accelerate, accelerate_blocks, prepare, shims
    from toprovar_compile.schedule import ScaleSchedule

__version__ = "0.1.0"

__all__ = [
    "Plan",
    "ScaleSchedule",
    "__version__",
    "accelerate",
    "accelerate_blocks",
    "bisect_passes",
    "diff",
    "errors",
    "explain",
    "minify",
    "models",
    "prepare",
    "shims",
]

_MODULES = frozenset({"errors", "models", "prepare"})  # `prepare` can be called as well
_NAMES = {
    "Plan": "toprovar_compile.plan",
    "ScaleSchedule": "toprovar_compile.schedule",
    "accelerate": "toprovar_compile.prepare",
    "accelerate_blocks": "toprovar_compile.prepare",
    "bisect_passes": "toprovar_compile.bisecting",
    "diff": "toprovar_compile.explaining",
    "explain": "toprovar_compile.explaining",
    "minify": "toprovar_compile.bisecting",
    "shims": "toprovar_compile.prepare",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"toprovar_compile.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'toprovar_compile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
