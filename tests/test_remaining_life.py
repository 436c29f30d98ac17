"""The experiment on remaining useful life: its data, its scores, and labels that no prediction may depend on."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # last, so as not to hide an installed eaml_ext

from benchmarks.experiments import remaining_life, turbofan

SEED = 3


def write_files(directory: Path, ends: list[int]) -> Path:
    """Write files in the format of C-MAPSS: 24 training engines, and a test engine for each of ``ends``."""
    generator = torch.Generator().manual_seed(0)
    for part, engines in (("train", 24), ("test", len(ends))):
        lines = []
        for unit in range(1, engines + 1):
            for cycle in range(1, 40 + unit % 5):
                sensors = (torch.randn(21, generator=generator) + cycle / 40).tolist()
                lines.append(" ".join(map(str, [unit, cycle, 0.0, 0.0, 100.0, *sensors])))
        (directory / f"{part}_FD001.txt").write_text("\n".join(lines) + "\n")
    (directory / "RUL_FD001.txt").write_text("\n".join(map(str, ends)) + "\n")
    return directory


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return write_files(tmp_path_factory.mktemp("fd001"), [12, 130, 7])


def test_read_counts_remaining_cycles_to_the_last_row(files):
    train, test = turbofan.read(files)
    assert len(train.sensors) == 24 and train.sensors[0].shape == (40, 14)
    assert train.remaining[0].tolist() == list(range(39, -1, -1))
    assert [int(r[-1]) for r in test.remaining] == [12, 130, 7]
    assert int(test.remaining[1][0]) == 130 + len(test.sensors[1]) - 1


def test_split_engines_are_disjoint_and_scale_ignores_held_out(files):
    train, _ = turbofan.read(files)
    fitted, held_out = turbofan.split(train, SEED)
    assert len(held_out.sensors) == 20 and len(fitted.sensors) == 4
    assert {id(s) for s in fitted.sensors}.isdisjoint({id(s) for s in held_out.sensors})
    before = turbofan.scale(fitted)
    for sensors in held_out.sensors:
        sensors += 1e6
    assert torch.equal(turbofan.scale(turbofan.split(train, SEED)[0]).mean, before.mean)


def test_batch_target_is_the_next_row_and_the_capped_label(files):
    _, test = turbofan.read(files)
    x, y, lengths = turbofan.batch(test, turbofan.scale(test), labels=True)
    length = int(lengths[1])
    assert torch.equal(y[1, : length - 1, turbofan.NEXT], x[1, 1:length, :14])
    assert y[1, :length, turbofan.HAS_NEXT].tolist() == [1.0] * (length - 1) + [0.0]
    assert y[1, 0, turbofan.LABEL] == 0.5  # 130 cycles or more are cut at 125
    assert y[0, int(lengths[0]) - 1, turbofan.LABEL] == pytest.approx(12 / 125 - 0.5)
    assert not y[..., turbofan.SHOWN].any()
    hidden = turbofan.batch(test, turbofan.scale(test), labels=False)
    assert all(hidden.y[i, : int(n), turbofan.LABEL].isnan().all() for i, n in enumerate(lengths))


def test_scores_match_their_formulas():
    predicted, remaining = torch.tensor([30.0, 0.0]), torch.tensor([10.0, 151.0])
    found = turbofan.scores(predicted, remaining)
    assert found["rmse"] == pytest.approx(math.sqrt((20**2 + 125**2) / 2), abs=1e-3)
    assert found["rmse uncapped"] == pytest.approx(math.sqrt((20**2 + 151**2) / 2), abs=1e-3)
    assert found["score"] == pytest.approx(math.expm1(2) + math.expm1(125 / 13), rel=1e-5)


@pytest.fixture
def short_chunks(monkeypatch):
    monkeypatch.setattr(remaining_life, "CHUNK", 16)


def test_chunks_show_labels_and_end_with_the_failure(files):
    train, _ = turbofan.read(files)
    fitted = turbofan.batch(train, turbofan.scale(train), labels=True)
    x, y, owners = turbofan.chunks(fitted, 16)
    last = int(fitted.lengths[5])
    assert owners.bincount().tolist() == (fitted.lengths // 16).tolist()
    assert torch.equal(x[owners == 5][-1], fitted.x[5, last - 16 : last])
    assert y[..., turbofan.SHOWN].all() and not fitted.y[..., turbofan.SHOWN].any()
    assert y[owners == 5][-1, -1, turbofan.LABEL] == -0.5


def test_predictions_do_not_depend_on_labels_or_later_rows(files, tmp_path, short_chunks):
    other = remaining_life.Experiment(write_files(tmp_path, [90, 1, 44]))
    experiment = remaining_life.Experiment(files)
    model, fitted, scored = untrained(experiment)
    _, others, _ = other.engines("test", SEED)
    cut = turbofan.Batch(scored.x.clone(), scored.y.clone(), scored.lengths)
    cut.x[:, 37:], cut.y[:, 36:] = 0, 0
    for predict in predictors(model, fitted):
        found = predict(scored)
        assert torch.equal(predict(others), found)
        assert torch.equal(predict(cut)[:, :37], found[:, :37])


def test_adapted_changes_predictions_after_the_first_chunk_only(files, short_chunks):
    model, _, scored = untrained(remaining_life.Experiment(files))
    plain, adapted = remaining_life.frozen(model, scored), remaining_life.adapted(model, scored, 0.1)
    chunk = remaining_life.CHUNK
    torch.testing.assert_close(adapted[:, :chunk], plain[:, :chunk], rtol=0, atol=1e-3)
    assert (adapted[:, chunk:] - plain[:, chunk:]).abs().max() > 0.05


@pytest.mark.parametrize("training", remaining_life.TRAININGS)
def test_run_trains_and_scores_all_variants_of_a_training(files, short_chunks, training):
    line = remaining_life.Experiment(files, (0.1, 0.1)).run(training, "test", SEED)
    assert tuple(line["variants"]) == remaining_life.TRAININGS[training]
    assert all(math.isfinite(score["rmse"]) for score in line["variants"].values())
    assert (line["updates"][1] > 0) == (training != "start")


def untrained(experiment):
    torch.manual_seed(0)
    fitted, scored, _ = experiment.engines("test", SEED)
    return remaining_life.make_model(), fitted, scored


def predictors(model, fitted):
    return [
        lambda scored: remaining_life.frozen(model, scored),
        lambda scored: remaining_life.adapted(model, scored, 0.1),
        lambda scored: remaining_life.looked_up(model, scored, fitted),
        *(stream_predictor(model, fitted, training) for training in ("second order", "experience")),
    ]


def stream_predictor(model, fitted, training):
    maml = remaining_life.make_stream(model, training)
    return lambda scored: remaining_life.streamed(maml, scored, fitted)
