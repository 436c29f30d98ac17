"""Does training through the updates pay on streams whose system switches, and experience when a system returns?

    python -m benchmarks.experiments.switching_streams [--quick] [--report]

A stream is one run of a switching linear system (LDSTasks, modes=2). It alternates between two hidden rotations of its
own, A B A B, every 128 steps on average, so systems return. An SSM predicts the next observation from the last
four and its state. Its fast weights are the output layer, the last norm and the core's output projection, updated after
chunks of 16 steps. Errors are squared, in variances of an observation, on the same 256 unseen systems for all seeds.

| variant | training | on a test stream |
|---|---|---|
| frozen | plain | no update |
| plain + Adapter | plain | gradient steps, the best of five step sizes on validation |
| lookup only | plain | no update; adds the model's mean error at the nearest past inputs, one of five settings |
| first order | StreamMAML, first_order=True | its updates |
| second order | StreamMAML | its updates |
| + experience | StreamMAML with StreamExperience | its updates, also on the past chunks that it retrieves |
| Kalman | none; true matrices, and the true mode of each step | bound |

Every training has the same CPU time, by time.process_time, and by seed the same initial weights. The trainings with
meta-updates begin with plain updates, which are cheaper, until a quarter of the time. "+ experience" then trains as
"second order" until 0.6 of it. The learning rate decays to zero with the CPU time used. It is the best of four on
validation systems, each after a shorter training with another seed. Results depend on the speed of the machine, because
trainings end by time.

"After a return" is the error in the two chunks after a switch to a system that the stream has had before.
"""

import dataclasses
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.experiments import runs, stream_training
from benchmarks.experiments.stream_training import STEP_SIZES, check_adapter
from eaml_ext import SSM
from eaml_ext.meta import StreamExperience, StreamMAML
from eaml_ext.ops import knn
from eaml_ext.tasks import LDSTasks

TASKS = LDSTasks(modes=2, stay=1 - 1 / 128, decay=0.998, noise=0.05)
FRAMES = 4  # observations in the input of a step
CHUNK, CHUNKS = 16, 24
TRAIN, VALID, TEST, BRIEF = 4096, 128, 256, 16  # streams
STREAMS = 32  # of an update
FAST = ("head", "norm", "cores.0.out_proj")
INNER_LR = 0.03  # step size at the start, for all fast weights
SLOTS, NEIGHBOURS = CHUNKS, 2  # of the experience
PLAIN_SHARE, WITHOUT_EXPERIENCE = 0.25, 0.6
LRS = (5e-3, 1e-2, 2e-2, 4e-2)
LOOKUPS = ((4, 0.5), (4, 1.0), (16, 0.5), (16, 1.0), (64, 1.0))  # neighbours, factor of their mean error
TRAINED = {
    "plain": ("frozen", "plain + Adapter", "lookup only"),
    "first order": ("first order",),
    "second order": ("second order",),
    "+ experience": ("+ experience",),
}
"""The variants at test time of each training."""
PARTS = {"mean": "whole stream", "late": "last quarter", "return": "after a return"}
DIFFERENCES = (
    ("second order", "plain + Adapter"),
    ("second order", "lookup only"),
    ("second order", "first order"),
    ("+ experience", "second order"),
)


@dataclasses.dataclass(frozen=True)
class Streams:
    """Streams of a split.

    Attributes:
        x: ``(streams, time, FRAMES * obs_dim)``, the model's input.
        y: ``(streams, time, obs_dim)``, the next observation.
        observations: ``(streams, FRAMES + time, obs_dim)``.
        modes: ``(streams, FRAMES + time)``, of each observation.
        tasks: the systems.
    """

    x: Tensor
    y: Tensor
    observations: Tensor
    modes: Tensor
    tasks: list[Any]

    @classmethod
    def draw(cls, count: int, split: str) -> "Streams":
        tasks = TASKS.sample(count, split, 0)
        seen, modes = (t[:, 0] for t in TASKS.simulate(tasks, 1, FRAMES + CHUNK * CHUNKS, 0))
        return cls(seen[:, :-1].unfold(1, FRAMES, 1).flatten(2), seen[:, FRAMES:], seen, modes, tasks)

    def returned(self) -> Tensor:
        """Whether a step is among the first ``2 * CHUNK`` after a switch back, ``(streams, time)``."""
        modes = self.modes[:, FRAMES:]
        steps = torch.arange(modes.shape[1])
        switch = F.pad(modes[:, 1:] != modes[:, :-1], (1, 0))
        since = steps - torch.where(switch, steps, 0).cummax(1).values
        return (switch.cumsum(1) >= 2) & (since < 2 * CHUNK)


drawn = functools.lru_cache(Streams.draw)


