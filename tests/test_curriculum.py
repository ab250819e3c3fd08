from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pad.commands.record import BufferSettings, recipe_of, refuse_other_recipe
from pad.config import RECIPE
from pad.errors import InputError
from pad.experts.curriculum import ADD_SCHEDULES, REMOVALS, Curriculum

README = Curriculum(0.75, 20, 40, 60, 0.1, 0.2)  # the published CIFAR-10 setting


@pytest.mark.parametrize(
    "epoch,window",
    [
        (0, (0, 3750)),
        (1, (0, 3812)),  # 0.7625 of 5000 is 3812.5
        (2, (0, 3875)),
        (10, (0, 4375)),
        (19, (0, 4937)),
        (20, (0, 5000)),
        (21, (0, 5000)),
        (40, (0, 5000)),
        (41, (500, 5000)),
        (60, (500, 5000)),
        (61, (1000, 5000)),
        (99, (1000, 5000)),
    ],
)
def test_the_published_cifar10_setting(epoch, window):
    assert README.window(epoch, 5000) == window


@pytest.mark.parametrize("epoch,first", [(0, 0), (40, 0), (41, 0), (50, 0), (61, 0), (100, 0), (101, 50), (1000, 50)])
def test_the_first_matching_row_counts_where_published_defaults_overlap(epoch, first):
    assert Curriculum().window(epoch, 500) == (first, 500)


def test_the_epochs_of_every_row():
    """Rows of other lengths than published, one epoch after the other, 10 images."""
    curriculum = Curriculum(0.4, 3, 5, 7, 0.1, 0.5)
    windows = [curriculum.window(epoch, 10) for epoch in range(10)]
    assert windows == [(0, 4), (0, 6), (0, 8), (0, 10), (0, 10), (0, 10), (1, 10), (1, 10), (5, 10), (5, 10)]


