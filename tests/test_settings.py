"""Launch settings by architecture class."""

from __future__ import annotations

import pytest
import torch
from recattn.kernels import settings
from recattn.kernels.settings import Gpu

CPU = torch.device("cpu")
A100, H100, B200, RTX_5090 = (
    Gpu(False, capability, room << 10) for capability, room in ((8, 163), (9, 227), (10, 227), (12, 99))
)
MI300X = Gpu(True, 0, 64 << 10)
TABLES = {name: value for name, value in vars(settings).items() if isinstance(value, dict) and name.isupper()}


@pytest.mark.parametrize(
    ("gpu", "chosen"),
    [(A100, "row"), (H100, "group"), (B200, "blackwell"), (RTX_5090, "row"), (MI300X, "cdna")],
    ids=["A100", "H100", "B200", "RTX 5090", "MI300X"],
)
def test_an_exception_to_a_row_holds_for_its_class_only(gpu: Gpu, chosen: str) -> None:
    table = {
        "half": "row",
        "half group": "group",
        "half blackwell": "blackwell",
        "half cdna": "cdna",
        "ieee": "?",
    }
    with settings.choosing_for(gpu):
        assert settings.choose(table, "half", CPU) == chosen
        assert settings.choose(table, "ieee", CPU) == "?"


def test_without_a_gpu_settings_are_those_of_an_a100() -> None:
    assert settings.architecture(CPU) == settings.AMPERE


def test_every_exception_is_to_a_row_that_there_is_and_for_a_class_that_there_is() -> None:
    rows = {"half", "tf32", "split", "ieee"}
    checked = 0
    for name, table in TABLES.items():
        for key in table if name != "NVIDIA" else ():
            row, _, kind = key.rpartition(" ")
            assert key.split()[-1] in rows or (row in table and kind in settings.CLASSES), f"{name}: {key}"
            checked += 1
    assert checked > 20
