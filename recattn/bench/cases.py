"""All cases, by the names of real settings."""

from __future__ import annotations

from collections.abc import Sequence

from recattn.bench.peers import is_missing
from recattn.bench.task import Case
from recattn.bench.tasks import (
    activation_unit,
    attentional_gru,
    models,
    pairwise_pool,
    self_attention,
    target_attention,
)

OPERATORS = (activation_unit, target_attention, self_attention, attentional_gru, pairwise_pool, models)
CASES: tuple[Case, ...] = tuple(case for operator in OPERATORS for case in operator.CASES)
SWEPT: dict[str, Case] = {
    operator.SWEPT.op: operator.SWEPT for operator in OPERATORS if operator is not models
}  # what `recattn profile` varies

ALWAYS = ("small", "small-full")  # tiny widths and full histories, where plain code may win: in every run


def select_cases(
    names: Sequence[str] | None, ops: Sequence[str] | None = None, *, from_log: bool, quick: bool
) -> list[Case]:
    """The cases by name; or else all those of some operators, or of all: with a log those that take its histories, and
    those that have none; and `ALWAYS`.

    Raises:
        ValueError: for a name that does not exist, or that needs a log when there is none.
    """
    known = dict.fromkeys(case.op for case in CASES)
    for op in ops or ():
        if op not in known:
            raise ValueError(f"op: expected some of {', '.join(known)}, got {op!r}")
    if names is None:
        return [
            case
            for case in CASES
            if (not ops or case.op in ops)
            and (case.quick or not quick)
            and (case.needs_log == from_log or case.op == pairwise_pool.SWEPT.op or case.name in ALWAYS)
        ]
    by_name = {case.name: case for case in CASES}
    for name in names:
        if name not in by_name:
            raise ValueError(f"case: expected some of {', '.join(by_name)}, got {name!r}")
        if by_name[name].needs_log and not from_log:
            raise ValueError(
                f"case: {name!r} takes its histories from a log, expected data other than synthetic"
            )
    return [by_name[name] for name in names]


def check_providers(names: Sequence[str] | None, cases: Sequence[Case]) -> None:
    """Raises ValueError for a name that none of the cases has."""
    known = dict.fromkeys(name for case in cases for name in case.providers)
    for name in names or ():
        if name not in known:
            raise ValueError(f"provider: expected some of {', '.join(known)}, got {name!r}")


def default_providers(case: Case, *, quick: bool) -> list[str]:
    """Those that are measured if none are asked for: without libraries that are not installed, and in a quick run
    without what takes a minute to compile."""
    slow = {"compile"} if quick and case.op == models.Model.op else set()
    return [name for name in case.providers if name not in slow and not is_missing(name)]
