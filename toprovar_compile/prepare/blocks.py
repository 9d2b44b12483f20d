"""Any model whose loop runs a list of blocks: the list is made to run as one compiled step.

    for b in self.blocks: x = b(x=x, cond=cond)      the model's own code, unmodified

Inside the entry point, iterating over the list gives one object that stands for all blocks: calling it runs them all as
a compiled step, and what else is done to it is done to each of them. Outside, the list is as before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from toprovar_compile.errors import OptionError, UnsupportedModelError
from toprovar_compile.plan import Plan
from toprovar_compile.prepare.family import compile_steps
from toprovar_compile.prepare.sharing import check_ready, fingerprint
from toprovar_compile.report import counters
from toprovar_compile.schedule import ScaleSchedule
from toprovar_compile.session import Session, generation

_WHERE = "accelerate_blocks"
Schedule = Sequence[Any] | Callable[..., Sequence[Any]]


class Step(nn.Module):
    """One scale through all blocks, their caches passed in and out.

    `caches` are the attributes in which a block keeps its keys and values between scales, as paths.
    """

    def __init__(self, blocks: Sequence[nn.Module], caches: Sequence[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.caches = tuple(path.rpartition(".")[::2] for path in caches)

    def forward(
        self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], kept: Sequence[Sequence[Tensor | None]]
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """Tokens (B, n, C) and further arguments of the blocks: the tokens after all, and the new caches of each."""
        grown = []
        for i, block in enumerate(self.blocks):
            owners = [block.get_submodule(owner) for owner, _ in self.caches]
            for owner, (_, name), value in zip(owners, self.caches, kept[i], strict=True):
                setattr(owner, name, value)
            x = block(x, *args, **kwargs)
            grown.append([getattr(owner, name) for owner, (_, name) in zip(owners, self.caches, strict=True)])
            for owner, (_, name) in zip(owners, self.caches, strict=True):
                setattr(owner, name, None)
        return x.clone(), grown  # something has to follow the last block, for its output to lead somewhere


@dataclass
class _Run:
    """One generation: its session, and how many steps it has made."""

    owner: BlockList
    session: Session
    steps: int = 0


_current: ContextVar[_Run | None] = ContextVar("toprovar_blocks", default=None)


class BlockList(nn.ModuleList):
    """The model's list of blocks, which stands for all of them at once while the entry point runs.

    `plan` is the pruning plan made for their weights.
    """

    plan: Plan | None = None

    def __init__(self, blocks: nn.ModuleList, caches: Sequence[str], stream: str, options: Mapping[str, Any]) -> None:
        super().__init__(blocks)
        self._stream = stream
        step = Step(list(blocks), caches)
        # A tuple, as the blocks in it have their names here already.
        self._step = (step, compile_steps(step, options, fullgraph=True))
        self.training = blocks.training

    def __iter__(self) -> Iterator[nn.Module]:
        run = _current.get()
        if run is None or run.owner is not self:
            return super().__iter__()
        return iter((_Together(self, run),))  # type: ignore[arg-type]

    def run(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """All blocks on the arguments of one."""
        step, compiled = self._step
        if self._stream in kwargs:
            x = kwargs.pop(self._stream)
        else:
            x, *rest = args
            args = tuple(rest)
        session = run.session
        session.scale = run.steps - (session.prefix > 0)
        run.steps += 1
        plan = session.plan
        if plan is not None and session.scale >= 0 and not (plan.runs(session.scale) and plan.guided(session.scale)):
            counters.add("fallback", "the plan leaves out a scale or its guidance, which the model's own loop runs")
        places = [[(block.get_submodule(owner), name) for owner, name in step.caches] for block in step.blocks]
        kept = [[getattr(owner, name) for owner, name in place] for place in places]
        for place in places:
            for owner, name in place:
                setattr(owner, name, None)
        x, grown = compiled(x, args, kwargs, kept)
        for place, values in zip(places, grown, strict=True):
            for (owner, name), value in zip(place, values, strict=True):
                setattr(owner, name, value)
        return x  # type: ignore[no-any-return]


class _Together:
    """All blocks of a list: called, they run as one step; attributes are those of each."""

    def __init__(self, blocks: BlockList, run: _Run) -> None:
        vars(self).update(_blocks=blocks, _run=run, _values=list(nn.ModuleList.__iter__(blocks)))

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        blocks: BlockList = self._blocks
        return blocks.run(self._run, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        return _each([getattr(value, name) for value in self._values])

    def __setattr__(self, name: str, value: Any) -> None:
        for each in self._values:
            setattr(each, name, value)


class _Each(_Together):
    """The same attribute of all blocks: a call calls each."""

    def __init__(self, values: list[Any]) -> None:
        vars(self).update(_values=values)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _each([value(*args, **kwargs) for value in self._values])


def _each(values: list[Any]) -> Any:
    """A plain value that all have, or the values together."""
    first = values[0]
    if isinstance(first, bool | int | float | str | None) and all(v == first for v in values):
        return first
    return _Each(values)


def install(
    model: nn.Module,
    entry: str,
    blocks: str,
    caches: Sequence[str],
    schedule: Schedule,
    prefix: int,
    stream: str,
    options: Mapping[str, Any],
) -> tuple[nn.Module, Callable[..., Any], Callable[[], None]]:
    """Put the list in place: it, the function for the entry point, and what takes the list out again."""
    owner_path, _, name = blocks.rpartition(".")
    try:
        owner = model.get_submodule(owner_path)
        original: Any = owner.get_submodule(name)
        official = getattr(model, entry)
        for path in caches if isinstance(original, nn.ModuleList) else ():
            at, _, attribute = path.rpartition(".")
            getattr(original[0].get_submodule(at), attribute)
    except AttributeError as error:
        raise OptionError(
            f"{type(model).__name__} has no such thing: {error}",
            where=_WHERE,
            expected="`blocks` a path to a ModuleList, `caches` attributes of a block, `entry` a method",
        ) from error
    if not isinstance(original, nn.ModuleList) or len(original) < 2:
        raise UnsupportedModelError(
            f"{blocks} is a {type(original).__name__}", where=_WHERE, expected="a ModuleList of two blocks or more"
        )
    listed = BlockList(original, caches, stream, options)
    setattr(owner, name, listed)
    signature = inspect.signature(official)

    def identity() -> str:
        return fingerprint(f"{type(model).__name__} {len(original)}", original.named_parameters())

    def call(*args: Any, **kwargs: Any) -> Any:
        check_ready(model, _WHERE)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        grids = schedule(**bound.arguments) if callable(schedule) else schedule
        known = ScaleSchedule.from_patch_nums(grids)
        with generation(known, identity, listed.plan, prefix) as session:
            run = _Run(listed, session)
            token = _current.set(run)
            try:
                result = official(*args, **kwargs)
            finally:
                _current.reset(token)
        if run.steps == 0:
            raise UnsupportedModelError(
                f"{entry} did not iterate over {blocks}", where=_WHERE, expected=f"a loop `for block in {blocks}`"
            )
        return result

    return listed, call, lambda: setattr(owner, name, original)
