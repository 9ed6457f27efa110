"""A model that learned the question of `label --verify` on two scenes answers it there."""

from pathlib import Path

import numpy as np
import yaml
from support.tiny_models import SIDE, tiny_settings
from support.train_fakes import job_of

from lumen_ray.data.images import decode
from lumen_ray.data.shards.prepare import prepare_source
from lumen_ray.data.shards.shards import read_rows
from lumen_ray.data.sources.scenes import ScenesSource
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import RegionQuestion
from lumen_ray.structures import Region
from lumen_ray.tasks import region_question
from lumen_ray.train.launch import train_local

STAGE = {
    "steps": 150, "lr": 0.004, "warmup_steps": 10,
    "groups": [{"tasks": ["chat", "detect"]}],
    "branches": {"negatives": 1, "max_messages": 6},
}  # fmt: skip


def test_it_answers_what_it_learned(tmp_path: Path):
    source = ScenesSource(2, seed=0, side=SIDE, region_questions=True)
    prepare_source(tmp_path / "shards", source, rows_per_group=2, workers=0)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_settings(vocab_size=480).model_dump(mode="json")))
    train_local(job_of(tmp_path, tmp_path / "run", STAGE, batch_size=2))
    rows = list(read_rows(tmp_path / "shards"))
    engine = Engine.load(tmp_path / "run" / "model")
    questions, wanted = [], []
    before = region_question("X").split("X")[0]
    for number, row in enumerate(rows):
        for message in row["messages"]:
            question, answer = (turn["content"] for turn in message["turns"][:2])
            if question.startswith(before):
                points = np.reshape(row["regions"][message["regions"][0]]["points"], (2, 2))
                phrase = question.removeprefix(before).removesuffix(" ?")
                questions.append(RegionQuestion(number, Region("box", (SIDE, SIDE), points), phrase))
                wanted.append(answer == "yes")
    said = engine.ask_regions(engine.encode([decode(row["image"]) for row in rows]), questions)
    assert len(said) == 8 and [value > 0.5 for value in said] == wanted
