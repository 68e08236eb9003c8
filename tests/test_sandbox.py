"""The sandbox: what ends, what is stopped, and what a program may not do."""

from __future__ import annotations

import re

import pytest

from smidgen.sandbox import run_program


def test_a_program_that_reaches_its_end_passes(tmp_path):
    assert run_program("assert sorted([2, 1]) == [1, 2]\nopen('here.txt', 'w').write('x')").passed


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 == 2", "AssertionError"),
        ("import sys; sys.exit(0)", "ended before its last line"),
        ("import os; os._exit(0)", "ended before its last line"),
        ("while True: pass", "no end within|signal"),
        ("x = bytearray(1 << 30)", "MemoryError"),
        ("import socket; socket.socket()", "socket.* is refused"),
        ("import subprocess; subprocess.run(['true'])", "is refused"),
        ("import os; os.system('true')", "is refused"),
        ("open('{outside}', 'w')", "outside the working folder is refused"),
        ("import os; os.remove('{outside}')", "outside the working folder is refused"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_what_does_not_pass(program, reason, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("kept")
    ended = run_program(program.replace("{outside}", str(kept)), seconds=1.5, memory=1 << 29)
    assert not ended.passed
    assert re.search(reason, ended.reason), ended
    assert kept.read_text() == "kept"
