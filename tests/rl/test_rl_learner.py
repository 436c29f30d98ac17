"""RL2 and MAMLRL: units, skipped updates, parameters that change, state to resume from, limits."""

import copy
import warnings

import numpy as np
import pytest
import torch
from bandit import Bandit
from scripted import Script

from eaml_ext import checkpoint
from eaml_ext.rl import MAMLRL, RL2, SSMMetaPolicy, feature_dim, rollout
from eaml_ext.rl import maml_rl as maml_rl_module
from eaml_ext.tasks import CartPoleTasks

CARTPOLE = CartPoleTasks()
LEARNERS = pytest.mark.parametrize("make", [RL2, MAMLRL])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # nothing here is large enough for two


def policy(dist, **options):
    return SSMMetaPolicy(feature_dim(dist), dist.action_dim, 8, state_size=4, **options)


def learner(make, net, dist, **options):
    rows = {"num_minibatches": 2, "update_epochs": 2} if make is RL2 else {"rows": 2}
    return make(net, dist, **{"steps": 12, "tasks_per_update": 4, **rows, **options})


def numbers(net):
    return copy.deepcopy(dict(net.state_dict()))


def same(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------------------ units


@LEARNERS
def test_update_trained_policy_keeps_units_and_behaviour(make, tmp_path):
    dist = CARTPOLE
    net = policy(dist)
    learner(make, net, dist, seed=1).update()
    assert net.has_units
    net.save(tmp_path / "policy")
    loaded = SSMMetaPolicy.load(tmp_path / "policy")
    rate = {"lr": 1e-12} if make is RL2 else {"outer_lr": 1e-12}
    learner(make, loaded, dist, **rate).update()
    assert torch.equal(loaded.mean, net.mean) and torch.equal(loaded.std, net.std)
    tasks = dist.sample(4, "test")
    returns = [rollout(dist, tasks, p, 0, episodes=1, greedy=True).episode_returns(1) for p in (net, loaded)]
    assert torch.equal(*returns)


@LEARNERS
def test_update_new_policy_takes_units_of_its_first_observations(make):
    net = policy(CARTPOLE)
    trainer = learner(make, net, CARTPOLE)
    assert not net.has_units
    trainer.update()
    units = net.mean.clone(), net.std.clone()
    assert net.has_units and 0.75 < units[0][-2] < 1.0  # CartPole pays 1 a step; at a start the last reward is 0
    trainer.update()
    assert torch.equal(net.mean, units[0]) and torch.equal(net.std, units[1])


# ----------------------------------------------------------------------------------------------------------- resume


@LEARNERS
def test_load_state_dict_continues_with_the_bits_of_an_uninterrupted_training(make, tmp_path):
    net = policy(CARTPOLE)
    start = copy.deepcopy(net)
    whole = learner(make, net, CARTPOLE, seed=3)
    values = [whole.update() for _ in range(3)]

    first = learner(make, start, CARTPOLE, seed=3)
    np.testing.assert_array_equal([first.update(), first.update()], values[:2])  # NaN where no episode finished
    state = first.state_dict()
    checkpoint.save_state(tmp_path / "state", state)
    first.update()  # what follows must not reach the state
    torch.manual_seed(99)
    for came in (state, state, checkpoint.load_state(tmp_path / "state")):  # one state serves several learners
        again = learner(make, policy(CARTPOLE), CARTPOLE, seed=3)
        again.load_state_dict(came)
        np.testing.assert_array_equal(again.update(), values[2])
        assert same(numbers(again.policy), numbers(net))
        assert again.updates == 3 and again.state_dict()["optimizer"]["state"][0]["step"] > 0
    if make is RL2:
        assert again.steps == whole.steps == 3 * 4 * 12


@LEARNERS
def test_load_state_dict_in_inference_mode_is_as_outside(make):
    first = learner(make, policy(CARTPOLE), CARTPOLE)
    first.update()
    again = learner(make, policy(CARTPOLE), CARTPOLE)
    with torch.inference_mode():
        again.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(again.update(), first.update())
    assert same(numbers(again.policy), numbers(first.policy))


def test_train_total_in_two_calls_equals_one_call():
    net = policy(CARTPOLE)
    twin = copy.deepcopy(net)
    returns = learner(RL2, net, CARTPOLE).train(4)
    first = learner(RL2, twin, CARTPOLE)
    parts = first.train(1, total=np.int64(4))
    again = learner(RL2, policy(CARTPOLE), CARTPOLE)
    again.load_state_dict(first.state_dict())
    parts += again.train(3, total=4)
    np.testing.assert_array_equal(parts, returns)
    assert same(numbers(again.policy), numbers(net))
    with pytest.raises(ValueError, match=r"^RL2.train: total must be >= 5, got 4$"):
        again.train(1, total=4)


def _without(part):
    return lambda state: state.pop(part)


def _wrong_shape(state):
    state["policy"]["mean"] = torch.zeros(3)


def _wrong_moment(state):
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)


