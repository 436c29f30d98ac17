"""A rollout and the trainer's first evaluation of it have the same log-probabilities and values, bit for bit."""

import pytest
import torch
from bandit import Bandit
from learners import HIDDEN, make_policy

from eaml_ext.nn import _row_invariant
from eaml_ext.nn.cores import CORES
from eaml_ext.rl import RL2, rl2, rollout

pytestmark = pytest.mark.kernels
ENVIRONMENTS = (1, 2, 3, 8)
# The state of "s5" and "lru" is a sum of two states of the scan, which is rounded between calls.
EQUAL_CORES = [core for core in CORES if core not in ("s5", "lru")]


@pytest.fixture
def set_threads():
    threads = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(threads)


def trained_policy(dist, core, **options):
    """A policy whose parameters, biases too, and observation normalisation are not those of the start."""
    torch.manual_seed(0)
    policy = make_policy(dist, hidden_dim=24, core=core, **options)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1 * torch.randn_like(p))
    policy.normalise(torch.randn(100, policy.state_dim) + 0.3)
    return policy


def differences(policy, trials, rows=slice(None)):
    """Return the names of what a scan of the trials gives in other bits than the rollout gave."""
    trials = trials[rows]
    distribution, values, _ = policy.scan(trials.inputs, None, trials.resets)
    pairs = {"log_probs": (distribution.log_prob(trials.actions), trials.log_probs), "values": (values, trials.values)}
    return [name for name, (a, b) in pairs.items() if not torch.equal(a[trials.mask], b[trials.mask])]


def make_trials(dist, policy, count):
    length = {"episodes": 5} if isinstance(dist, Bandit) else {"steps": 30}
    return rollout(dist, dist.sample(count), policy, 0, **length, keep_state=isinstance(dist, Bandit))


@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize(("core", "feedforward"), [*((core, False) for core in EQUAL_CORES), ("s6", True)])
def test_scan_gives_log_probs_and_values_of_the_rollout(core, feedforward, continuous, set_threads):
    dist = Bandit(continuous=True) if continuous else HIDDEN
    policy = trained_policy(dist, core, continuous=continuous, feedforward=feedforward)
    for count in ENVIRONMENTS:
        for threads in ((1, 2), (2, 1)):
            set_threads(threads[0])
            trials = make_trials(dist, policy, count)
            set_threads(threads[1])
            assert not differences(policy, trials), (count, threads)
            assert not differences(policy, trials, torch.arange(count).flip(0)[: max(1, count // 2)])
            with torch.no_grad():
                assert not differences(policy, trials)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", ENVIRONMENTS)
@pytest.mark.parametrize("core", ["s6", "mamba"])
def test_rl2_first_ratio_is_one(core, count, threads, set_threads, monkeypatch):
    set_threads(threads)
    policy = trained_policy(HIDDEN, core, num_layers=2)
    ratios = []

    def record(log_probs, values, entropy, advantages, targets, old_log_probs, mask, **options):
        ratios.append((log_probs - old_log_probs).exp()[mask].detach())
        return original(log_probs, values, entropy, advantages, targets, old_log_probs, mask, **options)

    original = rl2.ppo_loss
    monkeypatch.setattr(rl2, "ppo_loss", record)
    options = {"num_minibatches": min(2, count), "update_epochs": 2, "tasks_per_update": count}
    RL2(policy, HIDDEN, steps=20, **options).train(1)
    assert (ratios[0] == 1).all()
    assert not (ratios[-1] == 1).all()  # the policy has changed


@pytest.mark.parametrize("core", ["s6", "mamba"])
def test_differences_of_torch_products_are_found(core, monkeypatch):
    policy = trained_policy(HIDDEN, core)
    monkeypatch.setattr(_row_invariant, "_applies", lambda x: False)
    assert any(differences(policy, make_trials(HIDDEN, policy, count)) for count in (1, 2, 3))


def test_differences_of_one_rounding_are_found():
    policy = trained_policy(HIDDEN, "s6")
    trials = make_trials(HIDDEN, policy, 2)
    with torch.no_grad():
        policy.ssm.embed.weight.mul_(1 + torch.finfo(torch.float32).eps)
    assert differences(policy, trials) == ["log_probs", "values"]
