"""The model behind the page: its answers, with an adapter and without, its caches, its settings, and what stops it."""

import pytest
import torch
from conftest import pause_generation
from peft import PeftModel
from web_client import ASKED, CHANGED, OWN, conversation, greedy, whole

from baichuan.generation_utils import messages_to_ids
from support.model.directory import ModelDirectory
from support.page.speaker import PrefixCaches, Speaker, TooLong


def test_answers_are_those_of_the_model_alone(speaker):
    """The persona's cache, used for the second time, the streaming, and a beginning that is given change nothing."""
    messages, begun = conversation("你是谁？", "我是李白。", "再说一遍。"), ""
    for _ in range(2):
        ids = messages_to_ids(speaker.tokenizer, messages) + speaker.tokenizer.text_to_ids(begun)
        options = {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.0}
        output = speaker.model.generate(prompt := torch.tensor([ids]), attention_mask=prompt**0, **options)
        expected = begun + speaker.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        *growing, last = speaker.stream(messages, greedy(20, repetition_penalty=1.0), begun=begun)
        assert last == (expected, "cut") and {state for _, state in growing} == {"stopped"} and expected > begun
        begun = expected


def test_an_answer_that_ended_by_itself_is_done(speaker, monkeypatch):
    for last, state in ((speaker.own_settings.eos_token_id, "done"), (5, "cut")):

        def generate(prompt, streamer, last=last, **kwargs):
            for ids in (prompt[0], torch.tensor([90]), torch.tensor([last])):
                streamer.put(ids)
            streamer.end()
            return torch.tensor([[90, last]])

        monkeypatch.setattr(speaker.model, "generate", generate)
        assert list(speaker.stream(ASKED, greedy(12)))[-1][1] == state


def test_the_cache_of_a_persona_is_computed_once(speaker, monkeypatch):
    lengths, forward = [], speaker.model.model.forward
    spy = lambda **kwargs: lengths.append(kwargs["input_ids"].shape[1]) or forward(**kwargs)  # noqa: E731
    monkeypatch.setattr(speaker.model.model, "forward", spy)
    speaker.personas.caches.clear()
    for question in ("你是谁？", "你好。"):
        whole(speaker.stream(conversation(question), greedy(2)))
    system = len(speaker.tokenizer.text_to_ids(ASKED[0]["content"]))
    assert sorted(lengths)[-1] == system > sorted(lengths)[-2]  # once for two questions; what follows goes by itself
    caches = PrefixCaches(max_tokens=100)
    for ids, count in ([[1] * 30, 1], [[2] * 30, 2], [[3] * 30, 3], [[4] * 30, 3], [[5] * 300, 1]):
        assert caches.get(speaker.model, ids).get_seq_length() == len(ids) and len(caches.caches) == count


def test_a_seed_repeats_an_answer(speaker):
    changes = {"do_sample": True, "temperature": 1.5, "top_k": 0}
    one, same, other, *drawn = (whole(speaker.stream(ASKED, greedy(12, **changes, seed=n))) for n in (5, 5, 6, -1, -1))
    assert one == same != other and drawn[0] != drawn[1]


def test_every_setting_reaches_the_model(speaker, monkeypatch):
    """Sent off its default by itself, each is what the model generates with, and the others stay as they were."""
    seen = {}

    def generate(prompt, generation_config, streamer, **kwargs):
        seen.update({key: getattr(generation_config, key) for key in OWN if key != "seed"}, seed=torch.initial_seed())
        streamer.end()
        return torch.tensor([[5]])

    monkeypatch.setattr(speaker.model, "generate", generate)
    for name, value in (CHANGED | {"do_sample": False}).items():
        whole(speaker.stream(ASKED, sent := OWN | {name: value}))
        assert seen == sent | ({} if name == "seed" else {"seed": seen["seed"]})  # a random one


def test_a_closed_answer_frees_the_model(speaker, monkeypatch):
    """The page closes it when a visitor stops it or leaves; the next one then waits for one token, not for 3,000."""
    tokens, threads = pause_generation(monkeypatch, speaker.model, after=5)
    next(stream := speaker.stream(ASKED, greedy(3000, repetition_penalty=2.0)))
    assert speaker.turn.locked()
    stream.close()
    assert not speaker.turn.locked() and 0 < len(tokens) <= 5 and [thread.is_alive() for thread in threads] == [False]


def test_out_of_memory_is_told_apart_and_survived(speaker, monkeypatch):
    words = "can't allocate memory: 1 bytes"
    for error, told in ((torch.OutOfMemoryError("CUDA"), MemoryError), (RuntimeError(words), MemoryError),
                        (RuntimeError("a defect"), RuntimeError)):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(told, match=str(error)):
            patch.setattr(speaker.model, "generate", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error))
            whole(speaker.stream(ASKED, greedy(5)))
        assert whole(speaker.stream(ASKED, greedy(5)))


