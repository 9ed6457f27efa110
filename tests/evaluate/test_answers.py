"""An LLM's own answers, as training data and to see what training kept."""

import json

import numpy as np
import pytest
from PIL import Image
from support.tiny_models import tiny_folder

from lumen_ray import api
from lumen_ray.answer import Answer
from lumen_ray.data.shards.shards import read_rows
from lumen_ray.errors import UserError
from lumen_ray.evaluate.answers import ask, changed, main, read_answers, read_questions, write_answers


class Parrot:
    """Answers with the last word, of `length` tokens."""

    def __init__(self, length=2, image=None, **others):
        self.length, self.image, self.others = length, image, others

    def run(self, images, requests, *, max_new_tokens, **_):
        assert len(images) == len(requests) and all(image is self.image for image in images)
        found = []
        for [request] in requests:
            text = self.others.get(request.text.split()[0], request.text.split()[-1])
            found.append([Answer("chat", (0, 0), text=text, log_probs=[-0.1] * min(self.length, max_new_tokens))])
        return found


def test_the_questions_of_the_check_are_not_trained():
    checked, trained = read_questions("knowledge"), read_questions("text")
    assert len(checked) == 30 and all(checked.values())
    plain = [{"".join(filter(str.isalnum, text.lower())) for text in texts} for texts in (checked, trained)]
    assert not plain[0] & plain[1]


def test_a_file_of_questions_must_be_a_list_or_a_map(tmp_path):
    path = tmp_path / "q.yaml"
    for text in ("- [a]\n", "just text\n", "a: 1\n", "- a\n - b: [\n", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="must be a list of questions|not YAML"):
            read_questions(str(path))
    path.write_text("- a b\n- c\n")
    assert read_questions(str(path)) == {"a b": None, "c": None}
    with pytest.raises(UserError, match="knowledge, text"):
        read_questions("knowlege")


def test_answers_are_training_data_and_can_be_compared(tmp_path):
    questions = [f"{word} then last{n}" for n, word in enumerate(["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"])]
    seen = []
    answers = list(ask(Parrot(), questions, progress=lambda *done: seen.append(done)))
    assert [a.text for a in answers] == [f"last{n}" for n in range(10)] and seen == [(8, 10), (10, 10)]
    kept = write_answers(tmp_path / "a.jsonl", answers)
    assert kept == answers == read_answers(tmp_path / "a.jsonl")
    assert changed(Parrot(), kept) == []
    assert [a.question for a in changed(Parrot(c="other"), kept)] == ["c then last2"]
    assert len(changed(Parrot(length=3), kept)) == 10  # the same text of other tokens
    image = np.zeros((8, 8, 3), np.uint8)
    assert [a.question for a in changed(Parrot(image=image, d="seen"), kept, image=image)] == ["d then last3"]
    api.prepare("chat", tmp_path / "shards", conversations=[str(tmp_path / "a.jsonl")], workers=0)
    rows = list(read_rows(tmp_path / "shards"))
    assert {row["messages"][0]["turns"][1]["content"] for row in rows} == {a.text for a in answers}
    assert all(row["image"] is None for row in rows)


def test_an_answer_without_an_end_is_no_training_data(tmp_path):
    answers = [*ask(Parrot(length=9), ["a b"], 9), *ask(Parrot(length=9), ["c d"], 10)]
    assert [a.ended for a in answers] == [False, True]
    assert [a.question for a in write_answers(tmp_path / "a.jsonl", answers)] == ["c d"]


def test_a_file_of_answers_must_be_one(tmp_path):
    path = tmp_path / "a.jsonl"
    with pytest.raises(UserError, match="does not exist"):
        read_answers(path)
    for text in ("{", "{}", json.dumps({"tokens": 1, "conversations": [{"value": "a"}]}), "[]", "1"):
        path.write_text(text)
        with pytest.raises(UserError, match="no file of answers"):
            read_answers(path)


def test_the_command_writes_and_compares(tmp_path, capsys):
    model, answers = str(tiny_folder(tmp_path / "model")), str(tmp_path / "a.jsonl")
    (tmp_path / "q.yaml").write_text("red circle: circle\nblue square: square\n")
    assert main(["write", "--model", model, "--questions", str(tmp_path / "q.yaml"), "--output", answers]) == 0
    assert f"-> {answers}" in capsys.readouterr().out.replace("\n", "")
    assert main(["compare", "--model", model, "--answers", answers]) == 0
    kept = len(read_answers(tmp_path / "a.jsonl"))
    assert f"{kept} of {kept} answers are unchanged" in capsys.readouterr().out
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    assert main(["compare", "--model", model, "--answers", answers, "--image", str(tmp_path / "red.png")]) == 0
    assert f"of {kept} answers are unchanged" in capsys.readouterr().out
    assert main(["compare", "--model", model, "--answers", answers, "--image", str(tmp_path / "none.png")]) == 2
    assert "none.png" in capsys.readouterr().err
    assert main(["compare", "--model", model, "--answers", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
