"""The base class of RL2 and MAMLRL: normalisation, saved state, skipped updates, frozen parameters, limits."""

import copy
import warnings

import numpy as np
import pytest
import torch
from learners import CARTPOLE, copied_state, equal_states, make_learner, make_policy
from scripted import Script

from eaml_ext import checkpoint
from eaml_ext.rl import MAMLRL, RL2, SSMMetaPolicy, feature_dim, rollout

LEARNERS = pytest.mark.parametrize("make", [RL2, MAMLRL])


@LEARNERS
def test_update_trained_policy_keeps_normalisation_and_behaviour(make, tmp_path):
    dist = CARTPOLE
    net = make_policy(dist)
    make_learner(make, net, dist, seed=1).update()
    assert net.has_normalisation
    net.save(tmp_path / "policy")
    loaded = SSMMetaPolicy.load(tmp_path / "policy")
    rate = {"lr": 1e-12} if make is RL2 else {"outer_lr": 1e-12}
    make_learner(make, loaded, dist, **rate).update()
    assert torch.equal(loaded.mean, net.mean) and torch.equal(loaded.std, net.std)
    tasks = dist.sample(4, "test")
    returns = [rollout(dist, tasks, p, 0, episodes=1, greedy=True).episode_returns(1) for p in (net, loaded)]
    assert torch.equal(*returns)


@LEARNERS
def test_update_new_policy_is_normalised_by_its_first_observations(make):
    net = make_policy(CARTPOLE)
    trainer = make_learner(make, net, CARTPOLE)
    assert not net.has_normalisation
    trainer.update()
    mean, std = net.mean.clone(), net.std.clone()
    assert net.has_normalisation and 0.75 < mean[-2] < 1.0  # the last reward, which is 1, and 0 at a start
    trainer.update()
    assert torch.equal(net.mean, mean) and torch.equal(net.std, std)


@LEARNERS
def test_load_state_dict_continues_with_the_bits_of_uninterrupted_training(make, tmp_path):
    net = make_policy(CARTPOLE)
    start = copy.deepcopy(net)
    whole = make_learner(make, net, CARTPOLE, seed=3)
    values = [whole.update() for _ in range(3)]

    first = make_learner(make, start, CARTPOLE, seed=3)
    np.testing.assert_array_equal([first.update(), first.update()], values[:2])  # NaN where no episode finished
    state = first.state_dict()
    checkpoint.save_state(tmp_path / "state", state)
    first.update()  # a later update must not change the state
    torch.manual_seed(99)
    for loaded in (state, state, checkpoint.load_state(tmp_path / "state")):  # one state serves several learners
        again = make_learner(make, make_policy(CARTPOLE), CARTPOLE, seed=3)
        again.load_state_dict(loaded)
        np.testing.assert_array_equal(again.update(), values[2])
        assert equal_states(copied_state(again.policy), copied_state(net))
        assert again.updates == 3 and again.state_dict()["optimizer"]["state"][0]["step"] > 0
    if make is RL2:
        assert again.steps == whole.steps == 3 * 4 * 12


@LEARNERS
def test_load_state_dict_in_inference_mode_equals_outside(make):
    first = make_learner(make, make_policy(CARTPOLE), CARTPOLE)
    first.update()
    again = make_learner(make, make_policy(CARTPOLE), CARTPOLE)
    with torch.inference_mode():
        again.load_state_dict(first.state_dict())
    np.testing.assert_array_equal(again.update(), first.update())
    assert equal_states(copied_state(again.policy), copied_state(first.policy))


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
def test_load_state_dict_of_another_learner_raises_and_changes_nothing(make, spoil, text):
    trainer = make_learner(make, make_policy(CARTPOLE), CARTPOLE)
    trainer.update()
    other = make_learner(make, make_policy(CARTPOLE), CARTPOLE, seed=1)
    other.update()
    state = other.state_dict()
    spoil(state)
    before = trainer.state_dict()
    with pytest.raises((TypeError, ValueError), match=f"^{make.__name__}.load_state_dict: {text}$"):
        trainer.load_state_dict(state)
    after = trainer.state_dict()
    assert equal_states(before["policy"], after["policy"]) and before["updates"] == after["updates"]
    moments = (s["optimizer"]["state"][0]["exp_avg"] for s in (before, after))
    assert torch.equal(*moments)


