"""The table of docs/memory.md: what training Baichuan2-7B takes, computed (support/training/memory.py), and which cards hold it.

    python3 -m tests.tools.memory_table

The rows are the largest that train.py finds with the book's flags on RoleBench under the published tokenizer, with and
without gradient checkpointing the same to a few tokens.
"""

import argparse

from baichuan import BaichuanConfig
from support.scores.table import markdown
from support.training.memory import FRAGMENTS, RowSize, Way, evaluation_bytes, row_bytes, trained_bytes, weight_bytes

CARDS = (12, 16, 24, 40, 80)  # GiB


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
