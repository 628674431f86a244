"""Compiles kernels for GPUs that are not there; run in a process of its own, without the interpreter.

Arguments: an operator; targets; dtypes; `all`, or `few` for one configuration per kernel, target and dtype. Prints a
JSON list of records as `recattn inspect` writes them.
"""

from __future__ import annotations

import json
import sys

from recattn.inspect.calls import select_calls
from recattn.inspect.chips import CHIPS
from recattn.inspect.planning import compiled, plan


def main(operator: str, targets: str, dtypes: str, amount: str) -> None:
    jobs = plan(
        select_calls([operator]), dtypes.split(","), [CHIPS[target] for target in targets.split(",")]
    ).jobs
    if amount == "few":
        jobs = list({(job.module, job.kernel, job.chip, job.dtype): job for job in reversed(jobs)}.values())
    records = compiled(jobs, workers=1, on_done=lambda job: None)
    print(json.dumps([record.as_json() for record in records]))


if __name__ == "__main__":
    main(*sys.argv[1:])
