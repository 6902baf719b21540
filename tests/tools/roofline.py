"""What a training step of Baichuan2-7B asks of a card, and how long that takes: computed, without a GPU and without weights.

A step passes through models that have shapes but no numbers (device "meta"), with the kernels of a GPU. Every operation
is a launch, computes, and moves bytes; it takes the longer of the latter two (the roofline, Williams et al. 2009). A step
takes what its operations take or, if that is longer, what the host takes to launch them.
"""

from collections import defaultdict
from itertools import product
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from support.scores.table import markdown
from support.training import one_parameter
from tests.tools import shared
from tests.tools.steps import OwnSteps, set_checkpointing, trainer_batch

META, aten = torch.device("meta"), torch.ops.aten
flop_registry[aten.addmm_] = flop_registry[aten.addmm]  # in place, which torch does not count
LAUNCH = 8e-6  # seconds of the host; published ones lie between 4 and 12
# FLOP a second, bytes a second, whether in four bits. Dense peaks of the data sheets, of which large products reach some
# 80 %; a T4, held to 70 W, 24 of 65 (measured: forums.developer.nvidia.com/t/264462). Bandwidths of the data sheets.
CARDS = {"H200": (0.8 * 989e12, 4.8e12, False), "A100": (0.8 * 312e12, 2e12, False)}
CARDS |= {"RTX 4090": (0.8 * 165e12, 1e12, False), "T4 (4 bits)": (24e12, 0.32e12, True)}
WAYS = ["tree", "tree-checkpointing", "book-checkpointing", "trainer", "trainer-checkpointing"]
# Launches, and bytes a trained weight, of clipping and AdamW: DeepSpeed's, as tests/test_tools.py counts them, and by estimate
# the Trainer's, whose AdamW takes 36 of its 448 tensors a launch, and clipping 110; ten numbers of two bytes come and go.
OWN_END, TRAINER_END = (51, 124), (40, 20)
OPERATIONS = "launches · TFLOP · GB | trees, 8 samples | trees, 32 samples | book +, 8 samples | Trainer, 8 samples"
TIMES = "card, samples | trees | trees + | book + | Trainer | Trainer + | book + / trees + | Trainer / trees | epoch"
CHINESE = """launches=启动次数;card, samples=显卡，样本数;epoch=一轮;trees=树;book=书; samples= 条; (4 bits)=（4 比特）
, 8=，8;, 32=，32; +,= +，; min= 分钟;in all=合计;attention=注意力;frozen linear layers=冻结的线性层;adapters, =适配器、
embedding, head, loss=词嵌入、输出头、损失;norms, rotation, gate, sums=归一化、旋转、门控、求和;clipping, =裁剪、"""


