"""Write docs/results.md from the files in benchmarks/results: python -m benchmarks.results_page [--check].

One function per experiment returns the text and the table of its section. A section without a file has the command that
makes it. The page computes only means and ratios of the numbers in the files. --check writes nothing and fails where
the page differs from the files.
"""

import argparse
import math
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from benchmarks.common import RESULTS, load
from benchmarks.experiments.runs import Runs, show

PAGE = RESULTS.parents[1] / "docs" / "results.md"
HEAD = """# Results of the experiments

`python -m benchmarks.results_page` makes this page from the files in `benchmarks/results`; every file records the
settings of its command and the machine. The tables have all variants of an experiment, also those that lose. "±" is
half the width of a 95 % interval unless a section states another; errors are mean squared. `make experiments` runs
every experiment on a small budget and one seed, in minutes; `make experiments-full` makes the files.
"""

Section = tuple[str, Sequence[str], list[Sequence[str]], str]  # prose, head and rows of a table, caption of a plot


def result(name: str) -> Any:
    """The contents of the result file of a name, with or without the CPU in it; None without a file."""
    for path in sorted(RESULTS.glob(f"{name}*.json")):
        found = load(path)
        if path.stem in (name, f"{name}-{found['machine']['cpu']}"):
            return found
    return None


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def pm(mean: float, half: float, digits: int = 3) -> str:
    if not abs(mean) < 1e4:
        return "diverged"
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def main_job(found: Any) -> Section:
    """Held-out CartPoles: error of the dynamics model, return of a planner."""
    rows: list[Sequence[str]] = []
    for name in dict.fromkeys([*found["returns"], *found["variants"]]):
        error, acted = found["variants"].get(name), found["returns"].get(name)
        cells = [pm(error["mean"], error["half"], 4), f"{error['median']:.4f}"] if error else ["", ""]
        rows.append([name, *cells, pm(acted["mean"], acted["half"], 1) if acted else ""])
    text = f"""Dynamics of held-out CartPoles after a few shots; physics differ between tasks, and half of the tasks
        flip the action. The table has the error, and the return of a planner with the model of each variant.
        {len(found["seconds"])} seeds, {statistics.median(found["seconds"]):.0f} s each."""
    return text, ["variant", "error", "median over tasks", "return"], rows, ""


def sinusoid(found: Any) -> Section:
    """MAML's sinusoids."""
    shown = (0, 1, 5, 10)
    rows: list[Sequence[str]] = []
    for name, one in found["settings"].items():
        cells = [pm(one["mean"][s], one["spread"][s]) for s in shown]
        rows.append([name, str(len(one["runs"])), *cells])
    rows.append(["the paper: 5 shots, 1 step", "1", "", "0.67", "0.38", "0.35"])
    text = f"""Error on {found["test_tasks"]} unseen tasks after 0, 1, 5 and 10 gradient steps, 15,000
        meta-updates; ± the standard deviation over seeds."""
    return text, ["training", "seeds", *(f"{s} steps" for s in shown)], rows, "error over gradient steps"


def noisy_sinusoid(found: Any) -> Section:
    """Noisy sinusoids: does experience help?"""
    settings = {name: one for name, one in found["settings"].items() if one.get("variants")}
    variants = list(next(iter(settings.values()))["variants"])
    rows: list[Sequence[str]] = []
    for name, one in settings.items():
        cells = [pm(one["variants"][variant]["mean"], one["variants"][variant]["half"]) for variant in variants]
        rows.append([name, str(len(one["runs"])), *cells])
    text = """A meta-trained MLP adapts to K noisy points of a new task, with a memory of past tasks. Every variant
        starts from the same parameters; its number of steps and the weight of its experience are
        chosen on other tasks.
        `retrieved` also takes steps on the points of the five past tasks whose adapted models fit the K
        points best. `lookup only` is the mean of those models, without a step. `oracle` takes steps on
        100 points of the same task."""
    return text, ["setting", "seeds", *variants], rows, "error over points of the new task, per variant"


def hidden_rotation(found: Any) -> Section:
    """Hidden rotation: which model finds it?"""
    rows: list[Sequence[str]] = []
    for name, row in found["errors"].items():
        about = found["models"].get(name)
        size = f"{about['parameters']}" if about else ""
        cells = [pm(c["mean"], c["half"], 4) for c in (*row.values(), found["above Kalman"][name])]
        rows.append([name, size, *cells])
    heads = list(next(iter(found["errors"].values())))
    text = """The systems are linear with a hidden state of four coordinates; an observation is two mixtures of
        them. Every run has its own system. The table has the error of the next frame over unseen systems.
        `late` is the error from step 52 on.
        The last column is the error above that of the Kalman filter with the true parameters, paired."""
    return text, ["model", "parameters", *heads, "above Kalman"], rows, "error over steps seen"


