import dataclasses

from matplotlib.image import imread

from peft_onelayer.records.ranking import LayerRanking
from peft_onelayer.report.plots import plot_ranking, plot_rewards

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


def test_plots_are_pngs_that_show_the_pick(tmp_path):
    plot_rewards([0.1, 0.2, 0.4], tmp_path / "reward.png", "title")
    plot_ranking(RANKING, tmp_path / "with.png", "title")
    plot_ranking(dataclasses.replace(RANKING, pick=None, tied=[]), tmp_path / "without.png", "title")
    orange = (0xD9, 0x73, 0x0D)
    assert len(coloured(tmp_path / "reward.png")) > 2
    assert orange in coloured(tmp_path / "with.png")
    assert orange not in coloured(tmp_path / "without.png")
