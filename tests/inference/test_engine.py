"""The engine: answers depend on their request alone, every task answers, and its halves work separately."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.forced_answers import force_answers
from support.tiny_models import scrambled, tiny_loaded, tiny_tokenizer

from lumen_ray.checkpoints.safetensors_file import WeightsFile
from lumen_ray.errors import UserError
from lumen_ray.inference.decoder_stage import DecoderStage
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.outputs import assemble, merge
from lumen_ray.inference.request import make_request
from lumen_ray.inference.sampling import Sampling
from lumen_ray.inference.trunk_stage import TrunkStage
from lumen_ray.keypoints import FIGURE_KEYPOINTS
from lumen_ray.model.build import save_model
from lumen_ray.structures import Region

CLASSES = [
    f"{colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square", "triangle", "figure")
]
EVERYTHING = {"score_threshold": 0.0, "max_per_phrase": 100, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def engine():
    loaded = tiny_loaded()
    scrambled(loaded.model, 0.15)
    return Engine(loaded)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


PICTURES = [picture(64, 64), picture(90, 120, 1), picture(150, 50, 2)]


def same(a, b, tolerance=1e-4):
    assert a.phrase == b.phrase and a.boxes.size == b.boxes.size and len(a) == len(b)
    np.testing.assert_allclose(a.scores, b.scores, atol=tolerance)
    scale = max(a.boxes.size)
    np.testing.assert_allclose(a.boxes.xyxy / scale, b.boxes.xyxy / scale, atol=tolerance)
    if a.masks is not None:
        assert (a.masks.to_arrays() == b.masks.to_arrays()).mean() > 0.999
    if a.keypoints is not None:
        np.testing.assert_allclose(a.keypoints.xyv[..., :2] / scale, b.keypoints.xyv[..., :2] / scale, atol=tolerance)


def ask(engine, image, classes, task="detect", **more):
    request = make_request(task, classes=classes)
    answer = engine.run([image], [[request]], **EVERYTHING | more)[0][0]
    assert answer.task == task and [p.phrase for p in answer.predictions] == list(classes)
    return answer.predictions


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_classes_together_one_by_one_shuffled_and_in_chunks_agree(engine, task):
    image = PICTURES[1]
    together = ask(engine, image, CLASSES, task)
    assert all(len(p) for p in together)
    assert len({round(float(p.scores[0]), 5) for p in together}) == len(CLASSES)  # the classes do differ
    for expected, name in zip(together, CLASSES, strict=True):
        same(expected, ask(engine, image, [name], task)[0])
    order = np.random.default_rng(0).permutation(len(CLASSES))
    shuffled = ask(engine, image, [CLASSES[i] for i in order], task)
    for i, prediction in zip(order, shuffled, strict=True):
        same(together[i], prediction)
    for chunk in (1, 5, 12):
        for expected, prediction in zip(together, ask(engine, image, CLASSES, task, class_chunk=chunk), strict=True):
            same(expected, prediction)


def test_a_list_of_1200_classes_gives_what_small_lists_give(engine):
    names = [f"{name} {i}" for i in range(100) for name in CLASSES]
    image, few = PICTURES[0], {"score_threshold": 0.02, "max_per_phrase": 5}
    whole = ask(engine, image, names, **few)
    assert sum(map(len, whole)) > 100
    for start in range(0, len(names), 120):
        part = names[start : start + 30]
        for expected, prediction in zip(whole[start : start + 30], ask(engine, image, part, **few), strict=True):
            same(expected, prediction)


def test_memory_is_bounded_whatever_the_requests(engine, monkeypatch):
    """Branches per pass of the trunk and prompts per pass of the decoder have a limit; results do not depend on it."""
    stage, seen = engine.decoders["lumen"], []
    requests = [[make_request("detect", classes=CLASSES), make_request("pose", classes=["red figure", "figure"])]]
    images = PICTURES[:2]
    expected = engine.run(images, requests * 2, **EVERYTHING)
    cells = (64 // 4) ** 2
    monkeypatch.setattr("lumen_ray.inference.decoder_stage.MAX_DECODER_CELLS", 5 * cells)
    forward = stage.decoder.forward
    monkeypatch.setattr(stage.decoder, "forward", lambda link, dense: seen.append(link) or forward(link, dense))
    chunked = engine.run(images, requests * 2, **EVERYTHING)
    assert len(seen) == 6 and all(int((link.parent < 0).sum()) <= 5 for link in seen)
    for one, two in zip(expected, chunked, strict=True):
        same_answers(one, two)


def mixed(size):
    height, width = size
    region = Region("box", size, np.array([[2, 3], [width / 2, height / 2]]))
    return [
        make_request("detect", classes=CLASSES[:3]),
        make_request("caption"),
        make_request("pose", classes=["red figure", "figure"]),
        make_request("segment", classes=["blue square"]),
        make_request("vqa", text="how many circles are there ?"),
        make_request("region_caption", region=region),
        make_request("ground", text="a red circle and a blue square"),
        make_request("refer", text="the circle left of the square"),
        make_request("count", classes=["green circle"]),
        make_request("chat", text="hello"),
    ]


def same_answers(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x.task, x.text, x.route, x.size) == (y.task, y.text, y.route, y.size)
        for p, q in zip(x.predictions, y.predictions, strict=True):
            same(p, q)


def test_every_task_answers_and_the_batch_size_changes_nothing(engine):
    requests = [mixed(p.shape[:2]) for p in PICTURES]
    requests[1] = requests[1][::-1]
    together = engine.run(PICTURES, requests, **EVERYTHING)
    for image, asked, answers in zip(PICTURES, requests, together, strict=True):
        assert [a.task for a in answers] == [r.task for r in asked]
        for request, answer in zip(asked, answers, strict=True):
            assert answer.size == image.shape[:2] and answer.to_dict()["task"] == request.task
            if request.phrases:
                assert [p.phrase for p in answer.predictions] == list(request.phrases) and answer.text is None
            if request.task == "pose":
                assert all(
                    p.keypoints.names == FIGURE_KEYPOINTS and len(p.keypoints) == len(p) for p in answer.predictions
                )
            if request.task == "segment":
                assert all(len(p.masks) == len(p) for p in answer.predictions)
            if request.task in ("caption", "vqa", "region_caption"):
                assert isinstance(answer.text, str) and not answer.predictions
        same_answers(answers, engine.run([image], [asked], **EVERYTHING)[0])
    routes = {a.task: a.route for a in together[0] if a.task != "chat"}
    assert routes == {
        "detect": "[DET]", "caption": None, "pose": "[POSE]", "segment": "[SEG]", "vqa": None,
        "region_caption": None, "ground": "[GRD]", "refer": "[GRD]", "count": "[DET]",
    }  # fmt: skip


def test_images_without_requests_and_no_images(engine):
    assert engine.run(PICTURES, [[], [make_request("detect", classes=["circle"])], []], **EVERYTHING)[0::2] == [[], []]
    assert engine.run(PICTURES[:1], [[]]) == [[]]
    assert engine.run([], []) == []


def test_text_alone_may_have_no_requests(engine):
    assert engine.run([None, PICTURES[0]], [[], []]) == [[], []]


def test_texts_alone_need_no_decoder(engine):
    out = engine.trunk.links(PICTURES[:2], [[make_request("caption")], []])
    assert not out.decoder_inputs and assemble(out.plans, {})[0][0].text is not None


def written(engine, limit, **settings):
    """The answer to a question about a picture with at most `limit` tokens."""
    request = make_request("vqa", text="what is it ?", sampling=Sampling(**settings))
    [[answer]] = engine.run(PICTURES[:1], [[request]], max_new_tokens=limit)
    return answer


def test_tokens_of_a_text_and_whether_it_was_cut(engine):
    seeds = [seed for seed in range(20) if written(engine, 6, temperature=1.0, seed=seed).text]
    cut = [written(engine, limit, temperature=1.0, seed=seeds[0]) for limit in (1, 3)]
    for answer, limit in zip(cut, (1, 3), strict=True):
        assert answer.is_cut and len(answer.tokens) == len(answer.log_probs) == limit
        assert "".join(answer.tokens).strip() == answer.text
    whole = written(engine, 400, temperature=1.0, seed=seeds[0])
    assert whole.tokens[:2] == cut[1].tokens[:2] and whole.is_cut == (len(whole.tokens) == 400)


def test_the_most_probable_tokens_stand_beside_those_of_a_text(engine):
    greedy, drawn, plain = (
        written(engine, 6, **settings)
        for settings in ({"top_log_probs": 3}, {"top_log_probs": 1, "temperature": 2.0, "seed": 1}, {})
    )
    assert plain.top_tokens is None and plain.tokens == greedy.tokens and plain.log_probs == greedy.log_probs
    assert [len(top) for top in greedy.top_tokens] == [3] * len(greedy.tokens)
    assert [len(top) for top in drawn.top_tokens] == [1] * len(drawn.tokens)
    for top, log_prob in zip(greedy.top_tokens, greedy.log_probs, strict=True):
        values = [value for _, value in top]
        assert values == sorted(values, reverse=True) and values[0] == pytest.approx(log_prob)
        assert all(text for text, _ in top)
    assert all(top[0][1] >= log_prob - 1e-6 for top, log_prob in zip(drawn.top_tokens, drawn.log_probs, strict=True))


def test_the_tokens_read_and_written_are_counted(engine):
    """A longer question by its words, an image by its tokens; text alone reads none of images."""

    def usage(image, text, **fields):
        [[answer]] = engine.run([image], [[make_request("chat", text=text, **fields)]], max_new_tokens=5)
        assert answer.usage.completion >= len(answer.tokens or ())
        return answer.usage

    encode = engine.trunk.tokenizer.encode
    short, long = usage(PICTURES[0], "what ?"), usage(PICTURES[0], "what is it ?")
    assert long.prompt - short.prompt == len(encode("what is it ?")) - len(encode("what ?"))
    grid = engine.trunk.trunk.vision.grid(*engine.trunk.bucket_of(PICTURES[0]))
    assert short.prompt == grid[0] * grid[1] + usage(None, "what ?").prompt
    assert usage(PICTURES[0], "what ?", history=[("hello", "hi")]).prompt > short.prompt
    assert written(engine, 3, temperature=1.0, seed=3).usage.completion == 3


def test_a_text_that_ends_at_its_longest_is_not_cut(engine):
    """By the LLM's end token or by a stop text."""
    answer = written(engine, 6, temperature=1.0, seed=3)
    stopped = written(engine, len(answer.tokens), temperature=1.0, seed=3, stop=(answer.text[-1],))
    assert answer.is_cut and answer.text and not stopped.is_cut
    ends = [written(engine, 200, temperature=1.0, seed=seed) for seed in range(30)]
    ended = next(answer for answer in ends if not answer.is_cut and answer.text)
    seed = ends.index(ended)
    assert not written(engine, len(ended.tokens) + 1, temperature=1.0, seed=seed).is_cut
    assert written(engine, len(ended.tokens), temperature=1.0, seed=seed).is_cut


