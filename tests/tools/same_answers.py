"""Are greedy answers the same, whichever way they are generated, under the transformers that is installed?

    python3 tests/tools/same_answers.py        # prints JSON: check → "ok" or what was wrong; 10 seconds

A small random model answers three questions by whole passes, without a cache. Every way to generate must give the same
answers: with the imported classes, and with the copy of the code in a saved directory; with sdpa and with eager attention.
tests/tools/versions.py runs this under many releases of transformers.
"""

import json
import logging
import os
import sys
import warnings
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory

MODULES = TemporaryDirectory()  # transformers keeps its copies of a saved directory's code here
os.environ.update(HF_HUB_OFFLINE="1", HF_MODULES_CACHE=MODULES.name)
os.environ["OMP_NUM_THREADS"] = "1"  # threads slow so small a model
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402 - torch and transformers read the environment when they are imported
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, DynamicCache  # noqa: E402

from baichuan import BaichuanForCausalLM  # noqa: E402
from baichuan.generation_utils import CACHE_NAME, messages_to_ids  # noqa: E402
from support.dialogues.samples import conversation  # noqa: E402
from support.model.answering import answer_batch, greedy, left_padded  # noqa: E402
from support.model.directory import ModelDirectory  # noqa: E402
from support.page.speaker import PrefixCaches, Speaker  # noqa: E402
from tests.tools.shared import write_model  # noqa: E402

NEW_TOKENS = 24
PERSONA = "你是孙悟空。\n花果山水帘洞的美猴王，一个筋斗十万八千里。\n"
QUESTIONS = ("你好", "你的金箍棒有多重？它从哪里来？", "师父，师父，师父！妖怪来了，妖怪来了，妖怪来了！")
CONVERSATIONS = [conversation(PERSONA, question) for question in QUESTIONS]


