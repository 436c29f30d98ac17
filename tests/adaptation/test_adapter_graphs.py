"""Adapter(compile=True) replays graphs: CUDA graphs on a GPU, recorded operations in their place on a CPU."""

import copy

import pytest
import torch
from recorded_graph import RecordingCapturer
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from eaml_ext import SSM, AdaptationConfig, Adapter
from eaml_ext.meta._cuda_graphs import GraphCache


def pair(model, cfg, **options):
    """An adapter that replays graphs and one that does not, of equal models."""
    replayed = Adapter(copy.deepcopy(model), cfg, compile=True, **options)
    if not next(model.parameters()).is_cuda:
        replayed._graphs = GraphCache("Adapter", RecordingCapturer)
    return replayed, Adapter(model, cfg, **options)


def assert_same_calls(replayed, plain, batches, loss_fn=mse_loss):
    for batch in batches:
        got, want = (adapter.adapt(loss_fn, batch) for adapter in (replayed, plain))
        assert got == pytest.approx(want, rel=1e-5, nan_ok=True)
        assert (replayed.last_steps, replayed.rollbacks) == (plain.last_steps, plain.rollbacks)
        for a, b in zip(replayed.model.state_dict().values(), plain.model.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def rows(n=8, device="cpu", **others):
    return {"states": torch.randn(n, 3, device=device), "targets": torch.randn(n, 2, device=device), **others}


MODELS = {
    "mlp": lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)),
    "ssm": lambda: SSM(3, 8, 2, state_size=2),
}


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_adapt_replayed_equals_plain(make, optimizer, device):
    replayed, plain = pair(make().to(device), AdaptationConfig(0.05, max_steps_per_call=3), optimizer=optimizer)
    assert_same_calls(replayed, plain, [rows(device=device) for _ in range(4)])
    assert replayed._graphs.replays == 11


def test_adapt_replayed_rolls_back_as_plain():
    replayed, plain = pair(MODELS["batch norm"](), AdaptationConfig(0.05, max_steps_per_call=2))
    bad = rows()
    bad["targets"][0] = torch.nan
    assert_same_calls(replayed, plain, [rows(), rows(), bad, rows(), bad, rows()])
    assert replayed.rollbacks == 2 and replayed._graphs.replays > 5


def test_adapt_replayed_with_experience_mask_and_hidden_state_equals_plain():
    def retriever(buffer, batch):
        n = len(batch["states"])
        return {"states": torch.ones(n, 3), "targets": torch.zeros(n, 2), "weights": torch.rand(n)}

    model = SSM(3, 8, 2, state_size=2)
    cfg = AdaptationConfig(0.05, max_steps_per_call=2)
    replayed, plain = pair(
        model, cfg, retriever=lambda buffer, batch: retriever(buffer, batch) if batch["ask"] else None
    )
    batches = []
    for i in range(9):
        mask = torch.arange(8) != i % 3
        batches.append(rows(mask=mask, hidden_state=torch.randn(8, 1, 8, 2), ask=i % 3 > 0))
    for batch in batches:
        torch.manual_seed(0)
        got = replayed.adapt(mse_loss, batch)
        torch.manual_seed(0)
        assert got == pytest.approx(plain.adapt(mse_loss, batch), rel=1e-6)
    assert len(replayed._graphs) == 2


def test_adapt_replayed_frozen_parameter_stays():
    replayed, plain = pair(MODELS["mlp"](), AdaptationConfig(0.05, max_steps_per_call=2))
    for frozen in (False, True, False):
        for adapter in (replayed, plain):
            adapter.model[0].requires_grad_(not frozen)
        assert_same_calls(replayed, plain, [rows(), rows()])
    assert len(replayed._graphs) == 2


def test_adapt_replayed_entropy_of_classes_equals_plain():
    replayed, plain = pair(MODELS["mlp"](), AdaptationConfig(0.05, entropy_weight=0.5))
    batches = [{"states": torch.randn(8, 3), "targets": torch.randint(2, (8,))} for _ in range(3)]
    assert_same_calls(replayed, plain, batches, cross_entropy)
    assert replayed._graphs.replays > 0