def _wrong_group(state):
    state["optimizer"]["param_groups"][0]["params"].pop()


@LEARNERS
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (_without("updates"), "state must be a dict with the entries policy, optimizer, updates, skipped_updates.*"),
        (_wrong_shape, r"policy has mean of shape \(3,\), wanted \(8,\)"),
        (_wrong_moment, r"optimizer has exp_avg of shape \(3,\), wanted \(.*\)"),
        (_wrong_group, r"optimizer has parameter groups of \[\d+\], wanted \[\d+\]"),
        (lambda state: state.update(updates=-1), "updates must be >= 0, got -1"),
        (lambda state: state["policy"]["mean"].fill_(torch.nan), "policy must be finite, got nan in mean"),
        (lambda state: state["policy"]["std"].zero_(), r"policy must have std > 0, got 0\.0"),
        (lambda state: state["optimizer"].update(param_groups=3), "optimizer must have .*, got dict and int"),
        (lambda state: state["optimizer"].update(param_groups=[{}]), r"optimizer has parameter groups of \[0\], .*"),
        (lambda state: state["optimizer"]["param_groups"][0].pop("lr"), "optimizer has a parameter group without lr"),
        (
            lambda state: state["optimizer"]["state"][0].pop("exp_avg"),
            r"optimizer has exp_avg of shape NoneType, wanted \(.*\)",
        ),
        (
            lambda state: state["optimizer"]["state"][0]["exp_avg"].fill_(torch.inf),
            "optimizer must be finite, got exp_avg of parameter 0 that is not",
        ),
        (lambda state: state.update(policy=3), "policy must be a dict of tensors, got int"),
        (lambda state: state["policy"].update(mean=3), r"policy has mean of shape int, wanted \(8,\)"),
        (lambda state: state.update(optimizer={}), "optimizer must be the state_dict of an optimizer, got dict"),
    ],
)
def test_load_state_dict_of_another_learner_is_refused_and_changes_nothing(make, spoil, text):
    trainer = learner(make, policy(CARTPOLE), CARTPOLE)
    trainer.update()
    other = learner(make, policy(CARTPOLE), CARTPOLE, seed=1)
    other.update()
    state = other.state_dict()
    spoil(state)
    before = trainer.state_dict()
    with pytest.raises((TypeError, ValueError), match=f"^{make.__name__}.load_state_dict: {text}$"):
        trainer.load_state_dict(state)
    after = trainer.state_dict()
    assert same(before["policy"], after["policy"]) and before["updates"] == after["updates"]
    moments = (s["optimizer"]["state"][0]["exp_avg"] for s in (before, after))
    assert torch.equal(*moments)


# ------------------------------------------------------------------------------------------------------- not finite


