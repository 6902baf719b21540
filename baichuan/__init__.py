"""Baichuan2 for transformers 5: configuration, tokenizer, model and conversation, written from the published model's facts."""

from .configuration_baichuan import BaichuanConfig
from .modeling_baichuan import BaichuanForCausalLM
from .tokenization_baichuan import BaichuanTokenizer

# save_pretrained then copies these files beside the weights and names them in `auto_map`, so that
# AutoModelForCausalLM and AutoTokenizer load the directory anywhere with trust_remote_code=True.
BaichuanConfig.register_for_auto_class()
BaichuanForCausalLM.register_for_auto_class("AutoModelForCausalLM")
BaichuanTokenizer.register_for_auto_class("AutoTokenizer")
