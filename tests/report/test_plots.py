import dataclasses
import warnings

import pytest
from matplotlib.image import imread

from peft_onelayer.records.files import whole_file
from peft_onelayer.records.ranking import LayerRanking, Sweep
from peft_onelayer.report import plots
from peft_onelayer.report.page import Subject, report_page
from peft_onelayer.report.plots import plot_profile, plot_ranking, plot_rewards

RANKING = LayerRanking(
    model="m",
    revision=None,
    num_layers=4,
    method="race",
    scores=[0.1, None, 0.3, 0.28],
    errors=[0.01, None, 0.02, 0.02],
    order=[2, 3, 0],
    tied=[2, 3],
    pick=2,
    learning_rate=3e-3,
    cost={},
    task="arithmetic",
    seed=0,
)


def coloured(path):
    """The distinct colours of a PNG's pixels."""
    image = (imread(path)[..., :3] * 255).round().astype(int)
    assert image.shape[0] > 300
    return {tuple(map(int, pixel)) for pixel in image.reshape(-1, 3)}


def test_rewards_stand_at_the_steps_that_logged_them(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    for steps in (None, [1, 5, 9]):
        plot_rewards([0.1, 0.2, 0.4], tmp_path / "reward.png", "title", steps=steps)
    assert [[list(line.get_xdata()) for line in axes.lines] for axes in drawn] == [[[1, 2, 3]] * 2, [[1, 5, 9]] * 2]


def test_plots_are_pngs_that_show_the_pick(tmp_path):
    plot_rewards([0.1, 0.2, 0.4], tmp_path / "reward.png", "title")
    plot_ranking(RANKING, tmp_path / "with.png", "title")
    plot_ranking(dataclasses.replace(RANKING, pick=None, tied=[]), tmp_path / "without.png", "title")
    orange = (0xD9, 0x73, 0x0D)
    assert len(coloured(tmp_path / "reward.png")) > 2
    assert orange in coloured(tmp_path / "with.png")
    assert orange not in coloured(tmp_path / "without.png")


def test_a_profile_joins_no_blocks_across_one_that_was_not_measured(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    sweep = Sweep([0.4, None, 0.9, 1.1], 0.2, 0.6, contribution_errors=[0.1, None, 0.1, 0.2], full_gain=[0.4, 0.1])
    plot_profile(dataclasses.replace(RANKING, sweep=sweep), tmp_path / "p.png", "title")
    plot_ranking(RANKING, tmp_path / "r.png", "title")
    (axes,) = drawn[0].axes
    line = axes.get_lines()[0]
    assert [None if y != y else y for y in line.get_ydata()] == sweep.contribution
    assert [int(tick) for tick in axes.get_xticks()] == [0, 2, 3]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert any("95 % intervals" in label for label in labels)
    assert any("95 % intervals" in text.get_text() for text in drawn[1].legends[0].get_texts())
    assert not any("from the mean" in text.get_text() for text in drawn[1].legends[0].get_texts())
    race = dataclasses.replace(RANKING, rounds={"2": [[4, 0.1, 0.1]]})
    plot_ranking(race, tmp_path / "r.png", "title")
    of_race = f"{plots.INTERVALS} of the difference from the mean"
    assert of_race in {text.get_text() for text in drawn[2].legends[0].get_texts()}
    assert plots.shown(race)[0] == "what each block gains, ± from the mean"
    assert "gain by race, ± from the mean" in report_page([Subject("a", ranking=race)])


def test_where_c_is_undefined_gains_are_drawn_against_that_of_all_parameters(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure.axes[0]))
    nothing = [None] * 4
    defined = Sweep([0.4, None, 0.9, 1.1], 0.2, 0.6, full_gain=[0.4, 0.1])
    lost = Sweep(nothing, 0.2, 0.1, contribution_errors=nothing, undefined="it lost", full_gain=[-0.1, 0.02])
    for sweep, what, values, full in (
        (defined, "layer contribution C of each block", defined.contribution, 1.0),
        (lost, "what each block gains", RANKING.scores, -0.1),
    ):
        plot_profile(dataclasses.replace(RANKING, method="sweep", sweep=sweep), tmp_path / "p.png", "title")
        line, *lines = drawn[-1].get_lines()
        assert [None if y != y else y for y in line.get_ydata()] == values and drawn[-1].get_ylabel() == what
        (every,) = [line for line in lines if line.get_label() == "every parameter trained"]
        assert list(every.get_ydata()) == [full, full]


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        (r"grpo on a$b^{c$", r"grpo on a$b^{c$"),
        (r"C:\tasks\_sums_%", r"C:\tasks\_sums_%"),
        ("two\n\tlines", "two lines"),
        ("数学 задача", "数学 задача"),
        ("a-long-name/" * 30, None),
    ],
)
def test_a_title_is_drawn_as_it_is_and_within_the_plot(tmp_path, monkeypatch, name, drawn):
    figures = []

    def save(figure, path):
        figures.append(figure)
        with whole_file(path) as partial:
            figure.savefig(partial, format="png")

    monkeypatch.setattr(plots, "_save", save)
    profile = dataclasses.replace(RANKING, sweep=Sweep([0.4, None, 0.9, 1.1], 0.2, 0.6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_rewards([0.1, 0.2], tmp_path / "a.png", name)
        plot_ranking(RANKING, tmp_path / "b.png", name)
        plot_profile(profile, tmp_path / "c.png", name)
    for figure in figures:
        title = figure.axes[0].title
        assert drawn is None or title.get_text() == drawn
        box = title.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and title.get_text().count("\n") <= 2
    assert all(coloured(tmp_path / f"{x}.png") for x in "abc")


def test_rewards_beyond_0_and_1_are_drawn_whole(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plot_rewards([-2.0, 3.0], tmp_path / "r.png", "title")
    low, high = drawn[0].axes[0].get_ylim()
    assert low <= -2 and high >= 3
