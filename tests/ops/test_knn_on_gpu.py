"""knn's CUDA kernels on a GPU: the bits of the CPU at sizes that fill a GPU, streams, graphs, and no synchronisation.

The conformance tests and the emulator cover small cases. These tests reach every path of the kernels on hardware, and
memories, buffers, learners and adapters on a GPU.
"""

from typing import Any

import pytest
import torch
from knn_checks import assert_same
from torch import Tensor

from eaml_ext.ops import Neighbors, PackedKeys, knn, knn_reference
from eaml_ext.ops.knn import METRICS

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


def on_gpu(x: Any) -> Any:
    return x.cuda() if isinstance(x, Tensor) else x


def check(queries: Tensor, keys: Tensor, k: int, **options: Any) -> Neighbors:
    """Assert that two calls on the GPU give the bits of the CPU."""
    want = knn(queries, keys, k, **options)
    there = {name: on_gpu(x) for name, x in options.items()}
    for _ in range(2):
        got = knn(queries.cuda(), keys.cuda(), k, **there)
        assert_same(got, want)
    return got


def test_knn_ops_have_cuda_kernels():
    for name in ("eaml_ext::knn", "eaml_ext::knn_write"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"{name} was built without CUDA"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 8, 100, 1024])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 20000, 128), (1, 700, 20000, 64), (1, 1100, 3000, 300), (300, 1, 1024, 64), (9, 40, 5000, 33)],
    ids=str,
)
def test_knn_on_gpu_gives_bits_of_cpu(shape, k, metric):
    memories, count, size, features = shape
    lead = () if memories == 1 else (memories,)
    queries, keys = torch.randn(*lead, count, features), torch.randn(*lead, size, features)
    valid, bias = torch.rand(*lead, size) < 0.9, torch.randn(*lead, size)
    check(queries, keys, k, metric=metric)
    check(queries, keys, k, metric=metric, valid=valid, bias=bias)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "shape, k",
    [
        ((1, 1, 200_000, 128), 8),
        ((1, 8, 50_000, 128), 8),
        ((1, 16, 50_000, 33), 64),
        ((16, 8, 10_000, 128), 8),
        ((64, 4, 4096, 64), 8),
    ],
    ids=str,
)
def test_knn_on_gpu_few_queries_give_bits_of_cpu(shape, k, metric):
    """Keys are read in one pass, from panels and from rows."""
    memories, count, size, features = shape
    queries, keys = torch.randn(memories, count, features), 3 + torch.randn(memories, size, features)
    valid, bias = torch.rand(memories, size) < 0.9, torch.randn(memories, size)
    check(queries, keys, k, metric=metric)
    want = check(queries, keys, k, metric=metric, valid=valid, bias=bias)
    memory = PackedKeys(size, features, memories=memories, metric=metric, device="cuda")
    memory.write(torch.arange(size, device="cuda").expand(memories, size), keys.cuda(), bias.cuda())
    assert_same(memory.search(queries.cuda(), k, valid.cuda()), want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 12, 600])
def test_knn_on_gpu_other_dtypes_give_bits_of_cpu(dtype, count):
    keys, bias = torch.randn(30000, 72).to(dtype), torch.randn(30000).to(dtype)
    check(torch.randn(count, 72).to(dtype), keys, 8, bias=bias)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("norm", [10, 118, 346])
def test_knn_on_gpu_offset_clusters_give_bits_of_cpu(metric, norm):
    centre = torch.nn.functional.normalize(torch.randn(128), dim=0) * norm
    queries, keys = (centre + 0.05 * torch.randn(n, 128) for n in (512, 20000))
    check(queries, keys, 8, metric=metric)
    check(queries, torch.cat([keys, -keys]), 8, metric=metric)  # two clusters, for which no single centre is near
    check(queries, torch.cat([keys, keys]), 8, metric=metric)  # ties