def test_a_chat_needs_no_image_and_other_questions_do(engine):
    [[answer]] = engine.run([None], [[make_request("chat", text="hello")]], max_new_tokens=3)
    assert answer.text is not None or answer.route is not None
    with pytest.raises(UserError) as error:
        engine.run([None], [[make_request("vqa", text="what is it ?")]])
    assert error.value.reason == "missing_image"


def test_keypoints_of_ones_own_choice(engine):
    request = make_request("pose", classes=["teapot"], keypoints=["spout", "lid"])
    (prediction,) = engine.run(PICTURES[:1], [[request]], **EVERYTHING)[0][0].predictions
    assert prediction.keypoints.names == ("spout", "lid") and prediction.keypoints.xyv.shape[1:] == (2, 3)


def test_an_unknown_skeleton_is_refused(engine):
    with pytest.raises(UserError, match="no keypoints for 'teapot'.*use one of: figure, red figure") as caught:
        engine.run(PICTURES[:1], [[make_request("pose", classes=["teapot"])]])
    assert caught.value.reason == "unknown_skeleton"


def test_a_region_of_another_image_size_is_refused(engine):
    region = Region("box", (64, 64), np.array([[1, 1], [20, 20]]))
    with pytest.raises(UserError, match="region is for an image of 64x64.*120x90") as caught:
        engine.run([PICTURES[1]], [[make_request("region_caption", region=region)]])
    assert caught.value.reason == "invalid_region"


