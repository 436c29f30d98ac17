"""Import a user's module by its name."""

from __future__ import annotations

from importlib import import_module


def import_user_module(where: str, argument: str, name: str) -> None:
    """Import a module that registers environments or task distributions. Exceptions that it raises pass through.

    Args:
        where, argument: the function and its argument, for the error message.
        name: dotted name of the module.

    Raises:
        ValueError: Python finds no module of that name.

    >>> import_user_module("make_tasks", "env_name", "no_such_module")
    Traceback (most recent call last):
    ValueError: make_tasks: env_name must name a module that Python finds, got 'no_such_module'
    """
    # An empty or a relative name is no module; import_module has other errors for these.
    if all(part.isidentifier() for part in name.split(".")):
        try:
            import_module(name)
            return
        except ModuleNotFoundError as error:
            # A package that the module itself imports may be missing, too.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    raise ValueError(f"{where}: {argument} must name a module that Python finds, got {name!r}")
