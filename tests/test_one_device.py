"""A step, an evaluation, likelihoods and an answer on a device that is not the CPU: without having one, or a compiler.

The tensors are fake: nothing is computed. What mixes devices raises, as on a GPU, and so does a size that numbers decide.
Noted is who makes a tensor on the CPU, and who waits for the device: for a number, or a copy that is not `non_blocking`.
Devices written in Python are in torch 2.11, the oldest that the project takes; this was run with 2.13.
"""

import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from unittest import mock

import pytest
import torch
from conftest import ROLE_SAMPLES, ROOT
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils import _pytree, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import train
import utils
from baichuan import modeling_baichuan
from support.model.answering import answer_batch, greedy
from support.model.directory import ModelDirectory
from support.scores.likelihood import Likelihood
from tests.forked import SERVER


class Notes(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for tensor in tensors(args):
            tensor.constant = None  # torch.tensor([…]) would keep its numbers, and look for a real device to hold them
        if torch.Tag.data_dependent_output in op.tags:
            return self.note(op) or 1  # any number will do
        made = op(*args, **(kwargs := kwargs or {}))
        here, everywhere = ({tensor.device.type for tensor in tensors(tree)} for tree in (made, (args, made)))
        if "cpu" in here or (len(everywhere) > 1 and not kwargs.get("non_blocking")):
            self.note(op)
        return made

    def note(self, op):
        frame = sys._getframe(2)
        while not (path := frame.f_code.co_filename).startswith(str(ROOT)) or path == __file__ or ".venv" in path:
            frame = frame.f_back
        self.who.setdefault(frame.f_code.co_qualname.split(".<")[0], f"{op} in {path}:{frame.f_lineno}")


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def check(expected: set[str], run, *args):
    with Notes() as notes:
        notes.who = {}  # function of this project → for what it was noted first
        run(*args)
    assert notes.who.keys() == expected, notes.who


def step(model, attention, rows):
    """A step of train.py, with as much of DeepSpeed's engine as it asks for."""
    engine = mock.MagicMock(side_effect=model.train(), module=model, device=model.device)
    engine.backward, engine.optimizer.bit16_groups = torch.Tensor.backward, [[flat := mock.MagicMock()]]
    engine.get_global_grad_norm = lambda: flat.grad.norm()
    train.update(engine, torch.float32, train.train_step(engine, rows, 7, attention, False))


def walk(checkpoint: str):
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    torch.pretended.get_amp_supported_dtype = list  # checkpointing asks for it
    torch._C._set_only_lift_cpu_tensors(True)
    masking_utils.is_tracing = lambda *_: False  # else it would look into no fake mask, as it does into a real one
    train.dist, directory = mock.MagicMock(get_world_size=lambda: 1), ModelDirectory(checkpoint)
    data = utils.RoleDataset(ROLE_SAMPLES, directory.tokenizer, 256, 256)
    talk, device = [{"role": role, "content": "二"} for role in ("system", "user")], torch.device("pretended", 0)
    for attention, packing in product(("sdpa", "eager"), ("tree", "none")):
        checkpointing = ["--gradient_checkpointing"] * ((attention, packing) in (("sdpa", "tree"), ("eager", "none")))
        args = train.parse_args(["--attn_implementation", attention, *checkpointing])
        model = train.model_with_adapters(args, directory, torch.float32, torch.device("cpu"))
        rows, fake = utils.Collator(data, packing, 256, 3)(range(len(data))), FakeTensorMode()
        rows = [{name: fake.from_tensor(tensor) for name, tensor in row.items()} for row in rows]
        with fake:
            for module in model.modules():
                for name, own in module.named_parameters(recurse=False):
                    there = fake.from_tensor(own).detach().to(device)
                    setattr(module, name, torch.nn.Parameter(there, own.requires_grad))
            check({"update"}, step, model, attention, rows)  # at its end
            check({"evaluation"}, utils.evaluation, model, rows, device, attention)  # so, too
            check(set(), Likelihood(model.eval(), directory.tokenizer)._row, rows[0])
            # Each token is read; prompts, and a cache that is empty, come from lists; sdpa asks whether there is padding.
            asked = (model, directory.tokenizer, [talk, talk[1:]], greedy(model.generation_config, 1))
            read = {"left_padded", "RoomyLayer.update", "greedy_ids"}
            check(read | ({"BaichuanModel.forward"} if attention == "sdpa" else set()), answer_batch, *asked)
    with fake:  # faults that are put in on purpose
        with pytest.raises(DynamicOutputShapeException):
            step(model, attention, [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
        rotary, ids = modeling_baichuan.rotary_cos_sin, torch.arange(99)  # not on the device
        modeling_baichuan.rotary_cos_sin = lambda positions, size: rotary(ids[None, : positions.shape[1]], size)
        with pytest.raises(RuntimeError, match="same device"):
            step(model, attention, rows)


def test_all_stays_on_one_device_and_a_step_waits_at_its_end(checkpoint):
    with ProcessPoolExecutor(1, SERVER) as other:  # it changes torch for good
        other.submit(walk, checkpoint).result()