# -- free chat --------------------------------------------------------------------------------------------------------


class Biased(torch.nn.Module):
    """A vocabulary projection that always chooses one token."""

    def __init__(self, head, token):
        super().__init__()
        self.head, self.token = head, tiny_tokenizer().ids[token]

    def forward(self, hidden):
        logits = self.head(hidden).clone()
        logits[..., self.token] += 1e4
        return logits


@pytest.fixture
def routed(engine):
    llm = engine.trunk.trunk.llm
    original = llm.lm_head

    def to(token):
        llm.lm_head = Biased(original, token)
        return engine

    yield to
    llm.lm_head = original


@pytest.mark.parametrize("token,text,task,phrase", [
    ("[DET]", "find every red circle", "detect", "red circle"),
    ("[SEG]", "segment blue square", "segment", "blue square"),
    ("[GRD]", "which one is the big circle ?", "refer", "the big circle"),
])  # fmt: skip
def test_a_routing_token_in_chat_gives_the_answer_of_the_structured_request(routed, token, text, task, phrase):
    engine = routed(token)
    words = {"text": phrase} if task == "refer" else {"classes": [phrase]}
    template = 1 if task in ("detect", "refer") else 0  # the same wording as in the chat
    expected = engine.run([PICTURES[1]], [[make_request(task, **words, template=template)]], **EVERYTHING)[0][0]
    answer = engine.run([PICTURES[1]], [[make_request("chat", text=text)]], **EVERYTHING)[0][0]
    assert answer.route == expected.route == token and answer.text is None
    same(answer.predictions[0], expected.predictions[0])
    assert len(answer.predictions) == 1


