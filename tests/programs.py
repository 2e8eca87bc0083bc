# SPDX-License-Identifier: Apache-2.0
"""What all command lines have in common when they are used wrongly."""

from collections.abc import Callable, Sequence

import pytest

from streaminator.cli import main_program


def assert_refused(
    program: str,
    main: Callable[[Sequence[str]], int],
    capsys: pytest.CaptureFixture[str],
    message: str,
) -> None:
    """The program, with the arguments of `sys.argv`, says one line with `message` and exits with 2."""
    assert main_program(program, main) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{program}: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
