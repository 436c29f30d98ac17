"""S_t = diag(w) S_{t-1} + k_t v_t;  o_t = r_t (S_{t-1} + diag(bonus) k_t v_t), w fixed: RWKV-5's time mixing."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eaml_ext.nn._row_invariant import linear, silu
from eaml_ext.nn._slots import slotted_row
from eaml_ext.nn.cores.base import Core
from eaml_ext.nn.padding import count_sequences, unit_step_delta
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

    def _run_scan(
        self,
        x: Tensor,
        state: Tensor | None,
        reset: Tensor | None,
        lengths: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Core.scan`; ``state`` is ``(batch, dim, state_size + 1)``, floating."""
        heads, length = self.num_heads, x.shape[1]
        row = None if cu_seqlens is None else slotted_row(cu_seqlens, length, 1)
        if state is None:
            state = to_opmath(x).new_zeros(count_sequences(x, cu_seqlens), *self.state_shape)

        def prepend(values: Tensor, first: Tensor | None = None) -> Tensor:
            """Insert a step before each sequence: ``first``, or zeros."""
            if row is not None:
                return row.insert(values, first)
            return F.pad(values, (0, 0, 1, 0)) if first is None else torch.cat([first.unsqueeze(1), values], dim=1)

        def append(values: Tensor) -> Tensor:
            """Insert a step of zeros after each sequence."""
            appended = F.pad(values if row is None else row.insert(values), (0, 0, 0, 1))
            return appended if row is None else appended[:, 1:]

        inputs = prepend(x, state[..., -1].to(x.dtype))
        before = slice(0, length) if row is None else row.steps - 1
        previous = inputs[:, before]
        if reset is not None:
            previous = previous.masked_fill(reset.unsqueeze(-1), 0)
        r, k, v, gate = (
            linear(layer, torch.lerp(x, previous, weight.to(x.dtype)))
            for layer, weight in zip(
                (self.receptance, self.key, self.value, self.gate), self.token_shift_mix.unbind(), strict=True
            )
        )
        # The output reads S_{t-1}, so the op runs one step longer: its step t adds k and v of step t - 1 and then reads
        # the state. The step 0 of a sequence adds nothing, and its last step is not read.
        added_v, added_k = prepend(v), prepend(k)
        if reset is not None:  # masked, because the values may be NaN
            starts = append(reset.unsqueeze(-1))
            added_v, added_k, reset = added_v.masked_fill(starts, 0), added_k.masked_fill(starts, 0), starts.squeeze(-1)
        log_w = -to_opmath(self.decay).exp().unsqueeze(1).expand(heads, self.head_dim, -1).flatten(0, 1)
        y, last = selective_scan(
            added_v.mT,
            prepend(unit_step_delta(v.mT, lengths).mT).mT,
            log_w,
            added_k.unflatten(-1, (heads, self.state_size)).permute(0, 2, 3, 1),
            append(r).unflatten(-1, (heads, self.state_size)).permute(0, 2, 3, 1),
            return_last_state=True,
            initial_state=to_opmath(state[..., :-1]),
            reset=reset,
            cu_seqlens=None if row is None else row.cu_seqlens,
        )
        bonus = (r * k).unflatten(-1, (heads, self.state_size)) * self.bonus.to(x.dtype)
        y = y.mT[:, before].unflatten(-1, (heads, self.head_dim))
        y = y + bonus.sum(-1, keepdim=True) * v.unflatten(-1, (heads, self.head_dim))
        weight, bias = self.norm.to(y.dtype).unbind()
        y = F.layer_norm(y, (self.head_dim,)).flatten(-2) * weight + bias
        if row is not None:
            newest = inputs[0, row.cu_seqlens[1:].long() - 1]
        elif lengths is not None:
            newest = inputs.gather(1, lengths.long().view(-1, 1, 1).expand(-1, 1, self.dim))[:, 0]
        else:
            newest = inputs[:, length]
        return linear(self.out_proj, silu(gate) * y), torch.cat([last, to_opmath(newest).unsqueeze(-1)], dim=-1)
