"""Whole models of other libraries, and a batch for each, as their own training takes it.

A builder returns a model with a `Batch` of histories of skewed lengths. Sizes are of `Sizes`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from recattn.bench.peers import import_peer
from recattn.data import sample_lengths


@dataclass(frozen=True)
class Sizes:
    """Of a batch: rows, the padded length, the share of it that is items, the width of an embedding, and how many
    items and users there are."""

    batch: int = 512
    longest: int = 100
    fill: float = 0.2
    dim: int = 32
    items: int = 5000
    users: int = 1000


class Example(NamedTuple):
    """A model, and what its training does with one batch.

    Args:
        forward: the prediction of a model.
        loss: the same model's loss.
    """

    model: nn.Module
    forward: Callable[[Any], Tensor]
    loss: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Ids from 1 on; 0 is padding."""

    lengths: Tensor  # [B]
    history: Tensor  # [B, L]
    negatives: Tensor  # [B, L]
    target: Tensor  # [B]
    user: Tensor  # [B]
    label: Tensor  # [B], 0 or 1

    @classmethod
    def of(cls, sizes: Sizes, least: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(0)

        def ids(count: int, *shape: int) -> Tensor:
            return torch.randint(1, count, shape, generator=generator)

        lengths = sample_lengths("lognormal", sizes.batch, sizes.longest, fill=sizes.fill).clamp_min(least)
        valid = torch.arange(sizes.longest) < lengths[:, None]
        padded = (sizes.batch, sizes.longest)
        return cls(
            lengths,
            ids(sizes.items, *padded) * valid,
            ids(sizes.items, *padded) * valid,
            ids(sizes.items, sizes.batch),
            ids(sizes.users, sizes.batch),
            ids(3, sizes.batch).sub(1).float(),
        )


def _deepctr_torch(name: str, sizes: Sizes) -> Example:
    inputs = import_peer("deepctr_torch.inputs")
    batch = Batch.of(sizes)
    sparse = [
        inputs.SparseFeat("user", sizes.users, embedding_dim=sizes.dim),
        inputs.SparseFeat("item", sizes.items, embedding_dim=sizes.dim),
    ]
    history = inputs.VarLenSparseFeat(
        inputs.SparseFeat("hist_item", sizes.items, embedding_dim=sizes.dim, embedding_name="item"),
        maxlen=sizes.longest,
        length_name="length",
    )
    columns: dict[str, Tensor] = {
        "user": batch.user,
        "item": batch.target,
        "hist_item": batch.history,
        "length": batch.lengths,
    }
    if name in ("DIN", "DIN-Dice"):  # the latter by the library's defaults
        options = {"att_hidden_size": (80, 40), "att_activation": "sigmoid"} if name == "DIN" else {}
        model = import_peer("deepctr_torch.models.din").DIN([*sparse, history], ["item"], **options)
    elif name == "DIEN":
        model = import_peer("deepctr_torch.models.dien").DIEN([*sparse, history], ["item"], gru_type="AUGRU")
    else:
        fields = [f"field_{i}" for i in range(39)]
        sparse = [inputs.SparseFeat(field, sizes.items, embedding_dim=16) for field in fields]
        columns = {field: batch.target.roll(i) for i, field in enumerate(fields)}
        model = import_peer("deepctr_torch.models.afm").AFM(sparse, sparse, attention_factor=16)
    model.compile("adam", "binary_crossentropy")
    width = max(stop for _, stop in model.feature_index.values())
    table = torch.zeros(sizes.batch, width)
    for column, (start, stop) in model.feature_index.items():
        table[:, start:stop] = columns[column].reshape(sizes.batch, -1)

    def loss(model: Any) -> Tensor:  # as in its `fit`
        predicted = model(table).squeeze()
        data_loss = model.loss_func(predicted, batch.label, reduction="sum")
        return data_loss + model.get_regularization_loss() + model.aux_loss

    return Example(model, lambda m: m(table), loss)


def _fuxictr(name: str, sizes: Sizes) -> Example:
    features = import_peer("fuxictr.features").FeatureMap("bench", tempfile.gettempdir())
    spec = {"type": "categorical", "padding_idx": 0, "embedding_dim": sizes.dim}
    features.features.update(
        {
            "user": {**spec, "source": "user", "vocab_size": sizes.users},
            "item": {**spec, "source": "item", "vocab_size": sizes.items},
        }
    )
    features.labels, features.default_emb_dim, features.num_fields = ["label"], sizes.dim, 2
    common = {
        "optimizer": "adam",
        "loss": "binary_crossentropy",
        "metrics": ["AUC"],
        "verbose": 0,
        "model_root": tempfile.gettempdir(),
        "embedding_dim": sizes.dim,
    }
    options: dict[str, Any] = {
        "DIN": {
            "attention_hidden_units": [80, 40],
            "attention_hidden_activations": "ReLU",
            "din_use_softmax": True,
        },
        "DIEN": {},
    }
    cls = getattr(import_peer(f"model_zoo.LongCTR.{name}.{name}"), name)
    model = cls(features, **options[name], **common)
    batch = Batch.of(sizes)
    # Its loader pads in front, which its DIEN, that takes the first items of a row, is not made for.
    ids = torch.cat([batch.history, batch.target[:, None]], 1)
    mask = (batch.history > 0).float()

    def inputs() -> Any:
        return {"user": batch.user, "label": batch.label}, {"item": ids.flatten()}, mask

    def loss(model: Any) -> Tensor:
        return model.compute_loss(model(inputs()), batch.label[:, None])

    return Example(model, lambda m: m(inputs())["y_pred"], loss)


def _recbole(name: str, sizes: Sizes) -> Example:
    folder = "context_aware_recommender" if name == "AFM" else "sequential_recommender"
    model_class = getattr(import_peer(f"recbole.model.{folder}.{name.lower()}"), name)
    config_class = import_peer("recbole.config").Config
    with _as_for_recbole(config_class), tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "embedding_size": sizes.dim,
            "MAX_ITEM_LIST_LENGTH": sizes.longest,
            "mlp_hidden_size": [80, 40],
            "dropout_prob": 0.0,  # which the two models would draw differently
            "use_gpu": False,
            "checkpoint_dir": scratch,
            "log_wandb": False,
            "show_progress": False,
        }
        config = config_class(name, "ml-100k", config_dict=settings)
        dataset = import_peer("recbole.data").create_dataset(config)
        dataset.build()
        model = model_class(config, dataset)
    if name == "AFM":  # of the fields of MovieLens-100K, one of which has several values
        singles = zip(model.token_field_names, model.token_field_dims, strict=True)
        several = zip(model.token_seq_field_names, model.token_seq_field_dims, strict=True)
        fields = {field: torch.randint(1, size, (sizes.batch,)) for field, size in singles}
        fields |= {field: torch.randint(size, (sizes.batch, 3)) for field, size in several}
        fields["label"] = Batch.of(sizes).label
        return Example(model, lambda m: m.predict(fields), lambda m: m.calculate_loss(fields))
    few = Sizes(sizes.batch, sizes.longest, sizes.fill, sizes.dim, items=1600, users=900)
    batch = Batch.of(few, least=2 if name == "DIEN" else 1)
    interaction = {
        "user_id": batch.user,
        "item_id": batch.target,
        "item_id_list": batch.history,
        "neg_item_id_list": batch.negatives,
        "item_length": batch.lengths,
        "label": batch.label,
    }
    return Example(model, lambda m: m.predict(interaction), lambda m: m.calculate_loss(interaction))


