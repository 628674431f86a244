"""Variable-length sequences: rows end to end, and where each sequence begins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Jagged:
    """B sequences of different lengths, end to end.

    Sequence b is `values[offsets[b]:offsets[b + 1]]`. Empty sequences are legal. Rows from `offsets[-1]` on
    are slack: no operator reads them, and their gradient is zero.

    Args:
        values: `[T, ...]`, any dtype.
        offsets: `[B + 1]`, int32 or int64, on the device of `values`; first 0, non-decreasing, last at most
            T. The contents are not read here (that would synchronise with the device): see `validate`.

    Raises:
        TypeError: if `offsets` is neither int32 nor int64.
        ValueError: if `values` has no dimension, `offsets` is not one-dimensional or is empty, or the two are
            on different devices.
    """

    values: Tensor
    offsets: Tensor

    def __post_init__(self) -> None:
        if not isinstance(self.values, Tensor):
            raise TypeError(f"values: expected a tensor, got {type(self.values).__name__}")
        if self.values.dim() < 1:
            raise ValueError("values: expected at least one dimension [T, ...], got a scalar")
        check_offsets("offsets", self.offsets, self.values.device)

    # ---------------------------------------------------------------- shape

    @property
    def batch_size(self) -> int:
        """The number of sequences, empty ones included."""
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        """`[B]`, in the dtype of the offsets."""
        return self.offsets.diff()

    @property
    def device(self) -> torch.device:
        return self.values.device

    def segment_ids(self) -> Tensor:
        """`[T]` int64: the sequence that each row belongs to; B for slack rows."""
        rows = torch.arange(self.values.shape[0], device=self.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets[1:].contiguous(), rows, right=True)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """`[T]` int64 each: the first row of the sequence that a row belongs to, and the one behind its last. Slack
        counts as one sequence more."""
        bounds = torch.nn.functional.pad(self.offsets.to(torch.int64), (0, 1), value=self.values.shape[0])
        sequence = self.segment_ids()
        return bounds[sequence], bounds[sequence + 1]

    def to(self, *args: Any, **kwargs: Any) -> Jagged:
        """As `Tensor.to` for the values; the offsets follow to the device and keep their dtype."""
        values = self.values.to(*args, **kwargs)
        return Jagged(values, self.offsets.to(values.device))

    def with_values(self, values: Tensor) -> Jagged:
        """The same sequences with other values, `[T, ...]`."""
        if values.shape[:1] != self.values.shape[:1]:
            raise ValueError(f"values: expected {self.values.shape[0]} rows, got {tuple(values.shape)}")
        return Jagged(values, self.offsets)

    def select(self, mask: Tensor) -> Jagged:
        """The rows of each sequence where `mask [T]`, bool, holds, in their order.

        Nothing is copied to the host: on an accelerator the result has T rows, the last of which are slack.
        """
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        _same_shape("mask", mask, tuple(self.values.shape[:1]))
        rows, offsets = select_rows(self.offsets, mask)
        return Jagged(self.values.index_select(0, rows), offsets)

    def last(self, count: int, mask: Tensor | None = None) -> Tensor:
        """`[T]` bool: the last `count` rows of each sequence, or of those of its rows where `mask [T]`, bool, holds.
        What slack gets means nothing, and `select` does not read it."""
        rows = torch.arange(self.values.shape[0], device=self.device)
        _, end = self.bounds()
        if mask is None:
            return rows >= end - count
        _same_shape("mask", mask, tuple(self.values.shape[:1]))
        before = offsets_of(mask)
        return mask & (before[rows] >= before[end] - count)

    def reversed(self) -> Jagged:
        """Each sequence from its last row to its first."""
        begin, end = self.bounds()
        rows = torch.arange(self.values.shape[0], device=self.device)
        return self.with_values(self.values.index_select(0, begin + end - 1 - rows))

    def append(self, rows: Tensor) -> Jagged:
        """Each sequence with one more row at its end, `rows [B, ...]`: T + B rows, of which the last are what was
        slack before."""
        _same_shape("rows", rows, (self.batch_size, *self.values.shape[1:]))
        place = torch.arange(self.batch_size + 1, device=self.device, dtype=self.offsets.dtype)
        offsets = self.offsets + place
        total = self.values.shape[0]
        old = torch.arange(total, device=self.device) + self.segment_ids()
        new = (offsets[1:] - 1).to(torch.int64)
        values = torch.cat([self.values, rows])
        return Jagged(torch.empty_like(values).index_copy(0, torch.cat([old, new]), values), offsets)

    def sum(self) -> Tensor:
        """`[B, ...]`, the sum of the rows of each sequence; 0 of an empty one."""
        return torch.segment_reduce(self.values, "sum", offsets=self.offsets, axis=0, unsafe=True, initial=0)

    def mean(self) -> Tensor:
        """`[B, ...]`, the mean of the rows of each sequence; 0 of an empty one."""
        return torch.segment_reduce(self.values, "mean", offsets=self.offsets, axis=0, unsafe=True, initial=0)

    def validate(self) -> Jagged:
        """Checks the contents of the offsets, which costs a synchronisation with the device.

        Raises:
            ValueError: if they do not start at 0, decrease, or run past the last row.
        """
        offsets = self.offsets.cpu()
        if offsets[0] != 0:
            raise ValueError(f"offsets: expected the first to be 0, got {int(offsets[0])}")
        if bool((offsets.diff() < 0).any()):
            at = int((offsets.diff() < 0).nonzero()[0])
            raise ValueError(
                f"offsets: expected non-decreasing values, got {int(offsets[at])} then {int(offsets[at + 1])}"
                f" at index {at}"
            )
        if offsets[-1] > self.values.shape[0]:
            raise ValueError(
                f"offsets: expected the last to be at most {self.values.shape[0]} (the rows of values),"
                f" got {int(offsets[-1])}"
            )
        return self

    # ---------------------------------------------------------------- conversions

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor) -> Jagged:
        """Rows that lie end to end already, with the length of each sequence, `[B]` integers."""
        return Jagged(values, offsets_of(_integers("lengths", lengths, 1)))

    @staticmethod
    def from_padded(
        padded: Tensor, *, lengths: Tensor | None = None, mask: Tensor | None = None, total: int | None = None
    ) -> Jagged:
        """Packs a padded batch. No value in the padding is read, so it may hold anything.

        Args:
            padded: `[B, L, ...]`.
            lengths: `[B]` integers, right padding; a length over L counts as L. Or instead:
            mask: `[B, L]`, bool or integers, non-zero where a position counts. Any pattern: left padding, holes.
            total: the number of valid positions, if the host knows it; positions over it are dropped. Without
                it nothing is copied to the host: on an accelerator the result then has B·L rows, the last of
                which are slack. On the CPU the rows are counted.
        """
        if not isinstance(padded, Tensor):
            raise TypeError(f"padded: expected a tensor, got {type(padded).__name__}")
        if padded.dim() < 2:
            raise ValueError(f"padded: expected [B, L, ...], got {tuple(padded.shape)}")
        rows, offsets = pack(valid_positions(padded, lengths, mask))
        if total is None and padded.device.type == "cpu":
            total = int(offsets[-1])
        rows = rows[:total]
        if total is not None and total > rows.shape[0]:
            rows = torch.nn.functional.pad(rows, (0, total - rows.shape[0]))
        return Jagged(padded.flatten(0, 1).index_select(0, rows), offsets.clamp_max(rows.shape[0]))

    def to_padded(self, max_length: int | None = None, padding_value: float = 0.0) -> Tensor:
        """`[B, max_length, ...]`, right padded; longer sequences are cut.

        Without `max_length` the longest sequence decides, which costs a synchronisation with the device.
        """
        if max_length is None:
            max_length = int(self.lengths.max()) if self.batch_size else 0
        trailing = self.values.shape[1:]
        if self.values.shape[0] == 0 or max_length == 0:
            return self.values.new_full((self.batch_size, max_length, *trailing), padding_value)
        position = torch.arange(max_length, device=self.device)
        valid = position < self.lengths[:, None]
        rows = torch.where(valid, self.offsets[:-1, None] + position, 0)
        padded = self.values.index_select(0, rows.reshape(-1)).reshape(self.batch_size, max_length, *trailing)
        return padded.masked_fill(~valid.reshape(valid.shape + (1,) * len(trailing)), padding_value)

    @staticmethod
    def from_nested(nested: Any) -> Jagged:
        """From a nested tensor with `layout=torch.jagged`, `[B, *, ...]`, ragged in dimension 1."""
        if not nested.is_nested or nested.layout != torch.jagged:
            raise TypeError(
                f"nested: expected a nested tensor of layout torch.jagged, got {type(nested).__name__} of layout"
                f" {nested.layout}"
            )
        if getattr(nested, "_ragged_idx", 1) != 1:
            raise ValueError(f"nested: expected dimension 1 to be the ragged one, got {nested.shape}")
        lengths = nested.lengths() if hasattr(nested, "lengths") else None
        if lengths is None:
            return Jagged(nested.values(), nested.offsets())
        # A view with holes: gather the rows that count.
        starts, values = nested.offsets()[:-1], nested.values()
        offsets = offsets_of(lengths)
        row = torch.arange(int(offsets[-1]), device=values.device)
        sequence = torch.searchsorted(offsets[1:].contiguous(), row, right=True)
        return Jagged(values.index_select(0, starts[sequence] + row - offsets[sequence]), offsets)

    def to_nested(self) -> Tensor:
        """A nested tensor, layout torch.jagged. Drops slack rows, which costs a synchronisation."""
        return torch.nested.nested_tensor_from_jagged(self.values[: int(self.offsets[-1])], self.offsets)

    @staticmethod
    def from_torchrec(tensor: Any, key: str | None = None) -> Jagged:
        """From a TorchRec `JaggedTensor`, or from one key of a `KeyedJaggedTensor`."""
        if hasattr(tensor, "keys"):
            if key is None:
                raise ValueError(f"key: expected one of {list(tensor.keys())}, got None")
            if key not in tensor.keys():  # noqa: SIM118 (a KeyedJaggedTensor is no mapping)
                raise ValueError(f"key: expected one of {list(tensor.keys())}, got {key!r}")
            tensor = tensor[key]
        if not (hasattr(tensor, "values") and hasattr(tensor, "offsets")):
            raise TypeError(
                f"tensor: expected a JaggedTensor or KeyedJaggedTensor, got {type(tensor).__name__}"
            )
        return Jagged(tensor.values(), tensor.offsets())

    def to_torchrec(self, key: str | None = None) -> Any:
        """A TorchRec `JaggedTensor`, or with `key` a `KeyedJaggedTensor` of that one key."""
        from torchrec import JaggedTensor, KeyedJaggedTensor

        if key is None:
            return JaggedTensor(self.values, offsets=self.offsets)
        return KeyedJaggedTensor([key], self.values, offsets=self.offsets)


def offsets_of(lengths: Tensor) -> Tensor:
    """`[B]` lengths to `[B + 1]` int64 offsets."""
    return torch.nn.functional.pad(lengths.to(torch.int64).cumsum(0), (1, 0))


def valid_positions(padded: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor:
    """`[B, L]` bool: which positions of `padded [B, L, ...]` count, by exactly one of lengths and mask."""
    batch, longest = padded.shape[:2]
    if (lengths is None) == (mask is None):
        raise ValueError("lengths, mask: expected exactly one of the two")
    if lengths is not None:
        lengths = _integers("lengths", lengths, 1)
        _same_shape("lengths", lengths, (batch,))
        _same_device("lengths", lengths, padded)
        return torch.arange(longest, device=padded.device) < lengths[:, None]
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask: expected a tensor, got {type(mask).__name__}")
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask: expected bool or integers, got {mask.dtype}")
    _same_shape("mask", mask, (batch, longest))
    _same_device("mask", mask, padded)
    return mask != 0


def pack(valid: Tensor) -> tuple[Tensor, Tensor]:
    """Of a mask `[B, L]` the valid positions in a flattened batch, `[B·L]` int64 with zeros behind the last, and the
    offsets `[B + 1]` of the sequences among them. Nothing is copied to the host."""
    flat = valid.flatten()
    rows = torch.zeros(flat.numel() + 1, dtype=torch.int64, device=valid.device)
    # The positions that do not count all go to one place past the end, which is dropped.
    place = torch.where(flat, flat.cumsum(0) - 1, flat.numel())
    rows.scatter_(0, place, torch.arange(flat.numel(), device=valid.device))
    return rows[:-1], offsets_of(valid.sum(1))


def select_rows(offsets: Tensor, mask: Tensor, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Of sequences over `offsets [B + 1]` the rows where `mask [T]` holds, and the offsets of the sequences among
    them. On the CPU as many rows as there are; on an accelerator, which nothing waits for, T with zeros at the end, or
    `most`, if it is known that there are no more."""
    total = mask.shape[0]
    mask = mask & (torch.arange(total, device=mask.device) < offsets[-1])
    chosen = offsets_of(mask).index_select(0, offsets.to(torch.int64)).to(offsets.dtype)
    if mask.device.type == "cpu":
        return mask.nonzero().squeeze(1), chosen
    return pack(mask[None])[0][:most], chosen


