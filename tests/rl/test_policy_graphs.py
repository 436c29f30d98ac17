"""SSMMetaPolicy(compile=True) replays steps: CUDA graphs on a GPU, recorded operations in their place on a CPU."""

import copy
import gc
import weakref

import pytest
import torch
from recorded_graph import RecordingCapturer

from eaml_ext.meta._cuda_graphs import GraphCache
from eaml_ext.rl import SSMMetaPolicy, feature_dim, rollout
from eaml_ext.tasks import CartPoleTasks


def replaying(*args, **options):
    policy = SSMMetaPolicy(*args, compile=True, **options)
    if not policy.mean.is_cuda:
        policy._graphs = GraphCache("SSMMetaPolicy", RecordingCapturer)
    return policy


def plain(policy):
    copied = copy.deepcopy(policy)
    copied._graphs = None
    return copied


@pytest.mark.parametrize("continuous", [False, True])
def test_step_replayed_gives_bits_of_usual_step(continuous, device):
    policy = replaying(5, 2, 8, device, continuous=continuous)
    usual = plain(policy)
    state = states = policy.init_hidden(3)
    with torch.no_grad():
        for i in range(8):
            obs, reset = torch.randn(3, 5, device=device), torch.rand(3, device=device) < 0.3
            if i == 4:
                for each in (policy, usual):
                    each.normalise(torch.full((4, 5), 3.0) + torch.eye(4, 5))
                    each.actor.weight.mul_(2.0)
            (got, value, state), (want, wanted, states) = (
                each.step(obs, each_state, reset) for each, each_state in ((policy, state), (usual, states))
            )
            assert torch.equal(got.mean if continuous else got.logits, want.mean if continuous else want.logits)
            assert torch.equal(value, wanted) and torch.equal(state, states)
    assert policy._graphs.replays == 7


def test_step_replayed_with_and_without_state_are_two_graphs():
    policy, obs = replaying(5, 2, 8), torch.randn(3, 5)
    usual = plain(policy)
    with torch.no_grad():
        for _ in range(3):
            for state in (None, policy.init_hidden(3)):
                assert torch.equal(policy.step(obs, state)[1], usual.step(obs, state)[1])
    assert len(policy._graphs) == 2


def test_step_with_gradient_or_under_vmap_runs_as_usual():
    policy, obs = replaying(5, 2, 8), torch.randn(3, 5)
    for _ in range(3):
        policy.step(obs)[1].sum().backward()
    with torch.no_grad():
        torch.func.vmap(lambda x: policy.step_tensors(x[None])[1])(obs)
    assert policy._graphs.replays == 0 and policy.critic.weight.grad is not None


def test_step_bad_argument_raises_as_usual():
    policy = replaying(5, 2, 8)
    with torch.no_grad():
        for _ in range(3):
            policy.step(torch.randn(3, 5), None, torch.zeros(3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"^SSMMetaPolicy.step: reset must have shape \(3,\), got \(2,\)$"):
            policy.step(torch.randn(3, 5), None, torch.zeros(2, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"^SSM.step: x must have shape"):
            policy.step(torch.randn(3, 4))
        with pytest.raises(TypeError, match=r"^SSM.step: x must be a torch.Tensor, got int$"):
            policy.step(3)
        assert policy.step(torch.randn(3, 5))[1].shape == (3,)


def test_rollout_replayed_gives_bits_of_usual_rollout(device):
    dist = CartPoleTasks()
    policy, tasks = replaying(feature_dim(dist), 2, 8, device), dist.sample(3)
    got, want = (rollout(dist, tasks, each, seed=0, episodes=2) for each in (policy, plain(policy)))
    assert all(torch.equal(a, b) for a, b in zip(vars(got).values(), vars(want).values(), strict=True))
    assert policy._graphs.replays > 10


def test_save_and_load_compiled_policy_keep_weights(tmp_path):
    policy, obs = replaying(5, 2, 8), torch.randn(3, 5)
    policy.save(tmp_path / "policy")
    assert torch.equal(SSMMetaPolicy.load(tmp_path / "policy")(obs), policy(obs))


def test_step_dropped_policy_is_freed_without_collection():
    policy = replaying(5, 2, 8)
    with torch.no_grad():
        for _ in range(3):
            policy.step(torch.randn(3, 5))
    assert policy._graphs.replays == 2
    alive = weakref.ref(policy)
    gc.collect()
    gc.disable()
    try:
        del policy
        assert alive() is None
    finally:
        gc.enable()


def test_step_of_policy_pickled_without_graphs_runs_as_usual():
    policy = SSMMetaPolicy(5, 2, 8)
    del vars(policy)["_graphs"]
    with torch.no_grad():
        assert policy.step(torch.randn(3, 5))[1].shape == (3,)
