"""Count the bits in which equivalent calls of the selective scan differ: the count must be 0.

    python -m benchmarks.ops.scan_bits [--shapes 200] [--seed 0]

Draws shapes (batch, length, dim, state) up to (16, 16384, 64, 64), log-uniform, with options of the scan. For each it
compares outputs, last states and gradients of a scan with those of

- a row of the batch alone,
- two parts of the sequence, with the state and its gradient handed over,
- the episodes between resets, one by one,
- packed sequences, one by one,
- single steps, with gradients through up to 512 of them,
- one thread and two.

Gradients of parameters are sums over the batch and over time, and only the numbers of threads are compared.
"""

import argparse
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_step

Arguments = dict[str, Tensor | None]
Results = dict[str, Tensor]

LARGEST = (16, 16384, 64, 64)  # (batch, length, dim, state)
STEPS = 512  # single steps with gradients
SEQUENCES = ("u", "delta", "z")
PER_STEP = (*SEQUENCES, "B", "C", "reset", "y", "grad_y")
PER_ROW = (*PER_STEP, "initial_state", "grad_state")
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def draw(seed: int, largest: tuple[int, int, int, int] = LARGEST) -> Arguments:
    """Return the arguments of a scan of a drawn shape and its cotangents, all on the CPU."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, length, dim, dstate = (int(math.exp(rng.uniform(0, math.log(size + 1)))) for size in largest)
    dtype, channel_last = rng.choice(DTYPES), rng.random() < 0.5
    real = dtype.to_real() if dtype.is_complex else dtype
    full = torch.promote_types(real, torch.float32)
    states = dtype if dtype.is_complex else full
    groups = 2 if dim % 2 == 0 and rng.random() < 0.2 else 1

    def normal(*size: int, dtype: torch.dtype = full) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype)

    def sequence() -> Tensor:
        values = normal(batch, length, dim).to(real).mT
        return values if channel_last else values.contiguous()

    A = -torch.rand(dim, dstate, generator=generator, dtype=full) * 3 - 0.05
    grouped = (batch, groups) if groups > 1 else (batch,)
    B, C = (normal(*grouped, length, dstate, dtype=states).to(dtype).mT for _ in range(2))
    return {
        "u": sequence(),
        "delta": sequence(),
        "A": torch.complex(A, normal(dim, dstate)) if dtype.is_complex else A,
        "B": normal(dim, dstate, dtype=states) if rng.random() < 0.15 and dtype in (full, states) else B,
        "C": C,
        "D": normal(dim) if rng.random() < 0.7 else None,
        "z": sequence() if rng.random() < 0.6 else None,
        "delta_bias": normal(dim) - 1,
        "initial_state": normal(batch, dim, dstate, dtype=states),
        "reset": torch.rand(batch, length, generator=generator) < 3 / length if rng.random() < 0.5 else None,
        "grad_y": sequence(),
        "grad_state": normal(batch, dim, dstate, dtype=states),
    }


def select(x: Arguments, names: tuple[str, ...], choose: Callable[[Tensor], Tensor]) -> Arguments:
    """Return the arguments, those of ``names`` through ``choose``; a B or C that is invariant in time stays."""
    return {
        name: choose(v) if name in names and v is not None and (name not in "BC" or v.dim() > 2) else v
        for name, v in x.items()
    }


def rows_of(x: Arguments, rows: slice) -> Arguments:
    """Return the arguments of some rows of the batch."""
    return select(x, PER_ROW, lambda v: v[rows])


def steps_of(x: Arguments, steps: slice) -> Arguments:
    """Return the arguments of some steps, with the initial state and the cotangent of the last one."""
    return select(x, PER_STEP, lambda v: v[..., steps])


def run(x: Arguments) -> Results:
    """Return y, the last state and all gradients of a scan."""
    leaves = {k: v.detach().requires_grad_() for k, v in x.items() if v is not None and k not in _NO_GRADIENT}
    options = {"reset": x["reset"], "cu_seqlens": x.get("cu_seqlens")}
    y, last = selective_scan(**leaves, **options, delta_softplus=True, return_last_state=True)
    grads = torch.autograd.grad([y, last], [*leaves.values()], [x["grad_y"], x["grad_state"]])
    return {"y": y.detach(), "last_state": last.detach(), **dict(zip(leaves, grads, strict=True))}


def run_steps(x: Arguments) -> Results:
    """Return what :func:`run` does, by single steps."""
    leaves = {k: v.detach().requires_grad_() for k, v in x.items() if v is not None and k not in _NO_GRADIENT}
    state, ys = leaves["initial_state"], []
    # unbind, because the gradients of indexing are added to zeros: -0 would become 0.
    per_step = {k: v.unbind(-1) for k, v in leaves.items() if k in PER_STEP and v.dim() > 2}
    shared = {k: v for k, v in leaves.items() if k not in per_step and k != "initial_state"}
    for t in range(x["u"].shape[-1]):
        y, state = selective_scan_step(state, **{k: v[t] for k, v in per_step.items()}, **shared, delta_softplus=True)
        ys.append(y)
    outs = [torch.stack(ys, -1), state]
    grads = torch.autograd.grad(outs, [*leaves.values()], [x["grad_y"], x["grad_state"]])
    return {"y": outs[0].detach(), "last_state": state.detach(), **dict(zip(leaves, grads, strict=True))}


_NO_GRADIENT = ("reset", "cu_seqlens", "grad_y", "grad_state")
OF_A_ROW = ("y", "last_state", *SEQUENCES, "B", "C", "initial_state")


def differing(a: Results, b: Results, x: Arguments, names: tuple[str, ...] = OF_A_ROW) -> list[str]:
    """Return the names of the results that differ in a bit."""
    invariant = {name for name in "BC" if x[name].dim() == 2}
    return [name for name in a if name in names and name not in invariant and not same_bits(a[name], b[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape and bits."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return a.shape == b.shape and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def join(parts: list[tuple[Arguments, Results]]) -> Results:
    """Return the results of consecutive parts as those of the whole."""
    first, last = parts[0][1], parts[-1][1]
    joined = {k: torch.cat([r[k] for _, r in parts], -1) for k in first if k in ("y", *SEQUENCES, "B", "C")}
    return {**joined, "last_state": last["last_state"], "initial_state": first["initial_state"]}


def run_parts(x: Arguments, bounds: list[int], episodes: bool) -> Results:
    """Return the results of the parts between ``bounds``; the state goes from part to part, or each starts at zero."""
    ends = list(itertools.pairwise(bounds))
    starts, state = [], x["initial_state"]
    for begin, end in ends:
        part = {**steps_of(x, slice(begin, end)), "initial_state": state}
        starts.append(part)
        state = torch.zeros_like(state) if episodes else run(part)["last_state"]
    parts: list[tuple[Arguments, Results]] = []
    grad_state = x["grad_state"]
    for part in reversed(starts):
        results = run({**part, "grad_state": grad_state})
        parts.insert(0, (part, results))
        grad_state = torch.zeros_like(grad_state) if episodes else results["initial_state"]
    return join(parts)


def check(x: Arguments, seed: int) -> Iterator[tuple[str, str]]:
    """Yield (property, result) for each result of an equivalent call that differs in a bit."""
    rng, threads = random.Random(seed), torch.get_num_threads()
    batch, _, length = x["u"].shape
    torch.set_num_threads(2)
    try:
        whole = run(x)
        torch.set_num_threads(1)
        yield from (("threads", name) for name in differing(whole, run(x), x, tuple(whole)))
        row = rng.randrange(batch)
        rows = slice(row, row + 1)
        alone = {name: v[rows] for name, v in whole.items() if name in OF_A_ROW}
        for count in (1, 2):
            torch.set_num_threads(count)
            yield from (("row", name) for name in differing(alone, run(rows_of(x, rows)), x))
        cut = rng.randrange(1, length) if length > 1 else 1
        parts = run_parts(x, [0, cut, length] if length > 1 else [0, 1], episodes=False)
        yield from (("split", name) for name in differing(parts, whole, x))
        cuts = sorted(rng.sample(range(1, length), min(3, length - 1)))
        reset = torch.zeros(batch, length, dtype=torch.bool)
        reset[:, cuts] = True
        with_resets = run({**x, "reset": reset})
        episodes = run_parts({**x, "reset": None}, [0, *cuts, length], episodes=True)
        yield from (("resets", name) for name in differing(episodes, with_resets, x))
        yield from (("packed", name) for name in check_packed(rows_of(x, rows), [0, *cuts, length]))
        if x["B"].dim() == 2:  # a single step takes a B for each batch row
            return
        few = {**steps_of(x, slice(0, STEPS)), "reset": None}
        yield from (("steps", name) for name in differing(run_steps(few), run(few), x))
    finally:
        torch.set_num_threads(threads)


def check_packed(row: Arguments, bounds: list[int]) -> Iterator[str]:
    """Yield the results of a packed row that differ from those of its sequences."""
    count = len(bounds) - 1
    states = ("initial_state", "grad_state")
    row = {**row, **{name: torch.randn_like(row[name].expand(count, -1, -1)) for name in states}}
    packed = run({**row, "cu_seqlens": torch.tensor(bounds, dtype=torch.int32)})
    for i in range(count):
        steps = slice(bounds[i], bounds[i + 1])
        alone = run({**steps_of(row, steps), **{name: row[name][i : i + 1] for name in states}})
        of_sequence = {**steps_of({name: packed.get(name) for name in ("y", *OF_A_ROW)}, steps)}
        of_sequence |= {name: packed[name][i : i + 1] for name in ("last_state", "initial_state")}
        present = {name: v for name, v in of_sequence.items() if v is not None}
        yield from differing(present, alone, row)


def main() -> None:
    """Print each difference, then the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    count = 0
    for seed in range(options.seed, options.seed + options.shapes):
        x = draw(seed)
        shape = (*x["u"].mT.shape, x["A"].shape[-1])
        for rule, name in check(x, seed):
            count += 1
            print(f"{rule}: {name} differs at {shape}, seed {seed}", flush=True)
    print(json.dumps({"shapes": options.shapes, "results that differ": count}))


if __name__ == "__main__":
    main()