class Encoder(nn.Module):
    """The mean over a chunk of features of four consecutive observations, ``(n, 8)``."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(FRAMES * TASKS.obs_dim, 32), nn.SiLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.features(x).mean(1)
        return found


@torch.no_grad()
def looked_up(model: SSM, data: Streams, neighbours: int, share: float) -> Tensor:
    """Add to each prediction ``share`` times the mean error at the nearest past inputs of the same stream.

    The past of a step are all chunks before its own, whose targets the other variants have too.
    """
    y = model(data.x)
    errors, result = data.y - y, y.clone()
    rows = torch.arange(len(y)).view(-1, 1, 1)
    for k in range(1, CHUNKS):
        here, past = slice(k * CHUNK, (k + 1) * CHUNK), slice(0, k * CHUNK)
        _, found = knn(data.x[:, here].contiguous(), data.x[:, past].contiguous(), min(neighbours, k * CHUNK))
        result[:, here] += share * errors[rows, found].mean(2)
    return result


def figures(data: Streams, y: Tensor) -> dict[str, Any]:
    """The mean error of each of ``PARTS``, and by chunk."""
    errors = (y - data.y).square().mean(-1)
    late = errors[:, -(CHUNK * CHUNKS // 4) :]
    parts = {"mean": errors.mean(), "late": late.mean(), "return": errors[data.returned()].mean()}
    by_chunk = errors.unflatten(1, (CHUNKS, CHUNK)).mean((0, 2)).tolist()
    return {
        **{name: round(float(value), 6) for name, value in parts.items()},
        "by_chunk": [round(v, 5) for v in by_chunk],
    }


def best(tried: dict[Any, Tensor], data: Streams) -> Any:
    """The setting with the least error."""
    return min(tried, key=lambda setting: float((tried[setting] - data.y).square().mean().nan_to_num(torch.inf)))


def run(training: str, lr: float, seed: int, seconds: float, split: str, brief: bool) -> runs.Line:
    """Train, choose the settings of test time on validation, return the figures of each variant on ``split``."""
    data = drawn(BRIEF if brief else {"valid": VALID, "test": TEST}[split], split)
    source = drawn(BRIEF if brief else TRAIN, "train")
    torch.manual_seed(seed)
    model = SSM(FRAMES * TASKS.obs_dim, 32, TASKS.obs_dim, dt_min=0.01, dt_max=1.0)
    options: dict[str, Any] = {"chunk_size": CHUNK, "parameters": FAST}
    maml = StreamMAML(
        model,
        INNER_LR,
        lr,
        training == "first order",
        experience=StreamExperience(Encoder(), SLOTS, NEIGHBOURS) if training == "+ experience" else None,
        **options,
    )
    streams = stream_training.batches(source.x, source.y, STREAMS, seed)
    updates = stream_training.train(maml, training, lr, seconds, streams, PLAIN_SHARE, WITHOUT_EXPERIENCE)
    if brief:
        check_adapter(maml, data.x, data.y)
    found: runs.Line = {"updates": updates, "skipped": maml.skipped_updates}
    if training != "plain":
        found["step_sizes"] = {name: round(float(value), 4) for name, value in maml.step_sizes.items()}
        if maml.experience is not None:
            found["experience_weight"] = round(float(maml.experience.weight.detach()), 4)
        predictions = {training: maml.predict(data.x, data.y, F.mse_loss)}
    else:
        valid = drawn(BRIEF if brief else VALID, "valid")

        def adapted(data: Streams, step_size: float) -> Tensor:
            return stream_training.adapted(model, data.x, data.y, step_size, **options)

        step_size = best({one: adapted(valid, one) for one in STEP_SIZES}, valid)
        lookup = best({one: looked_up(model, valid, *one) for one in LOOKUPS}, valid)
        found |= {"step_size": step_size, "lookup": lookup}
        with torch.no_grad():
            predictions = {"frozen": model(data.x)}
        predictions["plain + Adapter"] = adapted(data, step_size)
        predictions["lookup only"] = looked_up(model, data, *lookup)
    return {**found, "errors": {name: figures(data, y) for name, y in predictions.items()}}


def kalman(training: str, brief: bool) -> runs.Line:
    """The figures of the Kalman filter, which has the matrices and the mode of each step."""
    data = drawn(BRIEF if brief else TEST, "test")
    y = TASKS.kalman(data.tasks, data.observations.unsqueeze(1), data.modes.unsqueeze(1))[0]
    return {"errors": {training: figures(data, y[:, 0, FRAMES - 1 :].to(data.y))}}


def tables(results: runs.Runs, seeds: int = 5) -> list[runs.Table]:
    """Return the errors of all variants, and the differences of some."""
    errors = stream_training.errors_by_variant(results, TRAINED, seeds)
    bound = {line["settings"]["training"]: [line["errors"]["Kalman"]] for line in results.find(training="Kalman")}
    return [
        stream_training.error_table({**errors, **bound}, PARTS),
        stream_training.difference_table(errors, PARTS, DIFFERENCES),
    ]


def main() -> None:
    parser = runs.parser(__doc__, data=False)
    parser.add_argument("--seconds", type=float, default=75.0, help="CPU time of a training")
    flags = parser.parse_args()
    results = runs.Runs("switching_streams", flags.quick)
    if not flags.report:
        stream_training.run_all(results, run, TRAINED, flags, LRS)
        results.run(kalman, training="Kalman", brief=flags.quick)
    print(runs.show(tables(results, flags.seeds)))


if __name__ == "__main__":
    main()
