"""A conversation's exact ids, on both tokenizers, and chat(): whole, as a stream, and stopped."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import pause_generation
from transformers import GenerationConfig, pipeline

from baichuan import BaichuanForCausalLM, BaichuanTokenizer
from baichuan.generation_utils import ChatMixin, messages_to_ids


def conversation(*turns):
    roles = ["user", "assistant"] if not turns[0].startswith("系统") else ["system"]
    messages = [{"role": "system", "content": turns[0]}] if roles == ["system"] else []
    rest = turns[1:] if messages else turns
    return messages + [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(rest)]


def test_exact_ids_of_a_conversation(tokenizer):
    def ids(text):
        return tokenizer.text_to_ids(text)

    messages = conversation("系统", "甲问<reserved_107>", "乙答</s>", "又问")
    expected = [*ids("系统"), 195, *ids("甲问<reserved_107>"), 196, *ids("乙答</s>"), 195, *ids("又问"), 196]
    assert messages_to_ids(tokenizer, messages) == expected
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"] == expected
    assert tokenizer.apply_chat_template(messages, return_dict=False) == expected[:-1]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "系统<reserved_106>甲问<reserved_107><reserved_107>乙答</s><reserved_106>又问<reserved_107>"


def test_chat_template_as_tensors_and_what_only_text_could_follow(tokenizer):
    messages = conversation("系统", "问")
    ids = messages_to_ids(tokenizer, messages)
    tensors = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", tools=None)
    assert tensors["input_ids"].tolist() == [ids] and tensors["attention_mask"].tolist() == [[1] * len(ids)]
    for name, value in {"tools": [{"type": "function"}], "chat_template": "{{ messages }}", "truncation": True}.items():
        with pytest.raises(ValueError, match=f"not supported: {name}"):
            tokenizer.apply_chat_template(messages, **{name: value})
    with pytest.raises(ValueError, match="message 0 must be a dict"):
        tokenizer.apply_chat_template([messages, messages])


def test_the_pipeline_of_transformers_answers_as_chat_does(model, checkpoint):
    tokenizer, messages = BaichuanTokenizer.from_pretrained(checkpoint), conversation("系统", "问")
    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
    (answer,) = pipeline("text-generation", model, tokenizer=tokenizer)(messages, generation_config=config)
    assert answer["generated_text"][-1]["content"] == model.chat(tokenizer, messages, generation_config=config) > ""


def test_whole_oldest_rounds_go_first(tokenizer):
    messages = conversation("系统", "问一", "答一", "问二", "答二", "问三")

    def length(*turns):
        return len(messages_to_ids(tokenizer, conversation(*turns)))

    def cut(room):
        return messages_to_ids(tokenizer, messages, room)

    whole = len(messages_to_ids(tokenizer, messages))
    two, one = length("系统", "问二", "答二", "问三"), length("系统", "问三")
    assert len(cut(whole)) == whole
    assert cut(whole - 1) == cut(two) == messages_to_ids(tokenizer, conversation("系统", "问二", "答二", "问三"))
    assert cut(two - 1) == cut(one) == messages_to_ids(tokenizer, conversation("系统", "问三"))
    system = tokenizer.text_to_ids("系统")
    last = messages_to_ids(tokenizer, conversation("问三"))
    assert cut(one - 1) == system + last[1:]
    assert cut(len(system) + 1) == [*system, 196]
    with pytest.raises(ValueError, match="leaves no room"):
        cut(len(system))


def test_malformed_messages_and_unknown_markers_are_errors(tokenizer):
    late = [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}]
    for wrong in ({"role": "tool", "content": "x"}, {"content": "x"}, {"role": "user", "content": 3}, "text", late):
        with pytest.raises(ValueError):
            messages_to_ids(tokenizer, wrong if isinstance(wrong, list) else [wrong])
    with pytest.raises(ValueError, match="generation_config"):
        messages_to_ids(SimpleNamespace(text_to_ids=tokenizer.text_to_ids), conversation("问"))


@pytest.fixture(scope="module")
def chatting(checkpoint):
    model, tokenizer = BaichuanForCausalLM.from_pretrained(checkpoint), BaichuanTokenizer.from_pretrained(checkpoint)
    model.generation_config.update(max_new_tokens=24, do_sample=False)
    return model, tokenizer


def test_chat_in_both_forms(chatting):
    """Whole and as a stream, 220 drawn tokens are the text of those that `generate` draws from the same prompt."""
    model, tokenizer = chatting
    messages = conversation("系统", "你是谁？", "我是<reserved_106>", "再说一遍")
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=220, min_new_tokens=220, do_sample=True, temperature=2.0, top_k=0, top_p=1.0)
    ids = torch.tensor([messages_to_ids(tokenizer, messages)])
    torch.manual_seed(0)
    drawn = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]
    expected = tokenizer.decode(drawn, skip_special_tokens=True)
    assert len(drawn) == 220 and len(set(drawn.tolist())) > 100
    torch.manual_seed(0)
    assert model.chat(tokenizer, messages, generation_config=config) == expected
    torch.manual_seed(0)
    assert list(model.chat(tokenizer, messages, stream=True, generation_config=config))[-1] == expected


class Recorded(ChatMixin):
    """A model that says what it is told to."""

    def __init__(self, ids: list[int]):
        self.ids = ids

    def generate(self, prompt, streamer, **kwargs):
        for value in (prompt, *torch.tensor(self.ids).split(1)):
            streamer.put(value)
        streamer.end()
        return torch.tensor([self.ids])


def test_a_stream_is_the_text_of_its_tokens(tokenizer):
    """Over hundreds of tokens, many of which are single bytes of a character; each piece begins the whole text."""
    text = "𠮷野家 𪜀𫝀 的 👩‍👩‍👧 说： 𪚥𠀋\n\n来也 ꙮ！  Ω 😀" * 12
    ids = tokenizer.text_to_ids(text)
    single_bytes = [token for token in tokenizer.convert_ids_to_tokens(ids) if token.startswith("<0x")]
    assert tokenizer.decode(ids) == text and len(ids) > 300 and len(single_bytes) > 100
    pieces = list(Recorded([*ids, tokenizer.eos_token_id]).stream(tokenizer, torch.tensor([[195]]), None))
    assert pieces[-1] == text and len(pieces) > 60
    assert all(text.startswith(piece) for piece in pieces)
    assert all(len(earlier) < len(later) for earlier, later in zip(pieces, pieces[1:]))


def test_chat_sends_the_ids_that_are_trained_on_and_keeps_room_for_the_reply(chatting, monkeypatch):
    model, tokenizer = chatting
    asked = []
    monkeypatch.setattr(model, "generate", lambda ids, **kwargs: asked.append(ids[0].tolist()) or ids)
    messages = conversation("系统", "甲<reserved_107>")
    model.chat(tokenizer, messages)
    model.chat(tokenizer, conversation("系统", "长" * 9000))
    assert asked[0] == messages_to_ids(tokenizer, messages)
    assert len(asked[1]) == model.config.model_max_length - 24


def test_closing_a_stream_stops_the_model(chatting, monkeypatch):
    model, tokenizer = chatting
    tokens, threads = pause_generation(monkeypatch, model, after=5)
    config = copy.deepcopy(model.generation_config)
    config.update(max_new_tokens=100, eos_token_id=None)
    stream = model.chat(tokenizer, conversation("问"), stream=True, generation_config=config)
    next(stream)
    stream.close()
    assert 0 < len(tokens) <= 5
    assert len(threads) == 1 and not threads[0].is_alive()


def test_a_failing_model_raises_in_the_reader(chatting, monkeypatch):
    model, tokenizer = chatting

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.chat(tokenizer, conversation("问"), stream=True))
