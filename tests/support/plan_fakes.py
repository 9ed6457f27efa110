"""Stage times for the planner's tests."""

from dataclasses import replace

from lumen_ray.plan.recording import Recording
from lumen_ray.plan.times import Stage, StageTimes
from lumen_ray.plan.work import ModelWork

WORK = ModelWork("nano", {"vision": 1e9}, 1e6, 0, 24, 1, 3, 18, 10**6, 10**5, 1e5, 1e5, ("light",), True, 128)


def stage(*seconds):
    return Stage(seconds, "measured")


def times(**seconds):
    """Stages that take next to no time, but for those given."""
    names = ("listing", "reading", "decoding", "model", "publishing", "driver", "worker", "start", "finishing")
    stages = {name: stage(1e-7) for name in names}
    others = {name: seconds.pop(name) for name in list(seconds) if name not in names}
    stages |= {name: stage(*value) if isinstance(value, tuple) else stage(value) for name, value in seconds.items()}
    return replace(StageTimes(**stages), **others)


def recording(**changes):
    """A recording of a model that takes a tenth of a second for 8 images on one core."""
    samples = {
        "listing": [1e-5, 2e-5], "reading": [1e-5], "decoding": [0.002, 0.004], "publishing": [0.002],
        "driver": [0.008], "worker": [0.008], "start": [6.0], "finishing": [1e-4],
    }  # fmt: skip
    made = Recording(
        model="nano", preset="nano", device="cpu", dtype="float32", tasks=["detect"], num_classes=12, batch_size=8,
        images=64, image_bytes=1e4, megapixels=0.016, longest_side=128, cores=2, machine="", samples=samples,
        model_wall={"1": [0.09, 0.11], "2": [0.06, 0.08]}, model_cpu={"1": [0.09, 0.11], "2": [0.11, 0.13]},
        ray_start_s=3.0, work=WORK.__dict__ | {"decoders": ["light"]},
    )  # fmt: skip
    return replace(made, **changes)