@LEARNERS
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("kind", ["reward", "observation"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_train_one_non_finite_number_skips_the_update_and_warns(make, continuous, kind, value):
    clean = Script((1.0, 2.0), length=3, continuous=continuous)
    net = policy(clean, continuous=continuous)
    trainer = learner(make, net, clean)
    trainer.train(1)
    before, moments = numbers(net), trainer.state_dict()["optimizer"]
    trainer.dist = Script((1.0, 2.0), length=3, continuous=continuous, fault=(kind, 1, 5, value))
    text = (
        f"^{make.__name__}.train: 2 of 2 updates were not finite and skipped, the last for: rollout: {kind} must be "
        f"finite, got {value} at step 5 of tasks\\[1\\] of script-v1, script/train/0/2/[01]$"
    )
    with pytest.warns(RuntimeWarning, match=text):
        returns = trainer.train(2)
    assert np.isnan(returns).all() and trainer.skipped_updates == 2 and trainer.updates == 3
    assert same(numbers(net), before)
    after = trainer.state_dict()["optimizer"]
    assert all(torch.equal(m["exp_avg"], after["state"][i]["exp_avg"]) for i, m in moments["state"].items())
    trainer.dist = clean
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(1)
    assert trainer.skipped_updates == 2 and not same(numbers(net), before)


@LEARNERS
def test_update_non_finite_number_in_the_first_update_leaves_units_to_the_next(make):
    net = policy(CARTPOLE)
    trainer = learner(make, policy(Script(length=3)), Script(length=3, fault=("observation", 0, 1, np.nan)))
    net, before = trainer.policy, numbers(trainer.policy)
    trainer.update()
    assert same(numbers(net), before) and not net.has_units
    trainer.dist = Script(length=3)
    trainer.update()
    assert net.has_units and trainer.skipped_updates == 1


@pytest.mark.parametrize("loss", ["ppo", "a2c"])
def test_learn_loss_beyond_float32_leaves_policy_finite_and_is_counted(loss):
    dist = Script((3e38,), length=2, continuous=True)
    net = policy(dist, continuous=True)
    net.normalise(torch.randn(20, net.state_dim))
    trainer = learner(RL2, net, dist, loss=loss, reward_scale=1.0, tasks_per_update=2, num_minibatches=2)
    trials = rollout(dist, dist.sample(2), net, 0, steps=1)  # finite: the reward comes with the second step
    trials.rewards[0, 0] = 3e38
    before = numbers(net)
    trainer.learn(trials)
    assert trainer.skipped_updates == 1 and all(p.isfinite().all() for p in net.state_dict().values())
    assert same(numbers(net), before) == (loss == "a2c")  # PPO's other minibatch is learned from


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_learn_without_gradient_mode_is_as_with_it(mode):
    found = []
    for context in (torch.enable_grad, mode):
        torch.manual_seed(0)
        net = policy(CARTPOLE)
        trainer = learner(RL2, net, CARTPOLE)
        with context():
            trials = rollout(CARTPOLE, CARTPOLE.sample(4), net, 0, steps=12)
            trainer.learn(trials)
        found.append(numbers(net))
        trainer.learn(trials)  # trials of the mode outside it
    assert same(*found) and trainer.skipped_updates == 0


def test_learn_non_finite_trials_change_nothing():
    net = policy(CARTPOLE)
    trainer = learner(RL2, net, CARTPOLE)
    trials = rollout(CARTPOLE, CARTPOLE.sample(4), net, 0, steps=12)
    trials.rewards[2, 3] = torch.nan
    before = numbers(net)
    trainer.learn(trials)
    assert trainer.skipped_updates == 1 and same(numbers(net), before)


@LEARNERS
def test_update_policy_that_is_not_finite_is_named(make):
    net = policy(CARTPOLE)
    trainer = learner(make, net, CARTPOLE)
    with torch.no_grad():
        net.critic.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"^{make.__name__}.update: policy must be finite, got nan in critic.bias$"):
        trainer.update()
    assert trainer.updates == trainer.skipped_updates == 0


# ------------------------------------------------------------------------------------- parameters frozen or replaced


def moved(make, change, *, before=False):
    """The learner and the names of the parameters that an update moves, where ``change`` is applied to its policy."""
    net = policy(CARTPOLE)
    if before:
        change(net)
    trainer = learner(make, net, CARTPOLE)
    trainer.update()
    if not before:
        change(net)
    start = numbers(net)
    trainer.update()
    return trainer, {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}


@LEARNERS
@pytest.mark.parametrize("before", [False, True])
def test_update_frozen_parameters_stay_and_others_are_learned(make, before):
    trainer, names = moved(make, lambda net: net.ssm.embed.requires_grad_(False), before=before)
    every = {name for name, _ in trainer.policy.named_parameters()}
    assert names == every - {"ssm.embed.weight", "ssm.embed.bias"}
    if make is MAMLRL:
        adapted = trainer.adapt(CARTPOLE.sample(1)[0])
        assert torch.equal(adapted.ssm.embed.weight, trainer.policy.ssm.embed.weight)
        assert not torch.equal(adapted.actor.weight, trainer.policy.actor.weight)
        assert trainer.evaluate(CARTPOLE.sample(2, "test")).isfinite().all()


@LEARNERS
def test_update_parameters_unfrozen_later_are_learned(make):
    net = policy(CARTPOLE)
    net.actor.requires_grad_(False)
    trainer = learner(make, net, CARTPOLE)
    trainer.update()
    net.actor.requires_grad_(True)
    start = numbers(net)
    trainer.update()
    assert all(not torch.equal(p, start[name]) for name, p in net.named_parameters())


@LEARNERS
def test_update_replaced_parameters_are_refused(make):
    net = policy(CARTPOLE)
    trainer = learner(make, net, CARTPOLE)
    trainer.update()
    net.actor = torch.nn.Linear(8, 2)
    before, name = numbers(net), make.__name__
    text = f"^{name}.update: actor.weight was .*replaced after this {name} was made.* make a new {name}$"
    with pytest.raises(ValueError, match=text):
        trainer.update()
    assert same(numbers(net), before) and trainer.updates == 1


@LEARNERS
def test_init_policy_without_parameters_that_require_grad_is_refused(make):
    net = policy(CARTPOLE).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"^{make.__name__}: policy has no parameters that require grad$"):
        learner(make, net, CARTPOLE)


