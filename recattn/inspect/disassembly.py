"""Instructions in compiled code, counted by what they keep busy. Static: a loop's body counts once."""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

__all__ = ["Instructions", "amdgcn_instructions", "sass_instructions"]


class Instructions(NamedTuple):
    total: int
    matrix: int  # products of the matrix units
    special: int  # exponentials and the like
    fma: int  # floating-point additions and products elsewhere
    shared: int  # accesses to shared memory
    local: int  # accesses to local memory: arrays, and what was spilled
    memory: dict[int, int]  # accesses to memory, by bytes per thread


_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.MULTILINE)
_SASS_KINDS = {
    "matrix": r"(UTC)?[A-Z]+MMA",
    "special": r"MUFU",
    "fma": r"(FFMA|FADD|FMUL|HFMA|HADD|HMUL)2?",
    "shared": r"LDS|STS|LDSM|STSM|ATOMS",
    "local": r"LDL|STL",
    "memory": r"LDG|STG|LDGSTS|RED|REDG|ATOMG|UTMALDG|UTMASTG|UBLKCP",
}
_SASS_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}

_GCN = re.compile(r"^\s+([a-z]+_\w+)", re.MULTILINE)
_GCN_KINDS = {
    "matrix": r"v_s?mfma\w*",
    "special": r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+",
    "fma": r"v_(pk_)?(fma|fmac|fmaak|fmamk|mac|mad|mul|add|sub|subrev|dot\w*)_(f|bf)\w+",
    "shared": r"ds_(read|write|load|store|add)\w*",
    "local": r"scratch_\w+",
    "memory": r"(global|buffer|flat)_(load|store|atomic)\w*",
}
_GCN_BYTES = {
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
}


def sass_instructions(text: str) -> Instructions:
    """Of what `cuobjdump -sass` prints."""
    words = [word.split(".") for word in _SASS.findall(text)]
    sizes = [next((_SASS_BYTES[m] for m in word[1:] if m in _SASS_BYTES), 4) for word in words]
    return _counted([word[0] for word in words], sizes, _SASS_KINDS)


def amdgcn_instructions(text: str) -> Instructions:
    """Of the assembly of LLVM for AMD."""
    words: list[str] = _GCN.findall(text)
    sizes = [next((_GCN_BYTES[m] for m in word.split("_") if m in _GCN_BYTES), 4) for word in words]
    return _counted(words, sizes, _GCN_KINDS)


def _counted(names: list[str], sizes: list[int], kinds: dict[str, str]) -> Instructions:
    patterns = {kind: re.compile(pattern) for kind, pattern in kinds.items()}
    counts: Counter[str] = Counter()
    memory: Counter[int] = Counter()
    for name, size in zip(names, sizes, strict=True):
        kind = next((kind for kind, pattern in patterns.items() if pattern.fullmatch(name)), None)
        if kind == "memory":
            memory[size] += 1
        elif kind is not None:
            counts[kind] += 1
    others = {kind: counts[kind] for kind in kinds if kind != "memory"}
    return Instructions(total=len(names), memory=dict(sorted(memory.items())), **others)
