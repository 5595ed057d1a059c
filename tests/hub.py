"""KerasHub's backbones and tasks, from small configs such as its own tests have."""

from __future__ import annotations

from typing import Any

import keras
import keras_hub
import numpy as np

_TEXT = {
    "vocabulary_size": 10,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 16,
}
_LLAMA = {
    "vocabulary_size": 10,
    "num_layers": 2,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 8,
    "intermediate_dim": 8,
}
_RESNET = {
    "input_conv_filters": [8],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 64],
    "stackwise_num_blocks": [2, 2],
    "stackwise_num_strides": [1, 2],
    "block_type": "bottleneck_block",
    "image_shape": (32, 32, 3),
}
_VIT = {
    "image_shape": (28, 28, 3),
    "patch_size": (4, 4),
    "num_layers": 2,
    "hidden_dim": 24,
    "num_heads": 6,
    "mlp_dim": 48,
}

BACKBONES: dict[str, dict[str, Any]] = {
    "BertBackbone": _TEXT | {"max_sequence_length": 5},
    "DistilBertBackbone": _TEXT | {"max_sequence_length": 5},
    "GPT2Backbone": _TEXT | {"max_sequence_length": 5},
    "BartBackbone": _TEXT | {"max_sequence_length": 5},
    "T5Backbone": _TEXT,
    "LlamaBackbone": _LLAMA,
    "MistralBackbone": _LLAMA,
    "MixtralBackbone": _LLAMA | {"num_experts": 2, "top_k": 2},
    "GemmaBackbone": _LLAMA | {"num_key_value_heads": 1, "head_dim": 4},
    "WhisperBackbone": _TEXT | {"max_encoder_sequence_length": 6, "max_decoder_sequence_length": 6},
    "ViTBackbone": _VIT,
    "ResNetBackbone": _RESNET,
}


def backbone(name: str) -> keras.Model:
    """Build a backbone."""
    keras.utils.set_random_seed(0)
    model: keras.Model = getattr(keras_hub.models, name)(**BACKBONES[name])
    return model


def classifier() -> keras.Model:
    """Build a task with its preprocessor, and train it for a step."""
    keras.utils.set_random_seed(0)
    tokenizer = keras_hub.models.BertTokenizer(
        vocabulary=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e"]
    )
    task: keras.Model = keras_hub.models.BertTextClassifier(
        backbone("BertBackbone"),
        num_classes=2,
        preprocessor=keras_hub.models.BertTextClassifierPreprocessor(tokenizer, sequence_length=5),
    )
    task.fit(["a b", "c d e"], np.array([0, 1]), verbose=0)
    return task


def inputs_for(model: keras.Model) -> Any:
    """Make a batch for a model's inputs, of the lengths it takes."""
    batches = {
        each.name: np.ones(
            (2, *(size or 5 for size in each.shape[1:])),
            "int32" if "token" in each.name or "ids" in each.name else each.dtype,
        )
        for each in model.inputs
    }
    return batches if isinstance(model.input, dict) else next(iter(batches.values()))
