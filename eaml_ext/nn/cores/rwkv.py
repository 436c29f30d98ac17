"""S_t = diag(w) S_{t-1} + k_t v_t;  o_t = r_t (S_{t-1} + diag(bonus) k_t v_t), w fixed: RWKV-5's time mixing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import check_reset, unit_step_delta
from eaml_ext.nn.precision import to_opmath
from eaml_ext.ops import selective_scan


class RWKV(Core):
    """RWKV-5 (Eagle): linear attention, a decay per key entry, that reads what was before a step, and a bonus for it.

    Receptance, keys, values and gate each come from a learned blend of the input and the one before. Heads are
    normalised, gated by silu and mixed. The last column of a state is that input before.

    Args:
        dim: width of input and output.
        state_size: size of a head's keys.
        num_heads: divides ``dim`` into heads of at least 2; heads of about 16 channels if absent.

    Source: Peng et al. 2024, "Eagle and Finch", equations 3 to 9. Finch's decays, which depend on the input for each
    key entry, are not of this form.

    >>> y, state = RWKV(8, 4).scan(torch.randn(2, 5, 8))
    >>> y.shape, state.shape
    (torch.Size([2, 5, 8]), torch.Size([2, 8, 5]))
    """

    def __init__(self, dim: int, state_size: int = 16, *, num_heads: int | None = None):
        super().__init__(dim, state_size)
        dim, state_size = self.dim, self.state_size
        self.num_heads, self.head_dim = self._heads(num_heads, smallest=2)
        self.state_shape = (dim, state_size + 1)
        keys = self.num_heads * state_size
        self.token_shift_mix = nn.Parameter(torch.rand(4, dim))  # weights of the input before: r, k, v, gate
        self.receptance = nn.Linear(dim, keys, bias=False)
        self.key = nn.Linear(dim, keys, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.norm = nn.Parameter(torch.stack([torch.ones(dim), torch.zeros(dim)]))  # weight and bias
        self.out_proj = nn.Linear(dim, dim, bias=False)
        # Half-lives from about two steps to some hundred, spread over the keys of each head.
        spread = torch.linspace(0, 1, state_size).repeat(self.num_heads, 1)
        self.decay = nn.Parameter(-6 + 5 * spread**0.7)  # w = exp(-exp(decay))
        self.bonus = nn.Parameter(0.5 * (1 - spread))

    def scan(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` (batch, time, dim), ``state`` (batch, *state_shape), ``reset`` (batch, time) bool -> (y, state)."""
        heads, length = self.num_heads, x.shape[1]
        if state is None:
            state = to_opmath(x).new_zeros(x.shape[0], *self.state_shape)
        inputs = torch.cat([state[..., -1].unsqueeze(1).to(x.dtype), x], dim=1)
        before = inputs[:, :length]
        if reset is not None:
            check_reset("RWKV.scan", reset, x)
            before = before.masked_fill(reset.unsqueeze(-1), 0)
        r, k, v, gate = (
            layer(torch.lerp(x, before, weight.to(x.dtype)))
            for layer, weight in zip(
                (self.receptance, self.key, self.value, self.gate), self.token_shift_mix.unbind(), strict=True
            )
        )
        # Step t of the op takes in k and v of t - 1 and reads S_{t-1}; its first step only carries the state over, its
        # last one only takes in.
        late, late_k = v, k
        if reset is not None:  # masked, not multiplied: it may be NaN
            ends = F.pad(reset[:, 1:], (0, 1)).unsqueeze(-1)
            late, late_k = v.masked_fill(ends, 0), k.masked_fill(ends, 0)
        u = F.pad(late, (0, 0, 1, 0)).mT
        delta = F.pad(unit_step_delta(late.mT, lengths), (1, 0))
        decay = -to_opmath(self.decay).exp().unsqueeze(1).expand(heads, self.head_dim, -1).flatten(0, 1)
        y, last = selective_scan(
            u,
            delta,
            decay,
            F.pad(late_k, (0, 0, 1, 0)).unflatten(-1, (heads, self.state_size)).permute(0, 2, 3, 1),
            F.pad(r, (0, 0, 0, 1)).unflatten(-1, (heads, self.state_size)).permute(0, 2, 3, 1),
            return_last_state=True,
            initial_state=to_opmath(state[..., :-1]),
            reset=None if reset is None else F.pad(reset, (0, 1)),
        )
        now = (r * k).unflatten(-1, (heads, self.state_size)) * self.bonus.to(x.dtype)
        y = y.mT[:, :length].unflatten(-1, (heads, self.head_dim))
        y = y + now.sum(-1, keepdim=True) * v.unflatten(-1, (heads, self.head_dim))
        weight, bias = self.norm.to(y.dtype).unbind()
        y = F.layer_norm(y, (self.head_dim,)).flatten(-2) * weight + bias
        end = None if lengths is None else lengths.long().view(-1, 1, 1)
        newest = inputs[:, length] if end is None else inputs.take_along_dim(end, dim=1)[:, 0]
        return self.out_proj(F.silu(gate) * y), torch.cat([last, to_opmath(newest).unsqueeze(-1)], dim=-1)
