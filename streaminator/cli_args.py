# SPDX-License-Identifier: Apache-2.0
"""Command line and TOML -> `JobConfig`. Precedence: defaults < --config FILE < flags.

Every setting of `streaminator.config` is a flag. Hyphens and underscores are alike; a boolean is
`--x` or `--no_x`; a list is given by repeating the flag.

Used by: `streaminator.cli`, `jobs.*`.
"""

import argparse
import difflib
import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, NoReturn

from streaminator.config import JobConfig, settings
from streaminator.config_check import is_list, may_be_none, scalar_type
from streaminator.errors import ConfigError

_DESCRIPTION = "Draw many completions per prompt; every setting is a flag."


class _Parser(argparse.ArgumentParser):
    @property
    def flags(self) -> list[str]:
        return [flag for flag in self._option_string_actions if flag.startswith("--")]

    def error(self, message: str) -> NoReturn:
        message = message.replace("argument ", "", 1)
        message = message.replace("expected one argument", "a value must follow")
        for kind, number in (("int", "a whole number"), ("float", "a number")):
            message = re.sub(f": invalid {kind} value: '(.*)'$", rf" \1: must be {number}", message)
        raise ConfigError(message)


def parse(
    argv: Sequence[str],
    *,
    program: str,
    without: Sequence[str] = (),
    extra: Callable[[argparse.ArgumentParser], None] | None = None,
) -> tuple[JobConfig, argparse.Namespace]:
    """Parse `argv` into the job's settings and the few flags that are not settings.

    Args:
        argv: the words after the program's name.
        program: name shown in the usage text.
        without: groups of settings this program does not have (for example "cluster").
        extra: adds the flags that only this program has.

    Returns:
        The configuration, and a namespace with `dry_run` and the program's own flags.

    Raises:
        ConfigError: unknown flag or key (with the nearest name), or a value that is not allowed.
    """
    known = {s.name: s for group, s in settings() if group not in without}
    parser = _parser(program, known)
    if extra is not None:
        extra(parser)
    namespace = parse_words(parser, argv)
    given = vars(namespace)
    values = _load_toml(Path(given["config"]), known) if given["config"] else {}
    for name, setting in known.items():
        if given[name] is not None:
            value = given[name]
            values[name] = tuple(value) if is_list(setting) else _without_auto(setting, value)
    return JobConfig.from_flat(values), namespace


def make_parser(program: str, description: str) -> _Parser:
    """A parser without flags yet, for `parse_words`."""
    return _Parser(prog=program, allow_abbrev=False, description=description)


def parse_words(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse with hyphens and underscores alike. Raises: ConfigError."""
    # Whatever argparse cannot place is a typo: name the nearest flag instead of a usage text.
    namespace, rest = parser.parse_known_args([_underscored(word) for word in argv])
    if rest:
        _unknown(rest[0], parser.flags)
    return namespace


def _parser(program: str, known: dict[str, Field]) -> _Parser:
    parser = make_parser(program, _DESCRIPTION)
    parser.add_argument("--config", metavar="FILE.toml", help="settings to start from")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings and exit"
    )
    for name, setting in known.items():
        text = setting.metadata["help"]
        default = setting.default
        if default not in (None, (), True, False) or isinstance(default, int | float):
            text += f" (default: {default})".replace("%", "%%")
        if setting.type is bool:
            pair = parser.add_mutually_exclusive_group()
            pair.add_argument(f"--{name}", action="store_true", default=None, help=text)
            pair.add_argument(f"--no_{name}", action="store_false", dest=name, default=None)
        else:
            parser.add_argument(
                f"--{name}",
                type=_number_or_auto(setting) if _may_be_auto(setting) else scalar_type(setting),
                action="append" if is_list(setting) else "store",
                choices=setting.metadata["choices"] or None,
                metavar=name.upper() if not setting.metadata["choices"] else None,
                help=text,
            )
    return parser


def _underscored(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _unknown(word: str, flags: Sequence[str]) -> NoReturn:
    if not word.startswith("-"):
        raise ConfigError(f"unexpected word {word!r}: every setting is given as --name value")
    name = word.partition("=")[0]
    is_typo = difflib.get_close_matches(name, flags, n=1, cutoff=0.9)
    names = {setting.name for _, setting in settings()}
    if not is_typo and name.removeprefix("--").removeprefix("no_") in names:
        raise ConfigError(
            f"unknown flag {name}: not a setting of this program; leave it out, or use "
            "python -m jobs.sample"
        )
    raise ConfigError(f"unknown flag {name}{_nearest(name, flags)}")


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f": did you mean {close[0]}?" if close else ": --help lists all"


def _load_toml(path: Path, known: dict[str, Field]) -> dict[str, Any]:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"--config {path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not valid TOML ({error})") from error
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known and name in {setting.name for _, setting in settings()}:
            raise ConfigError(f"{path}: {key}: this program has no such setting; take it out")
        if name not in known:
            raise ConfigError(f"{path}: unknown key {key!r}{_nearest(name, list(known))}")
        values[name] = _checked(path, known[name], value)
    return values


def _checked(path: Path, setting: Field, value: Any) -> Any:
    scalar = scalar_type(setting)
    if is_list(setting) and isinstance(value, list):
        return tuple(_checked_scalar(path, setting, scalar, item) for item in value)
    if is_list(setting):
        return (_checked_scalar(path, setting, scalar, value),)
    return _checked_scalar(path, setting, scalar, value)


def _checked_scalar(path: Path, setting: Field, scalar: type, value: Any) -> Any:
    if _may_be_auto(setting) and value == "auto":
        return None
    if scalar is float and type(value) is int:
        value = float(value)
    choices = setting.metadata["choices"]
    if type(value) is not scalar or (choices and value not in choices):
        allowed = " or ".join(choices) if choices else f"a value of type {scalar.__name__}"
        raise ConfigError(f"{path}: {setting.name} = {value!r}: must be {allowed}")
    return value


def _may_be_auto(setting: Field) -> bool:
    """Whether it is a number that may be left to the program; "auto" says so in words."""
    return may_be_none(setting) and scalar_type(setting) in (int, float)


def _number_or_auto(setting: Field) -> Callable[[str], Any]:
    scalar = scalar_type(setting)

    def convert(text: str) -> Any:
        return text if text == "auto" else scalar(text)

    convert.__name__ = scalar.__name__  # argparse names it in its message
    return convert


def _without_auto(setting: Field, value: Any) -> Any:
    return None if _may_be_auto(setting) and value == "auto" else value
