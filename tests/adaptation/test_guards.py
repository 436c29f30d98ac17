"""The loss statistics of users and the spike rule."""

import pytest
import torch

from eaml_ext.adaptation.guards import UserHistory


def test_user_history_losses_give_weighted_mean_and_variance():
    history, decay, values = UserHistory(2, 0.9), 0.9, torch.randn(25, dtype=torch.float64) - 3
    for value in values.tolist():
        history.add_loss(1, value)
    weights = decay ** torch.arange(24, -1, -1, dtype=torch.float64)
    weights /= weights.sum()
    mean = (weights * values).sum()
    variance = (weights * (values - mean) ** 2).sum()
    assert history.mean == [0.0, pytest.approx(float(mean))]
    threshold = float(mean + max(6 * variance.sqrt(), abs(mean)))
    assert not history.is_spike(1, threshold - 1e-6)
    assert history.is_spike(1, threshold + 1e-6)


def test_user_history_outlier_in_the_warm_up_is_removed():
    history = UserHistory(1, 0.9)
    losses = [1.0, 1.2, 0.9, 1e6, 1.1, 1.0, 0.8, 1.3, 1.0]
    for loss in losses:
        history.add_loss(0, loss)
    assert history.mean[0] > 1e4
    history.add_loss(0, 1.0)
    assert history.count == [9] and history.mean[0] < 1.2 and 1e6 not in history.warmup_losses[0]
    assert not history.is_spike(0, 1e6), "the warm-up continues until ten losses remain"
    history.add_loss(0, 1.0)
    assert history.count == [10] and history.is_spike(0, 1e6)


def test_accept_third_consecutive_spike_of_one_user_restarts_its_statistics_alone():
    history, theta = UserHistory(3, 0.9), torch.zeros(3, 2)
    for _ in range(12):
        values = 1 + 0.1 * torch.rand(3)
        assert history.accept(theta, values, [True] * 3, first=True) == [True] * 3
        history.add(theta, values, [True] * 3, first=True)
    before = history.state_of(0)
    values = torch.tensor([1.0, 50.0, torch.nan])
    assert history.accept(theta, values, [True] * 3, first=False) == [True, False, False]
    assert history.consecutive_spikes == [0, 0, 0], "only the first loss of a call counts"
    for accepted in (False, False, True):
        assert history.accept(theta, values, [True, True, False], first=True) == [True, accepted, False]
    assert history.count == [12, 0, 12] and history.state_of(0) == before


def test_add_rejected_users_keep_average_and_statistics():
    history, theta = UserHistory(2, 0.5), torch.zeros(2, 3)
    history.accept(theta, torch.ones(2), [True, True], first=True)
    history.add(theta + 1, torch.ones(2), [True, False], first=True)
    assert torch.equal(history.average, torch.tensor([[0.5] * 3, [0.0] * 3])) and history.count == [1, 0]


def test_count_step_counts_steps_of_one_call_and_all_rollbacks():
    history = UserHistory(2, 0.5)
    for first in (True, False, True):
        history.count_step([True, first], [True, False], first=first)
    history.count_step([True, False], [True, False], first=False)
    assert (history.last_steps, history.rollbacks) == ([2, 0], [0, 2])
