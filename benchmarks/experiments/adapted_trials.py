"""Trials whose policy learns in context and, between their episodes, by gradient: an Adapter on the policy gradient."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import pad_sequence

from eaml_ext.adaptation import AdaptationConfig, Adapter
from eaml_ext.rl import SSMMetaPolicy, Trials, rollout

REWARD_SCALE = 0.1  # that of the training of the critic, whose values the advantages are made of


class _Sequences(nn.Module):
    """A policy as the Adapter calls it: ``(1, time, features)`` -> logits ``(1, time, actions)``."""

    def __init__(self, policy: SSMMetaPolicy):
        super().__init__()
        self.policy = policy

    def forward(self, x: Tensor) -> Tensor:
        return self.policy.scan_tensors(x)[0]


class _Steps(_Sequences):
    def forward(self, *args: Any) -> Any:
        return self.policy.step_tensors(*args)


class _Memory(_Sequences):
    def forward(self, x: Tensor) -> Tensor:
        return self.policy.scan_tensors(x)[2]


class _Continued:
    """The policy, with parameters of each task, in the middle of each task's trial: ``past`` ``(steps, features)``."""

    def __init__(self, policy: SSMMetaPolicy, params: dict[str, Tensor], past: list[Tensor], last: Tensor):
        self._policy, self._params, self._last = policy, params, last
        steps, memory = _Steps(policy), _Memory(policy)
        self._call = vmap(lambda params, *args: functional_call(steps, params, args))
        # The state of the trial under the adapted parameters, not under the previous ones.
        states = [policy.init_hidden(1)] * len(past)
        for i, x in enumerate(past):
            if len(x):
                own = {name: p[i] for name, p in params.items()}
                states[i] = functional_call(memory, own, (x[None],))
        self._state = torch.cat(states)
        self._first = True

    def init_hidden(self, batch: int) -> Tensor:
        return self._state

    def step(self, obs: Tensor, state: Tensor, reset: Tensor) -> Any:
        if self._first:
            obs, self._first = continued(obs, self._last), False
        out = self._call(self._params, obs[:, None], state[:, None])
        parameters, value, state = (t.flatten(0, 1) for t in out)
        return self._policy.distribution(parameters), value, state


def continued(obs: Tensor, last: Tensor) -> Tensor:
    """First inputs of an episode, ``(tasks, features)``, with the action and the reward before it: ``last``."""
    width = last.shape[-1]
    return torch.cat([obs[:, : -width - 1], last, obs[:, -1:]], dim=-1)


def policy_gradient(logits: Tensor, happened: Tensor) -> Tensor:
    """``-mean(log pi(a) A)`` over what ``happened`` ``(..., time, 3)`` marks: action, advantage, 1 or (padding) 0."""
    action, advantage, mask = happened.unbind(-1)
    log_probs = logits.log_softmax(-1).gather(-1, action.long()[..., None]).squeeze(-1)
    return -(log_probs * advantage * mask).sum() / mask.sum()


def adapted_returns(
    policy: SSMMetaPolicy, dist: Any, tasks: Sequence[Any], episodes: int, seed: int, lr: float
) -> Tensor:
    """The return of each episode of a trial, ``(tasks, episodes)``; the likeliest actions.

    After each episode every task takes five guarded steps of policy gradient on its trial so far, advantages being
    those of the critic. The policy's memory goes on.
    """
    model = _Sequences(policy)
    adapter = Adapter(model, AdaptationConfig(lr=lr, max_steps_per_call=5))
    params = {name: p.detach().expand(len(tasks), *p.shape) for name, p in model.named_parameters()}
    past = [torch.empty(0, policy.state_dim)] * len(tasks)
    happened = [torch.empty(0, 3)] * len(tasks)
    last = torch.zeros(len(tasks), dist.action_dim + 1)
    returns = []
    for episode in range(episodes):
        with torch.no_grad():
            actor = _Continued(policy, params, past, last)
            # Another seed, another start, as within one trial.
            trials = rollout(dist, tasks, actor, seed + 1000 * episode, episodes=1, greedy=True)  # type: ignore[arg-type]
        returns.append(trials.episode_returns(1))
        if episode == episodes - 1:
            break
        inputs = torch.cat([continued(trials.inputs[:, 0], last)[:, None], trials.inputs[:, 1:]], dim=1)
        advantages = _advantages(trials)
        for i, steps in enumerate(trials.mask.sum(1).tolist()):
            past[i] = torch.cat([past[i], inputs[i, :steps]])
            new = torch.stack([trials.actions[i].float(), advantages[i], trials.mask[i].float()], dim=-1)
            happened[i] = torch.cat([happened[i], new[:steps]])
            action = nn.functional.one_hot(trials.actions[i, steps - 1], dist.action_dim).float()
            last[i] = torch.cat([action, trials.rewards[i, steps - 1 : steps]])
        batch = {"states": pad_sequence(past, True)[:, None], "targets": pad_sequence(happened, True)[:, None]}
        params, _ = adapter.adapt_many(policy_gradient, batch, params)
    return torch.cat(returns, dim=1)


def _advantages(trials: Trials) -> Tensor:
    return replace(trials, rewards=REWARD_SCALE * trials.rewards).advantages()
