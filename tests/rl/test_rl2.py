import copy

import pytest
import torch
from bandit import Bandit

from eaml_ext.rl import RL2, SSMMetaPolicy, Trials, feature_dim, rollout
from eaml_ext.tasks import CartPoleTasks

HIDDEN = CartPoleTasks(hide_velocity=True)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # nothing here is large enough for two


def policy(dist, **options):
    return SSMMetaPolicy(feature_dim(dist), dist.action_dim, 16, state_size=4, **options)


@pytest.mark.parametrize(("loss", "updates", "lr"), [("ppo", 25, 1e-2), ("a2c", 120, 1e-2)])
def test_it_learns_to_find_the_arm_that_pays_and_to_stay_with_it(loss, updates, lr):
    dist = Bandit(arms=3)
    trainer = RL2(policy(dist), dist, episodes=6, loss=loss, lr=lr, gamma=1.0, gae_lambda=0.9, across_episodes=True)
    trainer.train(updates)
    returns = trainer.evaluate(dist.sample(200, "test"), episodes=6).mean(0)
    # Three arms tried in turn pay 1/3, 2/3 and then 1; without memory no episode pays more than 1/3 on average.
    assert returns[0] < 0.45 and returns[3:].min() > 0.9, returns


def test_it_learns_with_continuous_actions():
    dist = Bandit(continuous=True)
    trainer = RL2(policy(dist, continuous=True), dist, episodes=4, lr=1e-2)
    before = trainer.evaluate(dist.sample(100, "test"), 4).mean()
    returns = trainer.train(30)
    assert len(returns) == 30
    after = trainer.evaluate(dist.sample(100, "test"), 4).mean(0)
    # Always 0 pays 1 - 1/3; the payoff tells the distance from the arm.
    assert after[-1] > 0.75 and after.mean() > before + 0.02, (before, after)


def test_an_update_is_the_gradient_step_of_the_loss_over_the_whole_trial():
    net = policy(HIDDEN)
    trainer = RL2(
        net, HIDDEN, steps=30, tasks_per_update=4, loss="a2c", ent_coef=0.0, max_grad_norm=1e9, reward_scale=1.0
    )
    trials = rollout(HIDDEN, HIDDEN.sample(4), net, 0, steps=30)
    twin = copy.deepcopy(net)
    adv = trials.advantages(0.99, 0.95)
    state, total = twin.init_hidden(4), torch.zeros(())
    scaled = (adv - adv.mean()) / (adv.std(correction=0) + 1e-8)
    for t in range(30):
        distribution, value, state = twin.step(trials.inputs[:, t], state)
        error = (value - (adv + trials.values)[:, t]).square()
        total = total + (-distribution.log_prob(trials.actions[:, t]) * scaled[:, t] + 0.5 * error).sum() / 120
    total.backward()
    taken = {}
    trainer.optimizer.step = lambda: taken.update({n: p.grad.clone() for n, p in net.named_parameters()})
    trainer.learn(trials)
    for name, p in twin.named_parameters():
        assert torch.allclose(taken[name], p.grad, atol=1e-5, rtol=1e-3), name


def test_training_is_reproducible_and_draws_new_tasks_at_every_update():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        net = policy(HIDDEN)
        trainer = RL2(net, HIDDEN, steps=20, tasks_per_update=4, seed=seed)
        trainer.train(2)
        nets.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert trainer.updates == 2 and trainer.steps == 160
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


def test_padding_changes_nothing():
    net = policy(HIDDEN)
    trials = rollout(HIDDEN, HIDDEN.sample(4), net, 0, episodes=2)
    wide = Trials(
        **{
            name: torch.cat([value, torch.full_like(value[:, :3], name == "ends" or 0)], dim=1)
            for name, value in vars(trials).items()
        }
    )
    weights = []
    for data in (trials, wide):
        twin = copy.deepcopy(net)
        RL2(twin, HIDDEN, episodes=2, tasks_per_update=4).learn(data)
        weights.append(torch.cat([p.detach().flatten() for p in twin.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"policy": torch.nn.Linear(1, 1)}, TypeError, "policy must be an SSMMetaPolicy, got Linear"),
        ({"dist": CartPoleTasks}, TypeError, "dist must be a task distribution as of make_tasks, got type"),
        ({"dist": CartPoleTasks()}, ValueError, "policy must have state_dim 8 and action_dim 2, got 6 and 2"),
        ({"steps": None}, ValueError, "one of episodes and steps must be given, got None and None"),
        ({"episodes": 2}, ValueError, "one of episodes and steps must be given, got 2 and 10"),
        ({"steps": 0}, ValueError, "steps must be > 0, got 0"),
        ({"loss": "trpo"}, ValueError, "loss must be 'ppo' or 'a2c', got 'trpo'"),
        ({"tasks_per_update": 2.0}, TypeError, "tasks_per_update must be an integer, got 2.0"),
        ({"tasks_per_update": 3}, ValueError, "num_minibatches must be <= tasks_per_update 3, got 4"),
        ({"lr": 0.0}, ValueError, "lr must be > 0, got 0.0"),
        ({"anneal_lr": 1}, TypeError, "anneal_lr must be True or False, got int"),
        ({"update_epochs": 0}, ValueError, "update_epochs must be > 0, got 0"),
        ({"num_minibatches": "4"}, TypeError, "num_minibatches must be an integer, got '4'"),
        ({"gamma": 1.01}, ValueError, "gamma must be <= 1, got 1.01"),
        ({"gae_lambda": -0.1}, ValueError, "gae_lambda must be >= 0, got -0.1"),
        ({"across_episodes": "no"}, TypeError, "across_episodes must be True or False, got str"),
        ({"clip_coef": 0}, ValueError, "clip_coef must be > 0, got 0"),
        ({"vf_coef": -1.0}, ValueError, "vf_coef must be >= 0, got -1.0"),
        ({"ent_coef": None}, TypeError, "ent_coef must be a number, got None"),
        ({"reward_scale": 0.0}, ValueError, "reward_scale must be > 0, got 0.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0, got 0.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*32\), got -1"),
    ],
)
def test_refuses(kwargs, error, text):
    with pytest.raises(error, match=f"^RL2: {text}$"):
        RL2(**{"policy": policy(HIDDEN), "dist": HIDDEN, "steps": 10, **kwargs})


def test_train_refuses():
    with pytest.raises(ValueError, match=r"^RL2.train: updates must be > 0, got 0$"):
        RL2(policy(HIDDEN), HIDDEN, steps=10).train(0)
