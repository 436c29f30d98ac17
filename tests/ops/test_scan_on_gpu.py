"""The scan's CUDA kernels on a GPU: streams, graphs, devices, offsets beyond 32 bits, no synchronisation.

The conformance tests check their results, on every device present.
"""

from typing import Any

import pytest
import torch
from scan_bits import SCANS, check_parts_and_steps, check_rows, make_arguments
from torch import Tensor

from eaml_ext.ops import selective_scan, selective_scan_step

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def arguments(batch: int = 4, dim: int = 40, length: int = 100, state: int = 16, device: str = "cuda") -> list[Tensor]:
    u, delta = torch.randn(2, batch, length, dim, device=device).transpose(2, 3)
    B, C = torch.randn(2, batch, state, length, device=device)
    return [u, delta - 2, -0.3 - torch.rand(dim, state, device=device), B, C]


def with_imaginary_parts(x: list[Tensor]) -> list[Tensor]:
    """Return the same arguments with imaginary parts of A, B and C."""
    return [*x[:2], *(torch.complex(v, torch.randn_like(v)) for v in x[2:])]


def squared(v: Tensor) -> Tensor:
    """Return |v|^2 in at least float32, also of complex tensors."""
    return v.to(torch.promote_types(v.dtype, torch.float32)).abs().square()


def gradients(x: list[Tensor], **others: Any) -> list[Tensor]:
    """Return y and its first and second derivatives in ``x`` and in the floating tensors of ``others``."""
    x = [v.detach().requires_grad_() for v in x]
    more = {
        n: v.detach().requires_grad_() for n, v in others.items() if isinstance(v, Tensor) and v.dtype != torch.bool
    }
    leaves = [*x, *more.values()]
    y = selective_scan(*x, delta_softplus=True, **{**others, **more})
    first = torch.autograd.grad(squared(y).mean(), leaves, create_graph=True)
    second = torch.autograd.grad(torch.stack([squared(g).sum() for g in first]).sum(), leaves)
    return [v.detach() for v in (y, *first, *second)]


def everything(batch: int, dim: int, length: int, kind: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        "D": torch.randn(dim, device="cuda"),
        "z": torch.randn(batch, dim, length, device="cuda"),
        "delta_bias": torch.randn(dim, device="cuda"),
        "initial_state": torch.randn(batch, dim, 16, device="cuda", dtype=kind),
        "reset": torch.rand(batch, length, device="cuda") < 0.05,
    }


def test_cuda_kernels_are_registered():
    for name in ("", "_step", "_backward", "_jvp", "_backward_jvp"):
        name = f"eaml_ext::selective_scan{name}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"{name} was built without CUDA"


def exact(v: Tensor) -> Tensor:
    return v.cpu() if v.dtype == torch.bool else v.cpu().to(torch.complex128 if v.is_complex() else torch.float64)


