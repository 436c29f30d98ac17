import copy

import pytest
import torch
from bandit import Bandit
from torch.func import functional_call

from eaml_ext.rl import MAMLRL, SSMMetaPolicy, a2c_loss, feature_dim, normalised, rollout
from eaml_ext.tasks import CartPoleTasks

DIST = CartPoleTasks()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # nothing here is large enough for two


def policy(dist=DIST, **options):
    return SSMMetaPolicy(feature_dim(dist), dist.action_dim, 8, state_size=4, **options)


def objective(net, params, trials):
    """The loss of one task by autograd alone, step by step, under ``params``."""

    class Steps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            state, said = net.init_hidden(len(trials.inputs)), []
            for t in range(trials.inputs.shape[1]):
                *out, state = net.step_tensors(trials.inputs[:, t], state, trials.resets[:, t])
                said.append(out)
            return (torch.stack(column, 1) for column in zip(*said, strict=True))

    parameters, values = functional_call(Steps(), {f"net.{n}": p for n, p in params.items()}, ())
    distribution = net.distribution(parameters)
    adv = trials.advantages(0.99, 0.95)
    log_probs = distribution.log_prob(trials.actions)
    return a2c_loss(log_probs, values, distribution.entropy(), normalised(adv), adv + trials.values, ent_coef=0.0)


@pytest.mark.parametrize("first_order", [False, True])
def test_the_outer_gradient_is_that_of_plain_autograd_through_the_inner_steps(first_order):
    net = policy().double()
    maml = MAMLRL(net, DIST, inner_lr=0.3, inner_steps=2, first_order=first_order, rows=3, reward_scale=1.0)
    params = dict(net.named_parameters())
    with torch.no_grad():
        for p in params.values():
            p.add_(0.2 * torch.randn_like(p))  # away from the all but constant policy of the start
    tasks = DIST.sample(2)

    def rows(seed):  # a float64 log of what a float32 twin played
        trials = rollout(
            DIST, [t for t in tasks for _ in range(3)], copy.deepcopy(net).float(), seed, steps=12, keep_state=False
        )
        return type(trials)(**{k: v.double() if v.is_floating_point() else v for k, v in vars(trials).items()})

    data = [rows(seed) for seed in range(3)]
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


def test_every_task_acts_and_adapts_with_parameters_of_its_own():
    maml = MAMLRL(policy(), DIST, inner_lr=1.0, rows=3, steps=20)
    tasks = DIST.sample(4)
    params, _ = maml._inner_loop(tasks, maml._spread(4))
    trials = maml._play(tasks, params, 1)
    for i in range(4):
        alone = copy.deepcopy(maml.policy)
        alone.load_state_dict({n: params[f"policy.{n}"][i] for n, _ in alone.named_parameters()}, strict=False)
        mine = trials[3 * i : 3 * i + 3]
        distribution, values, _ = alone.scan(mine.inputs, None, mine.resets)
        assert torch.allclose(distribution.log_prob(mine.actions), mine.log_probs, atol=1e-5)
        assert torch.allclose(values, mine.values, atol=1e-5)
    assert not torch.allclose(params["policy.actor.weight"][0], params["policy.actor.weight"][1])


@pytest.mark.parametrize("continuous", [False, True])
def test_it_learns_parameters_from_which_one_step_finds_the_arm(continuous):
    dist = Bandit(arms=3, continuous=continuous)
    net = policy(dist, continuous=continuous)
    maml = MAMLRL(net, dist, inner_lr=1.0, outer_lr=3e-2, tasks_per_update=32, rows=8, steps=3, reward_scale=1.0)
    tasks = dist.sample(100, "test")
    untrained = maml.evaluate(tasks).mean(0)
    maml.train(35)
    before, after = maml.evaluate(tasks).mean(0)
    assert after > before + 0.1 and after > untrained.max() + 0.05, (untrained, before, after)
    assert maml.skipped_updates == 0


def test_adapt_gives_a_detached_copy_that_is_the_tasks_row_of_the_batch():
    maml = MAMLRL(policy(), DIST, inner_lr=1.0, rows=3, steps=20)
    before = copy.deepcopy(maml.policy.state_dict())
    adapted = maml.adapt(DIST.sample(1)[0])
    assert all(torch.equal(v, before[n]) for n, v in maml.policy.state_dict().items())
    assert not torch.equal(adapted.actor.weight, maml.policy.actor.weight)
    assert isinstance(adapted, SSMMetaPolicy) and adapted.actor.weight.grad_fn is None


def test_a_meta_update_that_is_not_finite_is_left_out():
    maml = MAMLRL(policy(), DIST, inner_lr=1e30, rows=2, steps=10, tasks_per_update=2)
    maml.updates = 1  # past the first, which takes the units
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
        ({"rows": 1.5}, TypeError, "rows must be an integer, got 1.5"),
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
def test_refuses(kwargs, error, text):
    with pytest.raises(error, match=f"^MAMLRL: {text}$"):
        MAMLRL(**{"policy": policy(), "dist": DIST, **kwargs})


def test_train_refuses():
    with pytest.raises(ValueError, match=r"^MAMLRL.train: updates must be > 0, got 0$"):
        MAMLRL(policy(), DIST).train(0)
