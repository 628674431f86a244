"""Random calls against the formulas. How many is the hypothesis profile's: 100 in all by default, see conftest."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz_cases import OPERATORS
from fuzz_layers import LAYERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recattn.composite.target_attention

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def share(percent: int) -> settings:
    """Of the cases of all tests here."""
    return settings(
        max_examples=max(1, settings.default.max_examples * percent // 100),
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


@pytest.mark.parametrize("operator", OPERATORS)
@share(10)
@given(data=st.data())
def test_the_composite_path_equals_the_formula(operator: str, data: st.DataObject) -> None:
    data.draw(OPERATORS[operator]("torch")).check()


@pytest.mark.parametrize("operator", OPERATORS)
@share(4)
@given(data=st.data())
def test_kernels_equal_the_formula(operator: str, data: st.DataObject) -> None:
    data.draw(OPERATORS[operator]("triton")).check()


@pytest.mark.parametrize("layer", LAYERS)
@share(8)
@given(data=st.data())
def test_a_layer_gives_the_same_in_every_layout(layer: str, data: st.DataObject) -> None:
    data.draw(LAYERS[layer]()).check()


@pytest.mark.parametrize("factor", [1 - 1e-6, float("nan")], ids=["a millionth off", "nan"])
def test_a_planted_wrong_gradient_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    backward = recattn.composite.target_attention.backward

    def wrong(*arguments: Any) -> Any:
        query, keys, values, bias = backward(*arguments)
        return query, keys, values * factor, bias

    monkeypatch.setattr(recattn.composite.target_attention, "backward", wrong)

    @settings(max_examples=50, deadline=None, database=None, derandomize=True)
    @given(example=OPERATORS["target_attention"]("torch"))
    def fuzz(example: Any) -> None:
        example.check()

    with pytest.raises(AssertionError, match="grad values: error"):
        fuzz()
