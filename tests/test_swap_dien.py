"""The recurrent layers of other libraries' DIENs compute the same fused as by their own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from swap_cases import (
    BATCH,
    LENGTHS,
    LONGEST,
    MASKS,
    TOLERANCES,
    WIDTH,
    assert_exports_as_own,
    assert_fused_equals_own,
    assert_same,
    assert_state_survives,
    import_or_skip,
    run,
    spread,
)
from torch import Tensor, nn

import recattn

GRUS = ("GRU", "AIGRU", "AGRU", "AUGRU")
SOME = LENGTHS[LENGTHS > 0]


def histories(batch: int = BATCH) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, LONGEST, WIDTH)


def queries(batch: int = BATCH) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(batch, WIDTH)


@pytest.fixture(params=TOLERANCES, ids=str)
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """Which the libraries make tensors of, if it is the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


class TestDeepCTRTorch:
    @pytest.mark.parametrize("gru_type", GRUS)
    @pytest.mark.parametrize("normalized", [True, False])
    def test_evolution(self, gru_type: str, normalized: bool, dtype: torch.dtype) -> None:
        layer = spread(
            import_or_skip("deepctr_torch.models.dien").InterestEvolving(
                WIDTH, gru_type, att_hidden_size=(5, 3), att_weight_normalization=normalized
            )
        )
        if gru_type == "AUGRU":
            cell = layer.interest_evolution.rnn
            assert cell.bias_ih is cell.bias_hh
        call = lambda m, q, k: m(q, k, LENGTHS)  # noqa: E731
        assert_fused_equals_own(layer, call, [queries(), histories(len(SOME))], dtype)
        none = torch.zeros_like(LENGTHS)
        assert_fused_equals_own(layer, lambda m, q, k: m(q, k, none), [queries(), histories(0)], dtype)

    @pytest.mark.parametrize("use_neg", [True, False])
    @pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS.clamp_min(1), LENGTHS.clamp_max(1), LENGTHS * 0])
    def test_extractor(
        self, use_neg: bool, lengths: Tensor, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = import_or_skip("deepctr_torch.models.dien")
        layer = spread(module.InterestExtractor(WIDTH, use_neg))

        class InDtypeOfInput:
            """The library's targets are of float32, which the loss of others does not take."""

            @staticmethod
            def binary_cross_entropy(p: Tensor, target: Tensor) -> Tensor:
                return nn.functional.binary_cross_entropy(p, target.to(p.dtype))

        monkeypatch.setattr(module, "F", InDtypeOfInput)
        negatives = histories().flip(0)
        call = lambda m, k, n: m(k, lengths, n)  # noqa: E731
        assert_fused_equals_own(layer, call, [histories(), negatives], dtype)

    def test_state_and_copies(self) -> None:
        layer = spread(
            import_or_skip("deepctr_torch.models.dien").InterestEvolving(WIDTH, "AUGRU", att_hidden_size=(5,))
        )
        query, keys = queries(), histories(len(SOME))
        assert_state_survives(layer, lambda m: m(query, keys, LENGTHS))
        assert_exports_as_own(layer, (query, keys, LENGTHS))

    def test_a_gru_of_another_kind_is_left(self) -> None:
        layer = import_or_skip("deepctr_torch.models.dien").InterestEvolving(WIDTH, "GRU")
        layer.interest_evolution = nn.GRU(WIDTH, WIDTH, 2, batch_first=True)
        row, _ = recattn.fuse(layer)
        assert not row.swapped
        assert "num_layers=2" in row.reason


class TestRecBole:
    @pytest.mark.parametrize("gru", GRUS)
    def test_evolution(self, gru: str, dtype: torch.dtype) -> None:
        mask = torch.arange(LONGEST).view(1, -1)
        module = import_or_skip("recbole.model.sequential_recommender.dien")
        layer = spread(module.InterestEvolvingLayer(mask, WIDTH, WIDTH, [4 * WIDTH, 5, 3], gru=gru))
        call = lambda m, q, k: m(q, k, SOME)  # noqa: E731
        assert_fused_equals_own(layer, call, [queries(len(SOME)), histories(len(SOME))], dtype)

    @pytest.mark.parametrize("lengths", [SOME, torch.ones_like(SOME)])
    def test_extractor(self, lengths: Tensor, dtype: torch.dtype) -> None:
        module = import_or_skip("recbole.model.sequential_recommender.dien")
        layer = spread(module.InterestExtractorNetwork(WIDTH, WIDTH, [2 * WIDTH, 5, 1]))
        call = lambda m, k, n: m(k, lengths, n)  # noqa: E731
        assert_fused_equals_own(layer, call, [histories(len(SOME)), histories(len(SOME)).flip(0)], dtype)

    def test_an_empty_history_raises_as_in_the_library(self) -> None:
        module = import_or_skip("recbole.model.sequential_recommender.dien")
        layer = module.InterestExtractorNetwork(WIDTH, WIDTH, [2 * WIDTH, 5, 1])
        recattn.fuse(layer)
        with pytest.raises(RuntimeError, match="greater than 0"):
            layer(histories(), LENGTHS, histories())


class TestTorchRechub:
    @pytest.mark.parametrize("kind", [None, *MASKS])
    def test_augru(self, kind: str | None, dtype: torch.dtype) -> None:
        layer = spread(import_or_skip("torch_rechub.models.ranking.dien").AUGRU(WIDTH))
        mask = None if kind is None else MASKS[kind][LENGTHS > 0]
        call = lambda m, x, q: m(x, q, mask)  # noqa: E731
        assert_fused_equals_own(layer, call, [histories(len(SOME)), queries(len(SOME))], dtype)

    def test_rows_without_items(self) -> None:
        own = spread(import_or_skip("torch_rechub.models.ranking.dien").AUGRU(WIDTH))
        fused = copy.deepcopy(own)
        recattn.fuse(fused)
        with torch.no_grad():  # the library's code does not survive backward there
            expected = own(histories(), queries(), MASKS["holes"])
            actual = fused(histories(), queries(), MASKS["holes"])
        torch.testing.assert_close(actual, expected)

    def test_state_and_copies(self) -> None:
        layer = spread(import_or_skip("torch_rechub.models.ranking.dien").AUGRU(WIDTH))
        example = (histories(), queries())
        assert_state_survives(nn.ModuleDict({"evolution": layer}), lambda m: m["evolution"](*example)[1])
        assert_exports_as_own(layer, example)


class TestFuxiCTR:
    @pytest.fixture
    def dien(self) -> Any:
        """Its model holds features too: this one is of the parts that are fused."""
        module = import_or_skip("model_zoo.LongCTR.DIEN.DIEN")

        def build(gru_type: str) -> nn.Module:
            model = module.DIEN.__new__(module.DIEN)
            nn.Module.__init__(model)
            model.gru_type = gru_type
            model.extraction_modules = nn.ModuleList([nn.GRU(WIDTH, WIDTH, batch_first=True)])
            evolving = (
                module.DynamicGRU(WIDTH, WIDTH, gru_type=gru_type)
                if gru_type[0] == "A"
                else nn.GRU(WIDTH, WIDTH, batch_first=True)
            )
            model.evolving_modules = nn.ModuleList([evolving])
            model.attention_modules = nn.ModuleList([module.AttentionLayer(WIDTH)])
            return spread(model)

        return build

    @pytest.mark.parametrize("kind", MASKS)
    @pytest.mark.parametrize("gru_type", ["GRU", "AGRU", "AUGRU"])
    def test_extraction_and_evolution(self, gru_type: str, kind: str, dien: Any, dtype: torch.dtype) -> None:
        mask = MASKS[kind][LENGTHS > 0].to(dtype)

        def call(model: Any, sequence: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
            packed, interests = model.interest_extraction(0, sequence, mask)
            return interests, model.interest_evolution(0, packed, interests, target, mask)

        assert_fused_equals_own(dien(gru_type), call, [histories(len(SOME)), queries(len(SOME))], dtype)

    @pytest.mark.parametrize("softmax", [True, False])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("kind", ["bilinear_attention", "dot_attention", "din_attention"])
    def test_attention(self, kind: str, training: bool, softmax: bool, dtype: torch.dtype) -> None:
        module = import_or_skip("model_zoo.LongCTR.DIEN.DIEN")
        layer = module.AttentionLayer(WIDTH, kind, [5, 3], use_attention_softmax=softmax)
        spread(layer).train(training)
        for mask in (None, MASKS["left"].to(dtype)):
            call = lambda m, k, q, mask=mask: m(k, q, mask)  # noqa: E731
            assert_fused_equals_own(layer, call, [histories(), queries()], dtype)

    def test_what_the_library_fails_at_is_left(self, dien: Any) -> None:
        row, _ = recattn.fuse(dien("AIGRU"))
        assert row == ("", "DIEN", False, "AIGRU, which the library's own code fails at")


def test_afm_of_deepctr_torch(dtype: torch.dtype) -> None:
    layer = spread(import_or_skip("deepctr_torch.layers.interaction").AFMLayer(WIDTH, 3))
    torch.manual_seed(1)
    fields = [torch.randn(BATCH, 1, WIDTH) for _ in range(5)]
    fused = assert_fused_equals_own(layer, lambda m, *x: m(list(x)), fields, dtype)
    layer([x.to(dtype) for x in fields])
    torch.testing.assert_close(fused.normalized_att_score, layer.normalized_att_score.detach())
    copy.deepcopy(fused)


def test_afm_of_recbole(dtype: torch.dtype) -> None:
    afm, layers = (
        import_or_skip("recbole.model.context_aware_recommender.afm"),
        import_or_skip("recbole.model.layers"),
    )
    model = afm.AFM.__new__(afm.AFM)  # without the features that it is of
    nn.Module.__init__(model)
    model.attlayer, model.dropout_layer = layers.AttLayer(WIDTH, 3), nn.Dropout(0.0)
    model.num_feature_field, model.p = 5, nn.Parameter(torch.randn(WIDTH))
    torch.manual_seed(1)
    assert_fused_equals_own(spread(model), lambda m, x: m.afm_layer(x), [torch.randn(BATCH, 5, WIDTH)], dtype)


def test_run_compares_all_that_can_differ() -> None:
    norm = nn.BatchNorm1d(2)
    x = torch.randn(3, 2, requires_grad=True)
    found = run(norm, lambda m: m(x), [x])
    assert len(found) == 1 + 1 + 2 + 3
    with pytest.raises(AssertionError):
        assert_same(found, [x + 1 for x in found], 1e-5)
