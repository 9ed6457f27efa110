"""Answers that are written together equal plain greedy runs; prompts join, wait and leave without touching others."""

import threading
import time

import pytest
import torch
from support.tiny_models import SIDE, llm, random_images, scrambled, tiny_model, tiny_tokenizer

from lumen_ray.errors import UserError
from lumen_ray.inference.decode_loop import DecodeLoop
from lumen_ray.inference.sampling import GREEDY, Sampler, Sampling
from lumen_ray.inference.writing import TextPrompt
from lumen_ray.trunk.branch import Branch
from lumen_ray.trunk.layout import branch_span
from lumen_ray.trunk.tokenizer import EOS

TOKENIZER = tiny_tokenizer()
IMAGES = random_images(2)
QUESTIONS = ["what ?", "describe the image in many words .", "is there a red circle ?", "what ?"]
OWNERS = [0, 1, 1, 1]


def make_trunk(model_type="llama", mode="full", **changes):
    return scrambled(tiny_model(llm=llm(model_type), prefix_attention=mode, **changes).trunk)


def make_loop(trunk, **options):
    return DecodeLoop(trunk, TOKENIZER, **options)


def prompt(question, image=0, limit=7, region=None, sampling=GREEDY):
    branch = Branch(image, question, regions=() if region is None else (0,))
    ids = branch_span(0, branch, TOKENIZER).tokens
    return TextPrompt(branch, Sampler(sampling, ids), limit, region)


@torch.inference_mode()
def write(loop, prefix, prompts):
    written = loop.submit(prefix, prompts)
    loop.wait(written)
    return [writing.tokens for writing in written]


def naive_greedy(trunk, image, question, limit, mode="full"):
    """Every token from a full pass over the whole sequence: no cache, no packing; causal needs no mask at all."""
    with torch.no_grad():
        sequence, *_ = trunk.extract_features(image[None].float() / 255)
        prefix = sequence.shape[1]
        tokens = TOKENIZER.ids["<user>"], *TOKENIZER.encode(question), TOKENIZER.ids["<assistant>"]
        written = []
        while len(written) < limit:
            text = trunk.llm.get_input_embeddings()(torch.tensor([[*tokens, *written]]))
            embeds = torch.cat([sequence, text], dim=1)
            mask = None
            if mode == "full":
                allowed = torch.ones(embeds.shape[1], embeds.shape[1]).tril()
                allowed[:prefix, :prefix] = 1
                mask = torch.where(allowed > 0, 0.0, -1e30)[None, None]
            token = int(trunk.llm(inputs_embeds=embeds, attention_mask=mask).logits[0, -1].argmax())
            if token == TOKENIZER.ids[EOS]:
                break
            written.append(token)
    return written


