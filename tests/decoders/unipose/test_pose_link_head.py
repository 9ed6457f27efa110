"""Link heads for objects and their keypoints."""

import torch

from lumen_ray.decoders.unipose.link_head import PoseLinkHead


def test_objects_and_keypoints_have_a_head_each():
    torch.manual_seed(0)
    head = PoseLinkHead(6, 4)
    states, parents = torch.randn(5, 3, 6), torch.tensor([-1, 0, 0, -1, 3])
    links = head(states, None, parents)
    wanted = torch.where((parents < 0)[:, None], head.objects(states), head.keypoints(states))
    torch.testing.assert_close(links, wanted)
    links[1].sum().backward()
    assert all(not p.grad.any() for p in head.objects.parameters())
    assert all(p.grad.any() for name, p in head.keypoints.named_parameters() if name.endswith("weight"))


def test_words_are_read_if_reads_words_is_set():
    torch.manual_seed(0)
    head = PoseLinkHead(6, 4, reads_words=True)
    states, words, parents = torch.randn(3, 2, 6), torch.randn(3, 6), torch.tensor([-1, 0, -1])
    links = head(states, words, parents)
    torch.testing.assert_close(links[1:2], head.keypoints(states[1:2], words[1:2]))
    torch.testing.assert_close(links[[0, 2]], head.objects(states[[0, 2]], words[[0, 2]]))


def test_object_prompts_alone():
    head = PoseLinkHead(6, 4)
    assert head(torch.randn(2, 3, 6), None, torch.tensor([-1, -1])).shape == (2, 4)
