"""Pictures of rankings: that they show what the rankings say."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr

from pad.difficulty.ranking import Ranking
from pad.errors import InputError
from pad.experts.curriculum import Curriculum
from pad.show import difficulty as plots
from pad.show.figures import draw_figure


def ranking(sizes, seed=0, scores=True, kind=torch.rand) -> Ranking:
    """Of classes of these sizes, whose images lie in the data set in random order (the same for every seed)."""
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(99))]
    values = kind(len(labels), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    made = Ranking.from_scores(values, labels, len(sizes), {})
    return made if scores else Ranking(made.rows, None, {})


def names(count):
    return [f"class {c}" for c in range(count)]


# ---- correlation


def test_rank_correlation_against_scipy():
    sizes = [7, 1, 30, 2, 1, 12]
    rankings = {name: ranking(sizes, seed, scores=seed != 1) for seed, name in enumerate(["a", "b", "c", "d"])}
    places = {  # which place each image has, by loops
        name: [[row.tolist().index(image) for image in sorted(row.tolist())] for row in made.rows]
        for name, made in rankings.items()
    }
    wanted = [
        [np.mean([spearmanr(x, y).statistic for x, y in zip(places[a], places[b]) if len(x) > 1]) for b in rankings]
        for a in rankings
    ]
    found = plots.rank_correlation(rankings)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-12)
    assert 0 < abs(found[0, 1]) < 0.9


def test_what_agrees_and_what_is_turned_round():
    one = ranking([5, 9])
    turned = Ranking([row.flip(0) for row in one.rows], None, {})
    half = Ranking([one.rows[0], one.rows[1].flip(0)], None, {})
    found = plots.rank_correlation({"one": one, "same": one, "turned": turned, "half": half})
    wanted = torch.tensor([[1, 1, -1, 0], [1, 1, -1, 0], [-1, -1, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(plots.rank_correlation({"one": one}), torch.ones(1, 1, dtype=torch.float64))


def test_classes_of_one_image_alone_have_no_correlation():
    assert plots.rank_correlation({"a": ranking([1, 1]), "b": ranking([1, 1], 1)}).isnan().all()


def test_the_matrix_shows_the_numbers():
    correlation = torch.tensor([[1, -0.126, 0.004], [-0.126, 1, -0.004], [0.004, -0.004, 1]], dtype=torch.float64)
    axes = plots.plot_correlation(correlation, ["GraNd", "EL2N", "Herding"]).axes[0]
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert [[shown[j, i] for j in range(3)] for i in range(3)] == [
        ["1.00", "-0.13", "0.00"],
        ["-0.13", "1.00", "0.00"],
        ["0.00", "0.00", "1.00"],
    ]
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["GraNd", "EL2N", "Herding"]


# ---- images


def coloured(count: int, channels: int = 3) -> torch.Tensor:
    """Images ``[count, channels, 8, 8]`` uint8 of one colour each, no grey, which says their number."""
    number = torch.arange(count)
    colours = torch.stack([number % 200, torch.full_like(number, 250), number // 200], dim=1)[:, :channels]
    return colours.to(torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)


def shown_in(picture: np.ndarray) -> list[list[int]]:
    """The numbers of :func:`coloured` images in a picture, row by row."""
    rows = []
    for line in picture.astype(int):
        coloured = line[(line[:, 1] == 250) & (line[:, 2] < 10)]
        numbers = coloured[:, 0] + 200 * coloured[:, 2]
        row = numbers[np.flatnonzero(np.diff(numbers, prepend=-1))].tolist()
        if row and (not rows or rows[-1] != row):
            rows.append(row)
    return rows


def test_the_easiest_and_the_hardest_of_each_class():
    sizes = [40, 12, 19]
    made = ranking(sizes, scores=False)
    images = coloured(sum(sizes))
    picture = plots.extremes(made, images, names(3), "GraNd")
    rows = [row.tolist() for row in made.rows]
    assert shown_in(picture) == [row[:8] + row[-8:] for row in rows]
    middle = picture.shape[1] // 2  # no row is cut by the line between easy and hard
    assert shown_in(picture[:, :middle]) == [row[:8] for row in rows]
    assert picture.dtype == np.uint8 and picture.shape[2] == 3


def test_classes_smaller_than_a_block():
    made = ranking([1, 3, 17])
    found = shown_in(plots.extremes(made, coloured(21), names(3), "GraNd"))
    one, three, many = (row.tolist() for row in made.rows)
    assert found == [one, three + three, many[:8] + many[-8:]]  # one image, on both sides, is one run of colour


def test_of_many_classes_some_are_shown_evenly_chosen():
    made = ranking([3] * 200)
    found = shown_in(plots.extremes(made, coloured(600), names(200), "GraNd"))
    chosen = [0, 10, 21, 31, 42, 52, 63, 73, 84, 94, 105, 115, 126, 136, 147, 157, 168, 178, 189, 199]
    assert found == [2 * made.rows[c].tolist() for c in chosen]


def test_grey_images():
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8) * 5 + 10
    rows = torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(20)
    picture = plots.extremes(Ranking([*rows], None, {}), images, names(2), "Herding")
    shown = np.flatnonzero(np.bincount(picture[:, :, 0].ravel())[:255] > 1000)  # more than writing has of a grey
    assert shown.tolist() == sorted(5 * i + 10 for row in rows for i in (row[:8].tolist() + row[-8:].tolist()))
    with pytest.raises(InputError, match="1 or 3 channels"):
        plots.extremes(Ranking([*rows], None, {}), torch.zeros(40, 2, 8, 8, dtype=torch.uint8), names(2), "Herding")


# ---- scores


def heights(axes):
    return [patch.get_height() for patch in axes.patches]


def test_histograms_count_the_images_of_their_class():
    made = ranking([40, 3, 100])
    panels = plots.plot_scores(made, ["ant", "bee", "$cow"], "GraNd").axes
    assert [panel.get_title() for panel in panels] == ["ant", "bee", "$cow"]
    edges = np.linspace(float(made.scores.min()), float(made.scores.max()), 41)
    for panel, row in zip(panels, made.rows):
        values = made.scores[row].numpy()
        assert heights(panel) == np.histogram(values, edges)[0].tolist() and sum(heights(panel)) == len(row)
        lines = [line.get_xdata()[0] for line in panel.lines]
        assert lines == [np.median(made.scores), np.median(values)]
        assert panel.get_xscale() == "linear"


def test_counts_have_one_bar_per_value():
    made = ranking([30, 50], kind=lambda n, **how: torch.randint(0, 6, (n,), **how))
    for panel, row in zip(plots.plot_scores(made, names(2), "Forgetting").axes, made.rows):
        assert heights(panel) == made.scores[row].long().bincount(minlength=6).tolist()


def test_scores_over_many_decades_are_on_a_logarithmic_scale():
    made = ranking([50] * 2, kind=lambda n, **how: 10 ** torch.linspace(-3, 1, n, dtype=torch.float64))
    for panel in plots.plot_scores(made, names(2), "GraNd").axes:
        assert panel.get_xscale() == "log" and sum(heights(panel)) == 50
    assert "logarithmic" in plots.plot_scores(made, names(2), "GraNd").get_supxlabel()
    made = ranking([2] * 50, kind=lambda n, **how: 10 ** torch.linspace(-3, 1, n, dtype=torch.float64))
    assert plots.plot_scores(made, names(50), "GraNd").axes[0].get_yscale() == "log"


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("classes", [2, 30])
def test_scores_that_are_all_equal(value, classes, tmp_path):
    made = ranking([3] * classes, kind=lambda n, **how: torch.full((n,), value, dtype=torch.float64))
    draw_figure(tmp_path / "s.png", plots.plot_scores, made, names(classes), "EL2N")
    assert (tmp_path / "s.png").exists()


def test_many_classes_are_bands_of_quantiles_in_the_order_of_their_medians():
    made = ranking([1, 5] + [9] * 98)
    (axes,) = plots.plot_scores(made, names(100), "GraNd").axes
    levels = np.array([np.quantile(made.scores[row], (0.05, 0.25, 0.5, 0.75, 0.95)) for row in made.rows])
    order = np.argsort(levels[:, 2])
    wide, narrow = axes.patches[:100], axes.patches[100:]
    for bars, low, high in ((wide, 0, 4), (narrow, 1, 3)):
        np.testing.assert_allclose([bar.get_y() for bar in bars], levels[order, low])
        np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in bars], levels[order, high])
    ticks = {round(tick): label.get_text() for tick, label in zip(axes.get_xticks(), axes.get_xticklabels())}
    assert ticks == {place: f"class {order[place]}" for place in range(0, 100, 2)}
    assert axes.get_xlabel() == "100 classes, by their median, every 2nd named"


# ---- curriculum


@pytest.mark.parametrize("schedule, removal", [("linear", "step"), ("geometric", "linear")])
def test_the_curriculum_picture(schedule, removal):
    curriculum = Curriculum(0.5, 4, 6, 9, 0.1, 0.3, add_schedule=schedule, removal=removal)
    which, number = plots.plot_curriculum(curriculum, 12, 50).axes
    windows = np.array([curriculum.window(epoch, 50) for epoch in range(12)])
    upper, edges, lower = which.patches[0].get_data()
    np.testing.assert_allclose(upper, windows[:, 1] / 50)
    np.testing.assert_allclose(lower, windows[:, 0] / 50)
    np.testing.assert_array_equal(edges, np.arange(13) - 0.5)
    assert which.get_ylim() == (0, 1) and number.get_xlabel() == "epoch"
    np.testing.assert_array_equal(number.patches[0].get_data().values, windows[:, 1] - windows[:, 0])


# ---- files


@pytest.mark.slow
def test_every_picture_of_some_rankings(tmp_path):
    sizes = [12, 1, 7]
    rankings = {"GraNd": ranking(sizes), "EL2N": ranking(sizes, 1), "Herding": ranking(sizes, 2, scores=False)}
    arguments = rankings, coloured(20), names(3), Curriculum(0.5, 3), 10
    plots.plot_all(tmp_path / "new" / "folder", *arguments)
    written = sorted((tmp_path / "new" / "folder").iterdir())
    assert [path.name for path in written] == [
        "correlation.png",
        "curriculum.png",
        "images_EL2N.png",
        "images_GraNd.png",
        "images_Herding.png",
        "scores_EL2N.png",
        "scores_GraNd.png",
    ]
    for path in written:
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 100
            assert len(np.unique(np.asarray(picture.convert("L")))) > 3, "an empty picture"
    plots.plot_all(tmp_path / "again", *arguments)
    assert [(tmp_path / "again" / path.name).read_bytes() for path in written] == [p.read_bytes() for p in written]


def test_pictures_of_one_method(tmp_path):
    plots.plot_all(tmp_path, {"GraNd": ranking([4, 4])}, coloured(8), names(2), Curriculum(), 10)
    assert {path.name for path in tmp_path.iterdir()} == {"scores_GraNd.png", "images_GraNd.png", "curriculum.png"}


@pytest.mark.slow
def test_two_hundred_classes(tmp_path):
    rankings = {"GraNd": ranking([50] * 200), "Herding": ranking([50] * 200, 1, scores=False)}
    images = torch.zeros(10_000, 3, 8, 8, dtype=torch.uint8)
    plots.plot_all(tmp_path, rankings, images, names(200), Curriculum(0.5, 3), 100)
    assert len(list(tmp_path.iterdir())) == 5
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert max(picture.size) <= 2400
