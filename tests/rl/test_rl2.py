import copy

import numpy as np
import pytest
import torch
from bandit import Bandit
from learners import CARTPOLE, HIDDEN, copied_state, equal_states, make_learner, make_policy
from scripted import Script

from eaml_ext.rl import RL2, Trials, rollout
from eaml_ext.tasks import CartPoleTasks


@pytest.mark.parametrize(("loss", "updates", "lr"), [("ppo", 25, 1e-2), ("a2c", 120, 1e-2)])
def test_rl2_train_bandit_finds_the_rewarded_arm_within_a_trial(loss, updates, lr):
    dist = Bandit(arms=3)
    trainer = RL2(make_policy(dist), dist, episodes=6, loss=loss, lr=lr, gamma=1.0, gae_lambda=0.9, episodic=False)
    trainer.train(updates)
    returns = trainer.evaluate(dist.sample(200, "test"), episodes=6).mean(0)
    # Trying three arms in turn pays 1/3, 2/3 and then 1; without memory the mean of every episode is at most 1/3.
    assert returns[0] < 0.45 and returns[3:].min() > 0.9, returns


def test_rl2_train_continuous_bandit_raises_the_return():
    dist = Bandit(continuous=True)
    trainer = RL2(make_policy(dist, continuous=True), dist, episodes=4, lr=1e-2)
    before = trainer.evaluate(dist.sample(100, "test"), 4).mean()
    returns = trainer.train(30)
    assert len(returns) == 30
    after = trainer.evaluate(dist.sample(100, "test"), 4).mean(0)
    # Always acting 0 pays 1 - 1/3; the reward is a function of the distance from the arm.
    assert after[-1] > 0.75 and after.mean() > before + 0.02, (before, after)


def test_learn_gradient_equals_that_of_the_stepwise_loss():
    net = make_policy(HIDDEN)
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


def test_rl2_train_same_seed_gives_same_parameters():
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        net = make_policy(HIDDEN)
        trainer = RL2(net, HIDDEN, steps=20, tasks_per_update=4, seed=seed)
        trainer.train(2)
        nets.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
        assert trainer.updates == 2 and trainer.steps == 160
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


def test_learn_padding_changes_nothing():
    net = make_policy(HIDDEN)
    trials = rollout(HIDDEN, HIDDEN.sample(4), net, 0, episodes=2)
    wide = Trials(
        **{
            name: torch.cat([value, torch.full_like(value[:, :3], name == "episode_ends" or 0)], dim=1)
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
        ({"episodic": "no"}, TypeError, "episodic must be True or False, got str"),
        ({"clip_coef": 0}, ValueError, "clip_coef must be > 0, got 0"),
        ({"vf_coef": -1.0}, ValueError, "vf_coef must be >= 0, got -1.0"),
        ({"ent_coef": None}, TypeError, "ent_coef must be a number, got None"),
        ({"reward_scale": 0.0}, ValueError, "reward_scale must be > 0, got 0.0"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be > 0, got 0.0"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*32\), got -1"),
    ],
)
def test_rl2_bad_argument_raises(kwargs, error, text):
    with pytest.raises(error, match=f"^RL2: {text}$"):
        RL2(**{"policy": make_policy(HIDDEN), "dist": HIDDEN, "steps": 10, **kwargs})


def test_rl2_train_bad_argument_raises():
    with pytest.raises(ValueError, match=r"^RL2.train: updates must be > 0, got 0$"):
        RL2(make_policy(HIDDEN), HIDDEN, steps=10).train(0)


def test_rl2_train_total_in_two_calls_equals_one_call():
    net = make_policy(CARTPOLE)
    twin = copy.deepcopy(net)
    returns = make_learner(RL2, net, CARTPOLE).train(4)
    first = make_learner(RL2, twin, CARTPOLE)
    parts = first.train(1, total=np.int64(4))
    again = make_learner(RL2, make_policy(CARTPOLE), CARTPOLE)
    again.load_state_dict(first.state_dict())
    parts += again.train(3, total=4)
    np.testing.assert_array_equal(parts, returns)
    assert equal_states(copied_state(again.policy), copied_state(net))
    with pytest.raises(ValueError, match=r"^RL2.train: total must be >= 5, got 4$"):
        again.train(1, total=4)


