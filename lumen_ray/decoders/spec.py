"""What a decoder is to the rest of the package: one `DecoderSpec`.

A spec is plain data. Importing it loads neither torch nor the decoder, so that the command line, recipes and settings
can be read in a fraction of a second; what is heavy is named as "module:object" and resolved when it is first needed.
"""

from __future__ import annotations

import keyword
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lumen_ray.config import Settings
from lumen_ray.errors import UserError
from lumen_ray.input_size import SizeRule
from lumen_ray.tasks import LINK_FAMILIES, TASKS

#: parts of the trunk that recipes name; a decoder's name stands beside them
TRUNK_PARTS = ("stem", "vision", "regions", "llm", "queries", "link_heads", "dense")
#: fields and properties of a model's settings, beside which a decoder has its section
_SETTINGS_NAMES = """
    trunk decoders name published_weights image_size prefix_attention prompt_layout lead_tokens dense_channels
    published_tokens stem_channels tokens_read_stem link_channels link_reads_words vocab_size pose_queries choose
    able beside chosen_over conversion image_adapters links_see_image
    decoder_names families image_tokens input_rules input_step llm_config reads_dense sections serving shape token_side
    trunk_shape dense_readers
"""
#: attributes of `torch.nn.ModuleDict`, which cannot be keys of one
_MODULE_NAMES = """
    T_destination add_module apply bfloat16 buffers call_super_init children clear compile cpu cuda double
    dump_patches eval extra_repr float forward get_buffer get_extra_state get_parameter get_submodule half ipu items
    keys load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters pop
    register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
    register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
    register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
    set_submodule share_memory state_dict to to_empty train training type update values xpu zero_grad
"""
#: names that a decoder cannot have, since they mean something else in recipes, settings or modules
RESERVED = frozenset([*TRUNK_PARTS, *_SETTINGS_NAMES.split(), *_MODULE_NAMES.split()])

#: what the normaliser of a loss counts. Losses of "batches" are averaged over micro-steps
LossUnit = Literal["objects", "masks", "keypoints", "prompts", "batches"]
#: what a decoder reads: the trunk's dense features, the image itself, or only the super link
Reads = Literal["dense", "pixels"] | None


class DecoderSettings(Settings):
    """Base of the settings of a decoder: its section in a model's YAML."""

    @property
    def input_rule(self) -> SizeRule | None:
        """The size in which the decoder gets its images; None: the trunk's input."""
        return None

    def source(self, reads: Reads) -> Reads:
        """What a decoder with these settings reads besides the super link; `reads`: what its spec says."""
        return reads

    @property
    def tile(self) -> int:
        """Height and width of the trunk's input must be multiples of this many pixels."""
        return 1

    @property
    def caption_encoder(self) -> Mapping[str, Any] | None:
        """Keys of `transformers.CLIPTextConfig` of a text encoder that training aligns links with, if there is one."""
        return None

    def link_width(self, link_channels: int) -> int:
        """Channels of the link embeddings [P, C] that the decoder takes; `link_channels`: the model's default."""
        return link_channels

    def weight_semantics(self) -> dict[str, Any]:
        """Settings that change what weights mean though no tensor's shape shows it, such as the number of heads."""
        return {}


@dataclass(frozen=True)
class TrunkShape:
    """The widths that a decoder and its link head meet at the trunk."""

    llm_width: int
    vocab_size: int
    dense_channels: int
    link_channels: int
    link_reads_words: bool


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder. Its folder's `__init__.py` holds one; other packages register theirs under the entry-point group
    `lumen_ray.decoders`, as `name = "package.module:SPEC"`."""

    #: section of the model's YAML, key under `decoders.` in weights, part in recipes
    name: str
    #: link family (`tasks.LINK_FAMILIES`) whose super-link queries it is driven by
    family: str
    #: tasks it can serve; where several decoders can, the one registered first does unless settings say otherwise
    tasks: tuple[str, ...]
    #: what it reads besides the super link
    reads: Reads
    #: loss -> what its normaliser counts
    losses: Mapping[str, LossUnit]
    #: settings class of its section
    settings: type[DecoderSettings]
    #: "module:class" of the `Decoder` or `ImageDecoder`
    decoder: str
    #: "module:function": (section, TrunkShape) -> the module that turns hidden states into the decoder's link
    link_head: str
    #: "module:function": (decoder, DecoderWork) -> FLOPs of a training step, forward and backward
    flops: str
    #: one line for help texts and error messages
    description: str = ""
    #: the section of models whose YAML does not name it; None: such models lack the decoder
    default: DecoderSettings | None = None
    #: "module:object" of a `checkpoints.loader.PublishedLoader`, where published weights can be read
    published: str | None = None
    #: "module:object" of a `checkpoints.rules.ReleasedModule`: its part of the released VisionLLM v2 checkpoint
    released: str | None = None
    #: distribution that registered it; empty for those of this package
    package: str = field(default="", compare=False)

    @property
    def class_name(self) -> str:
        """Name of the decoder's class, e.g. ``GroundingDinoDecoder``."""
        return self.decoder.partition(":")[2]

    def resolve(self, field_name: str) -> Any:
        """Imports what a "module:object" field names. `UserError` where it cannot be imported."""
        path = getattr(self, field_name)
        try:
            return pkgutil.resolve_name(path)
        except Exception as error:  # a package's own code may raise anything
            if not self.package:
                raise
            raise UserError(
                f"decoder '{self.name}' of package '{self.package}' cannot be used: its {field_name} '{path}' does not "
                f"import ({type(error).__name__}: {error}); correct the package, install what it needs, or remove it",
                "broken_decoder",
            ) from error


