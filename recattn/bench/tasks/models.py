"""Whole models: inference, and training steps with Adam, fused and by their eager twins.

A library's models differ from these in more than attention, so they are compared with themselves: `recattn bench
--library`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from recattn.bench.histories import FROM_LOG, HistoryCase, draw_batch, draw_lengths
from recattn.bench.task import Prepared, Setting, Task, comparing
from recattn.data import Batch
from recattn.data.synthetic import random_batch
from recattn.models import DIEN, MODELS, RankingModel

IDS = {"num_users": 1000, "num_items": 2000, "num_categories": 50}


@dataclass(frozen=True)
class Model(HistoryCase):
    """Args:
    model: a name of `recattn.models.MODELS`.
    dim: of the embeddings; items are twice as wide.
    """

    op = "model"
    modes = ("inference", "training step")
    model: str = "din"
    dim: int = 32

    @property
    def providers(self) -> Mapping[str, Callable[[Any], Prepared]]:
        return PROVIDERS

    def task(self, setting: Setting) -> Task:
        ids, batch = self._batch(setting)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            model = MODELS[self.model](**ids, dim=self.dim)
        model.to(setting.device)
        inputs = Inputs(model, batch, setting)
        return Task(
            self,
            setting,
            f"{self.model}, {self.describe(batch.history)}, D={self.dim} per id",
            {name: partial(provider, inputs) for name, provider in self.providers.items()},
            partial(formula, inputs),
            None,
            kinked=True,
        )

    def _batch(self, setting: Setting) -> tuple[dict[str, int], Batch]:
        if self.lengths != FROM_LOG:
            batch = random_batch(draw_lengths(self, setting), seed=setting.seed, **IDS)
            return IDS, batch.to(setting.device)
        batch = draw_batch(self, setting, torch.Generator().manual_seed(setting.seed))
        ids = {name: getattr(setting.log, name) for name in IDS}
        return ids, batch.to(setting.device)


MODEL_LENGTHS = {"din": 100, "dien": 100, "bst": 50, "dsin": 100, "afm": 100}
CASES = (
    *(Model(f"train-{name}", name == "din", 256, n, model=name) for name, n in MODEL_LENGTHS.items()),
    *(
        Model(f"train-{name}-log", name in ("din", "dien"), 256, n, FROM_LOG, model=name)
        for name, n in MODEL_LENGTHS.items()
    ),
)


@dataclass(frozen=True, eq=False)
class Inputs:
    """A model, in float32, and a batch for it."""

    model: RankingModel
    batch: Batch
    setting: Setting


def formula(inputs: Inputs) -> Prepared:
    """The eager twin in float64."""
    return _prepared(inputs, "eager", torch.float64)


def recattn(inputs: Inputs) -> Prepared:
    return _prepared(inputs, "fused", inputs.setting.dtype)


def eager(inputs: Inputs) -> Prepared:
    """Padded PyTorch code in the place of each fused layer."""
    return _prepared(inputs, "eager", inputs.setting.dtype)


def compiled(inputs: Inputs) -> Prepared:
    """The same through `torch.compile`, for exactly these shapes; it breaks off where the model reads lengths."""
    if isinstance(inputs.model, DIEN):
        raise NotImplementedError("torch.compile unrolls the steps of a recurrence, which takes it minutes")
    return _prepared(inputs, "eager", inputs.setting.dtype, partial(torch.compile, dynamic=False))


def _prepared(
    inputs: Inputs,
    implementation: str,
    dtype: torch.dtype,
    through: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = lambda function: function,
) -> Prepared:
    """A copy of the model, which each call finds with the same random numbers ahead."""
    model = copy.deepcopy(inputs.model).to(dtype).use(implementation)
    fields: dict[str, Any] = {**vars(inputs.batch), "label": inputs.batch.label.to(dtype)}
    batch = Batch(**fields)
    optimizer = torch.optim.Adam(model.parameters())
    predicted, loss_of = through(model.__call__), through(model.loss)

    def loss() -> Tensor:
        torch.manual_seed(inputs.setting.seed)
        return loss_of(batch)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value.detach()

    infer = partial(predicted, batch)
    return Prepared(loss, list(model.parameters()), None, comparing(0), infer=infer, step=step)


PROVIDERS = {"recattn": recattn, "eager": eager, "compile": compiled}