@pytest.mark.parametrize("loss", ["ppo", "a2c"])
def test_learn_loss_beyond_float32_leaves_policy_finite_and_is_counted(loss):
    dist = Script((3e38,), length=2, continuous=True)
    net = make_policy(dist, continuous=True)
    net.normalise(torch.randn(20, net.state_dim))
    trainer = make_learner(RL2, net, dist, loss=loss, reward_scale=1.0, tasks_per_update=2, num_minibatches=2)
    trials = rollout(dist, dist.sample(2), net, 0, steps=1)  # finite, because only the second step has a reward
    trials.rewards[0, 0] = 3e38
    before = copied_state(net)
    trainer.learn(trials)
    assert trainer.skipped_updates == 1 and all(p.isfinite().all() for p in net.state_dict().values())
    assert equal_states(copied_state(net), before) == (loss == "a2c")  # PPO's other minibatch is finite


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learn_without_gradient_mode_equals_learn_with_it(mode):
    found = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(0)
        net = make_policy(CARTPOLE)
        trainer = make_learner(RL2, net, CARTPOLE)
        with context():
            trials = rollout(CARTPOLE, CARTPOLE.sample(4), net, 0, steps=12)
            trainer.learn(trials)
        found.append(copied_state(net))
        trainer.learn(trials)  # made in that mode, used outside it
    assert equal_states(*found) and trainer.skipped_updates == 0


def test_learn_non_finite_trials_change_nothing():
    net = make_policy(CARTPOLE)
    trainer = make_learner(RL2, net, CARTPOLE)
    trials = rollout(CARTPOLE, CARTPOLE.sample(4), net, 0, steps=12)
    trials.rewards[2, 3] = torch.nan
    before = copied_state(net)
    trainer.learn(trials)
    assert trainer.skipped_updates == 1 and equal_states(copied_state(net), before)


def test_rl2_updates_and_evaluation_have_seeds_of_their_own(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "eaml_ext.rl.rl2.rollout", lambda *args, **options: seeds.append(args[3]) or rollout(*args, **options)
    )
    for seed in (0, 1, 2):
        trainer = make_learner(RL2, make_policy(CARTPOLE), CARTPOLE, seed=seed)
        trainer.train(3)
        trainer.evaluate(CARTPOLE.sample(1), 1, seed=seed)
    assert len(set(seeds)) == len(seeds) == 3 * (1 + 3 + 1)


def test_rl2_update_episode_without_an_end_raises_at_the_limit():
    dist = Script(length=np.inf)
    trainer = make_learner(RL2, make_policy(dist), dist, steps=None, episodes=1, max_episode_steps=15)
    with pytest.raises(ValueError, match=r"^rollout: episodes must end within max_episode_steps, got 15 steps"):
        trainer.update()
    with pytest.raises(ValueError, match=r"^RL2: max_episode_steps must be > 0, got 0$"):
        make_learner(RL2, make_policy(dist), dist, max_episode_steps=0)


def test_rl2_evaluate_bad_seed_raises():
    with pytest.raises(ValueError, match=r"^RL2.evaluate: seed must be in \[0, 2\*\*32\), got -1$"):
        make_learner(RL2, make_policy(CARTPOLE), CARTPOLE).evaluate(CARTPOLE.sample(1), 1, -1)


def test_rl2_evaluate_without_state_repeats_the_first_episode():
    dist = Bandit(arms=3)
    trainer = RL2(make_policy(dist), dist, episodes=4, lr=1e-2)
    trainer.update()
    tasks = dist.sample(20, "test")
    kept, zeroed = trainer.evaluate(tasks, 4), trainer.evaluate(tasks, 4, keep_state=False)
    assert torch.equal(zeroed, kept[:, :1].expand(-1, 4))  # starts are equal and the actions greedy
