"""The table of docs/memory.md: what training Baichuan2-7B takes of memory, computed, and which cards hold it.

    python3 -m tests.tools.memory_table

The rows are the largest that the book's flags give on RoleBench under the published tokenizer, with and without gradient
checkpointing the same to a few tokens.

Sizes in the formulas: h hidden, m intermediate, V vocabulary, L layers, r rank of the adapters; s bytes a number.
"""

import argparse
from typing import NamedTuple

from baichuan import BaichuanConfig
from support.scores.table import markdown

CARDS = (12, 16, 24, 40, 80)  # GiB
FRAGMENTS = 1.05  # what the pieces of a device's memory that are too small for anything add; an estimate


class Way(NamedTuple):
    """How a run holds its weights, and what it keeps for the backward pass."""

    itemsize: int  # bytes of a number: 2 in bfloat16 and float16, 4 in float32
    rank: int  # of the adapters
    dropout: bool  # whether an adapter's inputs are dropped in part
    checkpointing: bool  # --gradient_checkpointing
    four_bit: bool  # --load_in_4bit
    processes: int = 1  # which share the optimizer's state


class RowSize(NamedTuple):
    """What passes through the model at once."""

    tokens: int  # padding included
    supervised: int  # tokens that carry loss
    length: int  # tokens that may see each other: of a padded batch, those of one sample


def decoder_parameters(config) -> int:
    """Weights of the linear layers that --load_in_4bit holds in four bits: W_pack, o_proj, gate, up and down."""
    h, m = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (4 * h * h + 3 * h * m)


def weight_bytes(config, way: Way) -> float:
    """Of the frozen base.

    NF4 takes half a byte a weight, and with double quantisation a byte for every 64 weights and 4 for every 64 × 256
    (Dettmers et al. 2023, arXiv 2305.14314).
    """
    h = config.hidden_size
    others = 2 * config.vocab_size * h + (2 * config.num_hidden_layers + 1) * h  # embedding, head, norms
    of_a_weight = 1 / 2 + 1 / 64 + 4 / (64 * 256) if way.four_bit else way.itemsize
    return decoder_parameters(config) * of_a_weight + others * way.itemsize


def adapter_parameters(config, rank: int) -> int:
    """A of r rows and B of r columns beside each linear layer: r · (in + out) for every one of them."""
    h, m = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * rank * ((h + 3 * h) + (h + h) + 2 * (h + m) + (m + h))


def trained_bytes(config, way: Way) -> float:
    """Adapters and their gradients; and the optimizer's float32 copy and two moments, shared out by ZeRO."""
    return adapter_parameters(config, way.rank) * (2 * way.itemsize + 12 / way.processes)


def layer_bytes(config, way: Way) -> float:
    """What a decoder layer keeps of a token until its backward pass.

    Both norms keep their input; attention the output of W_pack, of which the value is a part, query and key as they were
    turned, and its own output; the MLP what goes into activation and product; an adapter the input of its A, which
    dropout copies (on a GPU with a mask of a byte a number). Frozen weights need no input kept.
    """
    h, m, s = config.hidden_size, config.intermediate_size, way.itemsize
    norms, attention, mlp = 2 * h * s, 6 * h * s, 3 * m * s
    if way.dropout:
        adapters = (4 * h + m) * (s + 1)  # of W_pack, o_proj, gate and up; of down
    else:
        adapters = 2 * h * s + m * s  # o_proj's is attention's output; gate and up share theirs
    return norms + attention + mlp + adapters + 5 * way.rank * s


def row_bytes(config, way: Way, row: RowSize) -> float:
    """The most that a row takes beyond the weights, from its forward to the end of its backward pass.

    Every layer keeps its activations or, with checkpointing, its input alone, and computes the rest again in the backward
    pass. On top of that come, at different times, the head (the logits' softmax and two gradients, in float32) and the
    backward pass of one layer, whose gradients are as large as the MLP's activations.
    """
    h, m, s = config.hidden_size, config.intermediate_size, way.itemsize
    kept = h * s if way.checkpointing else layer_bytes(config, way)
    working = 4 * m * s + (layer_bytes(config, way) if way.checkpointing else 0)
    head = row.supervised * config.vocab_size * 3 * 4
    mask = row.tokens * row.length * s
    unpacked = h * max(3 * h, m) * s if way.four_bit else 0  # the largest weight, while it is multiplied
    return row.tokens * kept * config.num_hidden_layers + max(head, row.tokens * working + unpacked) + mask


def evaluation_bytes(config, way: Way, row: RowSize) -> float:
    """The same for a row of the test set, of which nothing is kept: the head's logits and their softmax, or a layer."""
    working = (4 * config.hidden_size + 3 * config.intermediate_size) * way.itemsize
    return (
        max(row.supervised * config.vocab_size * 2 * 4, row.tokens * working) + row.tokens * row.length * way.itemsize
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lora_dim", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--tokens", type=int, default=870, help="of the largest training row")
    parser.add_argument("--supervised", type=int, default=436, help="of them with loss")
    parser.add_argument("--test_tokens", type=int, default=1486, help="of the largest row of the test set")
    parser.add_argument("--test_supervised", type=int, default=1128, help="of them with loss")
    args = parser.parse_args(argv)
    config, row = BaichuanConfig(), RowSize(args.tokens, args.supervised, args.tokens)
    test_row = RowSize(args.test_tokens, args.test_supervised, args.test_tokens)
    rows = [["flags", "weights", "adapters, optimizer", "largest row", "sum", *(f"{card} GB" for card in CARDS)]]
    for four_bit in (False, True):
        for checkpointing in (False, True):
            way = Way(2, args.lora_dim, dropout=True, checkpointing=checkpointing, four_bit=four_bit)
            flags = ["`--load_in_4bit`"] * four_bit + ["`--gradient_checkpointing`"] * checkpointing
            largest = max(row_bytes(config, way, row), evaluation_bytes(config, way, test_row))
            parts = [weight_bytes(config, way), trained_bytes(config, way), largest]
            fits = ["yes" if FRAGMENTS * sum(parts) <= card << 30 else "–" for card in CARDS]
            rows.append([" ".join(flags) or "neither", *(f"{part / 1e9:.1f}" for part in [*parts, sum(parts)]), *fits])
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
