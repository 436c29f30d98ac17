"""Printed lines and the plot of the meta-RL jobs."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eaml_ext import _terminal
from eaml_ext.jobs import report
from eaml_ext.jobs.rl_config import UPDATES, RL2Config, RLConfig


def print_start(settings: RLConfig, reward_scale: float, limit: int | None, resumed: int | None) -> None:
    """Print the reward scale, a warning about lengths, and the number of updates of a run that goes on.

    Args:
        settings: of the run.
        reward_scale: of the learner.
        limit: most steps of an episode, if known.
        resumed: updates made so far, in a run that goes on.
    """
    source = "auto: 1 / root mean square of the discounted returns of random actions"
    print(f"Reward scale: {reward_scale:g} ({source if settings.reward_scale == 'auto' else 'given'})")
    warning = "" if limit is None else length_warning(settings, limit)
    if warning:
        print(warning)
    if resumed is not None:
        print(f"Resumed after {resumed} of {settings.num_epochs * UPDATES} updates.")


def length_warning(settings: Any, limit: int) -> str:
    """Return a warning where recordings of training and evaluation differ in length, else an empty string.

    A rollout of maml, whose state is zeroed at each episode, only differs where it is shorter than an episode.

    Args:
        settings: of the run.
        limit: most steps of an episode.

    >>> length_warning(RL2Config(steps=1500, episodes=3), 500)
    ''
    """
    if isinstance(settings, RL2Config):
        longest = settings.episodes * limit
        recording, evaluated = "trial", f"trial up to {settings.episodes} x {limit} ="
    else:
        longest, recording, evaluated = limit, "rollout", "episode up to"
    if settings.steps == longest or (recording == "rollout" and settings.steps > longest):
        return ""
    text = f"a training {recording} has {settings.steps} steps, an evaluated {evaluated} {longest}"
    return f"Warning: {text}; --steps {longest} makes them equal."


def epoch_line(settings: Any, epoch: int, returns: Sequence[float]) -> str:
    """Return the line of an epoch.

    Args:
        settings: of the run.
        epoch: its number, from 0.
        returns: return per episode of its updates; NaN for skipped ones.
    """
    known = [value for value in returns if not math.isnan(value)]
    text = f"{sum(known) / len(known):.4g}" if known else "all updates were skipped"
    return f"Epoch {epoch}, {value_name(settings)}: {text}"


def value_name(settings: Any) -> str:
    """Return the name of the value of an update."""
    if isinstance(settings, RL2Config):
        return f"Return per episode in trials of {settings.steps} steps"
    return f"Return per episode after adaptation in rollouts of {settings.steps} steps"


def table(results: dict[str, Any]) -> str:
    """Return the table of the returns in a report, and the number of skipped updates if there are any."""
    columns = {**results["baselines"], **results["returns"]}
    rows = [["", "mean", "95 % +-", "median"], *([name, *report.cells(row, 1)] for name, row in columns.items())]
    lines = [f"Return on {results['settings']['test_tasks']} held-out tasks:"]
    lines += _terminal.table(rows, first=24, width=10)
    if results["skipped_updates"]:
        lines.append(f"{results['skipped_updates']} updates were skipped: their data or gradients were not finite.")
    return "\n".join(lines)


def plot(path: str | Path, settings: RLConfig, results: dict[str, Any]) -> None:
    """Plot the learning curve, and the returns on held-out tasks with 95 % intervals: see ``report.save_figure``."""
    report.save_figure(path, lambda left, right: _draw(left, right, settings, results))


def _draw(left: Any, right: Any, settings: RLConfig, results: dict[str, Any]) -> None:
    curve = results["curve"]
    left.plot(range(1, len(curve) + 1), curve)
    left.xaxis.get_major_locator().set_params(integer=True)
    recording = value_name(settings).removeprefix("Return per episode ")
    left.set(xlabel="update", ylabel="return per episode", title=f"meta-training: {recording}")
    names = [*results["returns"]]
    rows, ticks = [results["returns"][name] for name in names], list(range(1, len(names) + 1))
    if not isinstance(settings, RL2Config):  # the first point of the adaptation curve
        rows, ticks = [results["baselines"]["unadapted policy"], *rows], [0, *ticks]
    means = [row["mean"] for row in rows]
    report.draw_band(right, ticks, means, [row["interval"] for row in rows], "adapted policy", marker="o")
    for style, (name, row) in zip(("--", ":"), results["baselines"].items(), strict=True):
        right.axhline(row["mean"], color="0.4", linestyle=style, label=name)
        if row["interval"] is not None:
            right.axhspan(row["mean"] - row["interval"], row["mean"] + row["interval"], color="0.4", alpha=0.15, lw=0)
    right.set(
        xticks=ticks,
        xlabel="episode of a trial" if isinstance(settings, RL2Config) else "gradient steps",
        ylabel="return (mean and 95 % interval)",
        title=f"held-out tasks of {settings.env_name}, seed {settings.seed}",
    )
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