def check(x: list[Tensor], tolerance: float, **others: Any) -> None:
    """Assert that two calls give the same bits, close to the CPU's results in double precision."""
    got = gradients(x, **others)
    assert all(map(torch.equal, got, gradients(x, **others)))
    want = gradients([exact(v) for v in x], **{n: exact(v) for n, v in others.items()})
    for a, b in zip(got, want, strict=True):
        assert (exact(a) - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("size", SCANS, ids=str)
def test_split_invariant_scan_equals_its_parts_and_steps_on_a_gpu(size):
    check_parts_and_steps(make_arguments(*size, "cuda"))


@pytest.mark.parametrize("size", SCANS, ids=str)
def test_row_bits_do_not_depend_on_the_batch_on_a_gpu(size):
    check_rows(make_arguments(*size, "cuda"))


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("length", [1, 100, 600, 20000])
@pytest.mark.parametrize("state", [1, 16, 70])
def test_cuda_scan_every_size_close_to_cpu(state, length, kind):
    x = arguments(2, 5, length, state)
    check(with_imaginary_parts(x) if kind == "complex" else x, 1e-4)


KINDS = ["everything", "per task", "groups", "invariant", "channel first", "bfloat16"]


@pytest.mark.parametrize("kind", [*KINDS, "complex", *(f"complex, {kind}" for kind in KINDS)])
def test_cuda_scan_every_layout_close_to_cpu(kind):
    states, kind = ("complex", kind[9:]) if kind.startswith("complex") else ("real", kind)
    x = arguments(4, 6, 70)
    if kind == "per task":
        x[2] = x[2] * (1 + torch.rand(2, 1, 1, device="cuda"))
    if kind == "groups":
        x[3:] = [v.unflatten(1, (2, 8)) for v in x[3:]]
        x[2] = x[2][:, :8].contiguous()
    if kind == "invariant":
        x[3:] = [torch.randn(6, 16, device="cuda") for _ in range(2)]
    if kind == "channel first":
        x[:2] = [v.contiguous() for v in x[:2]]
    if states == "complex":
        x = with_imaginary_parts(x)
    if kind == "bfloat16":
        x = [v if i == 2 or v.is_complex() else v.bfloat16() for i, v in enumerate(x)]
    others = everything(4, 6, 70, x[2].dtype) if kind == "everything" else {}
    check(x, 0.05 if kind == "bfloat16" else 1e-4, **others)


def test_cuda_scan_runs_on_current_stream():
    x = arguments()
    want = gradients(x)
    later, ahead = [torch.full_like(v, torch.nan) for v in x], torch.cuda.Stream()
    with torch.cuda.stream(ahead):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read the tensors before they are written
        for to, v in zip(later, x, strict=True):
            to.copy_(v)
        got = gradients(later)
    ahead.synchronize()
    assert all(map(torch.equal, got, want))


def test_cuda_scan_does_not_synchronise():
    x = arguments()
    gradients(x)  # runs torch's initialisation
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)
        gradients(x)
        busy.record()
        assert not busy.query(), "the host waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@pytest.mark.parametrize("kind", ["real", "complex"])
def test_cuda_scan_captured_in_graph_replays_with_new_inputs(kind):
    def inputs() -> list[Tensor]:
        return with_imaginary_parts(arguments()) if kind == "complex" else arguments()

    x = inputs()
    state = torch.zeros(4, 40, 16, device="cuda", dtype=x[2].dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(x)
        step = selective_scan_step(state, x[0][..., 0], x[1][..., 0], x[2], x[3][..., 0], x[4][..., 0])
    for v, new in zip(x, inputs(), strict=True):
        v.copy_(new)
    graph.replay()
    assert all(map(torch.equal, got, gradients(x)))
    assert torch.equal(step[1], selective_scan_step(state, *(v[..., 0] if v.dim() == 3 else v for v in x))[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_cuda_scan_runs_on_device_of_tensors():
    x = arguments(device="cuda:1")
    with torch.cuda.device(0):
        got = gradients(x)
    assert all(v.device == x[0].device for v in got)
    assert all(map(torch.equal, got, gradients([v.to("cuda:0").to("cuda:1") for v in x])))


def test_cuda_scan_offsets_beyond_32_bits_give_same_bits():
    """The last steps of a sequence, after a reset, equal a scan of these steps alone; so does their gradient."""
    batch, dim, length, tail = 1, 64, 2**25 + 8, 40
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    u = torch.empty(batch, dim, length, dtype=torch.bfloat16, device="cuda").normal_()
    delta = torch.empty_like(u).uniform_(0.1, 0.5)
    B, C = torch.randn(2, batch, 2, length, device="cuda").bfloat16()
    A = torch.tensor([[-0.5, -1.0]], device="cuda").repeat(dim, 1)
    reset = torch.zeros(batch, length, dtype=torch.bool, device="cuda")
    reset[:, -tail] = True
    assert u.numel() > 2**31
    ends = [v[..., -tail:].contiguous().requires_grad_() for v in (u, delta, B, C)]
    want = selective_scan(ends[0], ends[1], A, ends[2], ends[3])
    whole = [v.requires_grad_() for v in (u, delta, B, C)]
    y = selective_scan(whole[0], whole[1], A, whole[2], whole[3], reset=reset)
    assert torch.equal(y[..., -tail:], want)
    got = torch.autograd.grad(y[..., -tail:].float().square().sum(), whole)
    for a, b in zip(got, torch.autograd.grad(want.float().square().sum(), ends), strict=True):
        a, b = a[..., -tail:].float(), b.float()  # other chunks: some sums have another order
        assert (a - b).abs().max() <= 0.01 * b.abs().max()
