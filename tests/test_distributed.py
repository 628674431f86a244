"""DIN on two processes is DIN on one: data parallel, also where one process runs out of batches, and fully sharded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.join import Join
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.nn.parallel import DistributedDataParallel

from recattn.data import Batch, random_batch
from recattn.models import DIN

SIZES = {"num_users": 6, "num_items": 20, "num_categories": 3}
# Of each process the batches, and of each batch the lengths of its histories.
BATCHES = [
    [[4, 0, 9, 1, 0], [0, 0, 0], [2]],
    [[1, 30], [5, 0, 0, 2, 2, 7], [3, 3, 3]],
]
UNEVEN = [BATCHES[0], BATCHES[1][:1]]
WORLD = len(BATCHES)


def model() -> DIN:
    torch.manual_seed(0)
    return DIN(**SIZES, dim=4).double()


def batch(lengths: list[int], seed: int) -> Batch:
    torch.manual_seed(seed)
    made = random_batch(torch.tensor(lengths), **SIZES)
    return Batch(**{**vars(made), "label": made.label.double()})


def loss(made: nn.Module, given: Batch) -> Tensor:
    """A sum, since the mean of means is not that of batches of different sizes."""
    return binary_cross_entropy_with_logits(made(given), given.label, reduction="sum")


Steps = list[list[tuple[list[int], int]]]  # of each step the batches, by their lengths and seed


def train(made: nn.Module, steps: Steps, share: float = 1.0) -> None:
    """Gradient descent on a share of the loss."""
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05)
    for step in steps:
        optimizer.zero_grad()
        for lengths, seed in step:
            (share * loss(made, batch(lengths, seed))).backward()
        optimizer.step()


def alone(batches: list[list[list[int]]]) -> dict[str, Tensor]:
    """What one process learns that sees the batches of both, and averages over processes as they do."""
    made = model()
    longest = max(map(len, batches))
    steps = [
        [(given[i], 10 * rank + i) for rank, given in enumerate(batches) if i < len(given)]
        for i in range(longest)
    ]
    train(made, steps, 1 / WORLD)
    return made.state_dict()


def own(batches: list[list[list[int]]], rank: int) -> Steps:
    return [[(lengths, 10 * rank + i)] for i, lengths in enumerate(batches[rank])]


def assert_equal(got: dict[str, Any], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        whole = got[name].full_tensor() if hasattr(got[name], "full_tensor") else got[name]
        torch.testing.assert_close(whole, tensor, rtol=1e-10, atol=1e-12, msg=name)


def data_parallel(rank: int) -> None:
    made = model()
    train(DistributedDataParallel(made), own(BATCHES, rank))
    assert_equal(made.state_dict(), alone(BATCHES))


def data_parallel_until_all_are_done(rank: int) -> None:
    made = model()
    parallel = DistributedDataParallel(made)
    with Join([parallel]):
        train(parallel, own(UNEVEN, rank))
    if rank == 0:  # the other one has stopped before the last steps
        assert_equal(made.state_dict(), alone(UNEVEN))


def fully_sharded(rank: int) -> None:
    from torch.distributed.fsdp import fully_shard

    made = model()
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for part in (made.embedding, made.attention, made.head):
        fully_shard(part, mesh=mesh)
    fully_shard(made, mesh=mesh)
    assert all(hasattr(parameter, "full_tensor") for parameter in made.parameters())
    train(made, own(BATCHES, rank))
    assert_equal(made.state_dict(), alone(BATCHES))
    twin = model().use("eager")
    twin.load_state_dict({name: x.full_tensor() for name, x in made.state_dict().items()})
    given = batch([3, 0, 8], 5)
    torch.testing.assert_close(made(given), twin(given), rtol=1e-9, atol=1e-11)


WAYS = {way.__name__: way for way in (data_parallel, data_parallel_until_all_are_done, fully_sharded)}


def process(rank: int, folder: str) -> None:
    """All ways, as starting a process takes longer than any of them; what failed is left in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for name, way in WAYS.items():
        try:
            way(rank)
        except Exception as error:
            Path(folder, f"{name} {rank}").write_text(f"{type(error).__name__}: {error}")
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By way and process."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(process, (str(folder),), nprocs=WORLD)
    return {path.name: path.read_text() for path in folder.iterdir() if path.name.partition(" ")[0] in WAYS}


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_learn_what_one_does(way: str, failures: dict[str, str]) -> None:
    assert {name: text for name, text in failures.items() if name.startswith(f"{way} ")} == {}
