"""transformers' own tests of any model, over this one. `versions.py --common` copies this file among them and runs it."""

import unittest

import torch
from transformers.models.auto import modeling_auto

from baichuan import BaichuanConfig, BaichuanForCausalLM
from baichuan.modeling_baichuan import BaichuanModel

# The tests ask these tables which classes can be trained; that is to be known before they are imported.
modeling_auto.MODEL_MAPPING_NAMES["baichuan"] = "BaichuanModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["baichuan"] = "BaichuanForCausalLM"

from .test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor  # noqa: E402


class Sizes:
    """What the tests ask of a model's "tester"."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads = 99, 32, 37, 2, 4

    def get_config(self) -> BaichuanConfig:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return BaichuanConfig(**{name: getattr(self, name) for name in names})

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class TestBaichuan(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (BaichuanModel, BaichuanForCausalLM)

    def setUp(self):
        self.model_tester = Sizes()