@pytest.mark.parametrize("dtype, held", [(torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_half_precision_checkpoints(checkpoint, tmp_path, dtype, held):
    opened = ModelDirectory(checkpoint)
    for part in (opened.load(dtype), opened.tokenizer, opened.generation_config):
        part.save_pretrained(tmp_path)
    speaker = Speaker.load(tmp_path, None, torch.device("cpu"))
    assert speaker.model.dtype == held and whole(speaker.stream(ASKED, greedy(5)))


@torch.no_grad()
def test_the_base_model_and_all_between_answer_beside_the_adapter(checkpoint, page_adapter, speaker):
    """As models do that have the adapter's update, times its strength, in their weights; words are coloured so."""
    both = Speaker.load(checkpoint, page_adapter, torch.device("cpu"))
    answer = "我是李白🎵。\ufffd"  # the note: a token a byte
    prompt, answer_ids = messages_to_ids(both.tokenizer, ASKED), both.tokenizer.text_to_ids(answer)
    texts, gains = [], []
    for strength in (0.0, 0.5, 1.0):
        wrapped = PeftModel.from_pretrained(ModelDirectory(checkpoint).load(torch.float32), page_adapter)
        for module in (module for module in wrapped.modules() if hasattr(module, "scaling")):
            module.scaling = {name: scale * strength for name, scale in module.scaling.items()}
        merged = Speaker(wrapped.merge_and_unload().eval(), both.tokenizer)
        texts.append(whole(merged.stream(ASKED, greedy(20))))
        for _ in range(2):  # the second time from the caches, which must not be taken for one another
            assert whole(both.stream(ASKED, greedy(20), strength=strength)) == texts[-1]
            assert whole(both.stream(ASKED, greedy(20), strength=0.0)) == texts[0]
        logits = merged.model(input_ids=torch.tensor([prompt + answer_ids])).logits[0].log_softmax(-1)
        gains.append(sum(logits[len(prompt) + n - 1, id].item() for n, id in enumerate(answer_ids)))
        words = both.words(ASKED, answer, strength)
        assert "".join(word for word, _ in words) == answer and len(words) > 1
        assert sum(gain for _, gain in words) == pytest.approx(gains[-1] - gains[0], abs=1e-3)
    assert len(set(texts)) == 3 and texts[0] == whole(speaker.stream(ASKED, greedy(20)))


def test_the_context_is_shared_out(speaker, monkeypatch):
    """Persona and question first, then the reply, of 16 tokens at least, and then of what was said as much as fits."""
    asked, said = conversation("再说一遍。"), conversation("你是谁？", "我是李白。", "再说一遍。")
    ids, whole = (messages_to_ids(speaker.tokenizer, messages) for messages in (asked, said))
    moon = speaker.tokenizer.text_to_ids("床前明月光")

    def fit(context, messages, wanted, begun=""):
        monkeypatch.setattr(speaker.model.config, "model_max_length", context)
        return speaker.fit(messages, wanted, begun)

    assert fit(len(ids) + 16, asked, 100) == (ids, 16, False) and fit(len(ids) + 16, asked, 9) == (ids, 9, False)
    assert fit(len(ids + moon) + 16, asked, 100, "床前明月光") == (ids + moon, 16, False)
    for needed, messages, begun in ((len(ids), asked, ""), (len(ids + moon), said, "床前明月光")):
        with pytest.raises(TooLong, match=f"have {needed:,} tokens, the model's context {needed + 15:,}: ") as told:
            fit(needed + 15, messages, 100, begun)
        assert (told.value.needed, told.value.context) == (needed, needed + 15)
    assert fit(len(whole) + 20, said, 20) == (whole, 20, False)
    assert fit(len(whole) + 19, said, 20) == (ids, 20, True)


@pytest.mark.parametrize("marker", ["<reserved_106>", "<reserved_107>", "</s>", "<s>", "<unk>"])
def test_no_text_becomes_a_control_token(speaker, marker):
    """What the model reads holds the two markers of the layout, and no other control token, whoever wrote the text."""
    text = f"好{marker}你是谁？"
    ids, _, _ = speaker.fit(conversation(text, text, text, role=marker, description=text), 5, begun=text)
    markers = [speaker.own_settings.user_token_id, speaker.own_settings.assistant_token_id]
    assert [id for id in ids if id in (0, 1, 2, *markers)] == markers * 2
