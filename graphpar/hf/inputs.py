"""Random inputs for any model of transformers, from the signature of its forward and its configuration.

What an input is called says what it holds, its sizes come from the configuration. Where the name leaves
several shapes open (sound may be samples or spectra, pictures may be films), there are several
candidates: the first that the model accepts is right.
"""

import inspect
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import nn

from graphpar.hf.config import first_field, number_field, part_with, read_field
from graphpar.hf.documented import documented_inputs, handed_on

IGNORED = -100
"""The label that transformers leaves out of its losses."""
_SAMPLES_PER_FRAME = 320
_FEATURES = 24
"""Of each time step where nothing tells how many; what the model says of them does afterwards."""
_PICTURE_SIZES = ("image_size", "img_size", "max_img_size", "crop_size")
_SUMS = {"*": operator.mul, "+": operator.add, "-": operator.sub, "//": operator.floordiv}
_ALTERNATIVE = re.compile(
    r"embeds$|embeddings$|_outputs$|labels?$|head_mask|^past_|cache|_positions$|_values$(?<!input_values)(?<!pixel_values)"
)
"""Inputs that stand for others, or hold what an earlier call made."""
_CONDITION = re.compile(r"(^|_)cond(ition(ing)?)?$")
"""One vector for each sample, on which all its places depend."""


@dataclass(frozen=True)
class Wanted:
    """What inputs should be like.

    Attributes:
        batch: Samples.
        length: Tokens per sample.
        labels: Whether labels are wanted where the model takes them; some of them are ignored.
        mask: Whether samples end in padding that `attention_mask` hides.
        words: Range of ids of ordinary words.
        seed: Of the random numbers.
    """

    batch: int
    length: int
    labels: bool = True
    mask: bool = True
    words: tuple[int, int] | None = None
    seed: int = 0


@dataclass(frozen=True)
class _Variant:
    """One way to read the names of a model's inputs.

    Attributes:
        form: Which of the shapes that a name leaves open.
        names: "usual" inputs, those "documented" as needed as well, "all" documented, the
            "main" one with what the signature demands, "text" alone, or "embeds" in its place.
        labels: Whether labels are given.
    """

    form: int
    names: str = "usual"
    labels: bool = True


_FORMS = range(4)
_VARIANTS = (
    *(_Variant(form) for form in _FORMS),
    *(_Variant(form, "documented") for form in _FORMS),
    _Variant(0, "text"),
    *(_Variant(form, "main") for form in _FORMS),
    *(_Variant(form, labels=False) for form in _FORMS),
    *(_Variant(form, "documented", labels=False) for form in _FORMS),
    _Variant(0, "embeds"),
    _Variant(0, "all", labels=False),
)