@LEARNERS
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("kind", ["reward", "observation"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_train_one_non_finite_number_skips_the_update_and_warns(make, continuous, kind, value):
    clean = Script((1.0, 2.0), length=3, continuous=continuous)
    net = make_policy(clean, continuous=continuous)
    trainer = make_learner(make, net, clean)
    trainer.train(1)
    before, moments = copied_state(net), trainer.state_dict()["optimizer"]
    trainer.dist = Script((1.0, 2.0), length=3, continuous=continuous, fault=(kind, 1, 5, value))
    text = (
        f"^{make.__name__}.train: 2 of 2 updates were not finite and skipped, the last for: rollout: {kind} must be "
        f"finite, got {value} at step 5 of tasks\\[1\\] of script-v1, script/train/0/2/[01]$"
    )
    with pytest.warns(RuntimeWarning, match=text):
        returns = trainer.train(2)
    assert np.isnan(returns).all() and trainer.skipped_updates == 2 and trainer.updates == 3
    assert equal_states(copied_state(net), before)
    after = trainer.state_dict()["optimizer"]
    assert all(torch.equal(m["exp_avg"], after["state"][i]["exp_avg"]) for i, m in moments["state"].items())
    trainer.dist = clean
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(1)
    assert trainer.skipped_updates == 2 and not equal_states(copied_state(net), before)


@LEARNERS
def test_update_non_finite_first_update_leaves_normalisation_to_the_next(make):
    net = make_policy(CARTPOLE)
    trainer = make_learner(make, make_policy(Script(length=3)), Script(length=3, fault=("observation", 0, 1, np.nan)))
    net, before = trainer.policy, copied_state(trainer.policy)
    trainer.update()
    assert equal_states(copied_state(net), before) and not net.has_normalisation
    trainer.dist = Script(length=3)
    trainer.update()
    assert net.has_normalisation and trainer.skipped_updates == 1


@LEARNERS
def test_update_non_finite_policy_raises(make):
    net = make_policy(CARTPOLE)
    trainer = make_learner(make, net, CARTPOLE)
    with torch.no_grad():
        net.critic.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=rf"^{make.__name__}.update: policy must be finite, got nan in critic.bias$"):
        trainer.update()
    assert trainer.updates == trainer.skipped_updates == 0


def moved(make, change, *, before=False):
    """The learner and the names of the parameters that an update moves, where ``change`` is applied to its policy."""
    net = make_policy(CARTPOLE)
    if before:
        change(net)
    trainer = make_learner(make, net, CARTPOLE)
    trainer.update()
    if not before:
        change(net)
    start = copied_state(net)
    trainer.update()
    return trainer, {name for name, p in net.named_parameters() if not torch.equal(p, start[name])}


@LEARNERS
@pytest.mark.parametrize("before", [False, True])
def test_update_frozen_parameters_stay_and_others_change(make, before):
    trainer, names = moved(make, lambda net: net.ssm.embed.requires_grad_(False), before=before)
    every = {name for name, _ in trainer.policy.named_parameters()}
    assert names == every - {"ssm.embed.weight", "ssm.embed.bias"}
    if make is MAMLRL:
        adapted = trainer.adapt(CARTPOLE.sample(1)[0])
        assert torch.equal(adapted.ssm.embed.weight, trainer.policy.ssm.embed.weight)
        assert not torch.equal(adapted.actor.weight, trainer.policy.actor.weight)
        assert trainer.evaluate(CARTPOLE.sample(2, "test")).isfinite().all()


@LEARNERS
def test_update_parameters_unfrozen_later_change(make):
    net = make_policy(CARTPOLE)
    net.actor.requires_grad_(False)
    trainer = make_learner(make, net, CARTPOLE)
    trainer.update()
    net.actor.requires_grad_(True)
    start = copied_state(net)
    trainer.update()
    assert all(not torch.equal(p, start[name]) for name, p in net.named_parameters())


@LEARNERS
def test_update_replaced_parameters_raise(make):
    net = make_policy(CARTPOLE)
    trainer = make_learner(make, net, CARTPOLE)
    trainer.update()
    net.actor = torch.nn.Linear(8, 2)
    before, name = copied_state(net), make.__name__
    text = f"^{name}.update: actor.weight was .*replaced after this {name} was made.* make a new {name}$"
    with pytest.raises(ValueError, match=text):
        trainer.update()
    assert equal_states(copied_state(net), before) and trainer.updates == 1


@LEARNERS
def test_init_policy_without_trainable_parameters_raises(make):
    net = make_policy(CARTPOLE).requires_grad_(False)
    with pytest.raises(ValueError, match=rf"^{make.__name__}: policy has no parameters that require grad$"):
        make_learner(make, net, CARTPOLE)


@LEARNERS
def test_update_layer_registered_under_two_names_equals_one_name(make):
    net = make_policy(CARTPOLE)
    twin = copy.deepcopy(net)
    twin.again = twin.ssm.embed
    tasks, found = CARTPOLE.sample(2, "test"), []
    for p in (net, twin):
        trainer = make_learner(make, p, CARTPOLE)
        trainer.update()
        found.append(trainer.evaluate(tasks, 2) if make is RL2 else trainer.evaluate(tasks))
        assert all(type(value) is torch.nn.Parameter for value in p.ssm.embed._parameters.values())
    assert torch.equal(*found) and all(torch.equal(p, twin.state_dict()[n]) for n, p in net.state_dict().items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@LEARNERS
def test_update_and_evaluate_without_gradient_mode_equal_those_with_it(make, mode):
    net = make_policy(CARTPOLE)
    twin = copy.deepcopy(net)
    tasks, found = CARTPOLE.sample(2, "test"), []
    for p, context in ((net, torch.enable_grad), (twin, mode)):
        trainer = make_learner(make, p, CARTPOLE)
        with context():
            trainer.update()
            found.append(trainer.evaluate(tasks, 2) if make is RL2 else trainer.evaluate(tasks))
    assert equal_states(copied_state(net), copied_state(twin)) and torch.equal(*found)


@LEARNERS
def test_evaluate_episode_without_an_end_raises_at_the_limit(make):
    dist = Script(length=np.inf)
    trainer = make_learner(make, make_policy(dist), dist)
    text = (
        r"^rollout: episodes must end within max_episode_steps, got 20 steps without an end in tasks\[0\] "
        "of script-v1, script/test/0/0/0$"
    )
    options = {"episodes": 1} if make is RL2 else {}
    with pytest.raises(ValueError, match=text):
        trainer.evaluate(dist.sample(2, "test"), **options, max_episode_steps=20)


@LEARNERS
def test_learner_numpy_scalars_are_accepted_and_do_not_reach_the_state(make, tmp_path):
    dist = Script(length=3)
    net = SSMMetaPolicy(np.int64(feature_dim(dist)), dist.action_space.n, np.int32(8), state_size=np.int16(4))
    assert all(type(value) in (int, bool, str, float) for value in net.options.values())
    net.save(tmp_path / "policy")
    rates = ("lr", "clip_coef") if make is RL2 else ("inner_lr", "outer_lr")
    trainer = make_learner(
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


@LEARNERS
def test_train_values_are_the_return_per_episode_and_report_finds_a_whole_state(make):
    dist = Script((1.0, 3.0), length=3)  # 12 steps hold four episodes
    trainer, seen = make_learner(make, make_policy(dist), dist), []
    values = trainer.train(2, lambda i, value: seen.append((i, value, trainer.updates)))
    assert values == [2.0, 2.0] and seen == [(0, 2.0, 1), (1, 2.0, 2)]
    trainer = make_learner(make, make_policy(dist), dist, steps=8)  # the third episode is cut before its reward
    assert trainer.train(1) == pytest.approx([4 / 3])


@LEARNERS
def test_train_error_of_report_leaves_a_state_from_which_training_continues(make):
    def stop(i, _):
        if i == 1:
            raise KeyboardInterrupt

    total = {"total": 3} if make is RL2 else {}
    whole = make_learner(make, make_policy(CARTPOLE), CARTPOLE)
    first = make_learner(make, copy.deepcopy(whole.policy), CARTPOLE)
    again = make_learner(make, make_policy(CARTPOLE), CARTPOLE)
    whole.train(3, **total)
    with pytest.raises(KeyboardInterrupt):
        first.train(3, stop, **total)
    again.load_state_dict(first.state_dict())
    again.train(1, **total)
    assert equal_states(copied_state(again.policy), copied_state(whole.policy))