def test_the_text_before_a_routing_token_is_kept(monkeypatch, engine):
    tokenizer = engine.trunk.tokenizer
    force_answers(monkeypatch, engine.trunk.loop, [*tokenizer.encode("here it is"), tokenizer.ids["[DET]"]])
    pieces = []
    ((answer,),) = engine.run(
        [PICTURES[0]],
        [[make_request("chat", text="find every red circle")]],
        on_text=lambda image, request, text: pieces.append(text),
    )
    assert answer.text == "".join(pieces) == "here it is" and answer.route == "[DET]"
    assert [p.phrase for p in answer.predictions] == ["red circle"]


@pytest.mark.parametrize("token", ["[DET]", "[SEG]", "[POSE]"])
def test_words_alone_have_no_places(routed, token):
    asked = [[make_request("chat", text="pose of red figure")], [make_request("chat", text="detect circle")]]
    alone, seen = (answers[0] for answers in routed(token).run([None, PICTURES[0]], asked, **EVERYTHING))
    # the LLM goes on with the next best token
    assert alone.route is None and alone.text is not None and alone.predictions == []
    assert token not in alone.tokens and seen.predictions


def test_a_pose_in_chat_brings_the_skeleton(routed):
    answers = routed("[POSE]").run([PICTURES[0]], [[make_request("chat", text="pose of red figure")]], **EVERYTHING)[0]
    assert answers[0].predictions[0].keypoints.names == FIGURE_KEYPOINTS


def test_questions_do_not_route(routed):
    answer = routed("[DET]").run([PICTURES[0]], [[make_request("vqa", text="find every circle ?")]], **EVERYTHING)[0][0]
    assert answer.route is None and answer.text == "" and not answer.predictions


def test_routed_chat_and_structured_requests_of_a_batch_keep_apart(routed):
    engine = routed("[DET]")
    requests = [
        [make_request("chat", text="detect circle"), make_request("pose", classes=["figure"])],
        [
            make_request("pose", classes=["red figure"]),
            make_request("chat", text="detect square"),
            make_request("chat", text="pose of figure"),
        ],
    ]
    together = engine.run(PICTURES[:2], requests, **EVERYTHING)
    for image, asked, answers in zip(PICTURES, requests, together, strict=False):
        for request, answer in zip(asked, answers, strict=True):
            same_answers([answer], engine.run([image], [[request]], **EVERYTHING)[0])


# -- halves -----------------------------------------------------------------------------------------------------------


def test_trunk_output_can_be_split_and_merged_again(engine):
    requests = [mixed(p.shape[:2]) for p in PICTURES]
    out = engine.trunk.links(PICTURES, requests, max_new_tokens=6)
    parts = [out.select(i) for i in range(3)]
    expected = engine.run(PICTURES, requests, score_threshold=0.0, max_new_tokens=6)
    decoder = engine.decoders["lumen"]
    from lumen_ray.decoders.base import PredictSettings

    limits = PredictSettings(0.0)
    for part, answers in zip(parts, expected, strict=True):
        same_answers(assemble(part.plans, {"lumen": decoder.predict(part, limits)})[0], answers)
    again = merge(parts)
    assert torch.equal(again.dense, out.dense) and again.frames == out.frames
    found = {"lumen": decoder.predict(again, limits)}
    for answers, wanted in zip(assemble(again.plans, found), expected, strict=True):
        same_answers(answers, wanted)
    # two requests about one image, put together out of order
    swapped = merge([parts[2], parts[0]])
    same_answers(assemble(swapped.plans, {"lumen": decoder.predict(swapped, limits)})[1], expected[0])