def check(spec: object, others: Mapping[str, DecoderSpec]) -> str | None:
    """Why another package's spec cannot be registered beside `others`; None where it can."""
    if not isinstance(spec, DecoderSpec):
        return f"the entry point must name a DecoderSpec, but names {spec!r:.60}"
    if not (isinstance(spec.name, str) and spec.name.isidentifier() and not spec.name.startswith("_")):
        return f"its name {spec.name!r} is no public identifier, such as my_decoder"
    taken = spec.name in RESERVED or spec.name in LINK_FAMILIES or keyword.iskeyword(spec.name)
    if taken or hasattr(DecoderSettings, spec.name) or spec.name.startswith("model_"):
        return f"the name '{spec.name}' is taken by a part of the trunk, a setting or Python; choose another"
    if spec.name in others:
        owner = others[spec.name].package or "lumen-ray"
        return f"the name '{spec.name}' is taken by a decoder of package '{owner}'; choose another"
    if spec.family not in LINK_FAMILIES:
        return f"its family '{spec.family}' does not exist; families: {', '.join(LINK_FAMILIES)}"
    if not (isinstance(spec.settings, type) and issubclass(spec.settings, DecoderSettings)):
        return "its settings must be a subclass of DecoderSettings"
    if spec.reads not in ("dense", "pixels", None):
        return f"it reads {spec.reads!r}; give 'dense', 'pixels' or None"
    if spec.default is not None:
        return "it has a default section, which would change every model; leave 'default' out"
    return _check_tasks(spec) or _check_losses(spec, others) or _check_paths(spec)


def _check_tasks(spec: DecoderSpec) -> str | None:
    if not isinstance(spec.tasks, tuple):
        return f"its tasks are a {type(spec.tasks).__name__}; give a tuple of names"
    routed = [name for name, task in TASKS.items() if task.routing_token in LINK_FAMILIES[spec.family].routing_tokens]
    if wrong := [name for name in spec.tasks if name not in routed]:
        return f"task '{wrong[0]}' is not routed to family '{spec.family}'; its tasks: {', '.join(routed)}"
    return None if spec.tasks else f"it serves no task; name some under 'tasks', of {', '.join(routed)}"


def _check_losses(spec: DecoderSpec, others: Mapping[str, DecoderSpec]) -> str | None:
    if not isinstance(spec.losses, Mapping):
        return f"its losses are a {type(spec.losses).__name__}; give a mapping from name to what it counts"
    if not spec.losses:
        return "it names no losses; list them under 'losses' with what each counts"
    taken = {
        "lm": "the trunk",
        **{loss: f"decoder '{other.name}'" for other in others.values() for loss in other.losses},
    }
    for loss in spec.losses:
        if loss in taken:
            return f"its loss '{loss}' has the name of a loss of {taken[loss]}; choose another"
    units = get_args(LossUnit)
    if wrong := [loss for loss, unit in spec.losses.items() if unit not in units]:
        return f"its loss '{wrong[0]}' counts '{spec.losses[wrong[0]]}'; give one of {', '.join(units)}"
    return None


def _check_paths(spec: DecoderSpec) -> str | None:
    for name in ("decoder", "link_head", "flops"):
        value = getattr(spec, name)
        if not (isinstance(value, str) and all(value.partition(":")[::2])):
            return f"its {name} is missing; name it as 'package.module:object'"
    return None