def switching_lds(found: Any) -> Section:
    """Switching regimes: shock and recovery."""
    parts = ("shock", "steady", "whole")
    rows: list[Sequence[str]] = []
    for name, row in found["errors"].items():
        paired = found["minus retrieved"][name]["shock"]
        cells = [pm(row[p]["mean"], row[p]["half"], 4) for p in parts]
        rows.append([name, *cells, pm(paired["mean"], paired["half"], 4)])
    text = """A system switches between three hidden rotations. An SSM predicts along one long run and adapts to it.
        `shock` is the error in the 64 steps after a switch, `steady` the later error. Four variants also adapt to
        four past chunks of the run. `recent` takes the last ones, `uniform` any, `oracle` the latest of the true
        regime, and `retrieved` those whose parameters predict the last batch best. `lookup-only` takes the parameters
        of the best chunk without a step. The last column is the variant's error in the shock minus
        that of `retrieved`, paired by system."""
    return text, ["variant", *parts, "shock, minus retrieved"], rows, "error over steps since the regime switched"


def cartpole_rl(found: Any) -> Section:
    """Meta-RL on CartPole."""
    rows: list[Sequence[str]] = []
    for name, row in found["table"].items():
        cells = [f"{m:.0f} ± {h:.0f}" for m, h in zip(row["mean"], row["half"], strict=True)]
        rows.append([name, str(row["parameters"]), str(row["seeds"]), *cells, f"{row['cpu_seconds']:.0f}"])
    episodes = len(next(iter(found["table"].values()))["mean"])
    text = """CartPole with the action's sign flipped in half of the tasks and velocities hidden. The table has the
        return of each episode of a trial on unseen tasks, at most 500. The budget is equal for all, and each has the
        better of two learning rates. `frames` gets the last four inputs, and `ssm` is Mamba's block. `+ feedforward`
        encloses the core in perceptrons, and the step sizes of that `s6` start at 0.1 or above. These two options
        were chosen for `s6` in 17 more runs on other seeds, a search that no other variant had. The adapter takes
        guarded steps of policy gradient between the episodes of a trial."""
    head = ["policy", "parameters", "seeds", *(f"episode {i + 1}" for i in range(episodes)), "CPU seconds"]
    return text, head, rows, "return over environment steps"


def adaptation(found: Any) -> Section:
    """A stream with corrupted targets."""
    rows: list[Sequence[str]] = []
    for s in found["streams"]:
        e, bare = s["errors"], s["without guards"]["errors"]
        worst, astray = max(e[1:]), "NaN" if any(map(math.isnan, bare)) else f"{max(bare):.3g}"
        cells = [f"{e[0]:.4f}", f"{worst:.4f} ({worst / e[0]:.2f}x)", f"{e[-1]:.4f} ({e[-1] / e[0]:.2f}x)", astray]
        rows.append([str(s["seed"]), *cells, str(s["corrupted"]), str(s["rollbacks"])])
    head = ["seed", "before", "worst after", "last", "worst without guards", "corrupted", "rollbacks"]
    text = """10,000 adaptation steps of the default SSM on an unseen linear system. 1 % of the batches have corrupted
        targets (NaN, a factor of 1e4, the other sign, noise). The error is measured on clean held-out runs
        every 100 steps; factors are relative to the error before the stream. The run without guards has
        1,000 steps. A clean batch with an unusual loss causes a
        rollback, too. Parameters are finite after every step."""
    return text, head, rows, ""


def adaptation_step(found: Any) -> Section:
    """The cost of an adaptation step."""
    rows = [
        [shape, *(f"{1e3 * t[part]:.2f}" for part in ("forward", "gradient", "adapt"))]
        for shape, t in found["seconds"].items()
    ]
    memory = found["bytes"]
    text = f"""Milliseconds of one step of the default SSM on one thread, with all guards. Over 20,000 steps the
        process grows by {found["bytes grown"] / 1024:.0f} kB. The whole main job takes
        {(memory["main job"] - memory["its imports"]) / 2**20:.0f} MB over the
        {memory["its imports"] / 2**20:.0f} MB of its imports."""
    return text, ["states", "forward", "loss and gradient", "`Adapter.adapt`"], rows, ""


def soak(found: Any) -> Section:
    """Memory along a million steps."""
    text = f"""{found["gradient steps"]:,} gradient steps, with a memory that is written and searched at every call,
        and {found["rollbacks"]:,} rollbacks of corrupted batches. The table has resident memory after
        warming up, and after each tenth of the rest."""
    return text, [str(i) for i in range(len(found["MB"]))], [[f"{mb:.1f} MB" for mb in found["MB"]]], ""


