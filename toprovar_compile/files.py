"""Writing result files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toprovar_compile.errors import OptionError

if TYPE_CHECKING:
    from PIL.Image import Image


def cache_folder() -> Path:
    """Where what was built or measured for this machine is kept; without a home to keep it in, a new folder."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "toprovar_compile"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="toprovar_compile_"))
    return folder


def replace_file(target: Path, data: bytes) -> None:
    """Write a file that appears complete or not at all, in place of an older one. Raises OSError."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_bytes(path: str | os.PathLike[str], data: bytes) -> Path:
    """Write a file that appears complete or not at all; parents are made, an older file is replaced.

    Raises OptionError when the place cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_file(target, data)
    except OSError as error:
        raise OptionError(
            f"cannot write the file: {error.strerror}",
            where=str(target),
            expected="a folder that can be written and has room",
        ) from error
    return target


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write strict JSON (no NaN, no infinity), indented, as `write_bytes` does."""
    text = json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)
    return write_bytes(path, (text + "\n").encode())


def write_png(path: str | os.PathLike[str], image: Image) -> Path:
    """Write a picture as PNG, as `write_bytes` does."""
    import io

    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return write_bytes(path, buffer.getvalue())