@pytest.mark.parametrize("mode", ["causal", "full"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_answers_equal_a_naive_greedy_run(model_type, mode):
    trunk = make_trunk(model_type, mode)
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    written = loop.submit(prefix, [prompt(q, i) for q, i in zip(QUESTIONS, OWNERS, strict=True)])
    loop.wait(written)
    expected = [naive_greedy(trunk, IMAGES[i], q, 7, mode) for q, i in zip(QUESTIONS, OWNERS, strict=True)]
    assert [writing.tokens for writing in written] == expected
    assert len({tuple(tokens) for tokens in expected}) > 1 and max(len(tokens) for tokens in expected) == 7
    for writing in written:
        assert writing.end == ("length" if len(writing.tokens) == 7 else "stop")
    assert write(loop, prefix, [prompt(QUESTIONS[1], 1, limit=1)]) == [expected[1][:1]]
    assert loop.bytes_held == 0


def test_any_token_can_end_an_answer_and_a_routing_token_is_its_last():
    trunk = make_trunk()
    expected = naive_greedy(trunk, IMAGES[1], QUESTIONS[1], 7)
    cut = expected.index(expected[2])
    loop = make_loop(trunk)
    loop._routes = frozenset([expected[2]])
    written = loop.submit(trunk.encode(IMAGES), [prompt(QUESTIONS[1], 1)])
    loop.wait(written)
    assert written[0].tokens == expected[: cut + 1] and written[0].end == "route"


def test_answers_read_the_regions_of_their_prompts():
    trunk = make_trunk()
    masks = torch.zeros(2, SIDE, SIDE, dtype=torch.uint8)
    masks[0, 8:30, 8:40] = 1
    masks[1, 40:60, 4:20] = 1
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)

    def prompts():
        region = "what is <region> ?"
        return [
            prompt("what ?"),
            prompt(region, 0, 5, masks[0]),
            prompt(region, 1, 5, masks[0]),
            prompt(region, 1, 5, masks[1]),
        ]

    together = write(loop, prefix, prompts())
    assert [write(loop, prefix, [one])[0] for one in prompts()] == together


def test_prompts_join_and_leave_between_steps_and_no_answer_changes():
    """Requests about three batches of images and of different lengths, begun at different steps."""
    trunk = make_trunk()
    loop = make_loop(trunk)
    asked = []
    with torch.inference_mode():
        for batch in range(3):
            images = random_images(2, seed=batch)
            prefix = trunk.encode(images)
            limits = [3 + 5 * n for n in range(3)]
            prompts = [prompt(q, i, n) for q, i, n in zip(QUESTIONS, OWNERS[:3], limits, strict=False)]
            asked.append((images, limits, loop.submit(prefix, prompts)))
            for _ in range(2):
                loop._step()
        assert len(loop._active) > 3
    for images, limits, written in asked:
        with torch.inference_mode():
            loop.wait(written)
        for question, owner, limit, writing in zip(QUESTIONS, OWNERS, limits, written, strict=False):
            assert writing.tokens == naive_greedy(trunk, images[owner], question, limit)
    assert loop.bytes_held == 0


def test_long_and_short_answers_are_padded_apart():
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    with torch.inference_mode():
        written = loop.submit(prefix, [prompt("what ?", 0, 6), prompt(" ".join(QUESTIONS * 8), 1, 6)])
        loop._step()
    assert len(loop._groups) == 2
    with torch.inference_mode():
        loop.wait(written)
    assert written[0].tokens == naive_greedy(trunk, IMAGES[0], "what ?", 6)
    assert written[1].tokens == naive_greedy(trunk, IMAGES[1], " ".join(QUESTIONS * 8), 6)


def test_the_image_is_stored_once_and_its_batch_reads_it_from_there():
    trunk = make_trunk(image_size=256)
    loop, prefix = make_loop(trunk), trunk.encode(random_images(1, 256))
    assert prefix.length == 256

    def held(answers):
        with torch.inference_mode():
            written = loop.submit(prefix, [prompt("what ?", 0, 9) for _ in range(answers)])
            loop._step()
            bytes_held = loop.bytes_held
            loop.wait(written)
        return bytes_held

    one, sixteen = held(1), held(16)
    image = 2 * sum(layer.keys.nbytes for layer in prefix.cache.layers)
    assert image < one < 1.2 * image
    assert sixteen - image == 16 * (one - image)  # nothing of the image again
    # a second batch moves the first, whose cache then is a view of the slots
    other = trunk.encode(random_images(1, 256, seed=1))
    with torch.inference_mode():
        written = loop.submit(prefix, [prompt("what ?", 0, 9)])
        loop._step()
        written += loop.submit(other, [prompt("what ?", 0, 9)])
        loop._step()
    (slots,) = loop._slots.values()
    for cache in (prefix.cache, other.cache):
        assert cache.layers[0].keys.untyped_storage().data_ptr() == slots.stored.keys[0].untyped_storage().data_ptr()
    with torch.inference_mode():
        loop.wait(written)


def test_prompts_wait_while_memory_is_taken():
    trunk = make_trunk()
    room = 2 * 128 * trunk.key_value_bytes  # two answers of the first group
    loop, prefix = make_loop(trunk, memory=room), trunk.encode(IMAGES)
    with torch.inference_mode():
        written = loop.submit(prefix, [prompt(q, i) for q, i in zip(QUESTIONS, OWNERS, strict=True)])
        loop._step()
        assert len(loop._active) == 2 and sum(bool(w.tokens) for w in written) == 2
        loop.wait(written)
    assert [w.tokens for w in written] == [
        naive_greedy(trunk, IMAGES[i], q, 7) for q, i in zip(QUESTIONS, OWNERS, strict=True)
    ]
    # one answer larger than all memory is written nevertheless
    assert len(write(make_loop(trunk, memory=1), prefix, [prompt(q, 1) for q in QUESTIONS[:2]])) == 2


def test_no_prompts_hold_nobody_up():
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    assert write(loop, prefix, []) == []
    assert write(loop, prefix, [prompt("what ?")]) == [naive_greedy(trunk, IMAGES[0], "what ?", 7)]


def test_images_wait_while_memory_is_taken():
    trunk = make_trunk()
    loop = make_loop(trunk, memory=20 * trunk.key_value_bytes)
    order = []

    def second():
        with loop.images(16):
            order.append("second")

    with loop.images(16):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(timeout=0.2)
        assert thread.is_alive()
        order.append("first")
    thread.join(timeout=10)
    assert order == ["first", "second"]


def test_threads_write_together_and_each_gets_its_own():
    trunk = make_trunk()
    loop = make_loop(trunk)
    found, together = {}, []

    def ask(number):
        with torch.inference_mode():
            with loop.turn():
                prefix = trunk.encode(IMAGES)
            written = loop.submit(prefix, [prompt(QUESTIONS[number], OWNERS[number], 20)])
            loop.wait(written, lambda writing: together.append(len(loop._active)))
            found[number] = written[0].tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {n: naive_greedy(trunk, IMAGES[OWNERS[n]], QUESTIONS[n], 20) for n in range(4)}
    assert max(together) > 1
    assert loop.bytes_held == 0


def test_a_thread_that_takes_the_steps_wakes_others_when_their_answer_is_done():
    """None of them streams, so none is woken by every step; the answers end at different steps."""
    trunk = make_trunk()
    loop = make_loop(trunk)
    limits, found = {0: 3, 1: 25, 2: 9, 3: 14}, {}

    def ask(number):
        with torch.inference_mode():
            with loop.turn():
                prefix = trunk.encode(IMAGES)
            written = loop.submit(prefix, [prompt(QUESTIONS[number], OWNERS[number], limits[number])])
            loop.wait(written)
            found[number] = written[0].tokens

    threads = [threading.Thread(target=ask, args=(number,)) for number in limits]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == {n: naive_greedy(trunk, IMAGES[OWNERS[n]], QUESTIONS[n], limits[n]) for n in limits}
    assert loop.bytes_held == 0 and not loop._watching


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_another_thread_goes_on_when_the_one_that_took_the_steps_leaves(error):
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    waiting, found = threading.Event(), []

    def second():
        with torch.inference_mode():
            written = loop.submit(prefix, [prompt(QUESTIONS[2], 1, 12)])
            waiting.set()
            loop.wait(written)
            found.append(written[0].tokens)

    thread = threading.Thread(target=second)

    def leave(writing):
        if len(writing.tokens) == 2:
            thread.start()
            waiting.wait(timeout=10)
        if len(writing.tokens) >= 5:
            raise error

    with torch.inference_mode():
        (first,) = loop.submit(prefix, [prompt(QUESTIONS[1], 1, 40)])
        with pytest.raises(error):
            loop.wait([first], leave)
    thread.join(timeout=30)
    assert found == [naive_greedy(trunk, IMAGES[1], QUESTIONS[2], 12)]
    assert loop.bytes_held == 0 and not loop._watching


def test_an_answer_is_given_up_while_others_are_written():
    """Its caller goes on before the others are done, and no more than a token is written for it."""
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    (long,) = loop.submit(prefix, [prompt(QUESTIONS[1], 1, 300)])
    begun = threading.Event()

    def write():
        with torch.inference_mode():
            loop.wait([long])

    def stop(writing):
        if len(writing.tokens) == 2:
            begun.set()
        if len(writing.tokens) >= 4:
            raise KeyError("gone")

    thread = threading.Thread(target=write)
    with torch.inference_mode():
        (short,) = loop.submit(prefix, [prompt(QUESTIONS[2], 1, 300)])
        thread.start()
        with pytest.raises(KeyError):
            loop.wait([short], stop)
        left = len(short.tokens)
    assert long.end is None
    thread.join(timeout=60)
    assert len(short.tokens) == left and short.end == "cancelled"
    assert long.tokens == naive_greedy(trunk, IMAGES[1], QUESTIONS[1], 300)


def test_a_turn_that_is_interrupted_stops_nobody(monkeypatch):
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    (written,) = loop.submit(prefix, [prompt(QUESTIONS[1], 1, 5)])
    thread = threading.Thread(target=lambda: loop.wait([written]))
    waits = loop._changed.wait_for

    def interrupted(ready, *args):
        if threading.current_thread() is threading.main_thread():
            loop._busy = False
            thread.start()  # sees that a thread is arriving, and sleeps once this one leaves the lock
            deadline = time.monotonic() + 10
            while not loop._changed._waiters and time.monotonic() < deadline:  # nobody tells when one sleeps
                loop._changed.wait(0.01)
            raise KeyboardInterrupt
        return waits(ready, *args)

    monkeypatch.setattr(loop._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt), loop.turn():
        pass
    thread.join(timeout=30)
    assert not thread.is_alive() and len(written.tokens) == 5


def test_new_work_waits_for_one_step_at_most():
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    tokens_at_start = []

    def newcomer(writing):
        def ask():
            with torch.inference_mode(), loop.turn():
                tokens_at_start.append(len(writing.tokens))

        return threading.Thread(target=ask)

    with torch.inference_mode():
        (writing,) = loop.submit(prefix, [prompt(QUESTIONS[1], 1, 60)])
        threads = []

        def on_token(writing):
            if len(writing.tokens) == 5:
                threads.append(newcomer(writing))
                threads[0].start()
                while not (loop._arriving or tokens_at_start):
                    pass

        loop.wait([writing], on_token)
    threads[0].join(timeout=10)
    assert tokens_at_start == [6]  # the step that a turn begins with


def test_what_the_caller_raises_gives_its_answers_up_and_no_others():
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)

    def stop(writing):
        if len(writing.tokens) == 2:
            raise KeyError("gone")

    with torch.inference_mode():
        first, second = (loop.submit(prefix, [prompt(QUESTIONS[n], OWNERS[n], 7)])[0] for n in (1, 2))
        with pytest.raises(KeyError, match="gone"):
            loop.wait([first], stop)
        assert first.end == "cancelled" and second.end is None
        loop.wait([second])
    assert second.tokens == naive_greedy(trunk, IMAGES[1], QUESTIONS[2], 7)
    assert loop.bytes_held == 0


