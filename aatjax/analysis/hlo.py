"""Collectives, kernels and memory traffic of a compiled program, read from its text.

XLA's own `cost_analysis` counts the body of a loop once, and arrays in a TPU's VMEM as memory; here
loops count as often as they run, and arrays that are placed in VMEM (`S(1)`) do not count.
"""

import dataclasses
import math
import re

BYTES = {8: "f64 s64 u64", 4: "f32 s32 u32", 2: "bf16 f16 s16 u16", 1: "s8 u8 pred"}
SIZES = {kind: size for size, kinds in BYTES.items() for kind in kinds.split()}
ARRAY = re.compile(rf"\b({'|'.join(SIZES)})\[([\d,]*)\](\{{[^}}]*\}})?")
FREE = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "iota", "after-all")
FREE += ("partition-id", "replica-id")
"""Operations that move no bytes."""

ALLOCATION = 'custom_call_target="AllocateBuffer"'
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CALLS = re.compile(
    r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class HloInstruction:
    """One line of a computation: name and type of its result, operation, operands, attributes."""

    name: str
    kind: str
    result: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def calls(self) -> list[str]:
        """Names of the computations that it runs."""
        found = CALLS.findall(self.attributes)
        for group in BRANCHES.findall(self.attributes):
            found += [name.strip().lstrip("%") for name in group.split(",")]
        return found


def count_bytes(text: str, *, in_hbm: bool = False) -> int:
    """Return the bytes of the arrays in a piece of HLO; with `in_hbm` of those not in VMEM."""
    total = 0
    for kind, dims, layout in ARRAY.findall(text):
        if not (in_hbm and "S(1)" in layout):
            total += SIZES[kind] * math.prod(int(d) for d in dims.split(",") if d)
    return total


class Program:
    """A compiled program.

    Args:
        text: `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[HloInstruction]] = {}
        self.entry: str = ""
        current: list[HloInstruction] | None = None
        for line in text.splitlines():
            if current is None:
                head = re.match(r"(ENTRY )?%?([\w.-]+) \(.*\{\s*$", line)
                if head:
                    current = self.computations.setdefault(head.group(2), [])
                    if head.group(1):
                        self.entry = head.group(2)
            elif line.startswith("}"):
                current = None
            elif (one := _parse(line)) is not None:
                current.append(one)
        self._times = self._count_runs()

    def _count_runs(self) -> dict[str, int]:
        """Return how often each computation runs in one run of the program."""
        times: dict[str, int] = {}

        def walk(name: str, factor: int) -> None:
            times[name] = times.get(name, 0) + factor
            for one in self.computations.get(name, []):
                for called in one.calls:
                    if called in self.computations:
                        walk(called, factor * self._count_trips(one))

        walk(self.entry, 1)
        return times

    def _count_trips(self, one: HloInstruction) -> int:
        """Return how often a loop runs, from its attributes or its condition; else 1.

        The loops of `lax.scan` count from 0 in steps of 1.
        """
        if one.kind != "while":
            return 1
        if trips := TRIPS.search(one.attributes):
            return int(trips.group(1))
        condition = re.search(r"condition=%?([\w.-]+)", one.attributes)
        inside = self.computations.get(condition.group(1), []) if condition else []
        constants = {c.name: c.operands[0] for c in inside if c.kind == "constant"}
        for test in inside:
            limits = [constants[name] for name in test.operands if name in constants]
            if test.kind == "compare" and "direction=LT" in test.attributes and limits:
                return int(limits[0]) if limits[0].isdigit() else 1
        return 1

    def _list_instructions(self) -> list[tuple[HloInstruction, int]]:
        """Return every instruction with the number of times that it runs."""
        times = self._times.items()
        return [(one, factor) for name, factor in times for one in self.computations.get(name, [])]

    def count_collectives(self) -> dict[str, tuple[int, int]]:
        """Return (operations, bytes of their results per device) by kind, in one run."""
        found: dict[str, tuple[int, int]] = {}
        for one, factor in self._list_instructions():
            kind = one.kind.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            arrays = [count_bytes(item.group(0)) for item in ARRAY.finditer(one.result)]
            if one.kind.endswith("-start") and kind != "all-reduce":
                arrays = arrays[len(arrays) // 2 :][:1]  # (operands, results, ...)
            count, total = found.get(kind, (0, 0))
            found[kind] = (count + factor, total + factor * sum(arrays))
        return found

    def count_kernels(self) -> int:
        """Return the number of Pallas kernels in one run."""
        targets = ("tpu_custom_call", "triton", "mosaic_gpu")
        return sum(
            factor
            for one, factor in self._list_instructions()
            if one.kind == "custom-call" and any(f in one.attributes for f in targets)
        )

    def list_movers(self, computation: str | None = None) -> list[tuple[HloInstruction, int]]:
        """Return the instructions of a computation that do work, with the HBM bytes they move."""
        results: dict[str, str] = {}
        found = []
        for one in self.computations[computation or self.entry]:
            results[one.name] = one.result
            if one.kind in FREE or one.kind.endswith("-start") or ALLOCATION in one.attributes:
                continue
            if one.kind.endswith("-done"):  # an asynchronous copy between HBM and VMEM
                found.append((one, count_bytes(one.result)))
            elif one.kind == "while":
                found.append((one, 0))
            else:
                found.append((one, self._count_moved(one, results)))
        return found

    def _count_moved(self, one: HloInstruction, results: dict[str, str]) -> int:
        operands = [results.get(name, "") for name in one.operands]
        inside = self.computations.get(one.calls[0], []) if one.kind == "fusion" else []
        parameters = {
            int(p.operands[0]): p.name for p in inside if p.kind == "parameter" and p.operands
        }
        total, written = 0, count_bytes(one.result, in_hbm=True)
        for index, text in enumerate(operands):
            whole = count_bytes(text, in_hbm=True)
            if whole and index in parameters:
                part, replaced = _measure_slices(inside, parameters[index])
                if replaced is not None:  # one row of a large array is written in place
                    written -= max(0, min(written, whole) - replaced)
                    part = 0
                whole = whole if part is None else min(whole, part)
            total += whole
        if one.kind == "dynamic-slice":
            return 2 * count_bytes(one.result, in_hbm=True)
        if one.kind == "dynamic-update-slice":
            return 2 * count_bytes(results.get(one.operands[1], ""), in_hbm=True)
        return total + written

    def count_traffic(self) -> int:
        """Return the bytes that one run moves to and from HBM."""
        inlined = {
            name
            for instructions in self.computations.values()
            for one in instructions
            if one.kind not in ("while", "conditional", "call")
            for name in one.calls
        }
        return sum(
            factor * sum(moved for _, moved in self.list_movers(name))
            for name, factor in self._times.items()
            if name in self.computations and name not in inlined
        )


def _measure_slices(inside: list[HloInstruction], parameter: str) -> tuple[int | None, int | None]:
    """Return the bytes read of a fused computation's parameter if only slices are, and those
    written if it is only updated in place; None where it is used whole."""
    names, sliced = {parameter}, 0
    for one in inside:
        if not names & set(one.operands):
            continue
        if one.kind == "bitcast":
            names.add(one.name)
        elif one.kind == "dynamic-slice" and one.operands[0] in names:
            sliced += count_bytes(one.result)
        elif one.kind == "dynamic-update-slice" and one.operands[0] in names:
            update = next((o for o in inside if o.name == one.operands[1]), None)
            return sliced, count_bytes(update.result) if update else 0
        else:
            return None, None
    return sliced, None


def _parse(line: str) -> HloInstruction | None:
    match = re.match(r"\s*(?:ROOT )?%?(\S+) = (.*)", line)
    if not match:
        return None
    rest = match.group(2)
    call = re.search(r"\s([a-z][\w-]*)\(", rest)
    if not call:
        return None
    depth, end = 1, call.end()
    while end < len(rest) and depth:
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside = rest[call.end() : end - 1]
    kind = call.group(1)
    names = [inside] if kind in ("parameter", "constant") else re.findall(r"%([\w.-]+)", inside)
    return HloInstruction(match.group(1), kind, rest[: call.start()], tuple(names), rest[end:])
