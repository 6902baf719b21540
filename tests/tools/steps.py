"""Training steps of several kinds: of train.py, of the book, and of transformers' Trainer with PEFT."""

import os
import time
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

import train
import utils
from support.device import MOST_TOKENS, row_cost
from support.training import one_parameter
from tests.tools import shared


def training_step(flags: list[str]) -> tuple[Callable, Callable, utils.Steps]:
    """(gather, update, steps) of train.py with these flags, in bfloat16: `update(gather(*steps[k]))` takes step k."""
    args = train.parse_args([*flags, "--ds_file", str(shared.ROOT / "ds_zero2_no_offload.json")])
    model_directory, config, train_data, test_data, _ = train.read_inputs(args)
    device = train.processes.join_processes()
    model = train.model_with_adapters(args, model_directory, torch.bfloat16, torch.device("cpu"))
    steps, _ = train.lay_out(args, model_directory.config, device, train_data, test_data)
    engine = train.start_engine(model, config, args, len(steps))
    engine.train()

    def gather(batches, tokens):
        with torch.profiler.record_function("forward and reduction"):
            return train.train_step(engine, batches, tokens, args.attn_implementation, stop=False)

    def update(numbers):
        with torch.profiler.record_function("engine.step()"):
            train.update(engine, torch.bfloat16, numbers)

    return gather, update, steps


def labels_of(batch: dict, shift: int) -> torch.Tensor:
    """(b, l) labels as other programs have them, at the places that predict them or, with a shift of 1, at the next ones."""
    labels = torch.full_like(batch["input_ids"], -100)
    labels.view(-1)[batch["loss_positions"][:, 0] + shift] = batch["loss_positions"][:, 1]
    return labels


def mask_of(batch: dict) -> torch.Tensor:
    """(b, l) with 1 for real tokens, as other programs have it; 0, which pads, stands in no text."""
    return (batch["input_ids"] != 0).long()


def book_loss(model, batch: dict, tokens: int) -> torch.Tensor:
    """Logits at every position, and the head normalised in every pass, as the published model's code has it."""
    base = model.get_base_model()
    hidden = base.model(input_ids=batch["input_ids"], attention_mask=mask_of(batch), use_cache=False)[0]
    logits = F.linear(hidden, F.normalize(base.lm_head.weight, dim=-1)).float()
    return F.cross_entropy(logits.flatten(0, 1), labels_of(batch, 0).flatten(), reduction="sum") / tokens


def set_checkpointing(model, way: str):
    """Switch gradient checkpointing on or off, as the way's name says."""
    if way.endswith("-checkpointing"):
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.activation_checkpointing_disable()


class OwnSteps:
    """Steps of one way as train.py takes them, through DeepSpeed's engine; without one, `backward` alone can be called."""

    def __init__(self, way: str, model, device, engine=None):
        self.way, self.model, self.device, self.engine = way, model, device, engine

    def batches(self, data, indices) -> list[dict]:
        is_tree = self.way.startswith("tree")
        cost = row_cost(self.model.config, self.device)
        collator = utils.Collator(data, "tree" if is_tree else "none", MOST_TOKENS, 2, cost)
        return collator(data.in_tree_order(indices) if is_tree else indices)

    def backward(self, data, indices) -> tuple[float, int]:
        """Gather the gradients of a step: (its loss, tokens computed)."""
        batches, tokens, total = self.batches(data, indices), int(data.supervised[indices].sum()), 0.0
        for batch in batches:
            inputs = utils.model_inputs(batch, self.device, "sdpa")
            if self.way == "book":
                loss = book_loss(self.model, inputs, tokens)
            else:
                loss = (self.engine or self.model)(**inputs, use_cache=False, num_items_in_batch=tokens).loss
            self.engine.backward(loss) if self.engine else loss.backward()
            total += loss.detach()
        return float(total), sum(batch["input_ids"].numel() for batch in batches)

    def step(self, data, indices) -> tuple[float, float, int]:
        """Take one step: (seconds, loss, tokens computed)."""
        set_checkpointing(self.model, self.way)
        with shared.stopwatch(self.device) as watch:
            with self.engine.coalesce_grad_reduction():
                loss, computed = self.backward(data, indices)
                one_parameter.hand_over_gradients(self.engine)
            self.engine.step()
        return watch.seconds, loss, computed


class Watch(TrainerCallback):
    """The seconds of a Trainer's step."""

    def __init__(self, device):
        self.device = device

    def on_step_begin(self, *_, **__):
        shared.synchronize(self.device)
        self.start = time.perf_counter()

    def on_optimizer_step(self, *_, **__):
        shared.synchronize(self.device)
        self.seconds = time.perf_counter() - self.start


class TrainerSteps:
    """Steps of transformers' Trainer, as OwnSteps has them."""

    def __init__(self, way: str, model, device, directory: str):
        self.way, self.model, self.device, self.directory = way, model, device, directory

    def step(self, data, indices) -> tuple[float, float, int]:
        rows = [(np.append(ids, data.eos), pairs) for ids, pairs in map(data.sample, indices)]
        tokens = sum(2 * max(len(ids) for ids, _ in rows[start : start + 2]) for start in range(0, len(rows), 2))
        watch = Watch(self.device)
        set_checkpointing(self.model, self.way)
        with mock.patch.dict(os.environ):
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # or it would wrap its model for several processes
                os.environ.pop(name, None)
            arguments = self.arguments(-(-len(rows) // 2))
            trainer = Trainer(self.model, arguments, trainer_batch, rows, callbacks=[watch])
            trainer.remove_callback(PrinterCallback)
            trained = trainer.train()
        return watch.seconds, trained.training_loss, tokens

    def arguments(self, rows_of_two: int) -> TrainingArguments:
        return TrainingArguments(
            output_dir=f"{self.directory}/trainer",
            per_device_train_batch_size=2,
            gradient_accumulation_steps=rows_of_two,
            max_steps=1,
            train_sampling_strategy="sequential",
            learning_rate=0.0,  # its weights stay comparable from one step to the next
            max_grad_norm=0.0,
            bf16=self.model.dtype == torch.bfloat16 and self.device.type == "cuda",
            use_cpu=self.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )


def trainer_batch(rows) -> dict:
    batch = utils.padded_batch(rows)
    batch |= {"attention_mask": mask_of(batch), "labels": labels_of(batch, 1)}
    del batch["loss_positions"]
    return batch