def test_an_answer_is_given_up_outside_inference_mode_too():
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    written = loop.submit(prefix, [prompt(QUESTIONS[1], 1, 20), prompt("what ?", 0, 20), prompt(QUESTIONS[2], 1, 20)])
    loop._step()
    loop.cancel(written[:1])
    loop.wait(written[1:])
    assert written[0].end == "cancelled"
    assert written[1].tokens == naive_greedy(trunk, IMAGES[0], "what ?", 20)
    assert written[2].tokens == naive_greedy(trunk, IMAGES[1], QUESTIONS[2], 20)


def test_an_interrupt_leaves_the_loop_usable(monkeypatch):
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    other = loop.submit(prefix, [prompt("what ?")])

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trunk, "run_branches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(loop, prefix, [prompt(QUESTIONS[1], 1)])
    monkeypatch.undo()
    assert other[0].end == "error"  # it was to begin in the same pass
    assert write(loop, prefix, [prompt(QUESTIONS[1], 1)]) == [naive_greedy(trunk, IMAGES[1], QUESTIONS[1], 7)]


def test_prompts_are_kept_that_are_enqueued_during_a_step(monkeypatch):
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    late = []
    decode_step = trunk.decode_step

    def while_stepping(*args):
        if not late:
            thread = threading.Thread(target=lambda: late.extend(loop.submit(prefix, [prompt(QUESTIONS[2], 1)])))
            thread.start()
            thread.join(timeout=10)
        return decode_step(*args)

    monkeypatch.setattr(trunk, "decode_step", while_stepping)
    first = loop.submit(prefix, [prompt("what ?")])
    loop.wait(first)
    loop.wait(late)
    assert late[0].tokens == naive_greedy(trunk, IMAGES[1], QUESTIONS[2], 7)


