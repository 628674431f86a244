"""From calls to kernels, from these to records: what the operators launch, compiled for chips that are not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton

import recattn
from recattn.inspect.calls import Call
from recattn.inspect.chips import Chip
from recattn.inspect.compile import Resources, Source, compile_source, source_of
from recattn.inspect.processes import Failure, in_processes
from recattn.inspect.recording import recorded_launches
from recattn.inspect.records import Record
from recattn.inspect.roofline import bound_of
from recattn.kernels import settings

__all__ = ["DTYPES", "Job", "Plan", "compiled", "plan"]

# A dtype, and what `torch.set_float32_matmul_precision` is to be.
DTYPES = {
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
}


class Job(NamedTuple):
    call: Call
    step: str  # forward or backward
    module: str  # of `recattn.kernels`
    kernel: str
    chip: Chip
    dtype: str
    config: dict[str, Any]
    source: Source


class Plan(NamedTuple):
    jobs: list[Job]
    uncovered: list[str]  # calls without a kernel, and why

    @property
    def compilations(self) -> int:
        """How many of the jobs differ in what is compiled."""
        return len({job.source.key for job in self.jobs})


def plan(calls: Sequence[Call], dtypes: Sequence[str], chips: Sequence[Chip]) -> Plan:
    """What the launchers launch in their default settings; of equal kernels of an operator one.

    Raises:
        RuntimeError: in a process that runs kernels in Triton's interpreter.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: expected kernels that can be compiled; unset it")
    jobs: dict[Any, Job] = {}
    uncovered: dict[str, None] = {}
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)  # as processes will be forked
    try:
        for chip in chips:
            for dtype in dtypes:
                torch.set_float32_matmul_precision(DTYPES[dtype][1])
                for call in calls:
                    try:
                        found = _jobs(call, dtype, chip)
                    except NotImplementedError as error:
                        uncovered[f"{call.op} in {dtype}, {call.shape}: {error}"] = None
                        continue
                    for job in found:
                        jobs.setdefault((call.op, dtype, job.source.key), job)
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
    return Plan(list(jobs.values()), list(uncovered))


def _jobs(call: Call, dtype: str, chip: Chip) -> list[Job]:
    gpu = settings.Gpu(chip.hip, chip.capability // 10, chip.program_shared_memory)
    forward = []
    with settings.choosing_for(gpu), recorded_launches() as launches, recattn.backend("triton"):
        call.launch(DTYPES[dtype][0], then=lambda: forward.append(len(launches)))
        sources = [source_of(launch, chip) for launch in launches]
    jobs = []
    for index, (launch, source) in enumerate(zip(launches, sources, strict=True)):
        step = "forward" if index < forward[0] else "backward"
        config = {name: value for key, x in launch.kwargs.items() for name, value in _flat(key, x)}
        code = launch.kernel.fn
        module = code.__module__.rpartition(".")[2]
        jobs.append(Job(call, step, module, code.__name__, chip, dtype, config, source))
    return jobs


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Constants by name, those of a specification by theirs."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _flat(field.name, getattr(value, field.name))
    else:
        yield name, value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def compiled(jobs: Sequence[Job], workers: int, on_done: Callable[[Job], None]) -> list[Record]:
    """Compiles in processes of their own what the jobs need, equal sources once; a record per job."""
    first: dict[str, Job] = {}
    for job in jobs:
        first.setdefault(job.source.key, job)
    keys = list(first)
    tasks = [partial(compile_source, first[key].source) for key in keys]
    results: dict[str, Resources | Failure] = {}
    for index, result in in_processes(tasks, workers):
        results[keys[index]] = result
        on_done(first[keys[index]])
    return [_record(job, results[job.source.key]) for job in jobs]


def _record(job: Job, result: Resources | Failure) -> Record:
    chip = job.chip
    forward, backward = job.call.work(2 if job.dtype in ("bf16", "fp16") else 4)
    known: dict[str, Any] = {
        "op": job.call.op,
        "kernel": job.kernel,
        "arch": chip.arch,
        "dtype": job.dtype,
        "shape": job.call.shape,
        "config": job.config,
        "step": job.step,
        "module": job.module,
        "roofline": bound_of(forward if job.step == "forward" else backward, chip, job.dtype),
    }
    if isinstance(result, Failure):
        return Record(**known, ok=False, error=str(result))
    most = chip.program_shared_memory
    too_much = f"a program can have {most} bytes of shared memory" if result.shared_bytes > most else None
    return Record(
        **known,
        registers=result.registers,
        spill_bytes=result.spill_bytes,
        shared_bytes=result.shared_bytes,
        occupancy=chip.occupancy(result.registers, result.shared_bytes, result.num_warps),
        ok=result.spill_bytes == 0 and too_much is None,
        error=too_much,
        instructions=result.instructions._asdict(),
        matrix_units=result.instructions.matrix > 0,
    )
