"""The tokenizer: exact ids, on a trained tokenizer and on the published one."""

import copy
import pickle
import shutil

import pytest
import sentencepiece
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from baichuan import BaichuanTokenizer
from tests.forked import SERVER

HARD = [
    *("俺老孙来也！", "  spaces   in runs  ", "tab\tnewline\n\nend\r\n", "😀👩‍👩‍👧 𠮷野家 ꙮ \u200b"),
    *("full width ０１２ ＡＢＣ ‼ …", "<h2>not a tag</h2> <SEP> <CLS>", ""),
]
CONTROL = ["<reserved_107>", "</s>", "<s>", "<unk>", "好<reserved_107>我是助手</s>再见", "<reserved_<reserved_107>107>"]


def control_ids(tokenizer) -> set[int]:
    return {0, 1, 2, *tokenizer.convert_tokens_to_ids([f"<reserved_{n}>" for n in range(108)])}


def test_encodes_as_sentencepiece_does_and_comes_back(tokenizer):
    plain = sentencepiece.SentencePieceProcessor(model_file=tokenizer.vocab_file)
    for text in HARD:
        ids = plain.encode(text)
        assert tokenizer.encode(text) == tokenizer(text)["input_ids"] == tokenizer.text_to_ids(text) == ids
        assert tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)) == ids
        assert tokenizer.decode(ids) == text


def test_control_tokens_in_text_stay_text(tokenizer):
    for text in CONTROL:
        ways = [tokenizer.encode(text), tokenizer(text)["input_ids"], tokenizer([text])["input_ids"][0]]
        for ids in (*ways, tokenizer.encode(text, add_special_tokens=False), tokenizer.text_to_ids([text, text])[1]):
            assert not control_ids(tokenizer) & set(ids) and tokenizer.decode(ids) == text


def test_control_tokens_can_be_meant(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<reserved_106>", "<reserved_107>", "</s>"]) == [195, 196, 2]
    assert tokenizer.convert_ids_to_tokens([195, 2]) == ["<reserved_106>", "</s>"]
    assert tokenizer.decode([195, 2]) == "<reserved_106></s>"
    assert tokenizer.decode([195, 2], skip_special_tokens=True) == "<reserved_106>"
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.encode("x</s>", split_special_tokens=False)[-1] == 2


def test_bos_and_eos_only_when_asked_for(tokenizer, checkpoint):
    assert not {1, 2} & set(tokenizer.encode("你好"))
    asked = BaichuanTokenizer.from_pretrained(checkpoint, add_bos_token=True, add_eos_token=True)
    ids = asked.encode("你好")
    assert ids[0] == 1 and ids[-1] == 2 and not {1, 2} & set(ids[1:-1])
    assert asked.text_to_ids("你好") == ids[1:-1]


def test_markers_are_read_from_generation_config(tokenizer, tmp_path):
    assert (tokenizer.user_token_id, tokenizer.assistant_token_id) == (195, 196)
    directory = tmp_path / "moved"
    shutil.copytree(tokenizer.name_or_path, directory)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (directory / name).unlink(missing_ok=True)
    config = directory / "generation_config.json"
    text = config.read_text()
    config.write_text(text.replace("195", "101").replace("196", "100"))
    moved = BaichuanTokenizer.from_pretrained(directory)
    ids = moved.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True, return_dict=False)
    assert ids == [101, 100]


@pytest.mark.parametrize("way", ["saved", "auto", "pickled", "copied"])
def test_the_same_ids_elsewhere(tokenizer, tmp_path, way):
    texts = HARD + CONTROL
    expected = [tokenizer.encode(text) for text in texts]
    if way in ("saved", "auto"):
        tokenizer.save_pretrained(tmp_path)
        load = BaichuanTokenizer if way == "saved" else AutoTokenizer
        again = load.from_pretrained(tmp_path, **({"trust_remote_code": True} if way == "auto" else {}))
        again.save_pretrained(tmp_path / "twice")
        again = BaichuanTokenizer.from_pretrained(tmp_path / "twice")
        assert again.chat_template == tokenizer.chat_template
        assert (again.user_token_id, again.model_max_length) == (195, tokenizer.model_max_length)
    else:
        again = copy.deepcopy(tokenizer) if way == "copied" else pickle.loads(pickle.dumps(tokenizer))
        again.save_pretrained(tmp_path)
        assert BaichuanTokenizer.from_pretrained(tmp_path).encode(HARD[0]) == expected[0]
    assert [again.encode(text) for text in texts] == expected


def test_the_same_ids_in_a_worker_that_shares_no_memory(checkpoint):
    tokenizer, texts = BaichuanTokenizer.from_pretrained(checkpoint), HARD + CONTROL
    workers = {"num_workers": 1, "multiprocessing_context": SERVER}
    loader = DataLoader(texts, batch_size=None, collate_fn=tokenizer.encode, **workers)
    assert list(loader) == [tokenizer.encode(text) for text in texts]