def test_keys_outside_a_sliding_window_stay():
    keys = llm("mistral") | {"sliding_window": 8}
    trunk = scrambled(tiny_model(llm=keys, prefix_attention="full").trunk)
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    assert write(loop, prefix, [prompt(QUESTIONS[1], 1)]) == [naive_greedy(trunk, IMAGES[1], QUESTIONS[1], 7)]


def test_attention_that_is_no_plain_softmax_is_refused():
    with pytest.raises(UserError, match="an LLM of type 'gemma2' has sinks or capped logits"):
        tiny_model(llm=llm("gemma2") | {"head_dim": 16})


def test_an_error_of_the_model_reaches_those_who_wait(monkeypatch):
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    monkeypatch.setattr(trunk, "decode_step", lambda *args: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        write(loop, prefix, [prompt(QUESTIONS[1], 1)])
    monkeypatch.undo()
    assert write(loop, prefix, [prompt(QUESTIONS[1], 1)]) == [naive_greedy(trunk, IMAGES[1], QUESTIONS[1], 7)]


def test_an_llm_that_ignores_attention_functions_is_named(monkeypatch):
    trunk = make_trunk()
    monkeypatch.setattr(trunk.llm.config, "_attn_implementation", "eager")
    with pytest.raises(UserError, match="LlamaForCausalLM takes no attention function"):
        write(make_loop(trunk), trunk.encode(IMAGES), [prompt(QUESTIONS[1], 1)])


def test_a_seed_draws_the_same_answer_beside_others():
    trunk = make_trunk()
    loop, prefix = make_loop(trunk), trunk.encode(IMAGES)
    drawn = [Sampling(temperature=1.5, seed=n) for n in range(3)]
    together = write(loop, prefix, [prompt("what ?", 0, sampling=s) for s in drawn])
    assert together == [write(loop, prefix, [prompt("what ?", 0, sampling=s)])[0] for s in drawn]
    assert len({tuple(tokens) for tokens in together}) > 1
