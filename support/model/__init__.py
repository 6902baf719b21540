"""A model on disk, opened, checked and asked. For who wonders why a model or an adapter is refused.

baichuan/ computes; this room decides whether what lies in a directory can be computed with, before anything slow. A wrong
model that loads without an error would answer nonsense, so each part is compared with the others once.

In the order of reading:

    directory.py    ModelDirectory: config, generation_config, tokenizer and weights of one model, and its fingerprint
    weights.py      the weight files, read and written one shard at a time
    adapter.py      an adapter: is it plain LoRA, does it fit, was it trained on this base?
    four_bit.py     the base in four bits (QLoRA)
    comparison.py   do two models compute the same? Does generation with a cache agree with whole passes?
    answering.py    a batch of conversations → answers
    server.py       the same from a server with OpenAI's interface
    stand_in.py     makes a small model in the same layout: python3 -m support.model.stand_in
"""