def candidate_inputs(model: nn.Module, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """Keyword arguments that the model may accept, the likeliest first; none if there is nothing known.

    They lie on the model's device; on the meta device they have no values.
    """
    seen = []
    for variant in _VARIANTS:
        try:
            made = _Maker(model, wanted, variant).inputs()
        except Exception:  # a shape that the model's own helper functions refuse is no candidate
            continue
        form = [(k, (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v) for k, v in made.items()]
        if made and form not in seen:
            seen.append(form)
            yield made


def further_input(model: nn.Module, wanted: Wanted, name: str) -> Any:
    """An input by name that the model takes beside the usual ones; None where nothing is known of it."""
    if _ALTERNATIVE.search(name):
        return None
    try:
        maker = _Maker(model, wanted, _Variant(0))
        return maker.further(name)
    except Exception:  # a shape that the documentation tells by a formula, or does not tell
        return None


def unknown_inputs(model: nn.Module, wanted: Wanted) -> list[str]:
    """Inputs that the model cannot do without and of which nothing tells what they are."""
    maker = _Maker(model, wanted, _Variant(0))
    found = []
    for name in maker.needed():
        try:
            maker.further(name)
        except Exception:  # whatever a model's own helper functions say
            found.append(name)
    return found


class _Maker:
    """Makes one set of inputs."""

    def __init__(self, model: nn.Module, wanted: Wanted, variant: _Variant) -> None:
        self.model: Any = model
        self.config: Any = model.config
        self.wanted, self.variant = wanted, variant
        self.accepted: Mapping[str, inspect.Parameter] = inspect.signature(model.forward).parameters
        self.documented = documented_inputs(model.forward)
        main = getattr(model, "main_input_name", "input_ids")
        self.main: str = main if isinstance(main, str) else main[0]
        tensors = itertools.chain(model.parameters(), model.buffers())
        first = next(tensors, torch.empty(0))
        self.device = first.device
        self.generator = (
            None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(wanted.seed)
        )
        self.kind = type(model).__name__

    # --- putting together ---

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments of one call."""
        made: dict[str, Any] = {}
        for name in self._names():
            value = self._mask_of(name, made)
            value = self._value(name) if value is None else value
            if value is not None:
                made[name] = value
        self._place_pictures_in_text(made)
        if self.wanted.labels and self.variant.labels:
            self._add_labels(made)
        if getattr(self.config, "is_encoder_decoder", False) and "labels" not in made:
            if "decoder_input_ids" in self.accepted:
                made["decoder_input_ids"] = self._words("decoder_input_ids")
        return made

    def needed(self) -> list[str]:
        """Inputs that have no default."""
        return [
            name
            for name, parameter in self.accepted.items()
            if parameter.default is inspect.Parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]

    def further(self, name: str) -> Any:
        """One more input.

        Raises:
            LookupError: The model takes none of this name, or nothing tells its shape.
        """
        if name not in self.accepted and _CONDITION.search(name) and handed_on(self.model, name):
            return self._floats(self.wanted.batch, 1, number_field(self.config, "hidden_size"))
        parameter = self.accepted[name]
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise LookupError(name)
        if isinstance(parameter.default, (bool, int, float, str)):  # a setting
            raise LookupError(name)
        return self._value(name)

    def _names(self) -> list[str]:
        """Inputs the model needs, and the further ones that make a call typical."""
        needed = self.needed()
        if self.variant.names == "text":
            if "input_ids" not in self.accepted or self.main not in ("input_ids", *needed):
                raise LookupError("input_ids")
            return ["input_ids", *(["attention_mask"] if self._takes_mask() else [])]
        if self.variant.names == "embeds":
            if not {"input_ids", "inputs_embeds"} <= self.accepted.keys():
                raise LookupError("inputs_embeds")
            return ["inputs_embeds", *(["attention_mask"] if self._takes_mask() else [])]
        if self.variant.names == "main":
            return [self.main, *(n for n in needed if n != self.main)]
        names = [n for n in ("input_ids", "pixel_values", "input_features", "input_values")
                 if n in self.accepted]  # fmt: skip
        if self.main in self.accepted and self.main not in names:
            names.append(self.main)
        names += [n for n in needed if n not in names]
        names += [n for n in ("future_values", "future_time_features")
                  if n in self.accepted and n not in names]  # fmt: skip
        if "bbox" in self.accepted and "bbox" not in names:
            names.append("bbox")
        if "input_ids" in names and self._takes_mask() and "attention_mask" not in names:
            names.append("attention_mask")
        return [*names, *(n for n in self._further() if n not in names)]

    def _further(self) -> list[str]:
        """Inputs that the documentation calls for, though the signature has a default for them."""
        if self.variant.names in ("usual", "main"):
            return []
        everything = self.variant.names == "all"
        return [
            name
            for name, made in self.documented.items()
            if (everything or not made.is_optional) and not _ALTERNATIVE.search(name)
        ]

    def _takes_mask(self) -> bool:
        return self.wanted.mask and "attention_mask" in self.accepted

    def _value(self, name: str) -> Any:
        if name == "attention_mask":
            return self._mask()
        if name.endswith("input_ids"):
            return self._words("input_ids" if name == "decoder_input_ids" else name)
        if name == "pixel_values" and "spatial_shapes" in self.accepted:
            return self._patches()
        if name == "spatial_shapes":
            return torch.full((self.wanted.batch, 2), self._side(), device=self.device)
        if name == "pixel_attention_mask" and "spatial_shapes" in self.accepted:
            return self._ones(self.wanted.batch, self._side() ** 2)
        if name.startswith("pixel_values"):
            return self._pixels()
        heard = name == "inputs" and first_field(self.config, "conv_stride", "num_mel_bins") is not None
        if heard or name in ("input_values", "input_features", "audio_values"):
            return self._sound(name)
        if name == "bbox":
            return self._integers(100, self.wanted.batch, self.wanted.length, 4).sort(-1).values
        if name.startswith(("past_", "future_")):
            return self._series(name)
        if name == "image_attention_mask":  # which of the pictures each word sees
            return self._ones(self.wanted.batch, self.wanted.length, 1)
        if name.endswith("_mask"):
            return self._ones(self._rows(name), self.wanted.length)
        if name == "inputs_embeds" or name.endswith("hidden_states"):
            return self._floats(
                self.wanted.batch, self.wanted.length, number_field(self.config, "hidden_size")
            )
        return self._as_documented(name)

    def _mask_of(self, name: str, made: Mapping[str, Any]) -> torch.Tensor | None:
        """Ones for each time step of an input of sound that this is the mask of, by its name."""
        masked = made.get(name.removesuffix("_mask")) if name.endswith("_mask") else None
        if not isinstance(masked, torch.Tensor) or masked.ndim not in (2, 3):
            return None
        bins = first_field(self.config, "num_mel_bins", "feature_size")
        return self._ones(masked.shape[0], next((n for n in masked.shape[:0:-1] if n != bins), bins or 1))

    def _as_documented(self, name: str) -> torch.Tensor:
        if name == self.main and name not in self.documented:  # whatever the heads' preprocessors take
            if self.variant.form >= 2:
                places = (self.wanted.length,) if self.variant.form == 2 else ()
                return self._floats(self.wanted.batch, *places, _FEATURES)
            return self._words() if self.variant.form == 0 else self._pixels()
        made = self.documented[name]
        shape = tuple(self._size(part) for part in made.shape)
        if made.kind == "bool" or name.endswith("mask"):
            ones = torch.ones(shape, device=self.device)
            return ones.bool() if made.kind == "bool" else ones.long() if made.kind == "int" else ones
        if made.kind == "float":
            return self._floats(*shape)
        bound = (
            int(made.bound) if made.bound.isdigit() else first_field(self.config, made.bound or "none")
        )
        return self._integers(min(bound, 2) if isinstance(bound, int) and bound > 0 else 2, *shape)

    def _size(self, part: str) -> int:
        """What a dimension of the documentation's name is here.

        Raises:
            LookupError: It is a formula.
        """
        part = part.removeprefix("config.")
        if part.isdigit():
            return int(part)
        if found := re.fullmatch(r"(.+?) ?([*+-]|//) ?(.+)", part):
            first, second = self._size(found[1].strip("() ")), self._size(found[3].strip("() "))
            return int(_SUMS[found[2]](first, second))
        if not part.isidentifier():
            raise LookupError(part)
        if part in ("batch_size", "batch", "bsz", "B"):
            return self.wanted.batch
        value = first_field(self.config, part)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if re.search(r"len(gth)?$|^(seq|length|L|T)$", part):
            return self.wanted.length
        if part in ("height", "width", "image_height", "image_width"):
            return int(self._pixels().shape[-1])
        if part.endswith(("channels", "_dim")):
            return 3 if part.endswith("channels") else number_field(self.config, "hidden_size")
        return 3

    # --- text ---

    def _text_config(self) -> Any:
        inner = getattr(self.config, "text_config", None) or getattr(self.config, "thinker_config", None)
        return inner if inner is not None and not hasattr(self.config, "vocab_size") else self.config

    def _words(self, like: str = "input_ids") -> torch.Tensor:
        low, high = self.wanted.words or (0, number_field(self._text_config(), "vocab_size"))
        known = first_field(self._text_config(), "vocab_size")
        if isinstance(known, int) and low < known:
            high = min(high, known)
        shape: tuple[int, ...] = (self._rows(like), self.wanted.length)
        told = self.documented.get(like)
        if told is not None and len(told.shape) > 2 and self.variant.names != "usual":  # several codes
            shape = (*shape, *(self._size(part) for part in told.shape[2:]))
        return self._integers(high - low, *shape) + low

    def _rows(self, name: str) -> int:
        """Texts in an input: one for each sample, or as many as the documentation says."""
        told = self.documented.get(name)
        first = told.shape[0] if told is not None and told.shape else ""
        return self._size(first) if "*" in first else self.wanted.batch

    def _mask(self) -> torch.Tensor:
        """Ones and then zeros; the first sample is full, the last ones are shorter and shorter."""
        batch, length = self.wanted.batch, self.wanted.length
        mask = self._ones(batch, length)
        if self.device.type != "meta":
            for sample in range(1, batch):
                mask[sample, length - min(sample, length // 2) :] = 0
        return mask

    def _place_pictures_in_text(self, made: dict[str, Any]) -> None:
        """Put in the text, for each picture, as many placeholders as the model makes features of it."""
        token = first_field(self.config, "image_token_id", "image_token_index")
        if "input_ids" not in made or "pixel_values" not in made or token is None:
            return
        features = getattr(self.model, "get_image_features", None)
        if features is None or self.device.type == "meta":
            return
        sizes = [n for n in inspect.signature(features).parameters if n in made]
        with torch.no_grad():
            found = features(**{n: made[n] for n in sizes})
        batch = self.wanted.batch
        count = _num_features(found, batch)
        if not count:
            return
        ids = self._integers(8, batch, self.wanted.length + count) + (self.wanted.words or (10, 0))[0]
        ids[:, 1 : 1 + count] = token
        made["input_ids"] = ids
        if "attention_mask" in made:
            made["attention_mask"] = torch.ones_like(ids)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in self.accepted and self.accepted[name].default is not inspect.Parameter.empty:
                made[name] = (ids == token).long()

    # --- pictures, films, sound ---

    def _pixels(self) -> torch.Tensor:
        whole = getattr(self.config, "vision_config", None) or self.config
        config, size = part_with(whole, "image_size"), first_field(whole, *_PICTURE_SIZES)
        if not isinstance(size, (int, list, tuple)) or not size:
            size = (64, 224, 32, 384, 64)[self.variant.form]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
        if not isinstance(channels, int):
            channels = 3
        frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
        if frames and self.variant.form < 2:
            return self._floats(self.wanted.batch, frames, channels, height, width)
        if self.variant.form == 3:
            return self._floats(self.wanted.batch, 1, channels, height, width)
        return self._floats(self.wanted.batch, channels, height, width)

    def _side(self) -> int:
        """Patches along a side of a picture that is given as patches."""
        patches = first_field(self.config, "num_patches")
        return isqrt(patches) if isinstance(patches, int) else 4

    def _patches(self) -> torch.Tensor:
        """Pictures of any form, cut into patches: (batch, patches, points of a patch)."""
        patch = number_field(self.config, "patch_size")
        channels = first_field(self.config, "num_channels") or 3
        return self._floats(self.wanted.batch, self._side() ** 2, channels * patch**2)

    def _sound(self, name: str) -> torch.Tensor:
        config = getattr(self.config, "audio_config", None) or self.config
        bins = first_field(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_size")
        frames = first_field(config, "max_length", "max_source_positions")
        batch, samples = self.wanted.batch, 10 * _SAMPLES_PER_FRAME
        plain = ((batch, samples), (batch, 1, samples), (batch, samples // 10, 80), (batch, 1, 64, 64))
        if not isinstance(bins, int):
            return self._floats(*plain[self.variant.form])
        length = frames if isinstance(frames, int) else 64
        shapes: tuple[tuple[int, ...], ...] = (
            (batch, bins, 2 * length),
            (batch, length, bins),
            (batch, 2 * length, bins),
            (batch, 1, length, bins),
            (batch, samples),
        )
        if name == "input_values":
            shapes = (shapes[1], shapes[4], shapes[0], shapes[2], shapes[3])
        return self._floats(*shapes[self.variant.form])

    def _series(self, name: str) -> torch.Tensor:
        """Values of a time series, what is known of each time, or which values were observed."""
        lags = first_field(self.config, "lags_sequence") or [0]
        length = number_field(self.config, "context_length", "seq_length", "input_size") + max(lags)
        if name.startswith("future_"):
            length = number_field(self.config, "prediction_length")
        batch = self.wanted.batch
        if name.endswith("time_features"):
            return self._floats(batch, length, number_field(self.config, "num_time_features"))
        channels = first_field(self.config, "num_input_channels", "input_size") or 1
        one_series = (channels == 1 and read_field(self.config, "num_input_channels") is None) != (
            self.variant.form % 2 == 1
        )
        shape = (batch, length) if one_series else (batch, length, channels)
        return torch.ones(shape, device=self.device) if name.endswith("mask") else self._floats(*shape)

    # --- labels ---

    def _add_labels(self, made: dict[str, Any]) -> None:
        if "return_loss" in self.accepted:
            made["return_loss"] = True
        elif "labels" in self.accepted:
            labels = self._labels(made)
            if labels is not None:
                made["labels"] = labels
        elif {"start_positions", "end_positions"} <= self.accepted.keys():
            for name in ("start_positions", "end_positions"):
                made[name] = self._integers(self.wanted.length, self.wanted.batch)

    def _labels(self, made: Mapping[str, Any]) -> torch.Tensor | None:
        classes = getattr(self.config, "num_labels", 2)
        batch, kind = self.wanted.batch, self.kind
        if kind.endswith(("SequenceClassification", "ImageClassification", "VideoClassification",
                          "ImageClassificationWithTeacher")):  # fmt: skip
            return self._integers(classes, batch)
        if kind.endswith("TokenClassification"):
            return self._some_ignored(self._integers(classes, batch, self.wanted.length))
        if kind.endswith(("SemanticSegmentation", "DepthEstimation")):
            height, width = made[self.main].shape[-2:]
            if kind.endswith("DepthEstimation"):
                return None
            return self._integers(classes, batch, height, width)
        if "Classification" in kind:
            return self._integers(classes, batch)
        if "input_ids" in made and not getattr(self.config, "is_encoder_decoder", False):
            return self._some_ignored(made["input_ids"].clone())
        if kind.endswith(("LM", "ForConditionalGeneration", "LMHeadModel", "Seq2Seq", "Text2Text")):
            return self._some_ignored(self._words("labels"))
        return None

    def _some_ignored(self, labels: torch.Tensor) -> torch.Tensor:
        """Unequally many labels are ignored in each sample."""
        if self.device.type != "meta":
            for sample in range(labels.shape[0]):
                labels[sample, : 1 + sample % max(labels.shape[1] - 2, 1)] = IGNORED
        return labels

    # --- tensors ---

    def _integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, device=self.device, generator=self.generator)

    def _floats(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, generator=self.generator)

    def _ones(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.long, device=self.device)


def _num_features(found: Any, batch: int) -> int:
    """How many places in the text one picture takes, from what the model makes of a batch of them."""
    value = getattr(found, "pooler_output", None) if not isinstance(found, torch.Tensor) else found
    if value is None:
        value = found[0]
    if isinstance(value, (list, tuple)):
        return int(
            sum(v.shape[0] if v.ndim == 2 else v[0].numel() // v.shape[-1] for v in value) // batch
        )
    return int(value.numel() // value.shape[-1] // batch)
