"""What kind of value each argument of Keras's own classes takes: number, text, list, array, dict.

Keras looks at few of them. It formats and repeats what it takes for a number: a text of ten letters
in place of ``units`` becomes one of a gigabyte. So all are numbers, or objects, which are looked at
by themselves, but for the arguments that are listed here. Classes of the user's take what they
like; operations have rules of their own (:mod:`operations`).
"""

from __future__ import annotations

import re
from typing import Any

#: What Keras finds by ``class_name`` that is no class, and builds nothing but data.
DATA = frozenset({"__keras_tensor__", "__bytes__", "__ellipsis__", "__slice__"})

#: The same, of numbers, whose dtype may ask for more memory than they have.
NUMBERS = frozenset({"__tensor__", "__numpy__"})

#: Arguments that may be text; and those whose names end so.
TEXT = frozenset(
    {
        "activation", "activation_quantizer", "aggregation", "average", "bias_axes",
        "bounding_box_format", "class_aggregation", "color_mode", "compute_dtype", "curve",
        "data_format", "data_type", "default_policy", "distribution", "dtype", "encoding",
        "equation", "fill_mode", "fn", "interpolation", "kernel_quantizer", "loss", "mask_token",
        "mask_value", "merge_mode", "mode", "name", "oov_method", "oov_token", "ord", "order",
        "output_dtype", "output_mode", "padding", "quantization_mode", "reduction", "scaling",
        "score_mode", "side", "source_name", "split", "standardize", "summation_method",
        "synchronization", "use_cudnn", "variable_dtype", "vocabulary", "vocabulary_dtype",
        "weight_quantizer", "window",
    }
)  # fmt: skip
_TEXT_ENDS = ("_activation", "_constraint", "_dtype", "_initializer", "_regularizer")

#: Lists of numbers, also of lists of such, of objects; arrays may stand for these.
LISTS = frozenset(
    {
        "addition_factor", "alpha", "attention_axes", "axes", "axis", "batch_input_shape",
        "batch_shape", "bin_boundaries", "boundaries", "build_input_shape", "cells", "cropping",
        "crosses", "dilation_rate", "dims", "factor", "height_factor", "hue_factor",
        "idf_weights", "input_axes", "input_spec", "kernel_size", "layers", "learning_rate",
        "max_shape", "mean", "ngrams", "noise_shape", "normalization_axis", "offset",
        "output_axes", "output_padding", "output_shape", "output_size", "padding",
        "per_dimension_scale_factors", "pool_size", "reduction_axes", "rotation_factor", "salt",
        "saturation_factor", "scale", "shape", "shared_axes", "sigma", "size", "strides",
        "target_class_ids", "target_shape", "threshold_factor", "thresholds", "tile_grid_size",
        "upper", "lower", "value", "value_range", "values", "variance", "width_factor",
        "x_factor", "y_factor", "zoom_factor",
    }
)  # fmt: skip

#: Of initializers, which broadcast the mean over a variable, of as many elements as both together.
OF_INITIALIZERS = LISTS - {"mean"}

#: Lists of text, too; nests of lists and dicts of names.
_OF_TEXT = frozenset({"vocabulary", "exclude_layers", "feature_names"})
_NESTS = frozenset({"input_layers", "output_layers"})

#: Dicts of objects.
_DICTS = frozenset({"axes", "features", "optimizer_map", "policy_map"})

#: In a config as JSON: what is text, a list, a list of text, a dict that is no object; each by what
#: it may be an argument of, and what stands around arguments.
_WRITTEN = re.compile(r'"(\w+)": ("|\["?|\{(?!"module"|\}))')
_KNOWN: dict[str, frozenset[str]] = {
    '"': TEXT | {"module", "class_name", "registered_name", "config"},
    "[": OF_INITIALIZERS
    | _OF_TEXT
    | _NESTS
    | {"args", "inbound_nodes", "keras_history"}
    | {"input_shape", "query_shape", "value_shape", "key_shape"},
    '["': _OF_TEXT | _NESTS | {"keras_history"},
    "{": _DICTS | _NESTS | {"config", "build_config", "kwargs", "shapes_dict"},
}


def unlike(name: str, inner: object, build: object, lists: frozenset[str] = LISTS) -> str | None:
    """Say which argument of a class of Keras's is of a kind that it does not take.

    Parameters
    ----------
    name : str
        Of the class.
    inner : object
        Its config.
    build : object
        What it is built with: shapes, and nests of shapes.
    lists : frozenset of str
        The arguments that may be lists of numbers.
    """
    for key, value in inner.items() if isinstance(inner, dict) else ():
        if isinstance(value, str | list | dict) and not _fits(key, value, lists):
            return f"the argument {key!r} of {name} is no {type(value).__name__}"
    return None if _are_shapes(build) else f"{name} is built with what is no shape"


def may_be_unlike(text: str) -> bool:
    """Say whether to look for such arguments in a config as JSON."""
    return any(
        key not in _KNOWN[opening] and not (opening == '"' and key.endswith(_TEXT_ENDS))
        for key, opening in set(_WRITTEN.findall(text))
    )


def _fits(key: str, value: str | list[Any] | dict[str, Any], lists: frozenset[str]) -> bool:
    if key in _NESTS:
        return True
    if isinstance(value, str):
        return key in TEXT or key.endswith(_TEXT_ENDS)
    if isinstance(value, list):
        return key in lists | _OF_TEXT and _are_plain(value, text=key in _OF_TEXT)
    return _is_object(value, data=key in lists | _OF_TEXT) or key in _DICTS


def _are_plain(values: list[Any], *, text: bool) -> bool:
    """Say whether there are numbers, objects, and lists of such in a list, and text if it may."""
    waiting = [values]
    while waiting:
        for each in waiting.pop():
            if isinstance(each, list):
                waiting.append(each)
            elif isinstance(each, dict):
                if not _is_object(each, data=False):
                    return False
            elif isinstance(each, str) and not text:
                return False
    return True


def _is_object(value: dict[str, Any], *, data: bool) -> bool:
    """Say whether it is one that is looked at by itself; or an array, if ``data`` may be there."""
    name = str(value.get("class_name", ""))
    if not name or "config" not in value:
        return False
    return data if name in NUMBERS else name not in DATA


def _are_shapes(build: object) -> bool:
    waiting = [build]
    while waiting:
        each = waiting.pop()
        if isinstance(each, list | tuple | dict):  # senders have tuples
            waiting += each.values() if isinstance(each, dict) else each
        elif not isinstance(each, int | None):
            return False
    return True
