"""selective_scan: identities between its calls, resets, reduced precision, underflow, and long sequences."""

import doctest
import itertools
import math
import sys
from collections.abc import Sequence

import pytest
import torch
from op_calls import DTYPES, Call, close, derivatives, leaves, outputs
from scan_cases import FACTOR, HALVES, OPTIONAL, build, differentiable, in_episodes, in_segments, in_steps
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_reference
from eaml_ext.ops.selective_scan import ARGUMENTS


@pytest.mark.parametrize("other", [in_segments(1), in_segments(20), in_segments(5, 32, 37), in_steps, in_episodes])
def test_selective_scan_equals_segments_steps_and_episodes(other, device):
    call = build(*OPTIONAL, length=40, dim=3, state=2, softplus=True)(torch.float64, device)
    names = differentiable(call)
    close(outputs(other, call), outputs(selective_scan, call), FACTOR)
    close(derivatives(other, call, names), derivatives(selective_scan, call, names), FACTOR)


def test_reset_is_exact_after_non_finite_state(device):
    """No state crosses a reset, not even an infinite one."""
    call = build("initial_state", "reset", length=6)(torch.float32, device)
    tensors = call.tensors
    tensors["reset"].zero_()[:, 3] = True
    y, last = outputs(selective_scan, call)
    tensors["initial_state"] = torch.full_like(tensors["initial_state"], torch.inf)
    tensors["u"] = tensors["u"].clone()
    tensors["u"][..., :3] = torch.nan
    x = leaves(call, ("initial_state", "u", "A"))
    again, last_again = outputs(selective_scan, call, **x)
    assert torch.equal(again[..., 3:], y[..., 3:]) and torch.equal(last_again, last)
    assert not again[..., :3].isfinite().any()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim, length, channel_last", [(37, 70, True), (37, 70, False), (48, 33, True), (5, 1, False)])
def test_half_types_any_layout_are_computed_in_float32(dim, length, channel_last, dtype, device):
    """Outputs and derivatives to second order are those of float32 arguments, rounded once."""
    call = build(*OPTIONAL, dim=dim, length=length, state=5, softplus=True, invariant=("C",))(torch.float32, device)

    def memory(x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2) if channel_last else x

    half = {n: memory(x).to(dtype) if n in ("u", "delta", "z", "B") else x for n, x in call.tensors.items()}
    full = {n: x.float() if x.is_floating_point() else x for n, x in half.items()}

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        x = list(leaves(call._replace(tensors=tensors), ARGUMENTS).values())
        y, last = outputs(selective_scan, call._replace(tensors=tensors), **dict(zip(ARGUMENTS, x, strict=True)))
        assert y.dtype == tensors["u"].dtype and last.dtype == torch.float32
        y = y.to(dtype)
        first = torch.autograd.grad((y, last), x, (torch.ones_like(y), last.detach()), create_graph=True)
        assert [g.dtype for g in first] == [v.dtype for v in x]
        first = [g.to(half[n].dtype) for n, g in zip(ARGUMENTS, first, strict=True)]
        second = torch.autograd.grad(first, x, [torch.ones_like(g) for g in first])
        return [y, last, *first, *(g.to(half[n].dtype) for n, g in zip(ARGUMENTS, second, strict=True))]

    assert all(map(torch.equal, results(half), results(full)))
    all_half = {n: x.to(dtype) if x.is_floating_point() else x for n, x in half.items()}
    y, last = outputs(selective_scan, call._replace(tensors=all_half))
    assert y.dtype == dtype and last.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False])
