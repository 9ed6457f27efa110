"""A decoder of another package: registered, checked, and where it is broken told in one sentence."""

from support.plug_ins import install, lumen_ray, python

LIST = "from lumen_ray.decoders import registry; print(list(registry.DECODERS)); print(*registry.problems(), sep='\\n')"
BUILT_IN = ["lumen", "grounding_dino", "unipose", "stable_diffusion", "instruct_pix2pix"]
#: what a module of a package may get wrong about the toy decoder's spec, and a piece of the sentence about it
WRONG = {
    "clash": ("replace(SPEC, name='lumen')", "the name 'lumen' is taken by a decoder of package 'lumen-ray'"),
    "part": ("replace(SPEC, name='vision')", "the name 'vision' is taken by a part of the trunk or a setting"),
    "words": ("replace(SPEC, name='my decoder')", "its name 'my decoder' is no identifier"),
    "loss": ("replace(SPEC, name='a', losses={'box': 'objects'})", "its loss 'box' has the name of a loss of decoder"),
    "unit": ("replace(SPEC, name='b', losses={'x': 'pixels'})", "its loss 'x' counts 'pixels'; give one of objects"),
    "silent": ("replace(SPEC, name='c', losses={})", "it names no losses"),
    "family": ("replace(SPEC, name='d', family='sound')", "its family 'sound' does not exist; families: perception"),
    "task": ("replace(SPEC, name='e', tasks=('edit',))", "task 'edit' is not routed to family 'perception'"),
    "idle": ("replace(SPEC, name='f', tasks=())", "it serves no task"),
    "reads": ("replace(SPEC, name='g', reads='audio')", "it reads 'audio'; give 'dense', 'pixels' or None"),
    "settings": ("replace(SPEC, name='h', settings=dict)", "its settings must be a subclass of DecoderSettings"),
    "flops": ("replace(SPEC, name='i', flops='')", "its flops is missing; name it as 'package.module:object'"),
    "type": ("{'name': 'toy'}", "the entry point must name a DecoderSpec, not a dict"),
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
