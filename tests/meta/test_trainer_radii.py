"""MetaMAMLTrainer with several KL radii: training, selection of the policy."""

import torch
from torch import nn
from torch.nn.functional import mse_loss
from trainer_runs import trainer

from eaml_ext.meta import MetaMAMLTrainer, TaskBatch


def slopes(values, n=12):
    tasks = []
    for a in values:
        x = torch.randn(2 * n, 1)
        tasks.append((x[:n], a * x[:n], x[n:], a * x[n:]))
    return tasks


def test_kl_radii_trade_mean_for_worst_loss_and_the_right_one_is_selected():
    torch.manual_seed(0)
    # Nineteen tasks of slope about 0 and one of slope 4: the plain mean cares little for the last one.
    tasks = slopes([0.1 * float(torch.randn(())) for _ in range(19)] + [4.0])
    torch.manual_seed(0)
    t = MetaMAMLTrainer(nn.Linear(1, 1), 3e-2, 1e-2, kl_radii=(0.0, 1.5), progress=False)
    t.meta_train(TaskBatch(tasks, 20), 200)
    plain, robust = t.mamls
    slope = [float(maml.model.weight.detach()) for maml in (plain, robust)]
    assert slope[0] < 0.6 and slope[1] > slope[0] + 0.7
    losses = [maml.task_losses(maml.parameters(), tasks, mse_loss) for maml in (plain, robust)]
    assert float(losses[0].mean()) < float(losses[1].mean()) and float(losses[0].max()) > float(losses[1].max())
    near, far = slopes([0.0])[0], slopes([4.0])[0]
    assert t.select_kl_radius(near[:2]) == 0 and t.select_kl_radius(far[:2]) == 1
    one = torch.ones(1, 1)  # a single row: judged before adaptation
    assert t.select_kl_radius((one, 0 * one)) == 0 and t.select_kl_radius((one, 4 * one)) == 1
    adapted = t.adapt_to_new_task(far[:2])
    assert float(mse_loss(adapted(far[2]), far[3])) < float(mse_loss(plain.adapt(*far[:2], mse_loss)(far[2]), far[3]))


def test_select_kl_radius_support_set_is_split_into_folds():
    t = trainer(kl_radii=(0.0, 1.0))
    seen = []
    t.mamls[0].adapt_params = lambda start, x, y, loss_fn, steps: seen.append(len(x)) or start
    t.select_kl_radius((torch.randn(10, 1), torch.randn(10, 1)))
    assert seen == [8] * 5
    seen.clear()
    t.select_kl_radius((torch.randn(3, 1), torch.randn(3, 1)))
    assert seen == [2] * 3


def test_select_kl_radius_nan_is_never_selected():
    t = trainer(kl_radii=(0.0, 1.0))
    with torch.no_grad():
        t.mamls[0].model[0].weight.fill_(torch.nan)
    assert t.select_kl_radius((torch.randn(6, 1), torch.randn(6, 1))) == 1
