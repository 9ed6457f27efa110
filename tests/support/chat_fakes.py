"""An engine that answers chat requests with what it was asked, and lines of batch files."""

import json
import os
import time

from lumen_ray.answer import Answer, TokenUsage
from lumen_ray.data.images import as_picture
from lumen_ray.errors import UserError
from lumen_ray.inference.request import images_of
from lumen_ray.tasks import UNDERSTANDING

URL = "/v1/chat/completions"


class ChatEngine:
    """Answers "QUESTION | images | history". `calls`: the number of requests of each call of `run`.

    A question "crash" raises like a bug, "refuse" as bad input; "slow" takes a while.
    """

    preset, version, image_size, largest_side, dtype = "fake", "v0", 64, 64, "float32"
    tasks, serving, chosen_decoders, skeletons, classes, edges = UNDERSTANDING, {}, {}, {}, (), {}

    def __init__(self):
        self.calls = []

    def run(self, images, requests, *, max_new_tokens=48, **options):
        self.calls.append(len(images))
        return [
            [self._answer(shown, request, max_new_tokens) for request in row]
            for shown, row in zip(images, requests, strict=True)
        ]

    def _answer(self, shown, request, max_new_tokens):
        if request.text == "crash":
            raise RuntimeError("a bug")
        if request.text == "refuse":
            raise UserError("the conversation is too long", "context_too_long")
        if request.text == "slow":
            time.sleep(0.2)
        pictures = [as_picture(image) for image in images_of(shown)]
        seen = [f"{image.size[1]}x{image.size[0]}:{int(image.pixels.max())}" for image in pictures]
        words = f"{request.text} | {' '.join(seen)} | {len(request.history)}".split(" ")
        usage = TokenUsage(len(words), min(len(words), max_new_tokens))
        text = " ".join(words[:max_new_tokens])
        return Answer("chat", (1, 1), text=text, usage=usage, is_cut=len(words) > max_new_tokens)


def line(custom_id, text="hello", *images, url=URL, method="POST", **body):
    """A line of a batch file that asks `text` about images, given by URLs."""
    parts = [{"type": "text", "text": text}, *({"type": "image_url", "image_url": {"url": image}} for image in images)]
    body = {"messages": [{"role": "user", "content": parts}], **body}
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body})


def read_lines(path):
    return [json.loads(text) for text in open(path, encoding="utf-8")]


def answers(output):
    """custom_id -> text of the answer, in the order of ``output.jsonl``."""
    rows = read_lines(os.path.join(output, "output.jsonl"))
    return {row["custom_id"]: row["response"]["body"]["choices"][0]["message"]["content"] for row in rows}


def errors(output):
    """(custom_id, code) of ``errors.jsonl``, in its order."""
    rows = read_lines(os.path.join(output, "errors.jsonl"))
    return [(r["custom_id"], (r["error"] or r["response"]["body"]["error"])["code"]) for r in rows]


def killed_engine():
    """An engine whose process is killed at the question "kill", once."""

    class Killed(ChatEngine):
        def run(self, images, requests, **options):
            marker = os.environ["KILL_MARKER"]
            if any(request.text == "kill" for row in requests for request in row) and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), 9)
            return super().run(images, requests, **options)

    return Killed()