class Walk(TorchDispatchMode):
    """What a device does while it is entered. `found`: {kind: [launches, FLOP, bytes, then seconds on each of CARDS]}."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.found = device, defaultdict(lambda: np.zeros(3 + len(CARDS)))

    def add(self, kind: str, launches: int, flop: float, moved: float, unpacked: float = 0):
        seconds = [max(flop / rate, moved / band) + packed * unpacked / band for rate, band, packed in CARDS.values()]
        self.found[kind] += [launches, flop, moved, *seconds]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, function._overloadpacket
        if packet == aten._local_scalar_dense and args[0].is_meta:
            return 0  # whoever asks for the loss, or whether nothing is padded
        output = function(*args, **kwargs)
        read, written = ([x for x in tree_leaves(tree) if torch.is_tensor(x)] for tree in ((args, kwargs), output))
        here = self.device in {tensor.device.type for tensor in [*read, *written]}
        if not here or function.is_view or packet.__name__.startswith(("empty", "new_empty", "_unsafe_view")):
            return output
        flop = flop_registry[packet](*args, **kwargs, out_val=output) if packet in flop_registry else 0
        kind = kind_of(packet.__name__, flop, {size for tensor in [*read, *written] for size in tensor.shape})
        # In four bits a weight is unpacked before its product: half a byte read, two written.
        unpacked = 2.5 * max(tensor.numel() for tensor in read) if kind == "frozen linear layers" else 0
        read = written if packet == aten.embedding else read  # of whose table no more is read
        # Of an expanded tensor there is less than its shape says.
        moved = sum(min(tensor.nbytes, tensor.untyped_storage().nbytes()) for tensor in [*read, *written])
        self.add(kind, 1, flop, moved, unpacked)
        return output


def kind_of(name: str, flop: int, sizes: set[int]) -> str:
    if "attention" in name:
        return "attention"
    if "dropout" in name or (flop and 16 in sizes):  # the rank
        return "adapters, dropout"
    if 125_696 in sizes:  # the vocabulary
        return "embedding, head, loss"
    return "frozen linear layers" if flop else "norms, rotation, gate, sums"


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
    """The kernel that torch takes on a GPU where there is a mask, which it first turns into one to be added."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    kernel = aten._scaled_dot_product_efficient_attention
    return kernel(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


# On other devices these are several operations. RMSNorm's kernel reads and writes what that of layer normalisation does.
KERNELS = {
    "scaled_dot_product_attention": attention,
    "dropout": lambda x, p, training, inplace: torch.native_dropout(x, p, training)[0],
    "rms_norm": lambda x, shape, weight, eps: F.layer_norm(x, shape, weight, None, eps),
}


def passes(way: str, data, indices, layers: int) -> dict[str, np.ndarray]:
    """A step through so many layers of the 7B model: {kind: numbers}, see Walk."""
    name = way.removesuffix("-checkpointing")
    model = shared.random_model("7b", torch.bfloat16, META, num_hidden_layers=layers)
    model = shared.with_lora(shared.as_llama(model) if name == "trainer" else model, dropout=0.1).train()
    set_checkpointing(model, way)
    with mock.patch.multiple(F, **KERNELS), Walk("meta") as walk:
        if name == "trainer":
            rows = [(np.append(ids, data.eos), pairs) for ids, pairs in map(data.sample, indices)]
            for start in range(0, len(rows), 2):
                batch = {key: tensor.to(META) for key, tensor in trainer_batch(rows[start : start + 2]).items()}
                model(**batch, use_cache=False, num_items_in_batch=1).loss.backward()
        else:
            model.get_base_model().lm_head.reciprocal_norms()
            walk.found.clear()  # that is done once a run
            OwnSteps(name, model, META).backward(data, indices)
            one_parameter.joined(parameter.grad for parameter in one_parameter.trained(model))
    launches, of_a_weight = TRAINER_END if name == "trainer" else OWN_END
    walk.add("clipping, AdamW", launches, 0, of_a_weight * model.get_nb_trainable_parameters()[0])
    return walk.found


def whole_step(*step, layers: int = 32) -> dict[str, np.ndarray]:
    """The same through all layers, and its sum. The first layer passes no gradient on; the others are alike."""
    one, two = passes(*step, 1), passes(*step, 2)
    found = {kind: one[kind] + (layers - 1) * (two[kind] - one[kind]) for kind in two}
    return found | {"in all": sum(found.values())}


def print_tables(data, steps: dict[int, tuple[np.ndarray, int]]):
    """Those of docs/speed.md, in both languages. `steps`: {samples a step: (those of one, how many steps an epoch has)}."""
    found = {(size, way): whole_step(way, data, steps[size][0]) for size, way in product(steps, WAYS)}
    operations, times = [OPERATIONS.split(" | ")], [TIMES.split(" | ")]
    columns = [found[8, "tree"], found[32, "tree"], found[8, "book-checkpointing"], found[8, "trainer"]]
    for kind in sorted(columns[0], key=lambda kind: -columns[0][kind][3]):
        cells = [f"{step[kind][0]:,.0f} · {step[kind][1] / 1e12:.2f} · {step[kind][2] / 1e9:.1f}" for step in columns]
        operations.append([kind, *cells])
    for (number, card), size in product(enumerate(CARDS, 3), steps):
        sums = [found[size, way]["in all"] for way in WAYS]
        seconds = [max(each[number], each[0] * LAUNCH) for each in sums]
        cells = [f"{most:.3f} s" if most == each[number] else f"**{most:.3f} s**" for most, each in zip(seconds, sums)]
        tree, tree_again, book, trainer, _ = seconds
        cells += [f"{book / tree_again:.1f}", f"{trainer / tree:.1f}", f"{tree * steps[size][1] / 60:.1f} min"]
        times.append([f"{card}, {size}", *cells])
    for words in ("", CHINESE):
        for rows in (operations, times):
            for word in words.replace("\n", ";").split(";") if words else []:
                rows = [[cell.replace(*word.split("=")) for cell in row] for row in rows]
            print("\n".join(["", *markdown(rows)]))
