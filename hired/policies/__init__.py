"""Token-dropping policies by name. A policy's module is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from hired.errors import ConfigurationError
from hired.policies.policy import Candidates, Policy

__all__ = ["Candidates", "Policy", "get", "names", "register"]

# A policy class, or where it lies: "module:class".
_REGISTRY: dict[str, str | Callable[[], Policy]] = {
    "hired": "hired.policies.hired:Hired",
    "hired-reference": "hired.policies.hired_reference:HiredReference",
    "keep-all": "hired.policies.keep_all:KeepAll",
}


def names() -> tuple[str, ...]:
    """The names that ``get`` knows, in alphabetical order."""
    return tuple(sorted(_REGISTRY))


def get(name: str) -> Policy:
    """A new policy of that name with its default options. Raises ConfigurationError for an unknown one."""
    try:
        factory = _REGISTRY[name]
    except KeyError:
        raise ConfigurationError(f"there is no policy {name!r}; use one of {', '.join(names())}") from None
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(import_module(module), attribute)
    return factory()


def register(name: str, factory: str | Callable[[], Policy]) -> None:
    """Makes a policy known: its class, or "module:class" to import it when first asked for.

    Raises ConfigurationError when another policy has the name.
    """
    if _REGISTRY.get(name, factory) != factory:
        raise ConfigurationError(f"the name {name!r} belongs to another policy; choose one of your own")
    _REGISTRY[name] = factory
