# SPDX-License-Identifier: Apache-2.0
"""Whether a setting's value is one that it may have, for settings that are given in Python, too.

Used by: `streaminator.config`, `sampler_pool`.
"""

import types
from collections.abc import Iterable
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, get_args, get_origin

from streaminator.errors import ConfigError

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
        kind: Any = setting.type
        if isinstance(kind, types.UnionType):
            if value is None:
                continue
            kind = next(arg for arg in get_args(kind) if arg is not type(None))
        if get_origin(kind) is tuple:
            is_list = isinstance(value, Iterable) and not isinstance(value, str | bytes)
            require(is_list, name, repr(value), f"a list, of {_KINDS[get_args(kind)[0]][1]} each")
            value = tuple(_checked(name, get_args(kind)[0], item) for item in value)
        else:
            value = _checked(name, kind, value)
        object.__setattr__(group, name, value)
        choices = setting.metadata["choices"]
        require(not choices or value in choices, name, repr(value), " or ".join(choices))


def _checked(name: str, kind: type, value: Any) -> Any:
    expected, words = _KINDS[kind]
    is_it = isinstance(value, expected) and (kind is bool or not isinstance(value, bool))
    require(is_it, name, repr(value), words)
    if isinstance(value, str):
        require(is_encodable(value), name, repr(value), "text that is UTF-8")
    return kind(value)


def is_encodable(text: str) -> bool:
    """Whether it can be written as UTF-8: half a surrogate pair cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