def _torch_rechub(name: str, sizes: Sizes) -> Example:
    kinds = import_peer("torch_rechub.basic.features")
    batch = Batch.of(sizes)
    item = {"vocab_size": sizes.items, "embed_dim": sizes.dim}
    user = kinds.SparseFeature("user", vocab_size=sizes.users, embed_dim=sizes.dim)
    target = kinds.SparseFeature("item", **item, padding_idx=0)

    def history(column: str) -> Any:
        return kinds.SequenceFeature(column, **item, pooling="concat", shared_with="item", padding_idx=0)

    kind, _, dice = name.partition("-")
    module, mlp = import_peer(f"torch_rechub.models.ranking.{kind.lower()}"), {"dims": [80, 40]}
    if kind == "DIN":
        attention = {"dims": [80, 40], "activation": "dice" if dice else "sigmoid"}
        model = module.DIN([user], [history("history")], [target], mlp, attention)
    else:
        model = module.DIEN([user], [history("history")], [history("negatives")], [target], mlp)
    inputs = {
        "user": batch.user,
        "item": batch.target,
        "history": batch.history,
        "negatives": batch.negatives,
    }

    def forward(model: Any) -> Tensor:
        out = model(inputs)
        return out[0] if isinstance(out, tuple) else out

    def loss(model: Any) -> Tensor:
        out = model(inputs)
        predicted, auxiliary = out if isinstance(out, tuple) else (out, 0)
        return nn.functional.binary_cross_entropy(predicted, batch.label) + auxiliary

    return Example(model, forward, loss)


