"""Budgets of the hot kernels: registers, and instructions of the scan's loops, as counted from machine code.

A kernel of the scan has an outer loop over chunks of 32 steps. Its *recurrence loops* go through a chunk in tiles of
four steps. Machine code has no map of the source, so two properties identify them:

- They lie inside another loop, the chunk loop. Where the last, partial chunk of a row follows the chunk loop, its own
  recurrence lies in no other loop and is not counted.
- Their longest pass, without the loops within them, has a multiple of the MUFU.EX2 of a tile: 4 steps times the states
  of a thread. Each state and step takes one exponential, and a shorter pass is for states that share their decay. Loops
  that stage elements have one or two, of softplus and of the gate.

A fast kernel has two versions of the recurrence: for whole chunks without resets, and for others. A pass of the chunk
loop takes one of them, and the one with fewer instructions is counted, because the others are rare. A backward kernel
goes through a chunk twice, forward and then backward. There one pass of the chunk loop reaches one recurrence loop from
the other, so both are counted. Instructions for a state and step are the sum over such a sequence.

An element is a step of a channel, with all its inputs and outputs. Instructions for an element are those of a pass of
the chunk loop outside of the recurrence, over the elements of a thread in a chunk: with softplus, with saved states,
with the staging of B and C. Other loops in the chunk loop count with the passes that the elements of a thread take:

- With global accesses of 8 or 16 bytes, a loop stages the elements of such an access in a pass.
- With other global accesses, it stages the last, partial chunk of a row, and is not counted.
- Else it goes over elements in shared memory, with one load for each.

Loops that no pass runs together with the counted recurrence are those of a decay that states share; they have no
exponentials and are not counted.

A loop within a recurrence loop adds up the gradients of B and C over warps and stores 16 bytes of them in a pass. Its
instructions belong to the recurrence. The loops of the general kernels fit none of these descriptions, so their
elements are not counted, nor are the loops within their recurrence.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from cuda_check_sass import Flow, Instruction, Loop, local_accesses

CHUNK_STEPS, TILE_STEPS = 32, 4  # kSteps and kStepsPerTile of csrc/selective_scan/cuda/traits.cuh
MAX_THREADS = 512  # of a block, over the states of a thread: kMaxThreads there
SEQUENCES = re.compile(r"\(Half\)(?P<half>\d)")  # the type of the sequences in the name of a fast kernel; 0 is float32
TILING = re.compile(r"Tiling<(?:[^<>]|<[^<>]*>)+, (?P<lanes>\d+), (?P<states>\d+)>")


@dataclass(frozen=True)
class Kernel:
    """The budgets of the kernels whose short names match a pattern of fnmatch; None: not counted."""

    pattern: str
    number: int  # of kernels that match, for one architecture
    registers: int  # most of a thread
    per_update: float | None = None  # instructions for a state and step
    per_element: float | None = None  # instructions outside of the recurrence for an element
    local: int = 0  # loads and stores of local memory
    spilled: int = 0  # bytes of spilled registers, and of the stack

    @property
    def recurrences(self) -> int:
        """Recurrence loops in a sequence."""
        return 2 if "backward" in self.pattern else 1


# The counts are those of nvcc 13.0 for sm_90, rounded up a little. Registers: with so few, a multiprocessor holds the
# threads of the kernel: 256 to 640 of a general forward kernel, 256 or 384 of a backward kernel, three or four blocks
# of 128 of a fast kernel, two on duals. The kernels of knn that read every key: three blocks of 128 threads, two of
# 256, or one. The convolution's forward kernels: eight blocks of 128 threads, its backward kernels five.
#
# A kernel of the scan is hot if a thread's states take 16 bytes; for floats, only those for B and C that vary in time.
# Dual kernels of complex states in double precision are not checked: the backward one spills 124 bytes a thread. The
# last arguments of a fast kernel: type of the sequences (0 is float32), contiguous along time, gate.
HOT = (
    Kernel("fast_forward_kernel<Tiling<float, 4, 4>, (Half)0, *, false>", 2, 168, 7.5, 53),
    Kernel("fast_forward_kernel<Tiling<float, 4, 4>, (Half)0, *, true>", 2, 168, 7.6, 60),
    Kernel("fast_forward_kernel<Tiling<float, 4, 4>, (Half)[12], *, false>", 4, 168, 7.5, 51),
    Kernel("fast_forward_kernel<Tiling<float, 4, 4>, (Half)[12], *, true>", 4, 168, 7.5, 59),
    Kernel("fast_forward_kernel<Tiling<float, 16, 4>, (Half)0, *, false>", 2, 168, 8, 213),
    Kernel("fast_forward_kernel<Tiling<float, 16, 4>, (Half)0, *, true>", 2, 168, 7.8, 218),
    Kernel("fast_forward_kernel<Tiling<float, 16, 4>, (Half)[12], *, false>", 4, 168, 8, 217),
    Kernel("fast_forward_kernel<Tiling<float, 16, 4>, (Half)[12], *, true>", 4, 168, 8.1, 234),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 4, 4>, (Half)0, *, false>", 2, 255, 18.6, 79),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 4, 4>, (Half)0, *, true>", 2, 255, 18.4, 98),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 4, 4>, (Half)[12], *, false>", 4, 255, 18.3, 82),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 4, 4>, (Half)[12], *, true>", 4, 255, 18.4, 103),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 16, 4>, (Half)0, *, false>", 2, 255, 19.2, 360),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 16, 4>, (Half)0, *, true>", 2, 255, 19.1, 404),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 16, 4>, (Half)[12], *, false>", 4, 255, 19.2, 366),
    Kernel("fast_forward_kernel<Tiling<Dual<float>, 16, 4>, (Half)[12], *, true>", 4, 255, 19.2, 413),
    Kernel("fast_backward_kernel<Tiling<float, 4, 4>, (Half)0, *, false>", 2, 168, 28.7, 149),
    Kernel("fast_backward_kernel<Tiling<float, 4, 4>, (Half)0, *, true>", 2, 168, 31.6, 173),
    Kernel("fast_backward_kernel<Tiling<float, 4, 4>, (Half)[12], *, false>", 4, 168, 28.5, 123),
    Kernel("fast_backward_kernel<Tiling<float, 4, 4>, (Half)[12], *, true>", 4, 168, 32, 181),
    Kernel("fast_backward_kernel<Tiling<float, 16, 4>, (Half)0, *, false>", 2, 168, 29.7, 430),
    Kernel("fast_backward_kernel<Tiling<float, 16, 4>, (Half)0, *, true>", 2, 168, 32.5, 517),
    Kernel("fast_backward_kernel<Tiling<float, 16, 4>, (Half)[12], *, false>", 4, 168, 30, 441),
    Kernel("fast_backward_kernel<Tiling<float, 16, 4>, (Half)[12], *, true>", 4, 168, 33, 534),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 4, 4>, (Half)0, *, false>", 2, 255, 67.8, 208),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 4, 4>, (Half)0, *, true>", 2, 255, 72.3, 261),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 4, 4>, (Half)[12], *, false>", 4, 255, 69.2, 218),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 4, 4>, (Half)[12], *, true>", 4, 255, 74, 277),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 16, 4>, (Half)0, *, false>", 2, 255, 71, 645),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 16, 4>, (Half)0, *, true>", 2, 255, 76.8, 786),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 16, 4>, (Half)[12], *, false>", 4, 255, 71.8, 663),
    Kernel("fast_backward_kernel<Tiling<Dual<float>, 16, 4>, (Half)[12], *, true>", 4, 255, 77.3, 817),
    Kernel("forward_kernel<Tiling<float, *, 4>, false>", 5, 96, per_update=28),
    Kernel("backward_kernel<Tiling<float, *, 4>, false>", 5, 168, per_update=76),
    Kernel("forward_kernel<Tiling<Dual<float>, *, 4>, true>", 5, 168, per_update=43.1),
    Kernel("backward_kernel<Tiling<Dual<float>, *, 4>, true>", 5, 255, per_update=139),
    Kernel("forward_kernel<Tiling<Complex<float>, *, 2>, true>", 3, 128),
    Kernel("backward_kernel<Tiling<Complex<float>, *, 2>, true>", 3, 255),
    Kernel("forward_kernel<Tiling<Complex<Dual<float>>, *, 2>, true>", 3, 255),
    Kernel("backward_kernel<Tiling<Complex<Dual<float>>, *, 2>, true>", 3, 255),
    Kernel("forward_kernel<Tiling<double, *, 2>, true>", 3, 128),
    Kernel("backward_kernel<Tiling<double, *, 2>, true>", 3, 255),
    Kernel("forward_kernel<Tiling<Dual<double>, *, 2>, true>", 3, 255),
    Kernel("backward_kernel<Tiling<Dual<double>, *, 2>, true>", 3, 255, local=6, spilled=24),
    Kernel("forward_kernel<Tiling<Complex<double>, *, 1>, true>", 2, 128),
    Kernel("backward_kernel<Tiling<Complex<double>, *, 1>, true>", 2, 255),
    Kernel("forward_kernel<float, (Half)?, 4, *>", 6, 64),
    Kernel("backward_kernel<float, (Half)?, 4, *>", 6, 96),
    Kernel("filter_kernel<[14], false>", 2, 168),
    Kernel("one_pass_kernel<Panels, [12]>", 2, 128),
    Kernel("one_pass_kernel<AlignedRows, [12]>", 2, 128),
    Kernel("one_pass_select_kernel", 1, 128),
    Kernel("pack_kernel", 1, 128),
    Kernel("rows_kernel<float, 1, true>", 1, 128),
    Kernel("rows_kernel<float, 4, true>", 1, 255),
)


def budget(name: str, table: tuple[Kernel, ...] = HOT) -> Kernel | None:
    """The budgets of a kernel; None if it is not hot."""
    return next((kernel for kernel in table if fnmatchcase(name, kernel.pattern)), None)


@dataclass(frozen=True)
class Count:
    """Instructions of one kernel; None: not counted."""

    per_update: float | None = None
    per_element: float | None = None
    local: int = 0  # loads and stores of local memory


def chunk_loops(flow: Flow, tile: int) -> Iterator[tuple[Loop, dict[Loop, int]]]:
    """Each loop around recurrence loops, and these with their numbers of exponentials."""
    found: dict[Loop, dict[Loop, int]] = {}
    for loop in flow.loops:
        exponentials = flow.pass_count(loop, lambda i: i.name.startswith("MUFU.EX2"))
        if loop.parent and exponentials and exponentials % tile == 0:
            found.setdefault(loop.parent, {})[loop] = exponentials
    yield from found.items()


def element_passes(flow: Flow, loop: Loop, name: str, elements: float) -> float:
    """The passes of a loop in the chunk loop that a thread's elements of a chunk take."""
    if flow.own_count(loop, lambda i: i.is_wide):
        half = SEQUENCES.search(name)
        if half is None:
            raise ValueError("no type of the sequences in its name")
        size = 16 if flow.own_count(loop, lambda i: i.is_global and ".128" in i.name) else 8
        return elements / (size / (4 if half["half"] == "0" else 2))
    if flow.own_count(loop, lambda i: i.is_global):
        return 0
    loads = flow.own_count(loop, lambda i: i.opcode == "LDS")
    if not loads or loop.children:
        raise ValueError("a loop in the chunk loop is not counted: it loads no element")
    return elements / loads