def meta(found: Any) -> Section:
    """Speed of a meta-update."""
    one = found["sinusoid"]
    rows: list[Sequence[str]] = [
        [
            "sinusoid MLP, 25 tasks x 5 steps",
            f"{1e3 * one['eager']:.1f}",
            f"{1e3 * one['compiled']:.1f} ({one['compilation']:.0f} s)",
            f"{one['by hand'] / one['eager']:.1f}x / {one['by hand'] / one['compiled']:.1f}x",
            "",
        ]
    ]
    for s in found["shapes"]:
        rows.append(
            [
                f"SSM, {s['shape'][0]} tasks x {s['shape'][1]} steps",
                f"{1e3 * s['ours']:.1f}",
                f"{1e3 * s['compiled']:.1f} ({s['compilation']:.0f} s)",
                f"{s['loop over both'] / s['ours']:.1f}x / {s['loop over both'] / s['compiled']:.1f}x",
                f"{s['vmapped loop'] / s['ours']:.1f}x / {s['vmapped loop'] / s['compiled']:.1f}x",
            ]
        )
    head = ["second-order meta-update", "ms", "compiled, ms", "over the Python loop", "over the loop under vmap"]
    text = """The times are for one thread; compilation takes the seconds in brackets. The peers run the scan of an
        SSM as a Python loop, and the tasks one after another or under vmap. The last columns have two
        speed-ups each, in eager mode and with `compile=True`."""
    return text, head, rows, ""


def inner_steps(found: Any) -> Section:
    """Time and memory of long inner loops."""
    memories = ("reverse_over_reverse", "recompute", "forward_over_reverse")
    rows: list[Sequence[str]] = []
    for row in found["rows"]:
        times = [f"{row[f'time {memory}']:.2f}x" for memory in memories[1:]]
        peaks = [f"{row[f'bytes {memory}'] / 2**20:.0f} MB" for memory in memories]
        rows.append([row["case"], str(row["inner steps"]), *times, *peaks])
    head = ["second-order meta-gradient", "inner steps", "time: recompute", "forward over reverse"]
    head += ["peak memory: graph", "recompute", "forward over reverse"]
    text = """`MetaMAML(memory=)` computes one gradient from the graph of all inner steps, by recomputing one step at a
        time, or by forward mode over reverse mode. Times are those of one thread, in units of the graph's. Both sweeps
        do the work of each step twice and lose in time. Their memory grows by the adapted parameters of all tasks per
        step, so a small model with few data gains little."""
    return text, head, rows, ""


def stream(found: Any) -> Section:
    """Time of training through the updates along a stream."""
    names = [name for name in found["rows"][0]["seconds"] if name != "plain"]
    rows: list[Sequence[str]] = []
    for row in found["rows"]:
        hidden, layers, streams, time, chunk = row["shape"]
        plain = row["seconds"]["plain"]
        size = f"{hidden} x {layers}, {streams} x {time}, {chunk}"
        rows.append([size, f"{1e3 * plain:.0f}", *(f"{row['seconds'][name] / plain:.2f}x" for name in names)])
    text = """An outer step of `StreamMAML`, in units of a step of plain training, which runs each stream in one call.
        "in chunks" is plain training with a call per chunk. The fast weights are those behind the scan (output layer,
        last norm, output projection) or all parameters. `recompute` keeps one chunk's graph at a time, and "reference"
        has the scan's formula in plain PyTorch. Small models and short chunks pay for the calls."""
    return text, ["width x layers, streams x steps, chunk", "plain, ms", *names], rows, ""


SECTIONS: dict[str, tuple[str, str, Callable[[Any], Section]]] = {  # title: module, file, what to say of it
    "The main job": ("benchmarks.main_job", "main_job", main_job),
    "MAML's sinusoids": ("benchmarks.experiments.sinusoid", "sinusoid", sinusoid),
    "Noisy sinusoids, with experience": ("benchmarks.experiments.noisy_sinusoid", "noisy_sinusoid", noisy_sinusoid),
    "A hidden rotation": ("benchmarks.experiments.hidden_rotation", "hidden_rotation", hidden_rotation),
    "Switching regimes": ("benchmarks.experiments.switching_lds", "switching_lds", switching_lds),
    "Meta-RL on CartPole": ("benchmarks.experiments.cartpole_rl", "cartpole_rl-flip-position-v1", cartpole_rl),
    "A corrupted stream": ("benchmarks.adaptation", "adaptation", adaptation),
    "The cost of adaptation": ("benchmarks.adaptation_step", "adaptation-step-1-thread", adaptation_step),
    "A million steps": ("benchmarks.soak", "soak", soak),
    "Speed of meta-updates": ("benchmarks.meta", "meta-1-thread", meta),
    "Training through the updates of a stream": ("benchmarks.stream", "stream-1-thread", stream),
    "Long inner loops": ("benchmarks.inner_steps", "inner_steps-1-thread", inner_steps),
}


