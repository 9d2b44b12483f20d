"""A script that runs one captured graph alone: eager, and compiled by this backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

_SCRIPT = '''"""One captured graph, run alone. Weights and inputs are random numbers of the captured sizes.

With --minify it is cut down to a small graph that still fails, as the script minified.py.
"""

import sys

import torch
from torch import device, inf, nan  # names that graphs use
import toprovar_compile.kernels  # operators that a rewritten graph names

{module}

torch.manual_seed(0)
inputs = [
{inputs}
]
for tensor, dims in {marks}:
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(inputs[tensor], dim)
torch.set_grad_enabled({grad})
module = {cls}()
expected = module(*inputs)
compiled = torch.compile(module, backend="toprovar", options={{"plan": "dense", "inner": "{inner}"}})
found = compiled(*inputs)
for i, (a, b) in enumerate(zip(expected, found)):
    if isinstance(a, torch.Tensor):
        largest = (a.double() - b.double()).abs().max().item()
        print(f"output {{i}}: {{tuple(a.shape)}}, largest difference {{largest:.3g}}")
if "--minify" in sys.argv:
    from toprovar_compile import minify
    open("minified.py", "w").write(str(minify(module, inputs)))
'''


def repro_text(gm: GraphModule, inputs: Sequence[Any], inner: str) -> str:
    """The script for `gm`, as captured, and example inputs; or the reason why there can be none, as a comment."""
    inside = [n for n in gm.graph.nodes if n.op in ("get_attr", "call_module")]
    if inside:
        return f"# No script: the graph holds {inside[0].op} {inside[0].target}, which has no text.\n"
    module = gm.print_readable(print_output=False).replace("class <lambda>(", "class GraphModule(")
    marks = [(i, _open_dims(value)) for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    lines = "\n".join(f"    {_input(value)}," for value in inputs)
    return _SCRIPT.format(
        module=module.strip(),
        inputs=lines,
        marks=[mark for mark in marks if mark[1]],
        grad=torch.is_grad_enabled(),
        cls=module.partition("class ")[2].partition("(")[0],
        inner=inner,
    )


def _open_dims(value: Tensor) -> list[int]:
    sizes: tuple[Any, ...] = tuple(value.shape)
    return [d for d, size in enumerate(sizes) if isinstance(size, torch.SymInt)]


def _input(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(_size(value)) if isinstance(value, torch.SymInt) else repr(value)
    shape = tuple(_size(size) for size in value.shape)
    kind = f"dtype={value.dtype}, device={str(value.device)!r}"
    if value.dtype.is_floating_point:
        return f"torch.randn({shape}, {kind})"
    return f"torch.zeros({shape}, {kind})"


def _size(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
