"""Runs straight-line PTX on the CPU, all threads of a program at once, each operation rounded as the PTX manual says.

As far as the guided step and its noise need it: no branches, no shared memory, nothing that one thread tells another. An
instruction that is not here raises NotImplementedError.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch

UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}
STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.]*)\s+(.*)", re.DOTALL)


class Memory:
    """Tensors at made-up addresses; anything else is out of bounds."""

    def __init__(self) -> None:
        self.bytes = np.zeros(4096, dtype=np.uint8)  # nothing lies at low addresses
        self.allowed = np.zeros(4096, dtype=bool)

    def put(self, tensor: torch.Tensor) -> int:
        """The address of a copy of a dense tensor's storage, a multiple of 256."""
        data = np.frombuffer(bytes(tensor.untyped_storage().tolist()), dtype=np.uint8)
        address, padding = len(self.bytes), 256 + -len(data) % 256
        self.bytes = np.concatenate([self.bytes, data, np.zeros(padding, dtype=np.uint8)])
        self.allowed = np.concatenate([self.allowed, np.ones(len(data), dtype=bool), np.zeros(padding, dtype=bool)])
        return address

    def get(self, address: int, like: torch.Tensor) -> torch.Tensor:
        """What lies at an address now, as a tensor with the shape and strides of another."""
        data = self.bytes[address : address + like.untyped_storage().nbytes()].copy()
        return torch.from_numpy(data).view(like.dtype).as_strided(like.shape, like.stride())

    def at(self, addresses: np.ndarray, count: int) -> np.ndarray:
        """Indices of `count` bytes from each address."""
        index = addresses.astype(np.int64)[:, None] + np.arange(count)
        if not (index < len(self.bytes)).all() or not self.allowed[index].all():
            raise IndexError("an address outside of every tensor")
        return index