EXPERIMENTS: dict[str, tuple[str, str]] = {  # of files with a line a run; title: module with flags, text
    "Forecasting ETTh1, ETTh2 and Exchange": (
        "forecasting --data DIR",
        """96 values to 96 values, every test window, standardised by the training part. The model is one linear map
        around a learned daily cycle. It is updated every 96 steps on targets that are known by then. The input of
        `frozen` is 96 values; the others also use the past through their updates, or 336 values where their names
        have them. "chosen" is the variant of least validation error. The bound is the best fixed linear map for the
        test part itself. Published rows are those at look-back 96. TAFAS and PETSA split ETT as 60/20/20 %; their
        rows were read from an index of results, not from the papers. Exchange stays above the last value and the best
        published row.""",
    ),
    "Remaining life of turbofan engines": (
        "remaining_life --data DIR",
        """C-MAPSS FD001: the remaining cycles of 100 test engines, labels cut at 125 and uncut, RMSE and NASA's score.
        The model is a Mamba SSM that reads an engine once. `start` is the common plain training of 40 seconds; every
        variant trains for 15 more. Updates are on the next sensors of the engine itself. "+ experience" also steps on
        labelled chunks of similar training engines. The updates move the error by less than 0.01. No variant is better
        than `start`. The intervals of the differences from `frozen` contain 0, except those of "+ experience" and
        "lookup only". In the published rows FC-STGNN and the earlier code base cut test labels at 125; those of the
        others are not known.""",
    ),
    "Streams whose system switches": (
        "switching_streams",
        """A linear system alternates between two hidden rotations of its own, every 128 steps on average, so systems
        return. An SSM predicts the next observation; its output layer, last norm and output projection are updated
        every 16 steps. Errors are in variances of an observation, on the same 256 unseen systems for all seeds. All
        trainings have 75 CPU seconds; learning rates and step sizes are chosen on validation. The settings of the
        task were chosen on validation too, after a look at second order; with faster switches and more noise it did
        not help. An update with experience costs more, so its training has fewer. The Kalman filter has the true
        matrices and modes.""",
    ),
    "New dynamical systems": (
        "dynamical_systems",
        """A neural vector field adapts to new parameters of a system from one trajectory, by a context of few numbers.
        Errors are those of whole trajectories from new initial states, in the training environments (in domain) and
        in new ones. Every variant has 100 CPU seconds of training. `joint` trains the contexts with the field, as
        CoDA does; first and second order are MetaMAML on the context. Rows marked "unconfirmed" were not read in the
        papers' tables. The true field has an error because the published solver has a tolerance of 1e-3. On the
        oscillator no variant reaches CoDA or NCF-t2, and second order is not better than joint contexts. It ran on a
        slower CPU than Lotka-Volterra, so its trainings made fewer updates.""",
    ),
    "The main job as streams": (
        "main_job_streams",
        """The model of the [main job](command-line.md) reads the transitions of a task as one stream. It takes one
        gradient step on its last layers after every five transitions; the job takes 105 steps on the first ten.
        Trainings have 40 CPU seconds. The rows "job" are those of the main job, which trains longer.""",
    ),
}


def lines_section(command: str, text: str) -> str:
    """The section of an experiment whose file has a line a run."""
    name = command.partition(" ")[0]
    store, module = Runs(name), import_module(f"benchmarks.experiments.{name}")
    if not store.lines:
        return "Not run yet.\n"
    return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False) + "\n\n" + show(module.tables(store))


def page() -> str:
    """The whole text."""
    parts = [HEAD]
    for title, (command, text) in EXPERIMENTS.items():
        parts += [f"## {title}\n\n`python -m benchmarks.experiments.{command}`\n", lines_section(command, text)]
    for title, (module, name, section) in SECTIONS.items():
        parts.append(f"## {title}\n\n`python -m {module}`\n")
        found = result(name)
        if found is None:
            parts.append("Not run yet.\n")
            continue
        text, head, rows, caption = section(found.get("results", found))
        parts += [textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False) + "\n", table(head, rows) + "\n"]
        if caption:
            parts.append(f"![{caption}](../benchmarks/results/{name}.png)\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        if not PAGE.exists() or PAGE.read_text() != page():
            raise SystemExit(f"{PAGE.name} is not what benchmarks/results say: run python -m benchmarks.results_page")
        return
    PAGE.write_text(page())
    print(PAGE)


if __name__ == "__main__":
    main()