def test_images_are_added_by_exact_shares():
    """Against integer arithmetic: the share is (hundredths * end + (100 - hundredths) * epoch) / (100 * end)."""
    for hundredths in range(1, 101, 3):
        for end in (1, 3, 7, 20, 49):
            curriculum = Curriculum(hundredths / 100, end)
            for epoch in range(0, end + 1, max(1, end // 6)):
                for n in (1, 2, 10, 49, 100, 1300, 5000):
                    share = hundredths * end + (100 - hundredths) * epoch
                    assert curriculum.window(epoch, n) == (0, n * share // (100 * end))


def test_all_images_are_in_when_adding_ends():
    for n in (1, 3, 7, 49, 93, 1300, 5000, 10**6 + 3):
        for thousandths in range(1, 1001, 7):
            for end in (0, 1, 3, 6, 7, 20, 49, 100):
                assert Curriculum(thousandths / 1000, end).window(end, n) == (0, n)


@pytest.mark.parametrize("init_ratio", [1 / 3, 2 / 3, 0.1 + 0.2, 1e-9, 1 - 2**-53, 0.29, 0.57, 0.58])
def test_all_images_are_in_for_ratios_that_are_no_decimals(init_ratio):
    for n in range(1, 200):
        for end in range(1, 12):
            assert Curriculum(init_ratio, end).window(end, n) == (0, n)


def test_easy_images_are_removed_by_exact_shares():
    for hundredths in range(100):
        curriculum = Curriculum(1.0, 0, 0, 1, hundredths / 100, (99 - hundredths) / 100)
        for n in (1, 10, 30, 100, 500, 1300, 5000):
            assert curriculum.window(1, n) == (hundredths * n // 100, n)
            assert curriculum.window(2, n) == ((99 - hundredths) * n // 100, n)


def test_no_epochs_of_adding_means_all():
    curriculum = Curriculum(0.5, 0, 2, 3, 0.1, 0.2)
    assert [curriculum.window(epoch, 10) for epoch in range(5)] == [(0, 10)] * 3 + [(1, 10), (2, 10)]


def test_classes_of_unequal_size():
    rows = [torch.tensor([9, 4, 7, 1]), torch.tensor([3]), torch.tensor([], dtype=torch.int64), torch.tensor([0, 8, 2])]
    curriculum = Curriculum(0.5, 2, 2, 3, 0.25, 0.7)
    used = [curriculum.indices(epoch, rows) for epoch in range(5)]
    assert [u.tolist() for u in used] == [
        [9, 4, 0],
        [9, 4, 7, 0, 8],
        [9, 4, 7, 1, 3, 0, 8, 2],
        [4, 7, 1, 3, 0, 8, 2],
        [7, 1, 3, 2],
    ]
    assert all(u.dtype == torch.int64 for u in used)


def test_where_a_ranking_is_needed():
    assert README.uses_ranking(1)
    assert not Curriculum().uses_ranking(50) and not Curriculum().uses_ranking(101)
    assert Curriculum().uses_ranking(102)  # epoch 101 is the first without the easiest tenth
    assert not Curriculum(1.0, 0, 0, 0, 0.0, 0.0).uses_ranking(1000)
    late = Curriculum(0.5, 0, 3, 5, 0.0, 0.1)
    assert [late.uses_ranking(epochs) for epochs in (1, 4, 6, 7)] == [False, False, False, True]


# ---- other schedules


def share(schedule: str, start: Decimal, t: Decimal) -> Decimal:
    """The share of a class that is in, to 60 digits."""
    if schedule == "linear":
        return start + (1 - start) * t
    if schedule == "root":
        return (start**2 + (1 - start**2) * t).sqrt()
    return start ** (1 - t)


@pytest.mark.parametrize("schedule", ADD_SCHEDULES)
def test_schedules_of_adding_against_sixty_digits(schedule):
    with localcontext() as context:
        context.prec = 60
        for start in ("0.01", "0.25", "0.3", "0.729", "0.75", "0.999"):
            for end in (1, 2, 3, 7, 20):
                curriculum = Curriculum(float(start), end, add_schedule=schedule)
                for epoch in range(end + 1):
                    wanted = share(schedule, Decimal(start), Decimal(epoch) / end)
                    for n in (1, 10, 500, 1300, 5000):
                        count = int((wanted * n).quantize(Decimal("1e-30")))  # 809.99…9, of 50 nines, is 810
                        assert curriculum.window(epoch, n) == (0, count), (start, end, epoch, n)


def test_shares_that_are_whole_numbers_of_images():
    root = [Curriculum(0.6, 2, add_schedule="root").window(epoch, 100)[1] for epoch in range(3)]
    assert root == [60, 82, 100]  # sqrt(0.36), sqrt(0.68), 1
    assert Curriculum(0.28, 16, add_schedule="root").window(1, 5000) == (0, 1843)  # sqrt(0.1360)
    assert Curriculum(0.1, 11, add_schedule="root").window(3, 1000) == (0, 529)  # sqrt(0.28)
    assert Curriculum(0.2, 2, add_schedule="root").window(1, 10**6) == (0, 721110)  # sqrt(0.52)
    assert [Curriculum(0.25, 2, add_schedule="geometric").window(e, 8)[1] for e in range(3)] == [2, 4, 8]
    cubes = Curriculum(0.729, 3, add_schedule="geometric")
    assert [cubes.window(epoch, 1000)[1] for epoch in range(4)] == [729, 810, 900, 1000]
    assert [Curriculum(0.0001, 4, add_schedule="geometric").window(e, 10**5)[1] for e in range(5)] == [
        10,
        100,
        1000,
        10**4,
        10**5,
    ]


@pytest.mark.parametrize("schedule", ADD_SCHEDULES)
def test_adding_starts_at_the_first_share_ends_with_all_and_never_shrinks(schedule):
    for init_ratio in (1e-9, 1e-3, 0.1 + 0.2, 1 / 3, 0.57, 0.75, 1 - 2**-53, 1.0):
        for end in (0, 1, 3, 7, 49, 100):
            curriculum = Curriculum(init_ratio, end, 200, 300, add_schedule=schedule)
            for n in (1, 3, 49, 1300, 5000, 10**6 + 3):
                windows = [curriculum.window(epoch, n) for epoch in range(end + 2)]
                counts = [last for _, last in windows]
                assert {first for first, _ in windows} == {0} and counts == sorted(counts)
                assert counts[end:] == [n, n]
                start = Decimal(repr(init_ratio)) * n
                if end:  # powers are no fractions, so that one third of 3 is 1
                    assert counts[0] == int(round(start, 9) if schedule == "geometric" else start)


def test_the_root_is_ahead_and_the_geometric_behind():
    linear, root, geometric = (Curriculum(0.2, 20, add_schedule=schedule) for schedule in ADD_SCHEDULES)
    for epoch in range(1, 20):
        counts = [each.window(epoch, 5000)[1] for each in (geometric, linear, root)]
        assert counts == sorted(set(counts))


def test_gradual_removal():
    """From 0.1 at the first epoch after 40 to 0.2 at the first after 60: a twentieth of the way each, 25 of 5000."""
    gradual = Curriculum(0.75, 20, 40, 60, 0.1, 0.2, removal="linear")
    assert [gradual.window(epoch, 5000) for epoch in range(41)] == [README.window(epoch, 5000) for epoch in range(41)]
    assert [gradual.window(41 + k, 5000) for k in range(21)] == [(500 + 25 * k, 5000) for k in range(21)]
    assert {gradual.window(epoch, 5000) for epoch in range(61, 200)} == {(1000, 5000)}
    growing = Curriculum(1.0, 0, 2, 5, 0.0, 0.3, removal="linear")
    assert [growing.window(epoch, 10) for epoch in range(8)] == [(0, 10)] * 4 + [(1, 10), (2, 10), (3, 10), (3, 10)]
    back = Curriculum(1.0, 0, 0, 2, 0.5, 0.1, removal="linear")
    assert [back.window(epoch, 10)[0] for epoch in range(5)] == [0, 5, 3, 1, 1]


def test_gradual_removal_by_exact_shares():
    """Against integer arithmetic: the share is (first (span - k) + second k) / (100 span) of the way k out of span."""
    for first, second, span in [(0, 30, 7), (10, 20, 20), (29, 57, 3), (58, 29, 49), (10, 10, 5)]:
        curriculum = Curriculum(1.0, 0, 10, 10 + span, first / 100, second / 100, removal="linear")
        for k in range(span + 1):
            for n in (1, 10, 30, 500, 1300, 5000):
                assert curriculum.window(11 + k, n) == (n * (first * (span - k) + second * k) // (100 * span), n)


@pytest.mark.parametrize("second", [40, 60, 99])
def test_both_removals_agree_where_each_share_begins(second):
    step, gradual = (Curriculum(0.75, 20, 40, second, 0.1, 0.2, removal=removal) for removal in REMOVALS)
    for epoch in (0, 20, 40, 41, second + 1, second + 2, 1000):
        assert step.window(epoch, 5000) == gradual.window(epoch, 5000)
    equal = [Curriculum(0.75, 20, 40, second, 0.1, 0.1, removal=removal) for removal in REMOVALS]
    for epoch in range(110):
        assert equal[0].window(epoch, 5000) == equal[1].window(epoch, 5000)


def test_the_published_curriculum_is_the_default():
    assert (Curriculum().add_schedule, Curriculum().removal) == ("linear", "step")
    named = Curriculum(0.75, 20, 40, 60, 0.1, 0.2, add_schedule="linear", removal="step")
    assert named == README


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        ({"add_schedule": "cosine"}, "add_schedule: 'cosine' is not one of linear, root, geometric"),
        ({"removal": "root"}, "removal: 'root' is not one of step, linear"),
    ],
)
def test_unknown_names_are_refused(wrong, sentence):
    with pytest.raises(InputError, match=sentence):
        BufferSettings.resolve(wrong)


def test_where_a_ranking_is_needed_by_other_schedules():
    assert Curriculum(0.999, 2, add_schedule="geometric").uses_ranking(1)
    assert not Curriculum(1.0, 5, add_schedule="root").uses_ranking(6)
    growing = Curriculum(1.0, 0, 2, 5, 0.0, 0.3, removal="linear")
    assert [growing.uses_ranking(epochs) for epochs in (4, 5)] == [False, True]  # the first image goes in epoch 4


# ---- which buffers other experts may join


def refusal_to_join(made_with: dict, **wanted) -> str:
    """Why experts of the ``wanted`` settings may not join a buffer of an expert recorded with ``made_with``, or ''."""
    header = {"settings": made_with, "seed": 0}
    store = SimpleNamespace(folder=Path("buffer"), experts=[0], header=lambda expert: header)
    try:
        refuse_other_recipe(store, recipe_of(BufferSettings(**wanted)))
    except InputError as error:
        return str(error)
    return ""


OTHER = [("add_schedule", "root"), ("add_schedule", "geometric"), ("removal", "linear")]


@pytest.mark.parametrize("key, value", OTHER)
def test_a_buffer_from_before_these_settings_has_the_published_ones(key, value):
    old = {key: value for key, value in BufferSettings().as_dict().items() if key not in ("add_schedule", "removal")}
    assert refusal_to_join(old) == ""
    before = BufferSettings().as_dict()[key]
    assert f"{key}: {before} in the buffer, {value} in" in refusal_to_join(old, **{key: value})


@pytest.mark.parametrize("key, value", OTHER)
def test_experts_of_another_schedule_do_not_join(key, value):
    assert key in BufferSettings.names(RECIPE)  # so it is written into every expert's file
    settings = BufferSettings().as_dict()
    assert refusal_to_join(settings | {key: value}, **{key: value}) == ""
    assert f"{key}: {value} in the buffer" in refusal_to_join(settings | {key: value})
    assert f"{key}: {settings[key]} in the buffer, {value} in" in refusal_to_join(settings, **{key: value})


def test_a_buffer_of_an_earlier_augmentation_is_not_mixed():
    assert "augmentation: an approximation of DC's in the buffer" in refusal_to_join({"dsa": False}, dsa=False)
    assert refusal_to_join(recipe_of(BufferSettings(dsa=False)), dsa=False) == ""
    assert refusal_to_join({"dsa": True}) == ""
