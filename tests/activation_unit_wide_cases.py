"""activation_unit at the widths that the public leaderboards use."""

from __future__ import annotations

import torch
from activation_unit_cases import Case, call

from recattn import functional


def run_classic_case(dtype: torch.dtype) -> None:
    """Forward and backward."""
    case = Case(
        lengths=[75] * 4,
        dim=128,
        hidden=(512, 256),
        activation="identity",  # of relu, which the kernels do not tell apart here, drawing keys would take long
        dtype=dtype,
        slack=0,
        offsets_dtype=torch.int32,
    )
    call(functional.activation_unit, case, case.tensors())