def run(ptx: str, arguments: list[int], memory: Memory, program: int, threads: int) -> None:
    """Runs one program: `arguments` are addresses and integers, in the order of the kernel's parameters."""
    registers: dict[str, np.ndarray] = {}
    body = re.sub(r"//[^\n]*", "", ptx)
    body = body[body.index("{", body.index(".reqntid")) + 1 : body.rindex("ret;")]

    def read(operand: str, bits: int) -> np.ndarray:
        """Unsigned bits of an operand, one of each thread (or one of all)."""
        if operand == "%tid.x":
            return np.arange(threads, dtype=np.uint32)
        if operand == "%ctaid.x":
            return np.full(threads, program, dtype=np.uint32)
        if re.match(r"%\w+\.", operand):
            raise NotImplementedError(operand)
        if operand.startswith("%"):
            # A register that nothing wrote (LLVM's `undef`, half of a pair) holds NaN, for the result to show if it matters.
            if operand not in registers:
                return np.full(threads, 0x7FC0DEAD_7FC0DEAD % 2**bits, dtype=UNSIGNED[bits])
            return registers[operand].astype(UNSIGNED[bits])
        value = int(operand[2:], 16) if operand.startswith("0f") else int(operand, 0)
        return np.full(threads, value % 2**bits, dtype=UNSIGNED[bits])

    for text in body.split(";"):
        text = "\n".join(line for line in text.split("\n") if not re.match(r"\s*(\.loc|\.reg|\$L)", line)).strip()
        if not text or text.startswith("."):
            continue
        matched = STATEMENT.fullmatch(text)
        if matched is None:
            raise NotImplementedError(text)
        negated, guard, operation, rest = matched.groups()
        active = np.ones(threads, dtype=bool) if guard is None else registers[guard].astype(bool) ^ (negated == "!")
        operands = [part.strip() for part in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)]
        name, *modifiers = operation.split(".")

        if name in ("ld", "st") and modifiers[0] == "global":
            place, lanes = (operands[1], operands[0]) if name == "ld" else (operands[0], operands[1])
            base, offset = re.fullmatch(r"\[\s*(%\w+)\s*(?:\+\s*(\d+))?\s*\]", place).groups()
            addresses = read(base, 64)[active] + np.uint64(int(offset or 0))
            names, bits = re.findall(r"%\w+", lanes), int(modifiers[-1][1:])
            index = memory.at(addresses, len(names) * bits // 8)
            if len(names) == 4 and bits == 32 and (addresses % np.uint64(16)).any():
                raise ValueError("a 128-bit access at an address that is no multiple of 16")
            if name == "st":
                data = np.stack([read(lane, bits)[active] for lane in names], axis=1)
                memory.bytes[index] = np.ascontiguousarray(data).view(np.uint8)
                continue
            data = memory.bytes[index].view(UNSIGNED[bits])
            for column, lane in enumerate(names):
                held = registers.get(lane, np.zeros(threads, dtype=UNSIGNED[bits])).copy()
                held[active] = data[:, column]
                registers[lane] = held
            continue
        if name == "ld" and modifiers[0] == "param":
            bits = int(modifiers[1][1:])
            value = arguments[int(re.search(r"_param_(\d+)", operands[1]).group(1))]
            registers[operands[0]] = np.full(threads, value % 2**bits, dtype=UNSIGNED[bits])
            continue
        if guard is not None:
            raise NotImplementedError(text)
        if name == "mov" and operands[0].startswith("{"):
            whole = read(operands[1], 64)
            low_high = (whole.astype(np.uint32), (whole >> np.uint64(32)).astype(np.uint32))
            for lane, half in zip(re.findall(r"%\w+|_", operands[0]), low_high, strict=True):
                registers[lane] = half
            continue
        if name == "mov" and operands[1].startswith("{"):
            low, high = (read(lane, 32).astype(np.uint64) for lane in re.findall(r"%\w+", operands[1]))
            registers[operands[0]] = low | high << np.uint64(32)
            continue
        registers[operands[0]] = _compute(name, modifiers, operands[1:], read, registers)


def _compute(name: str, modifiers: list[str], sources: list[str], read: Any, registers: dict[str, np.ndarray]) -> np.ndarray:
    kind = modifiers[-1] if modifiers else ""
    if not re.fullmatch(r"pred|[bsu](16|32|64)|f32(x2)?", kind):
        raise NotImplementedError(".".join([name, *modifiers]))
    if kind in ("f32", "f32x2") and name in ("add", "sub", "mul", "sqrt"):
        if modifiers[0] != "rn" or modifiers[1:-1] not in ([], ["ftz"]):
            raise NotImplementedError(f"{name}.{'.'.join(modifiers)}: anything but one IEEE rounding")
        bits = 32 if kind == "f32" else 64
        values = [read(source, bits).view(np.float32) for source in sources]  # f32x2: both halves side by side
        if "ftz" in modifiers and (name != "sqrt" or (abs(values[0]) < np.finfo(np.float32).tiny).any()):
            raise NotImplementedError(f"{name}.{'.'.join(modifiers)}: of a number that is flushed to zero")
        with np.errstate(all="ignore"):
            result = {
                "add": lambda a, b: a + b,
                "sub": lambda a, b: a - b,
                "mul": lambda a, b: a * b,
                "sqrt": lambda a: np.sqrt(a.astype(np.float64)).astype(np.float32),
            }[name](*values)
        return np.ascontiguousarray(result).view(UNSIGNED[bits])
    if (name, kind) == ("neg", "f32"):
        return read(sources[0], 32) ^ np.uint32(0x80000000)
    if kind[0] == "f" and (name, kind) not in (("selp", "f32"), ("mov", "f32"), ("cvt", "f32")):
        raise NotImplementedError(".".join([name, *modifiers]))
    if name == "cvt":
        to, source_kind = modifiers[-2], modifiers[-1]
        source = read(sources[0], int(source_kind[1:]))
        if source_kind[0] == "s":
            source = source.view(SIGNED[int(source_kind[1:])])
        if to == "f32":
            return source.astype(np.float32).view(np.uint32)  # .rn, as NumPy
        return source.astype(UNSIGNED[int(to[1:])])
    if kind == "pred":
        a, b = (registers[source].astype(bool) for source in sources)
        return {"and": a & b, "or": a | b, "xor": a ^ b}[name]
    bits = int(kind[1:])
    if name == "selp":
        return np.where(registers[sources[2]].astype(bool), read(sources[0], bits), read(sources[1], bits))
    if name == "setp":
        a, b = (read(source, bits) for source in sources)
        if kind[0] == "s":
            a, b = a.view(SIGNED[bits]), b.view(SIGNED[bits])
        comparison = {
            "eq": "equal",
            "ne": "not_equal",
            "gt": "greater",
            "lt": "less",
            "ge": "greater_equal",
            "le": "less_equal",
        }
        return getattr(np, comparison[modifiers[0]])(a, b)
    if name == "mov":
        return read(sources[0], bits)
    if name in ("shl", "shr"):
        value, shift = read(sources[0], bits), read(sources[1], 32)
        if (shift >= bits).any():
            raise NotImplementedError("a shift by more than the word")
        if kind[0] == "s":
            return (value.view(SIGNED[bits]) >> shift.astype(SIGNED[bits])).view(UNSIGNED[bits])
        return value << shift.astype(value.dtype) if name == "shl" else value >> shift.astype(value.dtype)
    if name in ("mul", "mad") and modifiers[0] in ("wide", "hi") and bits == 32 and len(modifiers) == 2:
        a, b = (read(source, 32) for source in sources[:2])
        if kind[0] == "s":
            a, b = a.view(np.int32), b.view(np.int32)
            product = (a.astype(np.int64) * b.astype(np.int64)).view(np.uint64)
        else:
            product = a.astype(np.uint64) * b.astype(np.uint64)
        if modifiers[0] == "hi":
            high = (product >> np.uint64(32)).astype(np.uint32)
            return high if name == "mul" else high + read(sources[2], 32)
        return product if name == "mul" else product + read(sources[2], 64)
    a, b = (read(source, bits) for source in sources[:2])
    if name == "div" and kind[0] == "s":
        a, b = a.view(SIGNED[bits]), b.view(SIGNED[bits])
        return (np.sign(a) * np.sign(b) * (abs(a) // abs(b))).astype(SIGNED[bits]).view(UNSIGNED[bits])
    if name == "mul" and modifiers[0] == "lo":
        return a * b
    if name == "mad" and modifiers[0] == "lo":
        return a * b + read(sources[2], bits)
    if len(modifiers) == 1 and name in ("add", "sub", "and", "or", "xor"):
        return {"add": a + b, "sub": a - b, "and": a & b, "or": a | b, "xor": a ^ b}[name]
    raise NotImplementedError(f"{name}.{'.'.join(modifiers)}")
