"""Training models side by side: the same batches, in turns short enough to share the machine's moods."""

from __future__ import annotations

import copy
import ctypes
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from recattn.data import Batch, Examples
from recattn.metrics import auc, grouped_auc
from recattn.models import RankingModel

TURN = 8  # batches


@dataclass
class Curve:
    """One figure per epoch of each."""

    loss: list[float] = field(default_factory=list)
    label_loss: list[float] = field(default_factory=list)
    auc: list[float] = field(default_factory=list)
    gauc: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[int | None] = field(default_factory=list)


def train_side_by_side(
    models: Mapping[str, RankingModel],
    train: Examples,
    test: Examples,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Curve]:
    """Trains each model with Adam on its loss, all on the same batches in the same order.

    The models take turns of a few batches, in an order that is reversed from turn to turn, so that whatever
    else goes on in the machine falls on all of them. Random numbers begin from one seed in each turn, so
    dropout masks agree too. Before the first epoch a copy of each model takes a turn that does not count:
    kernels are compiled and libraries loaded by then.

    Args:
        models: by name, on `device`; they are trained in place.
        progress: called after each turn with the epoch and how many batches it trained on.

    Returns:
        A curve per model. `loss` is the mean over the epoch's training examples, as they were met, and `label_loss`
        that without auxiliary terms; `auc` and `gauc` are of the test part after the epoch. `seconds` is the time in
        forward, backward and optimizer steps, so it is without the assembling of batches, which are shared, and the
        test. `peak_bytes` is the most that a turn took on top of what was held before it: see `PeakMemory`.

    Raises:
        ValueError: for fewer than one epoch.
    """
    if epochs < 1:
        raise ValueError(f"epochs: expected at least 1, got {epochs}")
    runs = [_Run(model, lr, device) for model in models.values()]
    warmup = next(_turns(train.batches(batch_size, seed=seed, device=device)))
    for model in models.values():
        _Run(copy.deepcopy(model), lr, device).turn(warmup)
    numbers = count()
    for epoch in range(epochs):
        batches = train.batches(batch_size, seed=seed + epoch, device=device)
        for turn in _turns(batches):
            number = next(numbers)
            for run in runs if number % 2 == 0 else reversed(runs):
                torch.manual_seed(seed + number)
                run.turn(turn)
            if progress is not None:
                progress(epoch, len(turn))
        for run in runs:
            run.finish_epoch(test, batch_size)
    return {name: run.curve for name, run in zip(models, runs, strict=True)}


def _turns(batches: Iterator[Batch]) -> Iterator[list[Batch]]:
    while turn := list(islice(batches, TURN)):
        yield turn


def predict(model: nn.Module, examples: Examples, batch_size: int, device: torch.device) -> Tensor:
    """`[E]` logits on the CPU, in the order of the examples, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(batch).cpu() for batch in examples.batches(batch_size, device=device)])


class _Run:
    """A model in training, and what it has taken in this epoch so far."""

    def __init__(self, model: RankingModel, lr: float, device: torch.device) -> None:
        self.model, self.device, self.curve = model, device, Curve()
        self.optimizer = torch.optim.Adam(model.parameters(), lr=lr)
        self.memory = PeakMemory(device)
        self._start_epoch()

    def _start_epoch(self) -> None:
        self.loss, self.label_loss, self.examples, self.seconds, self.peak = 0.0, 0.0, 0, 0.0, 0

    def turn(self, batches: list[Batch]) -> None:
        self.model.train()
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        with self.memory.measured():
            begin = time.perf_counter()
            for batch in batches:
                losses = self.model.losses(batch)
                self.optimizer.zero_grad()
                losses.total.backward()
                self.optimizer.step()
                sums += torch.stack(losses).detach() * batch.size
            total, of_labels = sums.tolist()  # waits for the device
            self.seconds += time.perf_counter() - begin
        self.loss += total
        self.label_loss += of_labels
        self.optimizer.zero_grad()
        self.examples += sum(batch.size for batch in batches)
        self.peak = max(self.peak, self.memory.peak or 0)

    def finish_epoch(self, test: Examples, batch_size: int) -> None:
        scores = predict(self.model, test, batch_size, self.device)
        self.curve.loss.append(self.loss / self.examples)
        self.curve.label_loss.append(self.label_loss / self.examples)
        self.curve.auc.append(auc(test.label, scores))
        self.curve.gauc.append(grouped_auc(test.label, scores, test.user))
        self.curve.seconds.append(self.seconds)
        self.curve.peak_bytes.append(None if self.memory.peak is None else self.peak)
        self._start_epoch()


class PeakMemory:
    """The most memory that was held during a stretch of code, on top of what was held before it.

    On a GPU: what PyTorch's allocator had handed out. On Linux, for the CPU: the process's resident set,
    whose peak the kernel keeps, good to a few hundred KiB, and lets us reset; free heap is given back to the
    system first, so that memory left by one stretch does not hide what the next one takes. Elsewhere there is
    no figure, and `peak` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak: int | None = None

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Sets `peak` for what runs inside."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            before: int | None = torch.cuda.memory_allocated(self.device)
        else:
            before = _reset_resident_peak()
        yield
        if before is None:
            self.peak = None
        elif self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - before
        else:
            self.peak = max(0, _resident("VmHWM") - before)


def _reset_resident_peak() -> int | None:
    """Sets the peak of the resident set to its size now, and returns that; None where it cannot be set."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(name: str) -> int:
    """A size in bytes from Linux's `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status: expected a line {name}, got none")
