import numpy as np
import pyarrow as pa
from support.label_fakes import FakeEngine, picture

from lumen_ray.inference.records import LABEL_SCHEMA, answer_records, records_to_answers
from lumen_ray.inference.request import make_request


def test_answers_survive_the_table():
    requests = [
        make_request("segment", classes=["square", "circle"]),
        make_request("pose", classes=["square"]),
        make_request("vqa", text="how bright ?"),
        make_request("vqa", text="what is it ?"),
        make_request("caption"),
    ]
    answers = FakeEngine().run([picture(3)], [requests])[0]
    records = [r for q, a in zip(requests, answers, strict=True) for r in answer_records("x", "x.png", q, a, "{}")]
    table = pa.Table.from_pylist(records, schema=LABEL_SCHEMA)
    back = records_to_answers(table.to_pylist())
    assert [a.to_dict() for a in back] == [{k: v for k, v in a.to_dict().items() if k != "route"} for a in answers]
    assert back[0].predictions[0].masks.rles == answers[0].predictions[0].masks.rles


def test_finding_nothing_is_on_record():
    request = make_request("detect", classes=["square"])
    answer = FakeEngine().run([np.zeros((8, 8, 3), np.uint8)], [[request]])[0][0]
    records = answer_records("x", "x.png", request, answer)
    assert len(records) == 1 and records[0]["task"] == "detect" and records[0]["box"] is None
    assert records_to_answers(records)[0].predictions == []