def test_the_trunks_output_is_ready_for_the_wire(engine):
    out = engine.trunk.links(PICTURES[:2], [mixed(p.shape[:2]) for p in PICTURES[:2]], max_new_tokens=2)
    link = out.decoder_inputs["lumen"].link
    for tensor in (out.dense, link.embeddings, link.image_index, link.parent, link.group, out.select(1).dense):
        assert tensor.is_contiguous() and tensor.device.type == "cpu" and not tensor.requires_grad
    kept = out.dense.clone(), link.embeddings.clone()
    engine.decoders["lumen"].predict(out)
    assert torch.equal(kept[0], out.dense) and torch.equal(kept[1], link.embeddings)


def test_stages_load_apart_and_together(tmp_path, engine):
    loaded = engine.loaded
    save_model(tmp_path, loaded.model.state_dict(), loaded.settings, loaded.tokenizer, loaded.meta)
    whole, trunk, decoder = Engine.load(tmp_path), TrunkStage.load(tmp_path), DecoderStage.load(tmp_path, "lumen")
    assert (whole.preset, whole.image_size, whole.classes) == ("tiny", 64, ("red circle", "blue square"))
    assert whole.skeletons["figure"] == FIGURE_KEYPOINTS and len(whole.version) == 12
    requests = [[make_request("detect", classes=CLASSES[:2])]]
    out = trunk.links(PICTURES[:1], requests)
    same_answers(assemble(out.plans, {"lumen": decoder.predict(out)})[0], whole.run(PICTURES[:1], requests)[0])
    with pytest.raises(UserError, match="no decoder 'lumin'; decoders: lumen"):
        DecoderStage.load(tmp_path, "lumin")
    with pytest.raises(UserError, match="does not exist"):
        Engine.load(tmp_path / "nothing")


def test_a_stage_reads_and_holds_only_its_weights(tmp_path, engine, monkeypatch):
    loaded, read = engine.loaded, []
    save_model(tmp_path, loaded.model.state_dict(), loaded.settings, loaded.tokenizer, loaded.meta)
    given = WeightsFile.__getitem__
    monkeypatch.setattr(WeightsFile, "__getitem__", lambda file, name: read.append(name) or given(file, name))

    def held(make):
        read.clear()
        stage = make()
        return stage, {name.partition(".")[0] for name in read}, len(read)

    names = dict(loaded.model.named_parameters())  # tied ones once
    of_trunk, of_decoder = (sum(name.startswith(part) for name in names) for part in ("trunk.", "decoders.lumen."))
    decoder, parts, count = held(lambda: DecoderStage.load(tmp_path, "lumen"))
    assert (parts, count) == ({"decoders"}, of_decoder)
    assert [name for name, value in vars(decoder).items() if hasattr(value, "__dict__")] == ["decoder"]
    trunk, parts, count = held(lambda: TrunkStage.load(tmp_path))
    assert (parts, count) == ({"trunk"}, of_trunk)
    assert all(p.is_meta for p in trunk.loaded.model.decoders.parameters())
    whole, parts, _ = held(lambda: Engine.load(tmp_path))
    assert parts == {"trunk"}
    read.clear()
    whole.run(PICTURES[:1], [[make_request("caption")]])
    assert read == []
    asked = [[make_request("detect", classes=CLASSES[:2])]]
    for _ in range(2):
        whole.run(PICTURES[:1], asked)
    assert len(read) == of_decoder and all(name.startswith("decoders.lumen.") for name in read)


def test_a_request_keeps_its_own_limits(engine):
    """Limits of a request replace those of the call, whatever other requests of the pass allow."""
    image, request = PICTURES[0], make_request("detect", classes=["circle"])
    (all_,) = engine.run([image], [[request]], score_threshold=0.0, max_per_phrase=4)[0][0].predictions
    middle = float(all_.scores[1])
    loose = replace(request, score_threshold=0.0, max_per_phrase=4)
    strict, one = replace(loose, score_threshold=middle), replace(loose, max_per_phrase=1)
    answers = engine.run([image, image], [[loose, strict, one, request], [one]], score_threshold=1.0)
    assert [len(a.predictions[0]) for a in answers[0]] == [4, int((all_.scores >= middle).sum()), 1, 0]
    assert len(answers[1][0].predictions[0]) == 1
