"""Objects that remember the arguments they were made with, so that a file can say how to make them again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

from qm_lightning.errors import UserError

CLASS, ARGUMENTS = "class", "arguments"
_PLAIN = (bool, int, float, str, type(None))


class Described:
    """Base of classes whose arguments are plain values or described objects themselves.

    Attributes:
        arguments: of the constructor, as they were given.
    """

    arguments: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Keep the arguments; before ``__init__``, so that no subclass has to think of it."""
        self = super().__new__(cls)
        # Partial: copies are made without arguments, and get them with the rest of their state.
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs).arguments
        given = dict(list(bound.items())[1:])
        given.update(given.pop("kwargs", {}))
        object.__setattr__(self, "arguments", given)
        return self


def describe(made: Described) -> dict[str, Any]:
    """Class and arguments as JSON holds them.

    Raises:
        UserError: an argument is neither a plain value nor described.
    """
    return {
        CLASS: type(made).__name__,
        ARGUMENTS: {name: _plain(value, type(made), name) for name, value in made.arguments.items()},
    }


def _plain(value: Any, owner: type, name: str) -> Any:
    if isinstance(value, Described):
        return describe(value)
    if isinstance(value, list | tuple):
        return [_plain(item, owner, name) for item in value]
    if isinstance(value, _PLAIN):
        return value
    raise UserError(
        f"{owner.__name__}({name}=...) was given a {type(value).__name__}, which no config.json can hold; "
        "expected numbers, text or a budget; make it with such arguments"
    )


def make(description: Any, known: Mapping[str, Callable[..., Any]], where: str) -> Any:
    """Make what a description describes. Nothing but ``known`` is ever called.

    Args:
        description: from ``describe``, read from a file that anybody may have written.
        known: classes by name.
        where: the file, for messages.

    Raises:
        UserError: a class that is not known, or arguments that it does not take.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get(ARGUMENTS), Mapping):
        raise UserError(f"{where} describes no object ({str(description)[:60]!r}); export it again")
    name = str(description.get(CLASS))
    if name not in known:
        raise UserError(
            f"{where} names the class {name!r}; expected one of {', '.join(sorted(known))}; "
            "pass a class of your own with classes=[...], or use the version that exported it"
        )
    arguments = {key: _made(value, known, where) for key, value in description[ARGUMENTS].items()}
    try:
        return known[name](**arguments)
    except TypeError as error:
        raise UserError(
            f"{where}: {name} does not take these arguments ({error}); use the version that exported it"
        ) from error


def _made(value: Any, known: Mapping[str, Callable[..., Any]], where: str) -> Any:
    if isinstance(value, Mapping):
        return make(value, known, where)
    return tuple(_made(item, known, where) for item in value) if isinstance(value, list) else value
