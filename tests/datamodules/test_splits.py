"""Stratified parts: sizes, seeds and small classes."""

import pytest
import torch

from datamodules.splits import Percent, stratified_split

LABELS = torch.tensor([0] * 50 + [1] * 31 + [2] * 7)[torch.randperm(88, generator=torch.Generator().manual_seed(7))]


def counts(labels, piece):
    return labels[piece].bincount(minlength=int(labels.max()) + 1).tolist()


@pytest.mark.parametrize("parts", [[], [0.1], [0.2, 0.2], [0.4, 0.25, 0.05], [7, Percent(10)], [{0: 30, 1: 2, 2: 7}]])
def test_pieces_are_sorted_disjoint_and_complete(parts):
    pieces = stratified_split(LABELS, parts, seed=0)
    assert len(pieces) == 1 + len(parts)
    assert sorted(torch.cat(pieces).tolist()) == list(range(len(LABELS)))
    assert all(piece.tolist() == sorted(piece.tolist()) for piece in pieces)


@pytest.mark.parametrize("parts", [[0.1], [0.2, 0.2], [0.4, 0.25, 0.05]])
@pytest.mark.parametrize("seed", [0, 3])
def test_every_part_holds_its_share_of_every_class(parts, seed):
    _, *pieces = stratified_split(LABELS, parts, seed)
    sizes = LABELS.bincount().tolist()
    for piece, share in zip(pieces, parts, strict=True):
        assert len(set(piece.tolist())) == len(piece)
        for count, size in zip(counts(LABELS, piece), sizes, strict=True):
            assert count >= 1
            assert count == 1 or abs(count - share * size) <= 0.5


def test_split_depends_on_the_seed_and_leaves_global_random_numbers_alone():
    torch.manual_seed(1)
    once = stratified_split(LABELS, [0.2, 0.2], seed=0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    again = stratified_split(LABELS, [0.2, 0.2], seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
    other = stratified_split(LABELS, [0.2, 0.2], seed=1)
    assert not any(torch.equal(*pair) for pair in zip(once, other, strict=True))


def test_classes_are_drawn_independently_of_each_other():
    labels = torch.arange(2).repeat_interleave(40)
    _, part = stratified_split(labels, [0.5], seed=0)
    first, second = part[part < 40], part[part >= 40] - 40
    assert len(first) == len(second) == 20
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("size", "parts", "expected"),
    [
        (1, [0.2], [1, 0]),
        (2, [0.2], [1, 1]),
        (3, [0.2], [2, 1]),
        (2, [0.9], [1, 1]),
        (1, [0.2, 0.2], [1, 0, 0]),
        (2, [0.2, 0.2], [1, 1, 0]),
        (3, [0.2, 0.2], [1, 1, 1]),
        (4, [0.2, 0.2], [2, 1, 1]),
    ],
)
def test_a_small_class_keeps_one_image_and_gives_every_part_one_while_it_can(size, parts, expected):
    labels = torch.tensor([0] * 20 + [1] * size)
    assert [counts(labels, piece)[1] for piece in stratified_split(labels, parts, seed=0)] == expected


@pytest.mark.parametrize("images", [88, 100, 73257, 108754])
@pytest.mark.parametrize("percent", [1, 10, 20])
def test_percent_is_of_all_images_rounded_down_or_up(images, percent):
    assert Percent(percent).of(images) == images * percent // 100
    assert Percent(percent, up=True).of(images) == images - images * (100 - percent) // 100


@pytest.mark.parametrize("parts", [[20], [Percent(10)], [Percent(10, up=True), Percent(20)], [1, 2, 3]])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_of_images_are_exact_and_in_proportion(parts, seed):
    rest, *pieces = stratified_split(LABELS, parts, seed)
    wanted = [part.of(88) if isinstance(part, Percent) else part for part in parts]
    assert [len(piece) for piece in pieces] == wanted
    assert len(rest) == 88 - sum(wanted)
    left = torch.tensor([50, 31, 7])
    for piece, size in zip(pieces, wanted, strict=True):
        given = torch.tensor(counts(LABELS, piece))
        assert ((given - left * size / left.sum()).abs() < 1).all()
        left = left - given


def test_numbers_of_each_class_are_taken_as_they_are():
    _, piece = stratified_split(LABELS, [{0: 30, 1: 2, 2: 7}], seed=0)
    assert counts(LABELS, piece) == [30, 2, 7]
