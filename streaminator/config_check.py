# SPDX-License-Identifier: Apache-2.0
"""Whether a setting's value is one that it may have, for settings that are given in Python, too.

Used by: `streaminator.config`, `cli_args`.
"""

import types
from collections.abc import Iterable
from dataclasses import Field, fields
from numbers import Integral, Real
from typing import Any, get_args, get_origin

from streaminator.errors import ConfigError
from streaminator.unicode import half_a_pair

_KINDS: dict[Any, tuple[type, str]] = {
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "True or False"),
    str: (str, "text"),
}


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raises: ConfigError naming the setting, its value and what is allowed."""
    if not condition:
        raise ConfigError(f"--{name} {value}: must be {allowed}")


def check_types(group: Any) -> None:
    """See that every setting of a group has a value of its type, and of its choices.

    What means the same is kept as the same: a list as a tuple, NumPy's numbers as Python's, 1 as 1.0
    where a number need not be whole.

    Raises: ConfigError.
    """
    for setting in fields(group):
        name, value = setting.name, getattr(group, setting.name)
        if value is None and may_be_none(setting):
            continue
        kind = scalar_type(setting)
        value = (_checked_items if is_list(setting) else _checked)(name, kind, value)
        object.__setattr__(group, name, value)
        choices = setting.metadata["choices"]
        require(not choices or value in choices, name, repr(value), " or ".join(choices))


def _checked_items(name: str, kind: type, value: Any) -> tuple:
    has_items = isinstance(value, Iterable) and not isinstance(value, str | bytes)
    require(has_items, name, repr(value), f"a list, of {_KINDS[kind][1]} each")
    return tuple(_checked(name, kind, item) for item in value)


def _checked(name: str, kind: type, value: Any) -> Any:
    expected, words = _KINDS[kind]
    is_it = isinstance(value, expected) and (kind is bool or not isinstance(value, bool))
    require(is_it, name, repr(value), words)
    if isinstance(value, str):
        is_utf8 = half_a_pair(value) is None
        require(is_utf8, name, repr(value), "text that is UTF-8")
    return kind(value)


def is_list(setting: Field) -> bool:
    """Whether it takes several values."""
    return get_origin(setting.type) is tuple


def may_be_none(setting: Field) -> bool:
    """Whether it can be left to the program."""
    return type(None) in get_args(setting.type)


def scalar_type(setting: Field) -> type:
    """Of its value, or of each of its values."""
    kind: Any = setting.type
    if is_list(setting):
        return get_args(kind)[0]
    if isinstance(kind, types.UnionType):
        return next(arg for arg in get_args(kind) if arg is not type(None))
    return kind