def sum_cost(flow: Flow, recurrence: Loop, lanes: int, states: int) -> float:
    """Instructions for a state and step in the loops that add up the gradients of B and C over warps."""
    threads = min(32 * lanes, MAX_THREADS // states)
    passes = 2 * CHUNK_STEPS * lanes * states / 4 / threads  # in a chunk
    if any(not flow.own_count(loop, lambda i: i.is_wide) or loop.children for loop in recurrence.children):
        raise ValueError("a loop within a recurrence loop is not counted: it stores no 16 bytes")
    return sum(map(flow.pass_length, recurrence.children)) * passes / (CHUNK_STEPS * states)


def count(name: str, code: list[Instruction], kernel: Kernel) -> Count:
    """Count a kernel's instructions, as far as it has budgets; ValueError if its loops are not as expected."""
    local = local_accesses(code)
    if kernel.per_update is None:
        return Count(local=local)
    tiling = TILING.search(name)
    if tiling is None:
        raise ValueError("no Tiling in its name")
    lanes, states = int(tiling["lanes"]), int(tiling["states"])
    elements = CHUNK_STEPS / lanes  # of a thread in a chunk
    flow, every_loop = Flow(code), kernel.per_element is not None
    updates, staged = [], []
    for chunk, recurrences in chunk_loops(flow, TILE_STEPS * states):
        sequences = flow.sequences(chunk, recurrences)
        lengths = [len(sequence) for sequence in sequences]
        if any(length != kernel.recurrences for length in lengths):
            raise ValueError(f"expected {kernel.recurrences} recurrence loops in a pass, not {lengths}")
        cost = {loop: flow.pass_length(loop) / exponentials for loop, exponentials in recurrences.items()}
        if every_loop:
            cost = {loop: c + sum_cost(flow, loop, lanes, states) for loop, c in cost.items()}
            others = [
                x for x in chunk.children if x not in recurrences and x not in flow.alternatives(chunk, recurrences)
            ]
            inner = {x: element_passes(flow, x, name, elements) * flow.pass_length(x) for x in others}
            staged.append(flow.pass_length(chunk, inner) / elements)
        updates.append(min(sum(cost[loop] for loop in sequence) for sequence in sequences))
    if not updates:
        raise ValueError("no recurrence loop")
    return Count(max(updates), max(staged, default=None), local)


def faults(name: str, counted: Count, kernel: Kernel, limited: bool = True) -> list[str]:
    """Local memory beyond its budget, and each count beyond its budget if the counts are limited."""
    found = []
    if counted.local > kernel.local:
        found.append(f"{name}: {counted.local} loads and stores of local memory, budget {kernel.local}")
    pairs = (
        ("a state and step", counted.per_update, kernel.per_update),
        ("an element", counted.per_element, kernel.per_element),
    )
    for unit, instructions, most in pairs:
        if limited and instructions is not None and most is not None and instructions > most:
            found.append(f"{name}: {instructions:.2f} instructions {unit}, budget {most:g}")
    return found
