"""Sigmas by keypoint name."""

from lumen_ray.keypoints import COCO_SIGMAS, DEFAULT_SIGMA, keypoint_sigmas


def test_a_persons_keypoints_have_cocos_sigmas_in_any_order_and_number():
    assert keypoint_sigmas(("left_hip", "Nose", "right wrist")) == (0.107, 0.026, 0.062)
    assert keypoint_sigmas(tuple(COCO_SIGMAS)) == tuple(COCO_SIGMAS.values())


def test_other_skeletons_have_the_default_even_where_names_agree():
    assert keypoint_sigmas(("nose", "tail")) == (DEFAULT_SIGMA, DEFAULT_SIGMA)
    assert keypoint_sigmas(()) == ()
