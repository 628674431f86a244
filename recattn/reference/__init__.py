"""The formula of each operator, written for reading: what the kernels are compared with."""

from recattn.reference.activation_unit import activation_unit, activation_unit_padded

__all__ = ["activation_unit", "activation_unit_padded"]