@pytest.mark.parametrize("with_history", [False, True])
def test_adapt_many_replayed_equals_plain(with_history, device):
    replayed, plain = pair(SSM(3, 8, 2, device, state_size=2), AdaptationConfig(0.05, max_steps_per_call=3))
    results = [(None, None)] * 2
    histories = [adapter.history(4) if with_history else None for adapter in (replayed, plain)]
    for _ in range(3):
        batch = {"states": torch.randn(4, 2, 6, 3, device=device), "targets": torch.randn(4, 2, 6, 2, device=device)}
        results = [
            adapter.adapt_many(mse_loss, batch, params, history)
            for adapter, (params, _), history in zip((replayed, plain), results, histories, strict=True)
        ]
        torch.testing.assert_close(*results)
    assert replayed._graphs.replays == 8


def test_adapt_many_replayed_masks_of_rows_and_of_steps_equal_plain():
    replayed, plain = pair(SSM(3, 8, 2, state_size=2), AdaptationConfig(0.05, max_steps_per_call=2))
    steps, chosen = torch.zeros(4, 2, 6, dtype=torch.bool), torch.zeros(4, 2, dtype=torch.bool)
    steps[:, 1, 4] = chosen[:, 1] = True
    for _ in range(3):
        for mask in (steps, chosen):
            batch = {"states": torch.randn(4, 2, 6, 3), "targets": torch.randn(4, 2, 6, 2), "mask": mask}
            torch.testing.assert_close(*(adapter.adapt_many(mse_loss, batch) for adapter in (replayed, plain)))
    assert len(replayed._graphs) == 2


def test_adapt_loss_that_reads_a_number_runs_as_usual_after_one_warning():
    replayed, plain = pair(MODELS["mlp"](), AdaptationConfig(0.05))
    with pytest.warns(RuntimeWarning, match="^Adapter: no CUDA graph can be captured") as caught:
        assert_same_calls(replayed, plain, [rows(), rows()], lambda p, t: mse_loss(p, t) * float(t[0, 0].abs()))
    assert len(caught) == 1 and caught[0].filename == __file__


def test_adapter_copy_and_stream_with_graphs_equal_plain():
    replayed, plain = pair(SSM(3, 8, 2, state_size=2), AdaptationConfig(0.05, max_steps_per_call=2))
    assert_same_calls(replayed, plain, [rows(), rows()])
    assert_same_calls(copy.deepcopy(replayed), copy.deepcopy(plain), [rows(), rows()])
    batches = [rows() for _ in range(3)]
    streams = (adapter.adapt_stream(mse_loss, batches) for adapter in (replayed, plain))
    for (y, total), (want, want_total) in zip(*streams, strict=True):
        torch.testing.assert_close(y, want)
        assert total == pytest.approx(want_total, rel=1e-6)


def test_constructor_compile_not_a_flag_is_refused():
    with pytest.raises(TypeError, match=r"^Adapter: compile must be True or False, got int$"):
        Adapter(nn.Linear(3, 1), compile=1)


def test_adapt_loss_written_in_the_call_is_captured_once():
    replayed, plain = pair(MODELS["mlp"](), AdaptationConfig(0.05, max_steps_per_call=2))
    for i in range(4):
        batch, scale = rows(), 1.0 + i // 2
        got, want = (adapter.adapt(lambda p, t: scale * mse_loss(p, t), batch) for adapter in (replayed, plain))  # noqa: B023
        assert got == pytest.approx(want, rel=1e-5)
    assert len(replayed._graphs) == 2 and replayed._graphs.replays == 6


class KeepsOutput(nn.Linear):
    def forward(self, x):
        self.kept = [*getattr(self, "kept", ())[-1:], super().forward(x)]
        return self.kept[-1]


def test_adapt_model_that_keeps_its_output_warns_once():
    replayed, plain = pair(KeepsOutput(3, 2), AdaptationConfig(0.05, max_steps_per_call=1))
    replayed._graphs._max_graphs = 3
    with pytest.warns(RuntimeWarning, match="^Adapter: no CUDA graph was used in 6 calls, shapes, values or") as caught:
        for _ in range(10):
            batch = rows()
            got, want = (adapter.adapt(mse_loss, batch) for adapter in (replayed, plain))
            assert got == pytest.approx(want, rel=1e-5)
    assert len(caught) == 1 and caught[0].filename == __file__


def test_adapt_of_adapter_pickled_without_graphs_runs_as_usual():
    adapter, batch = Adapter(MODELS["mlp"](), AdaptationConfig(0.05)), rows()
    old = copy.deepcopy(adapter)
    del vars(old)["_graphs"]
    assert old.adapt(mse_loss, batch) == adapter.adapt(mse_loss, batch)
