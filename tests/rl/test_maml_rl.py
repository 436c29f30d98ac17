import copy

import pytest
import torch
from bandit import Bandit
from learners import CARTPOLE, make_learner, make_policy
from torch.func import functional_call

from eaml_ext.rl import MAMLRL, SSMMetaPolicy, a2c_loss, maml_rl, normalised, rollout
from eaml_ext.tasks import CartPoleTasks


def objective(net, params, trials):
    """The loss of one task, step by step with plain autograd, under ``params``."""

    class Steps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            state, outputs = net.init_hidden(len(trials.inputs)), []
            for t in range(trials.inputs.shape[1]):
                *out, state = net.step_tensors(trials.inputs[:, t], state, trials.resets[:, t])
                outputs.append(out)
            return (torch.stack(column, 1) for column in zip(*outputs, strict=True))

    parameters, values = functional_call(Steps(), {f"net.{n}": p for n, p in params.items()}, ())
    distribution = net.distribution(parameters)
    adv = trials.advantages(0.99, 0.95)
    log_probs = distribution.log_prob(trials.actions)
    return a2c_loss(log_probs, values, distribution.entropy(), normalised(adv), adv + trials.values, ent_coef=0.0)


@pytest.mark.parametrize("first_order", [False, True])
def test_task_losses_gradient_equals_autograd_through_the_inner_steps(first_order):
    net = make_policy().double()
    maml = MAMLRL(
        net, CARTPOLE, inner_lr=0.3, inner_steps=2, first_order=first_order, rollouts_per_task=3, reward_scale=1.0
    )
    params = dict(net.named_parameters())
    with torch.no_grad():
        for p in params.values():
            p.add_(0.2 * torch.randn_like(p))  # away from the almost constant initial policy
    tasks = CARTPOLE.sample(2)

    def trials_of(seed):  # rollouts of a float32 copy, in float64
        trials = rollout(
            CARTPOLE, [t for t in tasks for _ in range(3)], copy.deepcopy(net).float(), seed, steps=12, keep_state=False
        )
        return type(trials)(**{k: v.double() if v.is_floating_point() else v for k, v in vars(trials).items()})

    data = [trials_of(seed) for seed in range(3)]
    got = torch.autograd.grad(maml.task_losses([maml._batch(d, 2) for d in data]).mean(), list(params.values()))
    total = 0.0
    for i in range(2):
        adapted = params
        for d in data[:-1]:
            loss = objective(net, adapted, d[3 * i : 3 * i + 3])
            grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
            grads = [g.detach() for g in grads] if first_order else grads
            adapted = {n: p - 0.3 * g for (n, p), g in zip(adapted.items(), grads, strict=True)}
        total = total + objective(net, adapted, data[-1][3 * i : 3 * i + 3]) / 2
    want = torch.autograd.grad(total, list(params.values()))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, rtol=1e-6, atol=1e-9)


def test_inner_loop_each_task_acts_and_adapts_with_its_own_parameters():
    maml = MAMLRL(make_policy(), CARTPOLE, inner_lr=1.0, rollouts_per_task=3, steps=20)
    tasks = CARTPOLE.sample(4)
    params, _ = maml._inner_loop(tasks, maml._expand_params(4))
    trials = maml._rollout_for_step(tasks, params, 1)
    for i in range(4):
        alone = copy.deepcopy(maml.policy)
        alone.load_state_dict({n: params[f"policy.{n}"][i] for n, _ in alone.named_parameters()}, strict=False)
        mine = trials[3 * i : 3 * i + 3]
        distribution, values, _ = alone.scan(mine.inputs, None, mine.resets)
        assert torch.allclose(distribution.log_prob(mine.actions), mine.log_probs, atol=1e-5)
        assert torch.allclose(values, mine.values, atol=1e-5)
    assert not torch.allclose(params["policy.actor.weight"][0], params["policy.actor.weight"][1])


@pytest.mark.parametrize("continuous", [False, True])
def test_maml_rl_train_bandit_one_inner_step_raises_the_return(continuous):
    dist = Bandit(arms=3, continuous=continuous)
    net = make_policy(dist, continuous=continuous)
    maml = MAMLRL(
        net, dist, inner_lr=1.0, outer_lr=3e-2, tasks_per_update=32, rollouts_per_task=8, steps=3, reward_scale=1.0
    )
    tasks = dist.sample(100, "test")
    untrained = maml.evaluate(tasks).mean(0)
    maml.train(35)
    before, after = maml.evaluate(tasks).mean(0)
    assert after > before + 0.1 and after > untrained.max() + 0.05, (untrained, before, after)
    assert maml.skipped_updates == 0


def test_adapt_returns_a_detached_copy():
    maml = MAMLRL(make_policy(), CARTPOLE, inner_lr=1.0, rollouts_per_task=3, steps=20)
    before = copy.deepcopy(maml.policy.state_dict())
    adapted = maml.adapt(CARTPOLE.sample(1)[0])
    assert all(torch.equal(v, before[n]) for n, v in maml.policy.state_dict().items())
    assert not torch.equal(adapted.actor.weight, maml.policy.actor.weight)
    assert isinstance(adapted, SSMMetaPolicy) and adapted.actor.weight.grad_fn is None


def test_maml_rl_update_non_finite_loss_is_skipped():
    maml = MAMLRL(make_policy(), CARTPOLE, inner_lr=1e30, rollouts_per_task=2, steps=10, tasks_per_update=2)
    maml.updates = 1  # the first update sets the normalisation
    before = copy.deepcopy(maml.policy.state_dict())
    maml.task_losses = lambda batches: sum(p.sum() for p in maml.policy.parameters()) * torch.full((2,), torch.nan)
    maml._inner_loop = lambda tasks, params: (params, [])
    maml.update()
    assert maml.skipped_updates == 1
    assert all(torch.equal(v, before[n]) for n, v in maml.policy.state_dict().items())


