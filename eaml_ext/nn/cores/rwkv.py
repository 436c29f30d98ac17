"""S_t = diag(w) S_{t-1} + k_t v_t;  o_t = r_t (S_{t-1} + diag(bonus) k_t v_t), w fixed: RWKV-5's time mixing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import linear, silu
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import check_reset, unit_step_delta
from eaml_ext.nn.precision import to_opmath
from eaml_ext.ops import selective_scan


class RWKV(Core):
    """RWKV-5 (Eagle): linear attention with a decay per key entry, and a bonus for the key and value of the same step.

    Receptance, keys, values and gate each read a learned mix of the input and the previous input ("token shift"). Heads
    are normalised and gated by silu; an output projection follows. The last column of a state is the previous input.

    Args:
        dim: width of input and output.
        state_size: size of a head's keys.
        num_heads: divides ``dim`` into heads of at least 2; heads of about 16 channels if absent.

    Source: Peng et al. 2024, "Eagle and Finch", equations 3 to 9. Finch (RWKV-6), whose decay depends on the input, is
    not covered.

    >>> y, state = RWKV(8, 4).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 5]))
    """

    def __init__(self, dim: int, state_size: int = 16, *, num_heads: int | None = None):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.num_heads, self.head_dim = self._heads(num_heads, smallest=2)
        self.state_shape = (dim, state_size + 1)
        key_dim = self.num_heads * state_size
        self.token_shift_mix = nn.Parameter(torch.rand(4, dim))  # weight of the previous input in r, k, v, gate
        self.receptance = nn.Linear(dim, key_dim, bias=False)
        self.key = nn.Linear(dim, key_dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = nn.Parameter(torch.stack([torch.ones(dim), torch.zeros(dim)]))  # weight and bias
        self.out_proj = nn.Linear(dim, dim, bias=False)
        # Over the key entries of a head, half-lives fall from 280 steps to about 2.
        ramp = torch.linspace(0, 1, state_size).repeat(self.num_heads, 1)
        self.decay = nn.Parameter(-6 + 5 * ramp**0.7)  # w = exp(-exp(decay))
        self.bonus = nn.Parameter(0.5 * (1 - ramp))

    def scan(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, dim, state_size + 1)``, floating."""
        heads, length = self.num_heads, x.shape[1]
        if state is None:
            state = to_opmath(x).new_zeros(x.shape[0], *self.state_shape)
        inputs = torch.cat([state[..., -1].unsqueeze(1).to(x.dtype), x], dim=1)
        previous = inputs[:, :length]
        if reset is not None:
            check_reset("RWKV.scan", reset, x)
            previous = previous.masked_fill(reset.unsqueeze(-1), 0)
        r, k, v, gate = (
            linear(layer, torch.lerp(x, previous, weight.to(x.dtype)))
            for layer, weight in zip(
                (self.receptance, self.key, self.value, self.gate), self.token_shift_mix.unbind(), strict=True
            )
        )
        # The output reads S_{t-1}, so the op runs one step longer: its step t adds k and v of step t - 1 and then reads
        # the state. Its step 0 adds nothing, and its last step is not read.
        added_v, added_k = v, k
        if reset is not None:  # masked, because the values may be NaN
            ends = F.pad(reset[:, 1:], (0, 1)).unsqueeze(-1)
            added_v, added_k = v.masked_fill(ends, 0), k.masked_fill(ends, 0)
        u = F.pad(added_v, (0, 0, 1, 0)).mT
        delta = F.pad(unit_step_delta(added_v.mT, lengths), (1, 0))
        log_w = -to_opmath(self.decay).exp().unsqueeze(1).expand(heads, self.head_dim, -1).flatten(0, 1)
        y, last = selective_scan(
            u,
            delta,
            log_w,
            F.pad(added_k, (0, 0, 1, 0)).unflatten(-1, (heads, self.state_size)).permute(0, 2, 3, 1),
            F.pad(r, (0, 0, 0, 1)).unflatten(-1, (heads, self.state_size)).permute(0, 2, 3, 1),
            return_last_state=True,
            initial_state=to_opmath(state[..., :-1]),
            reset=None if reset is None else F.pad(reset, (0, 1)),
        )
        bonus = (r * k).unflatten(-1, (heads, self.state_size)) * self.bonus.to(x.dtype)
        y = y.mT[:, :length].unflatten(-1, (heads, self.head_dim))
        y = y + bonus.sum(-1, keepdim=True) * v.unflatten(-1, (heads, self.head_dim))
        weight, bias = self.norm.to(y.dtype).unbind()
        y = F.layer_norm(y, (self.head_dim,)).flatten(-2) * weight + bias
        end = None if lengths is None else lengths.long().view(-1, 1, 1)
        newest = inputs[:, length] if end is None else inputs.take_along_dim(end, dim=1)[:, 0]
        return linear(self.out_proj, silu(gate) * y), torch.cat([last, to_opmath(newest).unsqueeze(-1)], dim=-1)
