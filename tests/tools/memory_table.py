"""The table of docs/memory.md: what training Baichuan2-7B takes of memory, computed, and which cards hold it.

    python3 -m tests.tools.memory_table

Sizes in the formulas: h hidden, m intermediate, s bytes a number.
"""

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


class RowSize(NamedTuple):
    """What passes through the model at once."""

    tokens: int
    supervised: int  # tokens that carry loss


# The largest that the book's flags give on RoleBench under the published tokenizer: in training, and of the test set.
LARGEST, LARGEST_OF_TEST = RowSize(870, 436), RowSize(1486, 1128)


def weight_bytes(config, way: Way) -> float:
    """Of the frozen base. In four bits are W_pack, o_proj, gate, up and down.

    NF4 takes half a byte a weight, and with double quantisation a byte for every 64 weights and 4 for every 64 × 256
    (Dettmers et al. 2023, arXiv 2305.14314).
    """
    h, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    others = 2 * config.vocab_size * h + (2 * layers + 1) * h  # embedding, head, norms
    of_a_weight = 1 / 2 + 1 / 64 + 4 / (64 * 256) if way.four_bit else way.itemsize
    return layers * (4 * h * h + 3 * h * m) * of_a_weight + others * way.itemsize


def adapter_parameters(config, rank: int) -> int:
    """A of r rows and B of r columns beside each linear layer: r · (in + out) for every one of them."""
    h, m = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * rank * ((h + 3 * h) + (h + h) + 2 * (h + m) + (m + h))


def trained_bytes(config, way: Way) -> float:
    """Adapters and their gradients; and the optimizer's float32 copy and two moments."""
    return adapter_parameters(config, way.rank) * (2 * way.itemsize + 12)


def layer_bytes(config, way: Way) -> float:
    """What a decoder layer keeps of a token until its backward pass.

    Both norms keep their input; attention the output of W_pack, of which the value is a part, query and key as they were
    turned, and its own output; the MLP what goes into activation and product; an adapter the input of its A, which
    dropout copies, with a mask of a byte a number. Frozen weights need no input kept.
    """
    h, m, s = config.hidden_size, config.intermediate_size, way.itemsize
    norms, attention, mlp = 2 * h * s, 6 * h * s, 3 * m * s
    adapters = 2 * h * s + m * s  # o_proj's is attention's output; gate and up share theirs
    if way.dropout:
        adapters = (4 * h + m) * (s + 1)  # of W_pack, o_proj, gate and up; of down
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
    mask = row.tokens**2 * s
    unpacked = h * max(3 * h, m) * s if way.four_bit else 0  # the largest weight, while it is multiplied
    return row.tokens * kept * config.num_hidden_layers + max(head, row.tokens * working + unpacked) + mask


def evaluation_bytes(config, way: Way, row: RowSize) -> float:
    """The same for a row of the test set, of which nothing is kept: the head's logits and their softmax, or a layer."""
    working = (4 * config.hidden_size + 3 * config.intermediate_size) * way.itemsize
    return max(row.supervised * config.vocab_size * 2 * 4, row.tokens * working) + row.tokens**2 * way.itemsize


def main():
    config = BaichuanConfig()
    rows = [["flags", "weights", "adapters, optimizer", "largest row", "sum", *(f"{card} GB" for card in CARDS)]]
    for four_bit in (False, True):
        for checkpointing in (False, True):
            way = Way(2, 16, dropout=True, checkpointing=checkpointing, four_bit=four_bit)
            flags = ["`--load_in_4bit`"] * four_bit + ["`--gradient_checkpointing`"] * checkpointing
            largest = max(row_bytes(config, way, LARGEST), evaluation_bytes(config, way, LARGEST_OF_TEST))
            parts = [weight_bytes(config, way), trained_bytes(config, way), largest]
            fits = ["yes" if FRAGMENTS * sum(parts) <= card << 30 else "–" for card in CARDS]
            rows.append([" ".join(flags) or "neither", *(f"{part / 1e9:.1f}" for part in [*parts, sum(parts)]), *fits])
    print("\n".join(markdown(rows)))


if __name__ == "__main__":
    main()
