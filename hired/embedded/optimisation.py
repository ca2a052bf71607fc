"""Muon for the hidden matrices, AdamW for everything else, one warm-up and cosine for both."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn


class Optimiser:
    """Steps all parameters of some modules; the learning rate follows the share of the run that is done."""

    def __init__(
        self, modules: Sequence[nn.Module], *, peak: float, warm_up_steps: int = 200, floor: float = 0.02
    ):
        hidden, rest = _split(modules)
        self.parameters = [*hidden, *rest]
        muon = torch.optim.Muon(hidden, lr=peak, weight_decay=0.02, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=peak, weight_decay=0.01, betas=(0.9, 0.98))
        self._optimisers: Iterable[torch.optim.Optimizer] = (muon, adam)
        self._peak, self._warm_up_steps, self._floor, self._step = peak, warm_up_steps, floor, 0

    def step(self, done: float) -> None:
        """Applies the gradients and clears them; ``done`` runs from 0 to 1 over the whole training."""
        self._step += 1
        cosine = self._floor + (1 - self._floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        rate = self._peak * min(1.0, self._step / self._warm_up_steps) * cosine
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimiser in self._optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)


class Named(nn.Module):
    """A module under a name by which the optimiser tells matrices between hidden layers."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__()
        self.add_module(name, module)


def _split(modules: Sequence[nn.Module]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices between hidden layers, and embeddings, heads, norms and biases."""
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                inner = parameter.ndim == 2 and ("layers." in name or "projector" in name)
                (hidden if inner else rest).append(parameter)
    return hidden, rest


def elapsed(minutes: float) -> Iterator[tuple[int, float]]:
    """Counts steps from 1, with the share of the time that is gone, until it is."""
    start = time.monotonic()
    for step in itertools.count(1):
        done = (time.monotonic() - start) / (60 * minutes)
        if done >= 1:
            return
        yield step, done
