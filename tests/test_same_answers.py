"""Every way to generate gives the greedy answers of whole passes, without a warning.

tests/tools/versions.py runs this under other releases of transformers, too.
"""

import logging
import shutil
import warnings
from copy import deepcopy
from functools import partial

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import messages_to_ids
from support.dialogues.samples import conversation
from support.model.answering import answer_batch, greedy, left_padded
from support.page.speaker import PrefixCaches, Speaker

NEW_TOKENS = 24
PERSONA = "你是孙悟空。\n花果山水帘洞的美猴王，一个筋斗十万八千里。\n"
QUESTIONS = ("你好", "你的金箍棒有多重？它从哪里来？", "师父，师父，师父！妖怪来了，妖怪来了，妖怪来了！")
CONVERSATIONS = [conversation(PERSONA, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def directory(checkpoint, tmp_path_factory) -> str:
    """A random model whose attention decides its answers: at the usual 0.02 a lost cache would hardly change them.

    The seed is one with which prompt lookup guesses wrong, so that the cache has to forget.
    """
    directory = shutil.copytree(checkpoint, tmp_path_factory.mktemp("strong") / "model")
    model, draw = BaichuanForCausalLM.from_pretrained(directory), torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2, generator=draw)
    plain = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50, "repetition_penalty": 1.0}
    model.generation_config.update(max_new_tokens=NEW_TOKENS, **plain)
    model.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=["imported", "saved copy"])
def loaded(request, directory):
    """Model and tokenizer, of the imported classes or of the copies in the directory."""
    if request.param == "imported":
        return BaichuanForCausalLM.from_pretrained(directory), BaichuanTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    assert type(model) is not BaichuanForCausalLM and type(tokenizer) is not BaichuanTokenizer
    return model, tokenizer


@pytest.fixture(scope="module")
@torch.no_grad()
def expected(directory) -> tuple[list[list[int]], list[str]]:
    """The answers as ids and as texts, without a cache, a mask or a batch: all tokens are read again for each new one."""
    model, tokenizer = BaichuanForCausalLM.from_pretrained(directory), BaichuanTokenizer.from_pretrained(directory)
    answers = []
    for prompt in prompts_of(tokenizer):
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
        answers.append(ids[len(prompt) :])
    assert not any(tokenizer.eos_token_id in answer for answer in answers), "an answer ends early: change the seed"
    return answers, [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


@pytest.fixture
def told(caplog):
    """What transformers logs from level WARNING on; earlier tests may have made it quiet, or have heard it already."""
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    logging.Logger.warning_once.cache_clear()
    # Assisted decoding calls `generate` in a way that `generate` itself calls deprecated: nothing here passes that.
    return lambda: [text for text in caplog.messages if "min_new_tokens" not in text]


def prompts_of(tokenizer) -> list[list[int]]:
    return [messages_to_ids(tokenizer, messages) for messages in CONVERSATIONS]


def one_by_one(model, tokenizer, **options):
    answers = []
    for ids in prompts_of(tokenizer):
        answers.append(model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist())
    return answers


def batched(model, tokenizer, **options):
    ids, mask = left_padded(prompts_of(tokenizer), tokenizer.pad_token_id, model.device)
    return model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :].tolist()


def assisted(model, tokenizer):
    assistant = deepcopy(model)  # right often, not always: what it has guessed wrong must leave the cache again
    assistant.generation_config.num_assistant_tokens = 4
    draw = torch.Generator().manual_seed(0)
    for parameter in assistant.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=draw)
    return one_by_one(model, tokenizer, assistant_model=assistant)


def with_prefix_cache(model, tokenizer):
    caches, prefix, answers = PrefixCaches(), tokenizer.text_to_ids(PERSONA), []
    for ids in prompts_of(tokenizer):
        output = model.generate(torch.tensor([ids]), cache=caches.get(model, prefix))
        answers.append(output[0, len(ids) :].tolist())
    return answers


def chat(model, tokenizer):
    return [list(model.chat(tokenizer, messages, stream=True))[-1] for messages in CONVERSATIONS]


def speaker(model, tokenizer):
    settings, own = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "seed": -1}, model.generation_config
    speaker = Speaker(model, tokenizer)
    answers = [list(speaker.stream(messages, settings))[-1][0] for messages in CONVERSATIONS]
    model.generation_config = own  # which a Speaker takes off
    return answers


def scores_batch(model, tokenizer):
    config = greedy(model.generation_config, NEW_TOKENS)
    return [answer.text for answer in answer_batch(model, tokenizer, CONVERSATIONS, config)]


def generate_batch(model, tokenizer):
    attention, config = model.config._attn_implementation, deepcopy(model.generation_config)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by itself it takes most of the memory
    try:
        outputs = model.generate_batch(
            prompts_of(tokenizer), generation_config=config, continuous_batching_config=small
        )
        return [outputs[name].generated_tokens for name in sorted(outputs)]  # req_0, req_1, req_2
    finally:
        model.set_attn_implementation(attention)


WAYS = {
    "single": one_by_one,
    "batch, left padding": batched,
    "static cache": partial(batched, cache_implementation="static"),
    "prompt lookup": partial(one_by_one, prompt_lookup_num_tokens=3),
    "assisted": assisted,
    "prefix cache": with_prefix_cache,
    "chat, streamed": chat,
    "page's speaker": speaker,
    "batch of predict.py": scores_batch,
    "generate_batch": generate_batch,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_way_to_generate_gives_the_answers_of_whole_passes(way, attention, loaded, expected, told):
    model, tokenizer = loaded
    model.set_attn_implementation(attention)
    with warnings.catch_warnings():  # here, since the scripts that made the checkpoint ignore what is deprecated
        for deprecated in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", deprecated)
        assert way(model, tokenizer) in expected
    assert told() == []
