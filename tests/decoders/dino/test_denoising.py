"""Noisy copies of the objects: how many, how noisy, of which prompts, and who may read them."""

from __future__ import annotations

import pytest
import torch
from support.gdino_tiny import targets_of
from test_set_loss import objects_of

from lumen_ray.decoders.common.boxes import to_xyxy
from lumen_ray.decoders.dino.denoising import UNUSED, make_denoising
from lumen_ray.decoders.dino.settings import DinoLossSettings

BOX = [40.0, 40.0, 60.0, 60.0]


@pytest.fixture
def made():
    """Groups of three prompts and two objects, of one prompt and one object, and of two prompts and none."""
    torch.manual_seed(0)
    objects = objects_of(
        targets_of([[BOX], [BOX], [], [BOX], [], []], side=100), [0, 0, 0, 1, 2, 2], sizes=((100, 100),) * 3
    )
    link_valid = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    links = torch.arange(9.0).view(3, 3, 1).expand(-1, -1, 4)
    settings = DinoLossSettings(denoising_queries=41, label_noise=0.5)
    return objects, make_denoising(objects, links, link_valid, settings)


def test_as_many_rounds_as_fit(made):
    _, dn = made
    assert dn.rounds.tolist() == [41 // 4, 41 // 2, 0]
    assert (dn.round >= 0).sum(1).tolist() == [40, 40, 0]
    assert [int(r.max()) + 1 for r in dn.round[:2]] == [10, 20] and (dn.round[2] == UNUSED).all()
    assert dn.weight.sum(1).tolist() == pytest.approx([4, 2, 0])  # a round's positives and negatives


def test_a_round_holds_every_object_once_as_a_positive(made):
    objects, dn = made
    for group, count in ((0, 2), (1, 1)):
        own = dn.matches.group == group
        rounds = dn.round[group, dn.matches.query[own]]
        members = torch.nonzero(objects.group == group).flatten().tolist()
        for r in range(int(dn.rounds[group])):
            assert sorted(dn.matches.object[own][rounds == r].tolist()) == members
            assert (dn.round[group] == r).sum() == 2 * count


def test_positives_move_by_less_than_half_their_size_and_negatives_by_more(made):
    _, dn = made
    boxes = to_xyxy(dn.boxes) * 100
    moved = (boxes - torch.tensor(BOX)).abs()
    positive = torch.zeros(dn.round.shape, dtype=torch.bool)
    positive[dn.matches.group, dn.matches.query] = True
    used = dn.round >= 0
    assert positive.sum() == 40 and moved[positive].max() < 10.001 and moved[positive].mean() > 4
    # of a negative, the left and right (top and bottom) may have passed each other
    far = []
    for corners in (BOX, BOX[2:] + BOX[:2]):
        gap = (boxes[used & ~positive] - torch.tensor(corners)).abs()
        far.append(((gap > 9.999) & (gap < 20.001)).unflatten(1, (2, 2)).all(1))
    assert (far[0] | far[1]).all() and (far[1] & ~far[0]).any()
    assert (dn.boxes[used][:, 2:] >= 0).all()


def test_labels_are_those_of_prompts_that_are_there(made):
    objects, dn = made
    labels = dn.content[..., 0]
    assert set(labels[0][dn.round[0] >= 0].tolist()) == {0.0, 1.0, 2.0}
    assert set(labels[1][dn.round[1] >= 0].tolist()) == {3.0}
    own = objects.labels.argmax(1)[dn.matches.object]
    same = (labels[dn.matches.group, dn.matches.query] == own + 3 * dn.matches.group)[dn.matches.group == 0]
    assert 0.4 < same.float().mean() < 0.95  # half keep theirs, a third of the others draw it


def test_who_reads_whom(made):
    _, dn = made
    valid = torch.tensor([[True, True], [True, False], [True, True]])
    blocked = dn.blocked(valid)
    width = dn.round.shape[1]
    assert blocked.shape == (3, width + 2, width + 2)
    assert blocked[:, width:, :width][valid].all()  # matching queries read no copies
    used = dn.round[0] >= 0
    assert torch.equal(blocked[0, :width, :width][used], (dn.round[0][:, None] != dn.round[0])[used])
    assert not blocked[0, :, width:][torch.cat([used, torch.tensor([True, True])])].any()
    assert blocked[1, :-1, -1][: width + 1][torch.cat([dn.round[1] >= 0, torch.tensor([True])])].all()


def test_no_objects_or_no_denoising():
    links, valid = torch.zeros(2, 1, 4), torch.ones(2, 1, dtype=torch.bool)
    assert make_denoising(objects_of(targets_of([[], []]), [0, 1]), links, valid, DinoLossSettings()) is None
    some = objects_of(targets_of([[BOX], []]), [0, 1])
    assert make_denoising(some, links, valid, DinoLossSettings(denoising_queries=0)) is None
    assert make_denoising(some, links, valid, DinoLossSettings(denoising_queries=1)).rounds.tolist() == [1, 0]
