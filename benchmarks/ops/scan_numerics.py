"""Errors of the scan against a float64 loop: outputs, every gradient, every second derivative.

    python -m benchmarks.ops.scan_numerics [--quick] [--threads 1]

About ten minutes, mostly for the loop at length 65536, which ``--quick`` leaves out.

A = -(1..16), and step sizes are log-uniform in [0.001, 1], so states decay within 1 to 1000 steps. All arguments are
given, with softplus. The truth is the reference in float64 on the same, already rounded, inputs. It runs in segments of
64 steps with the state passed on, which changes no sum and avoids quadratic work in autograd. Errors of a tensor:

- max: max|got - want| / max|want|, also in units of the dtype's rounding (eps);
- rms: rms(got - want) / rms(want).

In float64 both sides have the same rounding, so that row is an upper bound in order of magnitude. bfloat16 and float16
inputs are computed in float32; y and the gradients of half arguments are rounded once at the end, half an eps. A second
derivative is the gradient of a random functional of all gradients, with respect to all arguments and to the cotangents
of y and of the last state.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import flags, write
from eaml_ext.ops import selective_scan, selective_scan_reference

SHAPES = {64: (2, 16), 1024: (2, 16), 65536: (1, 4)}  # length: (batch, dim)
STATE, PIECE = 16, 64
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SEQUENCES = ("u", "delta", "B", "C", "z")  # the arguments in the dtype of u, and the ones that are cut into pieces

Arguments = dict[str, Tensor]


def make_arguments(length: int, dtype: torch.dtype) -> Arguments:
    """All arguments; numbers that float32 holds, rounded further where the dtype is half."""
    batch, dim = SHAPES[length]
    bias = 0.1 * torch.randn(dim)
    dt = torch.exp(math.log(1e-3) * torch.rand(batch, dim, length, dtype=torch.float64))
    x = {
        "u": torch.randn(batch, dim, length),
        "delta": (dt.expm1().log() - bias.unsqueeze(-1)).float(),
        "A": -torch.arange(1.0, STATE + 1).repeat(dim, 1),
        "B": torch.randn(batch, STATE, length),
        "C": torch.randn(batch, STATE, length),
        "D": torch.randn(dim),
        "z": torch.randn(batch, dim, length),
        "delta_bias": bias,
        "initial_state": torch.randn(batch, dim, STATE),
    }
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: v.to(dtype if n in SEQUENCES else wide) for n, v in x.items()}


def fused(x: Arguments) -> tuple[Tensor, Tensor]:
    """Ours."""
    return selective_scan(**x, delta_softplus=True, return_last_state=True)  # type: ignore[return-value]


def loop(x: Arguments) -> tuple[Tensor, Tensor]:
    """The reference, in pieces."""
    rest = {n: v for n, v in x.items() if n not in (*SEQUENCES, "initial_state")}
    state, ys = x["initial_state"], []
    for piece in zip(*(x[n].split(PIECE, dim=-1) for n in SEQUENCES), strict=True):
        y, state = selective_scan_reference(  # type: ignore[misc]
            **dict(zip(SEQUENCES, piece, strict=True)),
            **rest,
            initial_state=state,
            delta_softplus=True,
            return_last_state=True,
        )
        ys.append(y)
    return torch.cat(ys, dim=-1), state


def noise(like: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random tensors, the same for both sides: rounded to the dtype of ``like``."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(v.shape, generator=draw).to(v.dtype) for v in like]


def evaluate(
    function: Callable[[Arguments], tuple[Tensor, Tensor]], x: Arguments, cotangents: list[Tensor], v: list[Tensor]
) -> dict[str, Tensor]:
    """Outputs, gradients and second derivatives by name."""
    x = {n: value.detach().requires_grad_() for n, value in x.items()}
    outs = function(x)
    cotangents = [c.detach().requires_grad_() for c in cotangents]
    first = torch.autograd.grad(outs, list(x.values()), cotangents, create_graph=True)
    second = torch.autograd.grad(first, [*x.values(), *cotangents], v)
    names = ["y", "last state", *(f"d {n}" for n in x), *(f"dd {n}" for n in (*x, "grad y", "grad state"))]
    return {n: t.detach() for n, t in zip(names, (*outs, *first, *second), strict=True)}


def errors(got: Tensor, want: Tensor) -> dict[str, float]:
    """The two measures of the module's docstring."""
    difference, eps = got.double() - want, torch.finfo(got.dtype).eps
    largest = (difference.abs().max() / want.abs().max()).item()
    return {"max": largest, "roundings": largest / eps, "rms": (difference.norm() / want.norm()).item()}


def group(name: str) -> str:
    """The table's column that a tensor belongs to; sequences are those that come out in the dtype of u."""
    order, _, argument = name.partition(" ")
    if order not in ("d", "dd"):
        return name
    kind = "sequences" if argument in (*SEQUENCES, "grad y") else "parameters, state"
    return f"{'gradients' if order == 'd' else 'second order'}: {kind}"


def measure(length: int) -> list[dict[str, Any]]:
    """Errors of all tensors in all dtypes at one length."""
    rows: list[dict[str, Any]] = []
    truths: dict[torch.dtype, dict[str, Tensor]] = {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        x = make_arguments(length, dtype)
        cotangents, v = noise(fused(x), 1), noise(list(x.values()), 2)
        exact = torch.float32 if dtype == torch.float64 else dtype  # float64 gets the very numbers of float32
        if exact not in truths:
            x64 = {n: value.double() for n, value in x.items()}
            truths[exact] = evaluate(loop, x64, [c.double() for c in cotangents], [t.double() for t in v])
        for name, got in evaluate(fused, x, cotangents, v).items():
            batch, dim = SHAPES[length]
            at = {"length": length, "batch": batch, "dim": dim, "dtype": str(dtype).removeprefix("torch.")}
            rows.append({**at, "tensor": name, **errors(got, truths[exact][name])})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The worst tensor of each group: max (roundings), rms."""
    groups = list(dict.fromkeys(group(row["tensor"]) for row in rows))
    lines = ["| dtype | length | " + " | ".join(groups) + " |", "|---" * (2 + len(groups)) + "|"]
    for dtype, length in dict.fromkeys((row["dtype"], row["length"]) for row in rows):
        cells = []
        for name in groups:
            of = [r for r in rows if (r["dtype"], r["length"], group(r["tensor"])) == (dtype, length, name)]
            worst = max(of, key=lambda r: r["max"])
            tensor = "" if len(of) == 1 else f" ({worst['tensor'].split(maxsplit=1)[1]})"
            cells.append(f"{worst['max']:.0e}{tensor}, {max(r['rms'] for r in of):.0e}")
        lines.append(f"| {dtype} | {length} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    arguments = flags(__doc__)
    rows = []
    print(f"{'length':>6} {'dtype':<10}{'tensor':<18}{'max':>9}{'roundings':>11}{'rms':>9}")
    for length in list(SHAPES)[: 2 if arguments.quick else None]:
        for row in measure(length):
            rows.append(row)
            print(
                f"{row['length']:>6} {row['dtype']:<10}{row['tensor']:<18}"
                f"{row['max']:>9.1e}{row['roundings']:>11.2f}{row['rms']:>9.1e}"
            )
    rows.sort(key=lambda row: [str(d).removeprefix("torch.") for d in DTYPES].index(row["dtype"]))
    print("\nWorst tensor of each group, max error (which), worst rms:\n\n" + table(rows))
    if not arguments.quick:
        print(write("scan_numerics", rows, timed=False))


if __name__ == "__main__":
    main()