@LEARNERS
def test_update_layer_registered_under_two_names_is_as_under_one(make):
    net = policy(CARTPOLE)
    twin = copy.deepcopy(net)
    twin.again = twin.ssm.embed
    tasks, found = CARTPOLE.sample(2, "test"), []
    for p in (net, twin):
        trainer = learner(make, p, CARTPOLE)
        trainer.update()
        found.append(trainer.evaluate(tasks, 2) if make is RL2 else trainer.evaluate(tasks))
        assert all(type(value) is torch.nn.Parameter for value in p.ssm.embed._parameters.values())
    assert torch.equal(*found) and all(torch.equal(p, twin.state_dict()[n]) for n, p in net.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@LEARNERS
def test_update_and_evaluate_without_gradient_mode_are_as_with_it(make, mode):
    net = policy(CARTPOLE)
    twin = copy.deepcopy(net)
    tasks, found = CARTPOLE.sample(2, "test"), []
    for p, context in ((net, torch.enable_grad), (twin, mode)):
        trainer = learner(make, p, CARTPOLE)
        with context():
            trainer.update()
            found.append(trainer.evaluate(tasks, 2) if make is RL2 else trainer.evaluate(tasks))
    assert same(numbers(net), numbers(twin)) and torch.equal(*found)


# ------------------------------------------------------------------------------------------------- seeds and limits


def test_maml_rl_evaluation_shares_no_seed_with_adaptation_or_training(monkeypatch):
    seen = {}

    def record(dist, tasks, policy, seed, **options):
        seen.setdefault(seed, set()).add((use, options.get("episodes"), number if use == "train" else None))
        return rollout(dist, tasks, policy, seed, **options)

    monkeypatch.setattr(maml_rl_module, "rollout", record)
    dist = Bandit(arms=3)
    net = policy(dist)
    net.normalise(torch.randn(20, net.state_dim))
    for inner_steps in (1, 2, 3):
        for number in (0, 1, 2):
            trainer = learner(MAMLRL, net, dist, inner_steps=inner_steps, rows=1, steps=1, seed=number)
            use = "train"
            trainer._update(dist.sample(1))
            use = "test"
            trainer.evaluate(dist.sample(1, "test"), seed=number)
    assert all(len(uses) == 1 for uses in seen.values()), seen
    assert len(seen) == 3 * (4 + 3 + 1)  # seeds times (training steps and query, adaptation steps, evaluation)


def test_maml_rl_updates_play_with_seeds_of_their_own(monkeypatch):
    seeds = []

    def record(dist, tasks, policy, seed, **options):
        seeds.append(seed)
        return rollout(dist, tasks, policy, seed, **options)

    monkeypatch.setattr(maml_rl_module, "rollout", record)
    net = policy(CARTPOLE)
    net.normalise(torch.randn(20, net.state_dim))
    learner(MAMLRL, net, CARTPOLE, inner_steps=2, steps=4).train(3)
    assert len(seeds) == len(set(seeds)) == 3 * (2 + 1)


@pytest.mark.parametrize(("inner_steps", "seed"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_maml_rl_evaluate_starts_are_not_those_of_adaptation(inner_steps, seed, monkeypatch):
    trainer, starts = learner(MAMLRL, policy(CARTPOLE), CARTPOLE, inner_steps=inner_steps), []

    def record(*args, **options):
        trials = rollout(*args, **options)
        starts.append((options.get("episodes"), trials.inputs[:, 0, :4]))
        return trials

    monkeypatch.setattr(maml_rl_module, "rollout", record)
    trainer.evaluate(CARTPOLE.sample(1, "test"), seed=seed)
    judged = [start for episodes, start in starts if episodes]
    adapted = [start for episodes, start in starts if not episodes]
    assert len(judged) == inner_steps + 1 and len(adapted) == inner_steps
    assert all(torch.equal(start, judged[0]) for start in judged)
    assert not any((start == judged[0]).any() for start in adapted)


def test_rl2_updates_and_evaluation_draw_other_actions(monkeypatch):
    seeds = []
    monkeypatch.setattr(
        "eaml_ext.rl.rl2.rollout", lambda *args, **options: seeds.append(args[3]) or rollout(*args, **options)
    )
    for seed in (0, 1, 2):
        trainer = learner(RL2, policy(CARTPOLE), CARTPOLE, seed=seed)
        trainer.train(3)
        trainer.evaluate(CARTPOLE.sample(1), 1, seed=seed)
    assert len(set(seeds)) == len(seeds) == 3 * (1 + 3 + 1)


@LEARNERS
def test_evaluate_environment_without_a_time_limit_ends_with_a_sentence(make):
    dist = Script(length=np.inf)
    trainer = learner(make, policy(dist), dist)
    text = (
        r"^rollout: episodes must end within max_episode_steps, got 20 steps without an end in tasks\[0\] "
        "of script-v1, script/test/0/0/0$"
    )
    options = {"episodes": 1} if make is RL2 else {}
    with pytest.raises(ValueError, match=text):
        trainer.evaluate(dist.sample(2, "test"), **options, max_episode_steps=20)


def test_rl2_training_trials_of_episodes_have_the_step_limit():
    dist = Script(length=np.inf)
    trainer = learner(RL2, policy(dist), dist, steps=None, episodes=1, max_episode_steps=15)
    with pytest.raises(ValueError, match=r"^rollout: episodes must end within max_episode_steps, got 15 steps"):
        trainer.update()
    with pytest.raises(ValueError, match=r"^RL2: max_episode_steps must be > 0, got 0$"):
        learner(RL2, policy(dist), dist, max_episode_steps=0)


# ---------------------------------------------------------------------------------------------------- numpy scalars


@LEARNERS
def test_numpy_scalars_are_taken_and_do_not_reach_the_state(make, tmp_path):
    dist = Script(length=3)
    net = SSMMetaPolicy(np.int64(feature_dim(dist)), dist.action_space.n, np.int32(8), state_size=np.int16(4))
    assert all(type(value) in (int, bool, str, float) for value in net.options.values())
    net.save(tmp_path / "policy")
    rates = ("lr", "clip_coef") if make is RL2 else ("inner_lr", "outer_lr")
    trainer = learner(
        make,
        net,
        dist,
        steps=np.int64(4),
        tasks_per_update=np.int32(4),
        seed=np.uint8(3),
        **dict.fromkeys((*rates, "gamma", "gae_lambda", "vf_coef", "ent_coef"), np.float32(0.5)),
        **dict.fromkeys(("reward_scale", "max_grad_norm"), np.float64(0.5)),
    )
    assert len(trainer.train(np.int64(2))) == 2
    tasks = dist.sample(2, "test")
    if make is RL2:
        found = trainer.evaluate(tasks, np.int64(2), np.int64(1), max_episode_steps=np.int64(5))
    else:
        found = trainer.evaluate(tasks, np.int64(1), max_episode_steps=np.int64(5))
        trainer.adapt(tasks[0], np.int64(1))
    assert found.isfinite().all()
    checkpoint.save_state(tmp_path / "state", trainer.state_dict())
    values = [v for v in vars(trainer).values() if not isinstance(v, (torch.nn.Module, torch.optim.Optimizer))]
    values += [x for v in values if isinstance(v, dict) for x in v.values()]
    assert not any(isinstance(value, np.generic) for value in values)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda t, task: t.adapt([task]), TypeError, "MAMLRL.adapt: task must be a Task, got list"),
        (lambda t, task: t.adapt(task, -1), ValueError, r"MAMLRL.adapt: seed must be in \[0, 2\*\*32\), got -1"),
        (lambda t, task: t.evaluate([]), ValueError, "MAMLRL.evaluate: tasks must hold at least one Task, got none"),
        (lambda t, task: t.evaluate([task], 0.5), TypeError, "MAMLRL.evaluate: seed must be an integer, got 0.5"),
    ],
)
def test_maml_rl_bad_argument_is_named(call, error, text):
    with pytest.raises(error, match=f"^{text}$"):
        call(learner(MAMLRL, policy(CARTPOLE), CARTPOLE), CARTPOLE.sample(1)[0])


def test_rl2_evaluate_bad_seed_is_named():
    with pytest.raises(ValueError, match=r"^RL2.evaluate: seed must be in \[0, 2\*\*32\), got -1$"):
        learner(RL2, policy(CARTPOLE), CARTPOLE).evaluate(CARTPOLE.sample(1), 1, -1)
