"""One operator each: its cases, its tensors, and who computes it.

A provider is a function of the inputs that prepares a call. What it needs in another layout is laid out beforehand, so
that only the operator is timed.
"""
