"""What LoRA on Baichuan2-7B takes, counted without its weights: python3 -m tests.tools.count_model

The model is built with shapes and dtypes but without numbers, so 7B fits into any laptop. One row passes forward and
backward through it; counted are the tensors that autograd keeps, and the multiplications.
"""

import argparse
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import utils
from baichuan import BaichuanConfig, BaichuanForCausalLM

GB, TERA = 1e9, 1e12


def build(rank: int, checkpointing: bool):
    """The 7B model in bfloat16 with adapters, as train.py makes it."""
    torch.set_default_dtype(torch.bfloat16)
    model = BaichuanForCausalLM(BaichuanConfig(attn_implementation="sdpa"))
    settings = {"r": rank, "lora_alpha": 64, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    lora = LoraConfig(target_modules=utils.find_all_linear_names(model), **settings)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    torch.set_default_dtype(torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def pass_through(model, tokens: int, supervised: int) -> tuple[int, int]:
    """(bytes that autograd keeps until the backward pass, operations of both passes: two a multiplication)."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights and tensor.shape[-2:] != (tokens, tokens):
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    pairs = torch.stack((torch.arange(tokens - supervised, tokens), torch.zeros(supervised, dtype=torch.long)), -1)
    ids = torch.zeros((1, tokens), dtype=torch.long)
    sees = torch.ones((1, 1, tokens, tokens), dtype=torch.bool)
    with FlopCounterMode(display=False) as operations:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            row = {"input_ids": ids, "position_ids": torch.arange(tokens)[None], "attention_mask": sees}
            loss = model(**row, loss_positions=pairs, use_cache=False, num_items_in_batch=supervised).loss
        size = sum(storage.nbytes() for storage in kept.values())
        kept.clear()
        loss.backward()
    return size, operations.get_total_flops()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lora_dim", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--tokens", type=int, default=704, help="tokens of the row: 8 samples of 88")
    parser.add_argument("--supervised", type=int, default=232, help="of them with loss: 8 answers of 29")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # between the libraries
    for checkpointing in (False, True):
        with torch.device("meta"):
            model = build(args.lora_dim, checkpointing)
            size, operations = pass_through(model, args.tokens, args.supervised)
        if not checkpointing:
            describe(model)
            print(f"\na row of {args.tokens} tokens, {args.supervised} of them supervised, forward and backward:")
        name = "with" if checkpointing else "without"
        print(
            f"  {name:7} gradient checkpointing: {size / GB:6.2f} GB kept, {operations / TERA:6.2f} × 10¹² operations"
        )


def describe(model):
    """Print the weights by layer and what each copy of them takes."""
    layer = model.get_base_model().model.layers[0]
    print("one decoder layer        W (out × in)       A           B      trained")
    for name, module in layer.named_modules():
        if hasattr(module, "lora_A"):
            (out, wide), rank = module.weight.shape, module.lora_A["default"].weight.shape[0]
            print(f"  {name:18}{out:7,} × {wide:<6,} {rank:3} × {wide:<6} {out:5} × {rank:<3} {rank * (out + wide):9,}")
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
    print(f"frozen   {frozen:13,} weights, {2 * frozen / GB:6.2f} GB in bfloat16")
    print(
        f"trained  {trained:13,} weights, {2 * trained / GB:6.2f} GB in bfloat16, {trained / frozen:.2%} of the frozen ones"
    )
    print("beside each trained weight: 2 bytes of gradient, 12 of float32 copy and AdamW's two moments")
    for name, count in (("adapters alone", trained), ("all weights", frozen)):
        print(f"  to train {name:14}  {2 * count / GB:6.2f} GB and {12 * count / GB:6.2f} GB")


if __name__ == "__main__":
    main()
