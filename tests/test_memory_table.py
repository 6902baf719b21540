"""The formulas of the memory table, against the tensors of a small model that are alive at once."""

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tools import memory_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import utils
from baichuan import BaichuanConfig, BaichuanForCausalLM
from support.training.fused_lora import fuse

SIZES = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}


class Peak(TorchDispatchMode):
    """Bytes of the storages that are alive at once, at most, beyond those of a model."""

    def __init__(self, model):
        self.known = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return output

    def gone(self, address, size):
        self.known.discard(address)
        self.now -= size


@pytest.mark.parametrize("vocab_size, supervised", [(2000, 32), (20_000, 200)], ids=["layers", "head"])
@pytest.mark.parametrize("checkpointing, dropout", [(False, 0.1), (True, 0.1), (True, 0.0)])
def test_memory_of_a_row_and_of_weights(checkpointing, dropout, vocab_size, supervised):
    config, tokens = BaichuanConfig(vocab_size=vocab_size, attn_implementation="sdpa", **SIZES), 512
    model = BaichuanForCausalLM(config)
    lora = LoraConfig(r=16, lora_dropout=dropout, target_modules=utils.find_all_linear_names(model))
    fuse(lora)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    pairs = torch.stack((torch.arange(tokens - supervised, tokens), torch.zeros(supervised, dtype=torch.long)), -1)
    mask = torch.ones((1, 1, tokens, tokens), dtype=torch.bool)
    ids = torch.zeros((1, tokens), dtype=torch.long)
    with Peak(model) as storages:
        model(input_ids=ids, attention_mask=mask, loss_positions=pairs, use_cache=False).loss.backward()
    way = memory_table.Way(4, 16, dropout > 0, checkpointing, False)
    computed = memory_table.row_bytes(config, way, memory_table.RowSize(tokens, supervised))
    assert computed == pytest.approx(storages.peak, rel=0.15)
    adapters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert memory_table.adapter_parameters(config, 16) == adapters
    assert memory_table.trained_bytes(config, way) == (4 + 4 + 12) * adapters
    assert memory_table.weight_bytes(config, way) == sum(p.nbytes for p in model.parameters()) - 4 * adapters
