"""The main job's dynamics as streams: how does StreamMAML compare with the job's adaptation to a few transitions?

    python -m benchmarks.experiments.main_job_streams [--quick] [--report]

The main job meta-trains a dynamics model by MetaMAML. It adapts the model to the first ten transitions of a held-out
CartPole by 105 gradient steps, and measures the error on the next 64. Here the same model reads the same transitions of
the same tasks as one stream, and keeps its state. After every five transitions, its output layer, last norm and core's
output projection take one gradient step. The inputs are observation, action and the start of an episode. The targets
are steps of the observation in the job's units, so copying the input has an error near 1.

| variant | training | on a held-out task |
|---|---|---|
| frozen | plain, on the streams | no update; the state alone adapts |
| plain + Adapter | plain | gradient steps, the best of five step sizes on validation |
| first order | StreamMAML, first_order=True | its updates |
| second order | StreamMAML | its updates |
| job: ... | MetaMAML | as in benchmarks/results/main_job.json |

"After 10 transitions" is the error that the job reports. Trainings of this experiment have equal CPU time, less than
the job's, and begin with plain updates. The learning rate is the best of four on validation tasks, each after a
shorter training with another seed. Results depend on the speed of the machine, because trainings end by time.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import RESULTS, load
from benchmarks.experiments import runs, stream_training
from benchmarks.experiments.stream_training import STEP_SIZES, TUNING_SEED, check_adapter
from eaml_ext.jobs.config import DynamicsConfig
from eaml_ext.jobs.world_model import DynamicsModel, model_data
from eaml_ext.meta import StreamMAML
from eaml_ext.rl import collect
from eaml_ext.tasks import make_tasks

JOB = DynamicsConfig()
TASKS = make_tasks(JOB.env_name)
CHUNK = 5  # transitions between updates; divides JOB.shots
TRAIN, BRIEF = 4096, 16  # tasks
STREAMS = 32  # of an update
FAST = ("ssm.head", "ssm.norm", "ssm.cores.0.out_proj")
INNER_LR = 0.03
PLAIN_SHARE = 0.1
LRS = (5e-3, 1e-2, 2e-2, 4e-2)
TRAINED = {
    "plain": ("frozen", "plain + Adapter"),
    "first order": ("first order",),
    "second order": ("second order",),
}
"""The variants at test time of each training."""
PARTS = {"mean": "after 10 transitions", "whole": "whole stream"}
DIFFERENCES = (
    ("second order", "plain + Adapter"),
    ("second order", "first order"),
    ("second order", "job: plain"),
    ("second order", "job: best_fit"),
)


class StreamedDynamics(DynamicsModel):
    """The job's model with the ``scan`` that a stream needs."""

    def scan(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Predict the steps ``(batch, time, obs_dim)`` from a state; return the next state too."""
        inputs = self.in_units(x)
        return self.ssm.scan(inputs[..., :-1], state, reset=inputs[..., -1] > 0.5)


def new_model(seed: int) -> StreamedDynamics:
    """The job's model and units."""
    torch.manual_seed(seed)
    model = StreamedDynamics(TASKS.obs_dim, TASKS.action_dim, JOB.hidden_dim, JOB.state_size, JOB.num_layers)
    model.normalise(collect(TASKS, TASKS.sample(64, "valid", seed), 64, seed))
    return model


@functools.lru_cache
def transitions(count: int, split: str, seed: int) -> Any:
    """The transitions of a split's tasks, of which the job uses those of "test"."""
    return collect(TASKS, TASKS.sample(count, split, seed), JOB.shots + JOB.query, seed)


def figures(y: Tensor, target: Tensor) -> dict[str, Any]:
    """The mean error of each of ``PARTS``, and by transition."""
    errors = (y - target).square().mean((0, 2))
    return {
        "mean": round(float(errors[JOB.shots :].mean()), 6),
        "whole": round(float(errors.mean()), 6),
        "by_transition": [round(v, 5) for v in errors.tolist()],
    }


def run(training: str, lr: float, seed: int, seconds: float, split: str, brief: bool) -> runs.Line:
    """Train, choose the step size of the Adapter on validation, return the figures of each variant on ``split``."""
    model = new_model(seed)
    options: dict[str, Any] = {"chunk_size": CHUNK, "parameters": FAST}
    maml = StreamMAML(model, INNER_LR, lr, training == "first order", **options)
    x, y = model_data(transitions(BRIEF if brief else TRAIN, "train", seed), model)
    streams = stream_training.batches(x, y, STREAMS, seed)
    updates = stream_training.train(maml, training, lr, seconds, streams, PLAIN_SHARE)
    count = BRIEF if brief else JOB.test_tasks
    x, y = model_data(transitions(count, split, seed), model)
    if brief:
        check_adapter(maml, x, y)
    found: runs.Line = {"updates": updates, "skipped": maml.skipped_updates}
    if training != "plain":
        found["step_sizes"] = {name: round(float(value), 4) for name, value in maml.step_sizes.items()}
        predictions = {training: maml.predict(x, y, F.mse_loss)}
    else:
        valid = model_data(transitions(count, "valid", TUNING_SEED), model)
        tried = {one: figures(stream_training.adapted(model, *valid, one, **options), valid[1]) for one in STEP_SIZES}
        found["step_size"] = min(tried, key=lambda one: (tried[one]["mean"] != tried[one]["mean"], tried[one]["mean"]))
        with torch.no_grad():
            predictions = {"frozen": model.scan(x)[0]}
        predictions["plain + Adapter"] = stream_training.adapted(model, x, y, found["step_size"], **options)
    return {**found, "errors": {name: figures(value, y) for name, value in predictions.items()}}


def job_errors(seeds: int) -> dict[str, list[dict[str, Any]]]:
    """The errors of the main job's variants by seed, from its result file."""
    table = load(RESULTS / "main_job.json")["runs"]
    return {f"job: {name}": [{"mean": row["mean"]} for row in rows[:seeds]] for name, rows in table.items()}


def tables(results: runs.Runs, seeds: int = 5) -> list[runs.Table]:
    """Return the errors of all variants, those of the job among them, and the differences of some."""
    errors = stream_training.errors_by_variant(results, TRAINED, seeds) | job_errors(seeds)
    return [stream_training.error_table(errors, PARTS), stream_training.difference_table(errors, PARTS, DIFFERENCES)]


def main() -> None:
    parser = runs.parser(__doc__, data=False)
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU time of a training")
    flags = parser.parse_args()
    results = runs.Runs("main_job_streams", flags.quick)
    if not flags.report:
        stream_training.run_all(results, run, TRAINED, flags, LRS)
    print(runs.show(tables(results, flags.seeds)))


if __name__ == "__main__":
    main()
