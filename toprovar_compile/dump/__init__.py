"""Dumps: everything the compiler did in this process, as files and as one page that explains itself.

`options={"dump": folder}` or TOPROVAR_DUMP=folder; `Dump` is what the backend talks to.
"""

from __future__ import annotations

from toprovar_compile.dump.record import Dump

__all__ = ["Dump"]