class _EncoderModel(nn.Module):
    """An encoder between embeddings and an MLP: TorchEasyRec's own models need what is on no index."""

    def __init__(self, encoder: nn.Module, sizes: Sizes) -> None:
        super().__init__()
        self.item = nn.Embedding(sizes.items, sizes.dim)
        self.encoder = encoder
        self.top = nn.Sequential(nn.Linear(2 * sizes.dim, 80), nn.ReLU(), nn.Linear(80, 1))

    def forward(self, history: Tensor, target: Tensor, lengths: Tensor) -> Tensor:
        query = self.item(target)
        inputs = {"h.query": query, "h.sequence": self.item(history), "h.sequence_length": lengths}
        return self.top(torch.cat([query, self.encoder(inputs)], 1)).squeeze(1)


def _torch_easy_rec(name: str, sizes: Sizes) -> Example:
    encoder_class = getattr(import_peer("tzrec.modules.sequence"), name)
    options = {"attn_mlp": {"hidden_units": [80, 40]}} if name == "DINEncoder" else {}
    model = _EncoderModel(encoder_class(sizes.dim, sizes.dim, "h", **options), sizes)
    batch = Batch.of(sizes)

    def forward(model: Any) -> Tensor:
        return model(batch.history, batch.target, batch.lengths)

    def loss(model: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(forward(model), batch.label)

    return Example(model, forward, loss)


# By library its models, and what builds them.
LIBRARIES: dict[str, tuple[tuple[str, ...], Callable[[str, Sizes], Example]]] = {
    "deepctr-torch": (("DIN", "DIN-Dice", "DIEN", "AFM"), _deepctr_torch),
    "fuxictr": (("DIN", "DIEN"), _fuxictr),
    "recbole": (("DIN", "DIEN", "AFM"), _recbole),
    "torch-rechub": (("DIN", "DIN-Dice", "DIEN"), _torch_rechub),
    "torch-easy-rec": (("DINEncoder", "SimpleAttention"), _torch_easy_rec),
}


@contextmanager
def _as_for_recbole(config: Any) -> Iterator[None]:
    """Its configuration reads `sys.argv`, sets names of numpy that numpy 2 dropped, and hides GPUs from the process."""
    argv, own, devices = sys.argv, config.compatibility_settings, os.environ.get("CUDA_VISIBLE_DEVICES")
    sys.argv, config.compatibility_settings = argv[:1], lambda _: None
    try:
        yield
    finally:
        sys.argv, config.compatibility_settings = argv, own
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if devices is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices
