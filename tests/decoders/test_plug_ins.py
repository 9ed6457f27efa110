"""A decoder of another package: registered, checked, and where it is broken told in one sentence."""

from support.plug_ins import install, lumen_ray, python

LIST = "from lumen_ray.decoders import registry; print(list(registry.DECODERS)); print(*registry.problems(), sep='\\n')"
BUILT_IN = ["lumen", "grounding_dino", "unipose", "stable_diffusion", "instruct_pix2pix"]
#: what a module of a package may get wrong about the toy decoder's spec, and a piece of the sentence about it
WRONG = {
    "clash": ("replace(SPEC, name='lumen')", "the name 'lumen' is taken by a decoder of package 'lumen-ray'"),
    "part": ("replace(SPEC, name='vision')", "the name 'vision' is taken by a part of the trunk, a setting or Python"),
    "words": ("replace(SPEC, name='my decoder')", "its name 'my decoder' is no public identifier"),
    "hidden": ("replace(SPEC, name='_toy')", "its name '_toy' is no public identifier"),
    "keyword": ("replace(SPEC, name='class')", "the name 'class' is taken by a part of the trunk, a setting or Python"),
    "method": ("replace(SPEC, name='keys')", "the name 'keys' is taken by"),
    "field": ("replace(SPEC, name='model_config')", "the name 'model_config' is taken by"),
    "always": (
        "replace(SPEC, name='k', default=SPEC.settings())",
        "it has a default section, which would change",
    ),
    "lists": ("replace(SPEC, name='l', losses=['x'])", "its losses are a list; give a mapping"),
    "string": ("replace(SPEC, name='m', tasks='detect')", "its tasks are a str; give a tuple of names"),
    "quits": ("__import__('sys').exit(3)", "cannot be loaded (SystemExit: 3)"),
    "loss": ("replace(SPEC, name='a', losses={'box': 'objects'})", "its loss 'box' has the name of a loss of decoder"),
    "unit": ("replace(SPEC, name='b', losses={'x': 'pixels'})", "its loss 'x' counts 'pixels'; give one of objects"),
    "silent": ("replace(SPEC, name='c', losses={})", "it names no losses"),
    "family": ("replace(SPEC, name='d', family='sound')", "its family 'sound' does not exist; families: perception"),
    "task": ("replace(SPEC, name='e', tasks=('edit',))", "task 'edit' is not routed to family 'perception'"),
    "idle": ("replace(SPEC, name='f', tasks=())", "it serves no task"),
    "reads": ("replace(SPEC, name='g', reads='audio')", "it reads 'audio'; give 'dense', 'pixels' or None"),
    "settings": ("replace(SPEC, name='h', settings=dict)", "its settings must be a subclass of DecoderSettings"),
    "flops": ("replace(SPEC, name='i', flops='')", "its flops is missing; name it as 'package.module:object'"),
    "type": ("{'name': 'toy'}", "the entry point must name a DecoderSpec, but names {'name': 'toy'}"),
    "incomplete": ("DecoderSpec(name='j')", "TypeError: DecoderSpec.__init__() missing"),
}


def test_a_registered_decoder_stands_behind_the_built_in_ones(tmp_path):
    install(tmp_path, "lumen-toy", {"toy": "support.toy_decoder:SPEC"})
    names, problems = python(tmp_path, "-c", LIST).stdout.splitlines()
    assert names == str([*BUILT_IN, "toy"]) and not problems


def test_each_mistake_is_one_sentence_and_the_others_work_on(tmp_path):
    for name, (spec, _) in WRONG.items():
        lines = "from dataclasses import replace\nfrom lumen_ray.decoders.spec import DecoderSpec\n"
        (tmp_path / f"wrong_{name}.py").write_text(f"{lines}from support.toy_decoder import SPEC\nSPEC = {spec}\n")
        install(tmp_path, f"lumen-{name}", {f"entry_{name}": f"wrong_{name}:SPEC"})
    install(tmp_path, "lumen-missing", {"entry_missing": "not_installed:SPEC"})
    install(tmp_path, "lumen-toy", {"toy": "support.toy_decoder:SPEC"})
    names, *problems = python(tmp_path, "-c", LIST).stdout.splitlines()
    assert names == str([*BUILT_IN, "toy"])
    wanted = {name: words for name, (_, words) in WRONG.items()} | {"missing": "No module named 'not_installed'"}
    assert len(problems) == len(wanted)
    for name, words in wanted.items():
        (problem,) = [p for p in problems if f"of package 'lumen-{name}'" in p]
        assert problem.startswith(f"decoder 'entry_{name}'") and words in problem, problem


def test_the_command_line_warns_and_works_on(tmp_path):
    install(tmp_path, "lumen-missing", {"gone": "not_installed:SPEC"})
    done = lumen_ray(tmp_path, "doctor")
    assert done.stderr.count("lumen-ray: warning: decoder 'gone' of package 'lumen-missing' is left out") == 1
    assert "decoders of other packages" in done.stdout and "preset 'nano' can run here" in done.stdout


def test_what_does_not_import_when_it_is_needed_names_its_package(tmp_path):
    missing = dict.fromkeys(("decoder", "link_head", "flops"), "support.toy_decoder:Nothing")
    (tmp_path / "late.py").write_text(
        f"from dataclasses import replace\nfrom support.toy_decoder import SPEC\nSPEC = replace(SPEC, **{missing})\n"
    )
    install(tmp_path, "lumen-late", {"toy": "late:SPEC"})
    code = """
from lumen_ray.decoders.registry import get
from lumen_ray.errors import UserError
for field in ("decoder", "link_head", "flops"):
    try:
        get("toy").resolve(field)
    except UserError as error:
        print(error)
"""
    lines = python(tmp_path, "-c", code).stdout.splitlines()
    for field, line in zip(missing, lines, strict=True):
        where = f"its {field} 'support.toy_decoder:Nothing' does not import"
        assert line.startswith(f"decoder 'toy' of package 'lumen-late' cannot be used: {where}"), line


VARIANTS = """
import torch
from support.tiny_models import SIDE, random_images, scene_batch, tiny_model, tiny_settings, tiny_tokenizer
from lumen_ray.inference.engine import Engine
from lumen_ray.inference.request import make_request
from lumen_ray.model.build import LoadedModel, ModelMeta
from lumen_ray.train.metrics import flops

def check(tasks, *names):
    model = tiny_model(lumen=None, **{name: {} for name in names})
    batch = scene_batch(2, tasks, sizes=model.settings.input_rules)
    losses = model(batch)
    wanted = {loss for name in names for loss in model.decoders[name].loss_names}
    assert wanted <= losses.keys(), (wanted, losses.keys())
    sum(term.total for term in losses.values()).backward()
    for name in names:
        assert all(p.grad is not None for p in model.decoders[name].parameters()), name
        assert name in flops.of_step(model, [batch])
    for name in names:
        chosen = model.settings.choose({task: name for task in tasks}, "test")
        engine = Engine(LoadedModel(model.eval(), chosen, tiny_tokenizer(), ModelMeta("tiny"), "0"))
        if tasks == ("generate",):
            ((answer,),) = engine.run([None], [[make_request("generate", text="a red circle")]])
            assert answer.images[0].shape == (32, 32, 3)
            continue
        image = random_images(1, SIDE)[0].permute(1, 2, 0).numpy()
        request = make_request("detect", classes=["red circle", "blue square"])
        ((answer,), _) = engine.run([image, image[:40]], [[request]] * 2, score_threshold=0)
        assert [len(p) for p in answer.predictions] == [1, 1], name
    print(*names)

check(("detect",), "toy_pixels")
check(("detect",), "toy_blind")
check(("detect",), "toy", "toy_pixels", "toy_blind")
check(("generate",), "toy_drawer")
"""


def test_decoders_of_every_kind_learn_and_answer(tmp_path):
    names = {"toy_pixels": "PIXELS", "toy_blind": "BLIND", "toy_drawer": "DRAWER"}
    points = {name: f"support.toy_variants:{spec}" for name, spec in names.items()}
    install(tmp_path, "lumen-toys", {"toy": "support.toy_decoder:SPEC", **points})
    lines = python(tmp_path, "-c", VARIANTS).stdout.split("\n")
    assert lines[:4] == ["toy_pixels", "toy_blind", "toy toy_pixels toy_blind", "toy_drawer"]


SAVED = """
import sys
from support.tiny_models import tiny_model, tiny_settings, tiny_tokenizer
from lumen_ray.model.build import ModelMeta, load_model, save_model
if sys.argv[2] == "save":
    model = tiny_model()
    save_model(sys.argv[1], model.state_dict(), model.settings, tiny_tokenizer(), ModelMeta("tiny"))
print(load_model(sys.argv[1]).settings.decoder_names)
"""


def test_a_model_without_a_plug_in_decoder_opens_where_the_package_is_missing(tmp_path):
    with_toy, without = tmp_path / "with", tmp_path / "without"
    without.mkdir()
    install(with_toy, "lumen-toy", {"toy": "support.toy_decoder:SPEC"})
    for site, action in ((with_toy, "save"), (without, "load")):
        assert python(site, "-c", SAVED, str(tmp_path / "model"), action).stdout == "('lumen',)\n"
    assert "toy" not in (tmp_path / "model" / "config.yaml").read_text()


def test_a_class_with_another_spec_is_refused(tmp_path):
    (tmp_path / "twice.py").write_text(
        "from dataclasses import replace\nfrom support.toy_decoder import SPEC\n"
        "SPEC = replace(SPEC, name='toy2', losses={'b': 'objects'})\n"
    )
    install(tmp_path, "lumen-twice", {"toy2": "twice:SPEC"})
    shown = lumen_ray(tmp_path, "doctor").stdout
    assert (
        "decoder 'toy2' of package 'lumen-twice' cannot be used: support.toy_decoder:ToyDecoder has no 'spec'" in shown
    )
