from pathlib import Path

import pytest

from toprovar_compile.errors import OptionError
from toprovar_compile.files import write_bytes, write_json


def test_writes_make_parents_replace_and_leave_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b.json"
    write_json(target, {"x": 1})
    write_json(target, {"x": 2, "name": "é"})
    assert target.read_text() == '{\n "x": 2,\n "name": "é"\n}\n'
    assert list(target.parent.iterdir()) == [target]


def test_json_without_a_standard_form_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(target, {"x": float("inf")})
    assert not target.exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot write the file.*file/x"):
        write_bytes(tmp_path / "file" / "x", b"")