def test_skip_every_half_number_passes_unchanged(channel_last, dtype, device):
    u = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 16, 4096).to(device)
    if channel_last:
        u = u.transpose(1, 2).contiguous().transpose(1, 2)
    none = torch.zeros(1, 1, 4096, dtype=dtype, device=device)
    A, D = -torch.ones(16, 1, device=device), torch.ones(16, device=device)
    y = selective_scan(u, torch.zeros_like(u), A, none, none, D)
    finite = u.float().isfinite()
    assert torch.equal(y[finite], u[finite]) and y[u.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("channel_last", [True, False])
def test_skip_float32_numbers_are_rounded_as_by_torch(channel_last, dtype, device):
    """With u = 1 and C = 0, y is D: numbers of every magnitude, and every midpoint of two half numbers."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    scattered = torch.arange(-(2**31), 2**31, 65521).to(torch.int32).view(torch.float32)
    D = torch.cat((scattered, (halves[:-1] + halves[1:]) / 2))
    D = D[D.isfinite()].to(device)
    u = torch.ones(1, len(D), 2, dtype=dtype, device=device)
    if channel_last:
        u = u.transpose(1, 2).contiguous().transpose(1, 2)
    none = torch.zeros(1, 1, 2, dtype=dtype, device=device)
    y = selective_scan(u, torch.zeros_like(u), -torch.ones(len(D), 1, device=device), none, none, D)
    assert torch.equal(y, D.to(dtype).view(1, -1, 1).expand_as(y))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e2, 1e6, 1e30])
def test_decay_underflow_is_zero_and_never_nan(scale, dtype, device):
    call = build("initial_state", length=40)(dtype, device)
    call.tensors["A"] = call.tensors["A"] * scale
    names = differentiable(call)
    close(outputs(selective_scan, call), outputs(selective_scan_reference, call), FACTOR)
    assert all(x.isfinite().all() for x in derivatives(selective_scan, call, names))
    with_zero_input = outputs(selective_scan, call, u=torch.zeros_like(call.tensors["u"]))
    if scale > 1e3:
        assert all((x == 0).all() for x in with_zero_input)


def test_jacobian_of_one_row_matches_reference(device):
    """All cotangents share the saved states of the row, which vmap expands."""
    call = build(batch=1, length=40, dim=2, state=2)(torch.float64, device)
    got, want = (
        torch.func.jacrev(lambda A, f=f: outputs(f, call, A=A)[0])(call.tensors["A"])
        for f in (selective_scan, selective_scan_reference)
    )
    close([got], [want], FACTOR)


def test_inputs_after_derivatives_are_unchanged(device):
    call = build(*OPTIONAL, softplus=True)(torch.float32, device)
    before = {n: x.clone() for n, x in call.tensors.items()}
    derivatives(selective_scan, call, differentiable(call))
    assert all(torch.equal(x, before[n]) for n, x in call.tensors.items())


def test_output_any_order_of_dims_has_strides_of_u(device):
    call = build(*OPTIONAL)(torch.float32, device)
    for order in itertools.permutations(range(3)):
        back = [order.index(i) for i in range(3)]
        u = call.tensors["u"].permute(order).contiguous().permute(back)
        assert outputs(selective_scan, call, u=u)[0].stride() == u.stride()


def test_docstring_examples_pass():
    failures, examples = doctest.testmod(sys.modules[selective_scan.__module__])
    assert examples and not failures


@pytest.mark.parametrize("present", [(), OPTIONAL], ids=["plain", "all"])
@pytest.mark.parametrize("state, invariant", [(16, ()), (9, ("B",))])
def test_few_channels_two_threads_give_same_bits(state, invariant, present, device, reference_only):
    """Units of the forward pass are narrowed for the threads."""
    if reference_only:
        pytest.skip("only the kernels use threads: the reference is one loop, minutes long here")
    single = build(*present, batch=1, dim=17, length=70000 // state, state=state, invariant=invariant, softplus=True)(
        torch.float32, device
    )
    check_few_channels(single, invariant, threads=(2,), factor=4 * FACTOR)


@pytest.mark.parametrize(
    "number, invariant",
    [
        ("real", ()),
        ("complex", ("B",)),
        pytest.param("real", ("B",), marks=pytest.mark.exhaustive),
        pytest.param("complex", (), marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "case", ["fast", "slow", "fast where segments meet", "large at the ends", "infinite", "resets"]
)
def test_few_channels_time_segments_give_same_bits(case, invariant, number, device, reference_only):
    """A time segment starts from a guess, a scan of the steps before it from zero; wrong guesses are recomputed."""
    if reference_only:
        pytest.skip("only the kernels have time segments: the reference is one loop, minutes long here")
    present = {*OPTIONAL} - {"reset"}
    length, dim = 3 * 4096, 7
    call = build(*present, batch=1, dim=dim, length=length, state=13, invariant=invariant)(torch.float32, device)
    tensors = dict(call.tensors)
    fast_at_edges = case in ("fast where segments meet", "large at the ends")
    slow = fast_at_edges or case == "slow"
    delta = torch.full((length,), 1e-4 if slow else 1.0)
    if fast_at_edges:
        step = torch.arange(length) % 2048  # threads may start at every multiple
        delta[(step < 64) | (step >= 2048 - 64)] = 1
    tensors["delta"] = delta.to(device).expand(1, dim, length).contiguous()
    tensors["delta_bias"] = tensors["delta_bias"] * 0
    if case == "large at the ends":  # makes the guess of the state wrong
        tensors["initial_state"] = tensors["initial_state"] * 1e5
        tensors["u"][..., -1] = 1e5
    if case == "infinite":
        tensors["u"][0, 3, 100] = math.inf
    if case == "resets":
        tensors["reset"] = torch.zeros(1, length, dtype=torch.bool, device=device)
        tensors["reset"][0, [2000, 4090, 4096, 7000]] = True
    if number == "complex":
        kinds = ("A", "B", "C", "initial_state")
        tensors |= {n: torch.complex(tensors[n], 0.5 * tensors[n].flip(-1)) for n in kinds}
    factor = 32 if slow else 4  # a state that lasts thousands of steps is rounded at each
    check_few_channels(call._replace(tensors=tensors), invariant, threads=(2, 3), factor=factor * FACTOR)


def check_few_channels(single: Call, invariant: Sequence[str], threads: Sequence[int], factor: float) -> None:
    """Assert that a call of one row gives the same bits on several threads, close to those of a batch of such rows."""
    rows = 4
    names = [name for name in ARGUMENTS if name in single.tensors]
    shared = {"A", "D", "delta_bias", *invariant}
    repeated = {n: x if n in shared else x.expand(rows, *x.shape[1:]) for n, x in single.tensors.items()}

    def results(call: Call, count: int = 1) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            x = list(leaves(call, names).values())
            outs = outputs(selective_scan, call, **dict(zip(names, x, strict=True)))
            first = torch.autograd.grad(outs, x, [out.detach() for out in outs], create_graph=True)
            every = [*outs, *first, *torch.autograd.grad(first, x, [v.detach() for v in x])]
            return [torch.view_as_real(x) if x.is_complex() else x for x in every]
        finally:
            torch.set_num_threads(before)

    got = results(single)
    for count in threads:
        for i, (a, b) in enumerate(zip(got, results(single, count), strict=True)):
            assert torch.equal(a.detach().view(torch.int32), b.detach().view(torch.int32)), f"{i}, {count} threads"
    want = results(single._replace(tensors=repeated))
    of = ["y", "last", *names, *names]
    close(got, [w / rows if n in shared else w[:1] for n, w in zip(of, want, strict=True)], factor)
