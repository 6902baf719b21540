"""--load_in_4bit: what is held how, trained, resumed, merged and answered from; on the CPU."""

import importlib.util
import json
import shutil

import pytest
import torch
from conftest import ROOT, adapter_weights, make_adapter, merge, scalars
from peft import PeftModel
from web_client import DESC_PATH

import predict
import train
import web_demo
from baichuan import BaichuanForCausalLM
from support.errors import UserError
from support.model.directory import ModelDirectory
from support.model.four_bit import check_four_bit
from support.training import processes

installed = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="bitsandbytes is missing: pip install -r requirements-4bit.txt -c constraints.txt",
)
# The 16 values of NF4, Dettmers et al. 2023 (arXiv 2305.14314), appendix E.
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FLAGS = ["--load_in_4bit", "--sample_answers", 0, "--lora_dropout", 0.1]


@installed
def test_what_is_held_in_four_bits(checkpoint):
    """The decoder's linear layers hold the nearest values of NF4; all else is as in the directory."""
    directory = ModelDirectory(checkpoint)
    model, exact = directory.load(torch.float32, four_bit=True), directory.load(torch.float32)
    import bitsandbytes

    for name, module in exact.named_modules():
        held = model.get_submodule(name)
        if name.endswith(("W_pack", "o_proj", "gate_proj", "up_proj", "down_proj")):
            state = held.weight.quant_state
            found = bitsandbytes.functional.dequantize_4bit(held.weight.data, state)
            blocks = module.weight.detach().reshape(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True)
            nearest = torch.tensor(NF4)[(blocks[..., None] / scale[..., None] - torch.tensor(NF4)).abs().argmin(-1)]
            # The scales are held in 8 bits, hence a percent.
            assert ((found.reshape(-1, 64) - nearest * scale).abs() <= 0.02 * scale).float().mean() > 0.999, name
            assert state.nested and not held.support_avx512bf16_for_cpu
        elif hasattr(module, "weight"):
            assert torch.equal(held.weight, module.weight) and held.weight.dtype == torch.float32, name


@pytest.fixture(scope="module")
def trained(train_arguments, tmp_path_factory):
    output = tmp_path_factory.mktemp("four_bit") / "run"
    flags = ["--num_train_epochs", 3, "--save_model_step", 4, "--save_total_limit", 1, "--learning_rate", 5e-3]
    train.main(train_arguments(output, *FLAGS, *flags))
    return output, [*FLAGS, *flags]


class Killed(BaseException):
    pass


@installed
def test_resumed_bit_by_bit_whatever_was_evaluated(trained, train_arguments, tmp_path, monkeypatch):
    """Killed after the state of step 8 and resumed, with a perplexity in every step, which must change no weight."""
    save_state = train.save_state

    def kill(engine, directory, run):
        save_state(engine, directory, run)
        if directory.name == "epoch-2-step-8":
            raise Killed

    arguments = train_arguments(tmp_path, *trained[1], "--eval_steps", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train, "save_state", kill)
        train.main(arguments)
    train.main([*arguments, "--resume"])
    ours, theirs = (adapter_weights(output / "epoch-3-step-15") for output in (tmp_path, trained[0]))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@installed
def test_the_precision_is_that_of_the_deepspeed_file(train_arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "has_bfloat16", lambda: True)
    more = ["--gradient_checkpointing", "--ds_file", ROOT / "ds_zero2_no_offload.json"]
    train.main(train_arguments(tmp_path, *FLAGS, *more))
    assert {tensor.dtype for tensor in adapter_weights(tmp_path / "best").values()} == {torch.bfloat16}
    assert all(loss < 20 for _, loss in scalars(tmp_path, "train_loss"))


@installed
def test_the_loss_falls_and_the_adapter_fits_the_16_bit_base_and_is_merged_into_it(trained, checkpoint, tmp_path):
    losses = [loss for _, loss in scalars(trained[0], "train_loss")]
    assert losses[-1] < losses[0] - 0.3
    adapter = trained[0] / "best"
    model = PeftModel.from_pretrained(BaichuanForCausalLM.from_pretrained(checkpoint), adapter).eval()
    ids = torch.arange(300, 340)[None]
    merged = merge(checkpoint, adapter, tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, BaichuanForCausalLM.from_pretrained(merged)(ids).logits, atol=1e-4)


@installed
def test_predict_answers_in_four_bits(checkpoint, few_samples, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    arguments = ["--model_path", checkpoint, "--test_path", few_samples[1], "--output_path", answers]
    arguments += ["--max_new_tokens", 2, "--resamples", 2, "--device", "cpu"]
    predict.main(list(map(str, [*arguments, "--load_in_4bit"])))
    assert json.loads(answers.read_text().splitlines()[0])["settings"]["load_in_4bit"] is True
    predict.main(list(map(str, arguments)))  # these are not the answers of the 16-bit model
    assert "other settings (load_in_4bit)" in capsys.readouterr().err


@installed
def test_the_page_answers_in_four_bits_with_an_adapter(checkpoint, tmp_path, capsys):
    """The answer is that of a model in full precision whose linear layers hold the values that NF4 leaves of them."""
    import bitsandbytes

    directory = ModelDirectory(checkpoint)
    rounded = directory.load(torch.float32)
    for name, held in directory.load(torch.float32, four_bit=True).named_modules():
        if isinstance(held, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(held.weight.data, held.weight.quant_state)
            rounded.get_submodule(name).weight.data = values
    rounded.save_pretrained(tmp_path / "rounded")
    directory.tokenizer.save_pretrained(tmp_path / "rounded")
    adapter = make_adapter(checkpoint, tmp_path / "adapter", spread=0.3)
    asked = [
        "--adapter_path",
        adapter,
        "--desc_path",
        DESC_PATH,
        "--ask",
        "你是谁？",
        "--device",
        "cpu",
        "--model_path",
    ]
    answers = []
    for model in ([tmp_path / "rounded"], [checkpoint, "--load_in_4bit"], [checkpoint]):
        capsys.readouterr()
        web_demo.main(list(map(str, [*asked, *model])))
        answers.append(capsys.readouterr().out[:20])  # later a random model's near ties may fall otherwise
    assert answers[0] == answers[1] != answers[2]


def test_without_the_package_or_with_odd_widths_it_is_refused(
    checkpoint, train_arguments, tmp_path, monkeypatch, capsys
):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 176}))
    monkeypatch.setattr("support.model.four_bit.find_spec", lambda name: object())
    with pytest.raises(UserError, match="intermediate_size 176 is no multiple of 64"):
        check_four_bit(ModelDirectory(model))
    monkeypatch.setattr("support.model.four_bit.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        train.main(train_arguments(tmp_path / "run", "--load_in_4bit"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert end.value.code == 2 and "pip install -r requirements-4bit.txt -c constraints.txt" in line