def test_knn_on_gpu_more_ties_than_candidates_return_lowest_index():
    got = check(torch.randn(1000, 64), torch.zeros(20_000, 64), 3)
    assert got.indices.tolist() == [[0, 1, 2]] * 1000
    check(torch.randn(600, 64), torch.randint(0, 2, (20_000, 64)).float(), 20)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_knn_on_gpu_non_finite_numbers_give_bits_of_cpu(bad):
    queries, keys, bias = torch.randn(900, 64), torch.randn(20000, 64), torch.randn(20000)
    queries[5, 3] = keys[7, 0] = bias[11] = bad
    keys[13] = bad
    check(queries, keys, 8, bias=bias)
    check(queries * 1e30, keys * 1e30, 8)


@pytest.mark.parametrize("features", [14, 62, 510, 4094])
def test_tensor_core_sums_are_within_error_bound(features):
    """csrc/knn/error_bounds.h assumes that each product adds at most four roundings to a sum."""
    a, b = (torch.randn(64, features).exp() * torch.randn(64, features).sign() for _ in range(2))
    a, b = a.bfloat16().cuda(), b.bfloat16().cuda()
    exact, most = a.double() @ b.double().mT, a.abs().double() @ b.abs().double().mT
    got = torch.mm(a, b.mT, out_dtype=torch.float32)
    assert ((got - exact).abs() <= 4 * (features + 16) * 2**-24 * most).all()


def test_knn_on_gpu_more_neighbors_than_kernels_find_runs_reference():
    queries, keys = torch.randn(3, 8), torch.randn(3000, 8)
    check(queries, keys, 1500)
    with pytest.raises(ValueError, match="knn: k is 1500, the CUDA kernels find up to 1024"):
        torch.ops.eaml_ext.knn.default(queries.cuda(), keys.cuda(), 1500, 0, None, None)


# ---- streams, graphs and devices ---------------------------------------------------------------------------------


def searches(queries: Tensor, keys: Tensor) -> list[Tensor]:
    return [x for count in (1, len(queries)) for x in knn(queries[:count], keys, 8)]


def test_knn_on_gpu_runs_on_current_stream():
    x = [torch.randn(900, 64, device="cuda"), torch.randn(30000, 64, device="cuda")]
    want = searches(*x)
    later, ahead = [torch.full_like(v, torch.nan) for v in x], torch.cuda.Stream()
    with torch.cuda.stream(ahead):
        torch.cuda._sleep(100_000_000)  # a kernel on another stream would read the tensors before they are written
        for to, v in zip(later, x, strict=True):
            to.copy_(v)
        got = searches(*later)
    ahead.synchronize()
    assert all(map(torch.equal, got, want))


