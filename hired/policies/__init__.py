"""Token-dropping policies by name. A policy's module is imported when it is first asked for.

Other packages add theirs by ``register``, or by an entry point in the group ``hired.policies``:

    [project.entry-points."hired.policies"]
    my-policy = "my_package.my_module:MyPolicy"
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from hired.errors import ConfigurationError
from hired.policies.policy import Candidates, Merged, Policy

__all__ = ["Candidates", "Merged", "Policy", "get", "names", "register"]

GROUP = "hired.policies"

# A policy class, or where it lies: "module:class".
_REGISTRY: dict[str, str | Callable[[], Policy]] = {
    "cdpruner": "hired.policies.cdpruner:CdPruner",
    "divprune": "hired.policies.divprune:DivPrune",
    "grid": "hired.policies.grid:EvenGrid",
    "hired": "hired.policies.hired:Hired",
    "hired-reference": "hired.policies.hired_reference:HiredReference",
    "hired-scope": "hired.policies.hired_scope:HiredScope",
    "hired-spread": "hired.policies.hired_spread:HiredSpread",
    "keep-all": "hired.policies.keep_all:KeepAll",
    "pool": "hired.policies.pool:Pool",
    "prumerge": "hired.policies.prumerge:PruMerge",
    "prumerge+": "hired.policies.prumerge_plus:PruMergePlus",
    "random": "hired.policies.random:Random",
    "scope": "hired.policies.scope:Scope",
    "thumbnail": "hired.policies.thumbnail:Thumbnail",
    "visionzip": "hired.policies.visionzip:VisionZip",
}


def names() -> tuple[str, ...]:
    """The names that ``get`` knows, in alphabetical order, those of installed packages included."""
    return tuple(sorted({**_installed(), **_REGISTRY}))


def get(name: str) -> Policy:
    """A new policy of that name with its default options.

    Raises ConfigurationError for an unknown one, and for one that its package fails to give. Where a package
    claims a name that is taken already, the name stays whose it was.
    """
    factory = _REGISTRY.get(name)
    if isinstance(factory, str):
        module, _, attribute = factory.partition(":")
        factory = getattr(import_module(module), attribute)
    if factory is not None:
        return factory()
    if name in _installed():
        return _loaded(_installed()[name])
    raise ConfigurationError(f"there is no policy {name!r}; use one of {', '.join(names())}")


def register(name: str, factory: str | Callable[[], Policy]) -> None:
    """Makes a policy known: its class, or "module:class" to import it when first asked for.

    Raises ConfigurationError when another policy has the name.
    """
    if _REGISTRY.get(name, factory) != factory:
        raise ConfigurationError(f"the name {name!r} belongs to another policy; choose one of your own")
    _REGISTRY[name] = factory


@cache
def _installed() -> dict[str, EntryPoint]:
    """What the packages of this environment register, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _loaded(entry: EntryPoint) -> Policy:
    package = entry.dist.name if entry.dist else "a package"
    try:
        policy = entry.load()()
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise ConfigurationError(
            f"the policy {entry.name!r} of {package} cannot be had from {entry.value!r} "
            f"({type(error).__name__}: {error}); mend or uninstall that package"
        ) from error
    if not isinstance(policy, Policy):
        raise ConfigurationError(
            f"{entry.value!r}, the policy {entry.name!r} of {package}, makes a {type(policy).__name__}; "
            "it must be a subclass of hired.policies.Policy"
        )
    return policy
