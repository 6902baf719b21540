"""What LoRA on Baichuan2-7B takes, counted without its weights: python3 -m tests.tools.count_model

The model is built with shapes and dtypes but without numbers, so 7B fits into any laptop. One row passes forward and
backward through it; counted are the tensors that autograd keeps, and the multiplications.
"""

import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from tests.tools import shared

flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]  # in place, which torch does not count
GB, TERA = 1e9, 1e12
TOKENS, SUPERVISED = 704, 232  # of the row: 8 samples of 88, 8 answers of 29


def pass_through(model) -> tuple[int, int]:
    """(bytes that autograd keeps until the backward pass, operations of both passes: two a multiplication)."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tensor.shape[-2:] != (TOKENS, TOKENS):
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    columns = torch.arange(TOKENS - SUPERVISED, TOKENS)
    row = {
        "input_ids": torch.zeros((1, TOKENS), dtype=torch.long),
        "position_ids": torch.arange(TOKENS)[None],
        "attention_mask": torch.ones((1, 1, TOKENS, TOKENS), dtype=torch.bool),
        "loss_positions": torch.stack((columns, torch.zeros(SUPERVISED, dtype=torch.long)), -1),
    }
    with FlopCounterMode(display=False) as operations:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(**row, use_cache=False, num_items_in_batch=SUPERVISED).loss
        size = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        loss.backward()
    return size, operations.get_total_flops()


def describe(model):
    """Print the weights by layer and what each copy of them takes."""
    layer = model.get_base_model().model.layers[0]
    print("one decoder layer        W (out × in)       A           B      trained")
    for name, module in layer.named_modules():
        if hasattr(module, "lora_A"):
            (out, wide), rank = module.weight.shape, module.lora_A["default"].weight.shape[0]
            print(f"  {name:18}{out:7,} × {wide:<6,} {rank:3} × {wide:<6} {out:5} × {rank:<3} {rank * (out + wide):9,}")
    trained, total = model.get_nb_trainable_parameters()
    frozen, size = total - trained, f"{2 * trained / GB:6.2f} GB in bfloat16"
    print(f"frozen   {frozen:13,} weights, {2 * frozen / GB:6.2f} GB in bfloat16")
    print(f"trained  {trained:13,} weights, {size}, {trained / frozen:.2%} of the frozen ones")
    print("beside each trained weight: 2 bytes of gradient, 12 of float32 copy and AdamW's two moments")
    for name, count in (("adapters alone", trained), ("all weights", frozen)):
        print(f"  to train {name:14}  {2 * count / GB:6.2f} GB and {12 * count / GB:6.2f} GB")


def main():
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    model = shared.random_model("7b", torch.bfloat16, "meta")
    model = shared.with_lora(model, dropout=0.1).train()  # as train.py makes it
    describe(model)
    print(f"\na row of {TOKENS} tokens, {SUPERVISED} of them supervised, forward and backward:")
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        with torch.device("meta"):
            size, operations = pass_through(model)
        name = "with   " if checkpointing else "without"
        print(f"  {name} gradient checkpointing: {size / GB:6.2f} GB kept, {operations / TERA:6.2f} × 10¹² operations")


if __name__ == "__main__":
    main()