@pytest.mark.parametrize(
    ("kwargs", "error", "text"),
    [
        ({"policy": torch.nn.Linear(1, 1)}, TypeError, "policy must be an SSMMetaPolicy, got Linear"),
        ({"dist": CartPoleTasks}, TypeError, "dist must be a task distribution as of make_tasks, got type"),
        ({"dist": Bandit()}, ValueError, "policy must have state_dim 7 and action_dim 4, got 8 and 2"),
        ({"inner_lr": 0.0}, ValueError, "inner_lr must be > 0, got 0.0"),
        ({"outer_lr": None}, TypeError, "outer_lr must be a number, got None"),
        ({"inner_steps": 0}, ValueError, "inner_steps must be > 0, got 0"),
        ({"first_order": 1}, TypeError, "first_order must be True or False, got int"),
        ({"tasks_per_update": 0}, ValueError, "tasks_per_update must be > 0, got 0"),
        ({"rollouts_per_task": 1.5}, TypeError, "rollouts_per_task must be an integer, got 1.5"),
        ({"steps": -1}, ValueError, "steps must be > 0, got -1"),
        ({"gamma": 2}, ValueError, "gamma must be <= 1, got 2"),
        ({"gae_lambda": -0.5}, ValueError, "gae_lambda must be >= 0, got -0.5"),
        ({"vf_coef": -1}, ValueError, "vf_coef must be >= 0, got -1"),
        ({"ent_coef": "0"}, TypeError, "ent_coef must be a number, got '0'"),
        ({"reward_scale": 0}, ValueError, "reward_scale must be > 0, got 0"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be > 0, got 0"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
    ],
)
def test_maml_rl_bad_argument_raises(kwargs, error, text):
    with pytest.raises(error, match=f"^MAMLRL: {text}$"):
        MAMLRL(**{"policy": make_policy(), "dist": CARTPOLE, **kwargs})


def test_maml_rl_train_bad_argument_raises():
    with pytest.raises(ValueError, match=r"^MAMLRL.train: updates must be > 0, got 0$"):
        MAMLRL(make_policy(), CARTPOLE).train(0)


def test_maml_rl_evaluate_shares_no_seed_with_adaptation_or_training(monkeypatch):
    seen = {}

    def record(dist, tasks, policy, seed, **options):
        seen.setdefault(seed, set()).add((use, options.get("episodes"), number if use == "train" else None))
        return rollout(dist, tasks, policy, seed, **options)

    monkeypatch.setattr(maml_rl, "rollout", record)
    dist = Bandit(arms=3)
    net = make_policy(dist)
    net.normalise(torch.randn(20, net.state_dim))
    for inner_steps in (1, 2, 3):
        for number in (0, 1, 2):
            trainer = make_learner(
                MAMLRL, net, dist, inner_steps=inner_steps, rollouts_per_task=1, steps=1, seed=number
            )
            use = "train"
            trainer._update(dist.sample(1))
            use = "test"
            trainer.evaluate(dist.sample(1, "test"), seed=number)
    assert all(len(uses) == 1 for uses in seen.values()), seen
    assert len(seen) == 3 * (4 + 3 + 1)  # seeds times (training steps and query, adaptation steps, evaluation)


def test_maml_rl_updates_have_seeds_of_their_own(monkeypatch):
    seeds = []

    def record(dist, tasks, policy, seed, **options):
        seeds.append(seed)
        return rollout(dist, tasks, policy, seed, **options)

    monkeypatch.setattr(maml_rl, "rollout", record)
    net = make_policy(CARTPOLE)
    net.normalise(torch.randn(20, net.state_dim))
    make_learner(MAMLRL, net, CARTPOLE, inner_steps=2, steps=4).train(3)
    assert len(seeds) == len(set(seeds)) == 3 * (2 + 1)


@pytest.mark.parametrize(("inner_steps", "seed"), [(1, 0), (1, 1), (2, 0), (2, 1)])
def test_maml_rl_evaluate_starts_are_not_those_of_adaptation(inner_steps, seed, monkeypatch):
    trainer, initial = make_learner(MAMLRL, make_policy(CARTPOLE), CARTPOLE, inner_steps=inner_steps), []

    def record(*args, **options):
        trials = rollout(*args, **options)
        initial.append((options.get("episodes"), trials.inputs[:, 0, :4]))
        return trials

    monkeypatch.setattr(maml_rl, "rollout", record)
    trainer.evaluate(CARTPOLE.sample(1, "test"), seed=seed)
    evaluated = [obs for episodes, obs in initial if episodes]
    adapted = [obs for episodes, obs in initial if not episodes]
    assert len(evaluated) == inner_steps + 1 and len(adapted) == inner_steps
    assert all(torch.equal(obs, evaluated[0]) for obs in evaluated)
    assert not any((obs == evaluated[0]).any() for obs in adapted)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda t, task: t.adapt([task]), TypeError, "MAMLRL.adapt: task must be a Task, got list"),
        (lambda t, task: t.adapt(task, -1), ValueError, r"MAMLRL.adapt: seed must be in \[0, 2\*\*32\), got -1"),
        (lambda t, task: t.evaluate([]), ValueError, "MAMLRL.evaluate: tasks must hold at least one Task, got none"),
        (lambda t, task: t.evaluate([task], 0.5), TypeError, "MAMLRL.evaluate: seed must be an integer, got 0.5"),
    ],
)
def test_maml_rl_methods_bad_argument_raises(call, error, text):
    with pytest.raises(error, match=f"^{text}$"):
        call(make_learner(MAMLRL, make_policy(CARTPOLE), CARTPOLE), CARTPOLE.sample(1)[0])