def test_knn_on_gpu_does_not_synchronise():
    queries, keys = torch.randn(900, 64, device="cuda"), torch.randn(30000, 64, device="cuda")
    memory = PackedKeys(30000, 64, device="cuda")
    memory.write(torch.arange(30000, device="cuda"), keys)
    memory.search(queries, 8)
    searches(queries, keys)  # includes torch's work of a first call
    torch.cuda.synchronize()
    busy = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(2_000_000_000)
        searches(queries, keys)
        memory.search(queries, 8)
        busy.record()
        assert not busy.query(), "the host waited until the GPU was done"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def test_knn_on_gpu_captured_in_graph_replays():
    queries, keys = torch.randn(900, 64, device="cuda"), torch.randn(30000, 64, device="cuda")
    slots, new = torch.arange(100, device="cuda"), torch.randn(100, 64, device="cuda")
    memory = PackedKeys(30000, 64, device="cuda")
    memory.write(torch.arange(30000, device="cuda"), keys)

    def work() -> list[Tensor]:
        memory.write(slots, new)
        return [*searches(queries, keys), *memory.search(queries, 8)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = work()
    for x in (queries, keys, new):
        x.copy_(torch.randn_like(x))
    graph.replay()
    assert all(map(torch.equal, got, work()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_knn_on_gpu_runs_on_device_of_tensors():
    x = [torch.randn(900, 64, device="cuda:1"), torch.randn(30000, 64, device="cuda:1")]
    with torch.cuda.device(0):
        got = searches(*x)
    assert all(v.device == x[0].device for v in got)
    assert all(map(torch.equal, got, searches(*x)))


def test_knn_on_gpu_offsets_beyond_32_bits():
    """Searches the last keys of a memory of more than 2³¹ numbers."""
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    size, features, tail = 2**25 + 100, 66, 3000
    keys = torch.empty(size, features, dtype=torch.bfloat16, device="cuda").normal_().add_(5)
    keys[-tail:] -= 5
    queries = torch.randn(40, features, device="cuda").bfloat16()
    assert keys.numel() > 2**31
    want = knn(queries, keys[-tail:], 4)
    for count in (1, 40):
        got = knn(queries[:count], keys, 4)
        assert torch.equal(got.indices, want.indices[:count] + size - tail)
        assert torch.equal(got.values, want.values[:count])


# ---- classes that use knn -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("memories", [None, 3])
def test_packed_keys_on_gpu_match_cpu(metric, memories):
    """The same writes and erasures run on the CPU and on the GPU."""
    lead = () if memories is None else (memories,)
    here, there = (PackedKeys(5000, 48, memories=memories, metric=metric, device=d) for d in ("cpu", "cuda"))
    for i in range(6):
        slots = torch.randint(0, 5000, (*lead, 3000))  # some twice
        keys, bias = torch.randn(*lead, 3000, 48) + 100 * (i % 3), torch.randn(*lead, 3000)
        here.write(slots, keys, bias), there.write(slots.cuda(), keys.cuda(), bias.cuda())
        here.erase(slots[..., :500]), there.erase(slots[..., :500].cuda())
        assert len(here) == len(there)
        for count in (1, 16, 30, 500):
            queries = torch.randn(*lead, count, 48) + 100 * (i % 3)
            assert_same(there.search(queries.cuda(), 8), here.search(queries, 8))
    copy = PackedKeys(5000, 48, memories=memories, metric=metric, device="cuda")
    copy.load_state_dict(there.state_dict())
    assert_same(copy.search(queries.cuda(), 8), here.search(queries, 8))
    assert_same(there.to("cpu").search(queries, 8), here.search(queries, 8))


def test_knn_on_gpu_gradients_match_cpu():
    queries, keys = torch.randn(50, 16, dtype=torch.float64), torch.randn(400, 16, dtype=torch.float64)

    def second(q: Tensor, x: Tensor) -> list[Tensor]:
        q, x = q.detach().requires_grad_(), x.detach().requires_grad_()
        first = torch.autograd.grad(knn(q, x, 5, metric="cosine").values.sin().sum(), (q, x), create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), (q, x))]

    for a, b in zip(second(queries.cuda(), keys.cuda()), second(queries, keys), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-9, atol=1e-9)


def test_knn_reference_on_gpu_gives_bits_of_cpu():
    queries, keys = torch.randn(30, 16), torch.randn(400, 16)
    for metric in METRICS:
        got = knn_reference(queries.cuda(), keys.cuda(), 5, metric=metric)
        assert_same(got, knn(queries.cuda(), keys.cuda(), 5, metric=metric))


def test_buffer_on_gpu_matches_cpu():
    from eaml_ext.experience import ExperienceBuffer

    found = []
    fields = [torch.randn(300, n) for n in (4, 2, 32)]
    for device in ("cpu", "cuda"):
        buffer = ExperienceBuffer(2000, 4, 2, device=device)
        state, action, context = (x.to(device) for x in fields)
        buffer.add(state=state, action=action, reward=state[:, 0], context_embedding=context)
        found.append(buffer.retrieve(context[7], 5).batch(targets="action"))
    assert all(torch.equal(found[0][name], found[1][name].cpu()) for name in ("states", "targets"))


def test_learner_and_adapter_on_gpu_run():
    from eaml_ext.adaptation import AdaptationConfig, Adapter
    from eaml_ext.meta import MetaMAML
    from eaml_ext.nn import SSM

    model = SSM(3, 16, 2, device="cuda")
    x, y = torch.randn(4, 12, 3, device="cuda"), torch.randn(4, 12, 2, device="cuda")

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction - target).square().mean()

    maml = MetaMAML(model, 0.05, 1e-3)
    losses = [maml.meta_update([(x, y, x, y)] * 2, loss) for _ in range(5)]
    assert losses[-1] < losses[0]
    adapter = Adapter(model, AdaptationConfig(lr=1e-2))
    first = adapter.adapt(loss, {"states": x, "targets": y})
    assert first == first and all(p.is_cuda for p in model.parameters())
