from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from recattn.bench import report
from recattn.bench.measure import RECORD, Measurement
from recattn.bench.report import Section
from recattn.bench.roofline import Peaks, chip_of, measured_peaks, peaks_of
from recattn.bench.task import Work
from recattn.bench.timing import HostMeter

# ---------------------------------------------------------------- the roofline


def test_the_least_time_is_that_of_bytes_or_of_flops():
    peaks = Peaks(bandwidth=1e9, rate=1e12, source="made up")
    assert peaks.ms(Work(bytes=2e6, flops=1e6)) == pytest.approx(2.0)
    assert peaks.ms(Work(bytes=1e3, flops=4e9)) == pytest.approx(4.0)
    assert peaks.share(Work(bytes=2e6, flops=0), ms=8.0) == pytest.approx(0.25)


def test_peaks_of_a_device_without_a_data_sheet_are_measured():
    class Meter(HostMeter):
        def milliseconds(self, run):
            run()
            return 2.0

    peaks = measured_peaks(Meter(), torch.device("cpu"), torch.float32)
    assert peaks.source == "measured"
    assert peaks.bandwidth == pytest.approx(2 * (64 << 20) / 2e-3)
    assert peaks_of(torch.device("cpu"), torch.float32).rate > 0


@pytest.mark.parametrize(
    ("name", "multiprocessors", "gib", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 132, 79.1, "sm_90"),
        ("NVIDIA H100 PCIe", 114, 79.1, None),
        ("NVIDIA H100 NVL", 132, 93.1, None),
        ("NVIDIA A100-SXM4-80GB", 108, 79.2, "sm_80"),
        ("NVIDIA A100-SXM4-40GB", 108, 39.4, None),
        ("NVIDIA L40S", 142, 44.4, "sm_89"),
        ("NVIDIA GeForce RTX 3090 Ti", 84, 23.7, None),
        ("AMD Instinct MI300X", 304, 191.98, "gfx942"),
        ("NVIDIA GeForce RTX 2080", 46, 7.8, None),
    ],
)
def test_a_data_sheet_counts_for_just_the_build_that_it_is_of(
    name: str, multiprocessors: int, gib: float, expected: str | None
):
    total = int(gib * 2**30)
    found = chip_of(SimpleNamespace(name=name, multi_processor_count=multiprocessors, total_memory=total))
    assert (found and found.arch) == expected


def test_backward_counts_two_passes_more():
    work = Work(10.0, 100.0)
    assert work.of("inference") == work.of("forward") == work
    assert work.of("forward+backward") == Work(30.0, 300.0)


# ---------------------------------------------------------------- reports


def measurement(provider: str, mode: str, ms: float, peak_bytes: int, **more: object) -> Measurement:
    return Measurement(
        "activation_unit", "c", provider, mode, "cpu", "float32", ms, ms * 0.9, ms * 1.1, peak_bytes, **more
    )


MEASURED = [
    measurement("recattn", "forward", 2.0, 2**20, roofline=0.5),
    measurement(
        "eager",
        "forward",
        13.0,
        30 * 2**20,
        first_ms=5e3,
        deviation=2e-7,
        relative=6.5,
        relative_low=6.24,
        relative_high=6.76,
    ),
    Measurement("activation_unit", "c", "compile", "forward", "cpu", "float32", error="no compiler"),
    Measurement("activation_unit", "c", "compile", "forward+backward", "cpu", "float32", error="no compiler"),
    measurement("recattn", "forward+backward", 4.0, 2**20),
    measurement("eager_jagged", "forward+backward", 2.0, 3 * 2**20),
    measurement("eager", "forward+backward", 10.0, 3 * 2**20),
]


def test_ratios_are_to_recattn_in_the_same_mode_and_its_own_to_the_fastest_other():
    text = report.markdown(Section("title", MEASURED))
    table, failures = text.rsplit("\n\n", 1)
    assert failures == "- c, compile, forward, forward+backward: no compiler\n"
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[4:]]
    assert lines == [
        ["forward", "recattn", "2.00", "1.80–2.20", "6.50×", "4%", "1.00", "30.00×", "50%", "", ""],
        ["forward", "eager", "13.00", "11.70–14.30", "6.50×", "4%", "30.00", "30.00×", "", "2e-07", "5 s"],
        ["forward", "compile", "failed", "", "", "", "", "", "", "", ""],
        ["forward+backward", "compile", "failed", "", "", "", "", "", "", "", ""],
        ["forward+backward", "recattn", "4.00", "3.60–4.40", "0.50×", "0%", "1.00", "3.00×", "", "", ""],
        ["forward+backward", "eager_jagged", "2.00", "1.80–2.20", "0.50×", "0%", "3.00", "3.00×", "", "", ""],
        ["forward+backward", "eager", "10.00", "9.00–11.00", "2.50×", "0%", "3.00", "3.00×", "", "", ""],
    ]


def test_records_have_the_figures_of_the_table():
    records = report.records(MEASURED)
    assert [tuple(record)[: len(RECORD)] for record in records] == [RECORD] * len(MEASURED)
    own, eager, failed = records[:3]
    assert (own["faster_by"], own["smaller_by"], own["roofline"]) == (6.5, 30.0, 0.5)
    assert (eager["faster_by"], eager["smaller_by"], eager["first_ms"]) == (6.5, 30.0, 5e3)
    assert (eager["relative_low"], eager["relative_high"]) == (6.24, 6.76)
    assert (failed["faster_by"], failed["error"]) == (None, "no compiler")
    assert [record["faster_by"] for record in records[4:]] == [0.5, 0.5, 2.5]


def test_the_summary_names_the_cases_that_are_lost():
    said = report.summary(MEASURED)
    assert "recattn is 1.8× as fast in the geometric mean over 2 cases and modes, from 0.5× to 6.5×" in said
    assert "slower in 1: c in forward+backward (0.50×, eager_jagged)" in said
    assert "no case that both" in report.summary(MEASURED[:1])


def test_a_table_shows_every_measurement():
    console = Console(width=130, file=StringIO())
    console.print(report.table(Section("title", MEASURED)))
    text = console.file.getvalue()
    for word in ("title", "forward+backward", "6.50×", "failed", "5 s"):
        assert word in text