def unpack(values: Tensor, valid: Tensor) -> Tensor:
    """`[T]` values of a batch packed by the mask `valid [B, L]` to `[B, L]`, with 0 where it is False."""
    flat = valid.reshape(-1)
    # Each takes the value of the last valid position up to it, or the one in front of all values.
    rows = torch.nn.functional.pad(values, (1, 0)).index_select(0, flat.cumsum(0))
    return rows.masked_fill(~flat, 0).reshape(valid.shape)


def check_offsets(name: str, offsets: Tensor, device: torch.device) -> None:
    """Raises unless `offsets` is `[B + 1]`, int32 or int64, on `device`."""
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.numel() < 1:
        raise ValueError(f"{name}: expected [B + 1] with at least one element, got {tuple(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name}: expected device {device}, as the values, got {offsets.device}")


def _integers(name: str, tensor: Tensor, dim: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor of integers, got {type(tensor).__name__}")
    if tensor.dtype.is_floating_point or tensor.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"{name}: expected integers, got {tensor.dtype}")
    if tensor.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimension(s), got {tuple(tensor.shape)}")
    return tensor


def _same_device(name: str, tensor: Tensor, padded: Tensor) -> None:
    if tensor.device != padded.device:
        raise ValueError(f"{name}: expected device {padded.device}, as the batch, got {tensor.device}")


def _same_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(tensor.shape)}")