def make_checkpoint(directory: str) -> str:
    """A random model whose attention decides its answers: at the usual 0.02 a lost cache would hardly change them."""
    path = write_model(directory, "--vocab_size", 2000, "--hidden_size", 64, "--num_hidden_layers", 3)
    model = BaichuanForCausalLM.from_pretrained(path)
    draw = torch.Generator().manual_seed(1234)  # not by transformers, whose order of drawing is its own
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=draw)
    plain = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    model.generation_config.update(max_new_tokens=NEW_TOKENS, **plain)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def whole_passes(model, prompt: list[int]) -> list[int]:
    """The greedy answer without a cache, a mask or a batch: all tokens are read again for each new one."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@torch.no_grad()
def check_arguments(model, prompt: list[int]):
    """Raise RuntimeError unless forward heeds a cache under either name, and refuses an unknown argument by its own."""
    ids = torch.tensor([prompt])
    expected = model(ids, use_cache=False).logits[:, -1]
    for name in ("past_key_values", "cache"):
        cache = DynamicCache(config=model.config)
        model(ids[:, :-1], **{name: cache})
        error = (model(ids[:, -1:], **{name: cache}).logits[:, -1] - expected).abs().max().item()
        if not error < 1e-4:
            raise RuntimeError(f"with a cache as {name}, logits differ by {error:.2g}")
    for part in (model, model.model):
        try:
            part(ids, no_such_argument=1)
        except TypeError as error:
            if "no_such_argument" in str(error):
                continue
            raise
        raise RuntimeError(f"{type(part).__name__}.forward() swallows an unknown argument")


def ways_to_generate(model, tokenizer, prompts: list[list[int]], expected: list[list[int]]) -> dict:
    """name → a function without arguments that returns the answers to all prompts: token ids, or texts."""

    def one_by_one(**options):
        return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]

    def batched(**options):
        ids, mask = left_padded(prompts, tokenizer.pad_token_id, model.device)
        return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()

    def assisted():
        assistant = deepcopy(model)  # right often, not always: what it has guessed wrong must leave the cache again
        draw = torch.Generator().manual_seed(0)
        for parameter in assistant.parameters():
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=draw)
        return one_by_one(assistant_model=assistant)

    def with_prefix_cache():
        caches, prefix, found = PrefixCaches(), tokenizer.text_to_ids(PERSONA), []
        for ids in prompts:
            cache = {CACHE_NAME: caches.get(model, prefix)}
            found.append(model.generate(torch.tensor([ids]), **cache)[0, len(ids) :].tolist())
        return found

    def chat():
        return [list(model.chat(tokenizer, messages, stream=True))[-1] for messages in CONVERSATIONS]

    def speaker():
        settings, own = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "seed": -1}, model.generation_config
        speaker = Speaker(model, tokenizer)
        answers = [list(speaker.answer(messages, settings))[-1][0] for messages in CONVERSATIONS]
        model.generation_config = own  # which a Speaker takes off
        return answers

    def scores_batch():
        config = greedy(model.generation_config, NEW_TOKENS)
        return [answer.text for answer in answer_batch(model, tokenizer, CONVERSATIONS, config)]

    def generate_batch():
        attention, config = model.config._attn_implementation, deepcopy(model.generation_config)
        small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by itself it takes most of the memory
        try:
            outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
            return [outputs[name].generated_tokens for name in sorted(outputs)]  # req_0, req_1, req_2
        finally:
            model.set_attn_implementation(attention)

    def arguments():
        check_arguments(model, prompts[0])
        return expected

    return {
        "single": one_by_one,
        "batch, left padding": batched,
        "static cache": lambda: batched(cache_implementation="static"),
        "prompt lookup": lambda: one_by_one(prompt_lookup_num_tokens=3),
        "assisted": assisted,
        "prefix cache": with_prefix_cache,
        "chat, streamed": chat,
        "page's speaker": speaker,
        "batch of predict.py": scores_batch,
        "generate_batch": generate_batch,
        "arguments": arguments,
    }


def record_warnings() -> list[str]:
    """A list that fills with what is deprecated, and with what transformers logs from level WARNING on."""
    found, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())
    for name in ("transformers", "py.warnings"):
        logging.getLogger(name).addHandler(handler)
    logging.captureWarnings(True)
    warnings.simplefilter("ignore")
    for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
        warnings.simplefilter("always", category)
    return found


def compare() -> dict[str, str]:
    """check → "ok" or what was wrong with which model; under "answers", the answers by whole passes."""
    problems, warned = {}, record_warnings()
    with TemporaryDirectory() as scratch:
        directory = make_checkpoint(scratch)
        tokenizer, imported = ModelDirectory(directory).tokenizer, BaichuanForCausalLM.from_pretrained(directory)
        copy = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
        copied_tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        assert type(copy) is not BaichuanForCausalLM and type(copied_tokenizer) is not type(tokenizer)

        prompts = [messages_to_ids(tokenizer, messages) for messages in CONVERSATIONS]
        expected = [whole_passes(imported, ids) for ids in prompts]
        assert not any(tokenizer.eos_token_id in answer for answer in expected), "an answer ends early: change the seed"
        texts = [tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
        for code, model, its_tokenizer in (("imported", imported, tokenizer), ("saved copy", copy, copied_tokenizer)):
            for attention in ("sdpa", "eager"):
                model.set_attn_implementation(attention)
                for name, way in ways_to_generate(model, its_tokenizer, prompts, expected).items():
                    wrong = problems.setdefault(name, [])
                    try:
                        if (found := way()) not in (expected, texts):
                            wrong.append(f"{code}, {attention}: {found} instead of {expected} or {texts}")
                    except Exception as error:  # whatever a release raises belongs into the table
                        wrong.append(f"{code}, {attention}: {type(error).__name__}: {error}")
    # Assisted decoding calls `generate` in a way that `generate` itself calls deprecated: nothing here passes that.
    problems["no warnings"] = sorted({text for text in warned if "min_new_tokens" not in text})
    results = {name: "; ".join(wrong) or "ok" for name, wrong in problems.items()}
    return results | {"answers": str(expected)}


if __name__ == "__main__":
    print(json.dumps(compare(), ensure_ascii=False))  # the last line of what is printed
