"""What is compared: the arms of the table, of the ablations, and of FastV."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

from hired import policies
from hired.budget import Budget
from hired.embedded.checkpoint import training
from hired.errors import ConfigurationError
from hired.evaluation.ablations import variants
from hired.evaluation.arms import Arm
from hired.evaluation.fastv import FastV
from hired.policies import Policy
from hired.policies.keep_all import KeepAll
from hired.policies.prumerge import PruMerge
from hired.policies.prumerge_plus import PruMergePlus
from hired.policies.random import Random
from hired.policies.thumbnail import Thumbnail
from pipeline.evaluation.options import Options

KEEP_ALL, FULL_IMAGE = "keep-all", "full-image"
# Left out of a table that names them, and why.
CANNOT = {"cdpruner": "needs a text tower, which checkpoints of LLaVA do not hold"}


def table_arms(options: Options) -> list[Arm]:
    """Everything kept, the full-image alone, then every policy at every budget.

    ``random`` has an arm for each of its seeds, which share a name but for the number: random, random#1.
    """
    wanted = options.wanted
    arms = [
        Arm(KEEP_ALL, KeepAll(), Budget(rate=1.0, alpha=options.alpha)),
        Arm(FULL_IMAGE, Thumbnail(), Budget(rate=1.0, alpha=options.alpha)),
    ]
    for name in wanted.policies:
        if name == KEEP_ALL or name in CANNOT:
            continue
        for rate in wanted.budgets:
            budget = Budget(rate=rate, alpha=options.alpha)
            arms += [Arm(own, policy, budget) for own, policy in _policies(name, options)]
    return arms


def ablation_arms(options: Options, *, feature_layer: int, num_heads: int) -> list[Arm]:
    """HiRED and each of its decisions changed alone, and everything kept, at the ablations' budget."""
    budget = Budget(rate=options.ablation_budget, alpha=options.alpha)
    keep_all = Arm(KEEP_ALL, KeepAll(), Budget(rate=1.0, alpha=options.alpha))
    return [keep_all, *variants(budget, feature_layer=feature_layer, num_heads=num_heads)]


def fastv_arms(options: Options, num_layers: int) -> list[FastV]:
    """FastV, for each number of layers that see all tokens, at every budget.

    Raises ConfigurationError where that leaves none of a language model's ``num_layers`` to drop in.
    """
    if max(options.fastv_layers) >= num_layers:
        raise ConfigurationError(
            f"--fastv-layers {max(options.fastv_layers)}: the language model has {num_layers} layers, "
            f"of which 1 to {num_layers - 1} can see all tokens"
        )
    return [
        FastV(Budget(rate=rate), num_full_layers)
        for num_full_layers in options.fastv_layers
        for rate in options.wanted.budgets
    ]


def _policies(name: str, options: Options) -> Iterator[tuple[str, Policy]]:
    if name == "random":
        for seed in range(options.wanted.random_seeds):
            yield name if not seed else f"{name}#{seed}", Random(seed)
    elif name in ("prumerge", "prumerge+") and _lacks_a_layer_above(options.model):
        yield name, PruMerge(layers_above=0) if name == "prumerge" else PruMergePlus(layers_above=0)
    elif ":" in name:
        policy = _imported(name)
        yield policy.name, policy
    else:
        yield name, policies.get(name)


def _lacks_a_layer_above(model: str) -> bool:
    """Whether jobs/train_embedded.py made it, which trains nothing above the feature layer."""
    return model == "embedded" or training(Path(model).expanduser()) is not None


def _imported(place: str) -> Policy:
    module, _, attribute = place.partition(":")
    try:
        policy = getattr(importlib.import_module(module), attribute)()
    except Exception as error:  # whatever a foreign module raises while it is imported
        raise ConfigurationError(
            f"--policies {place} cannot be had ({type(error).__name__}: {error}); it must be module:Class, "
            "and the class must need no arguments"
        ) from error
    if not isinstance(policy, Policy):
        raise ConfigurationError(f"--policies {place} makes a {type(policy).__name__}, which is no Policy")
    return policy


def described(arm: Arm | FastV) -> dict[str, Any]:
    """An arm as a run's identity and record have it."""
    if isinstance(arm, FastV):
        return {"name": arm.name, "rate": arm.budget.rate, "num_full_layers": arm.num_full_layers}
    policy = arm.policy
    options: tuple[Field[Any], ...] = fields(policy) if is_dataclass(policy) else ()
    return {
        "name": arm.name,
        "policy": f"{type(policy).__module__}:{type(policy).__qualname__}",
        "values": {option.name: repr(getattr(policy, option.name)) for option in options},
        "rate": arm.budget.rate,
        "alpha": arm.budget.alpha,
        "newlines": arm.newlines,
        "positions": arm.positions,
    }
