"""The page at `/` in a headless Chromium, over a fake model."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from pycocotools.coco import COCO
from support.browser import Browser
from support.serve_fakes import FakeBackend, free_port

from lumen_ray.serve.api import create_api
from lumen_ray.serve.settings import ServeSettings

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
#: what differs between two answers to the same request
_OF_ONE_ANSWER = {"timing_ms", "id", "created"}


class Page:
    """The page with the fake `backend` that it asks."""

    def __init__(self, browser: Browser, backend: FakeBackend, url: str) -> None:
        self.browser, self.backend, self.url = browser, backend, url
        self.run = browser.run

    def begin(self, sample: int | None = None) -> None:
        """The page as it is first seen, then with a sample image."""
        self.browser.open(f"{self.url}/?{len(self.backend.calls)}")
        self.run("until(() => find('task').value && find('sample-list').children.length)")
        if sample is not None:
            self.take(sample)

    def take(self, sample: int) -> None:
        self.run(f"find('sample-list').querySelectorAll('button')[{sample}].click()")
        self.run("until(() => !find('view').hidden)")

    def ask(self, task: str, **fields: str) -> None:
        self.run(f"(find('task').value = '{task}', find('task').onchange())")
        for name, value in fields.items():
            self.run(f"(find('{name}').value = {json.dumps(value)}, find('{name}').oninput())")
        self.run("find('go').click()")
        self.run("until(() => !find('result').hidden && find('go').textContent === 'Ask')")

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Where an image point is in the window, once the layout rests."""
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        left, top = self.run(
            "import('/page/stage.js').then(({view}) => { const box = find('view').getBoundingClientRect();"
            f"return [box.left + view.x + {x} * view.scale, box.top + view.y + {y} * view.scale] }})"
        )
        return left, top

    def text(self, name: str) -> str:
        return self.run(f"find('{name}').innerText")

    def code(self, kind: str) -> str:
        """The last request as `Curl` or `Python`."""
        return self.run(
            "Promise.all([import('/page/code.js'), import('/page/state.js')])"
            f".then(([code, {{state}}]) => code.as{kind}(state.request))"
        )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    backend, port = FakeBackend(), free_port()
    server = uvicorn.Server(
        uvicorn.Config(create_api(backend, ServeSettings(model="m")), port=port, log_level="warning")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    try:
        yield Page(browser, backend, f"http://127.0.0.1:{port}")
        assert browser.complaints == []
    finally:
        browser.close()
        server.should_exit = True
        thread.join()


def test_an_answer_is_listed_and_filtered_without_a_new_request(page):
    page.begin(0)
    page.ask("detect", classes="red circle, blue square")
    assert page.text("said") == "2 found, 2 below the score."
    asked = len(page.backend.calls)
    page.run("(find('score').value = 0.1, find('score').oninput())")
    assert page.text("said") == "4 found."
    page.run("find('list').querySelector('input').click()")
    assert page.text("said") == "2 found." and len(page.backend.calls) == asked


def test_a_region_is_dragged_clicked_and_scribbled(page):
    page.begin(0)
    page.run("(find('task').value = 'region_caption', find('task').onchange())")
    for number, (tool, points, kind) in enumerate(
        [
            ("shape", [(20, 30), (60, 50), (100, 90)], "box"),
            ("shape", [(50, 60)], "point"),
            ("scribble", [(20, 30), (60, 50), (100, 90)], "scribble"),
        ]
    ):
        asked = len(page.backend.calls)
        page.run(f"document.querySelector('[name=tool][value={tool}]').click()")
        page.browser.drag(*(page.place(*point) for point in points))
        page.run("until(() => find('go').textContent === 'Ask' && find('said').textContent)")
        assert len(page.backend.calls) == asked + 1, number
        region = page.backend.calls[-1][1][0].region
        assert region.kind == kind
        expected = [points[0], points[-1]] if kind == "box" else points
        assert region.points.tolist() == [pytest.approx(point, abs=1) for point in expected]


def test_all_of_it_works_by_keyboard(page):
    page.begin()
    page.run("find('choose').focus()")
    page.browser.press("Tab", "Enter")  # the first sample
    page.run("until(() => document.activeElement === find('view'))")
    page.run("(find('task').value = 'region_caption', find('task').onchange(), find('view').focus())")
    page.browser.press("Enter", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "Enter")
    page.run("until(() => find('said').textContent)")
    region = page.backend.calls[-1][1][0].region
    assert region.kind == "box" and region.points[0].tolist() == [128, 128]
    assert page.text("status") == page.text("said")


def test_a_class_by_example_keeps_its_image_when_another_is_opened(page):
    page.begin(0)
    page.run("(find('classes').value = '', find('add-class').click())")
    page.run("(document.activeElement.value = 'bolt', document.activeElement.oninput())")
    page.browser.drag(page.place(20, 30), page.place(60, 80))
    page.run("until(() => find('examples').querySelector('.examples li'))")
    page.ask("detect")
    (shown,) = page.backend.calls[-1][1][0].examples.values()
    assert shown.name == "bolt" and not shown.named and shown.examples[0].image is None
    assert list(shown.examples[0].box) == pytest.approx([20, 30, 60, 80], abs=1)
    page.run(
        "fetch('/page/samples/2.jpg').then(r => r.blob()).then(async blob => "
        "(await import('/page/open.js')).openImage(new File([blob], 'other.jpg', {type: blob.type})))"
    )
    page.run("find('result').hidden && find('go').click()")
    page.run("until(() => !find('result').hidden && find('go').textContent === 'Ask')")
    (shown,) = page.backend.calls[-1][1][0].examples.values()
    assert shown.examples[0].image.shape == (256, 256, 3)


def test_a_chat_is_streamed_and_remembers(page):
    page.begin(0)
    page.run("find('chat-tab').click()")
    for number in (1, 2):
        page.run(f"(find('question').value = 'question {number}', find('chat-form').requestSubmit())")
        page.run(
            f"until(() => find('turns').innerText.includes('chat says question {number}') && !find('send').hidden)"
        )
    image, (request,), _ = page.backend.calls[-1]
    assert image is not None and request.history == (("question 1", "chat says question 1"),)


def test_an_answer_is_stopped(page, monkeypatch):
    async def endless(*_: Any) -> AsyncIterator[str]:
        yield "the beginning"
        await asyncio.Event().wait()

    monkeypatch.setattr(page.backend, "stream", endless)
    page.begin()
    page.run("(find('chat-tab').click(), find('question').value = 'go on', find('chat-form').requestSubmit())")
    page.run("until(() => find('turns').innerText.includes('the beginning'))")
    page.run("find('stop').click()")
    page.run("until(() => find('turns').innerText.includes('Stopped.') && !find('send').hidden)")


def test_what_is_no_image_leaves_none(page):
    page.begin(0)
    page.run("import('/page/open.js').then(m => m.openImage(new File(['text'], 'notes.txt')))")
    assert page.text("problem").startswith("notes.txt is not an image")
    assert page.run("find('view').hidden && !find('choose').hidden") and page.text("missing") == "Open an image first."


def test_an_image_above_the_limits_is_scaled(page):
    page.begin()
    page.run(
        "import('/page/picture.js').then(async ({openPicture}) => {"
        "  const canvas = new OffscreenCanvas(400, 300), limits = {max_pixels: 30000, max_body_bytes: 1e6};"
        "  canvas.getContext('2d').fillRect(0, 0, 400, 300);"
        "  const file = new File([await canvas.convertToBlob()], 'a.png', {type: 'image/png'});"
        "  window.scaled = await openPicture(file, limits) })"
    )
    size = page.run("[scaled.width, scaled.height, scaled.original.width, scaled.name, scaled.blob.type]")
    assert size == [200, 150, 400, "a-scaled.jpg", "image/jpeg"]


@pytest.mark.parametrize("task", ["pose", "edit", "generate", "chat"])
def test_copied_code_gets_the_same_answer(page, task, tmp_path):
    page.begin(0)
    text = "is it \"red\" \\ $HOME `id` 'x' ü ?"
    if task == "chat":
        page.run(f"(find('question').value = {json.dumps(text)}, find('chat-form').requestSubmit())")
        page.run("until(() => find('turns').innerText.includes('chat says') && !find('send').hidden)")
    else:
        page.ask(task, **({"classes": "red circle"} if task == "pose" else {"text": text}))
    by_curl = executed(["bash", "-c", page.code("Curl")], tmp_path)
    asked = page.backend.calls[-1][1]
    program = page.code("Python").replace("print(response.json())", "print(response.text)")
    by_python = executed([sys.executable, "-c", program], tmp_path)
    assert page.backend.calls[-1][1] == asked and by_curl == by_python
    if task != "pose":
        assert asked[0].text == text


def executed(command: list[str], folder: Path) -> dict[str, Any]:
    """What a program prints, JSON."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout, done.stderr
    answer = json.loads(done.stdout)
    assert "error" not in answer
    for part in (answer, answer.get("lumen", {})):
        for name in _OF_ONE_ANSWER & set(part):
            del part[name]
    return answer


@pytest.mark.parametrize(("task", "area"), [("segment", 100), ("pose", 100)])
def test_the_coco_file_is_read_by_pycocotools(page, task, area, tmp_path):
    page.begin(0)
    page.ask(task, classes="red circle, blue square")
    data = page.run("import('/page/save.js').then(m => m.coco())")
    (tmp_path / "coco.json").write_text(json.dumps(data))
    coco = COCO(str(tmp_path / "coco.json"))
    assert [c["name"] for c in coco.cats.values()] == ["red circle", "blue square"]
    assert [(a["bbox"], a["area"], a["score"]) for a in coco.anns.values()] == [([2, 3, 10, 10], area, 0.9)] * 2
    first = coco.anns[1]
    if task == "segment":
        assert coco.annToMask(first)[3:13, 2:12].sum() == coco.annToMask(first).sum() == 100
    else:
        assert coco.cats[1]["keypoints"] == ["top", "left"] and first["keypoints"] == [0.5, 0.5, 2] * 2


def test_the_reference_of_the_api_runs_under_its_policy(page):
    page.browser.open(f"{page.url}/docs")
    page.run("until(() => find('routes').innerText.includes('/v1/region_caption'))")


@pytest.mark.skipif("AXE_CORE" not in os.environ, reason="needs AXE_CORE, the path of axe.min.js of npm's axe-core")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page, scheme):
    page.browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def check(where: str) -> None:
        page.browser.call("Runtime.evaluate", expression=Path(os.environ["AXE_CORE"]).read_text())
        found = page.run("axe.run().then(found => found.violations.map(v => [v.id, v.nodes.map(n => n.html)]))")
        assert found == [], where

    page.begin()
    check("without an image")
    page.take(0)
    page.ask("segment", classes="red circle")
    page.run("(find('add-class').click(), document.querySelectorAll('details').forEach(d => d.open = true))")
    page.run("until(() => find('code-text').textContent && find('raw').textContent)")
    check("with an answer")
    page.run("(find('chat-tab').click(), find('question').value = 'hello', find('chat-form').requestSubmit())")
    page.run("until(() => find('turns').innerText.includes('chat says') && !find('send').hidden)")
    check("in a chat")
    page.run("import('/page/open.js').then(m => m.openImage(new File(['text'], 'notes.txt')))")
    check("after a file that is no image")
    page.browser.open(f"{page.url}/docs")
    page.run("until(() => document.querySelectorAll('details').length > 20)")
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    check("docs")
