"""The model against transformers' LlamaForCausalLM, which Baichuan2 is once W_pack is split and the head normalised."""

import shutil
from importlib.util import module_from_spec, spec_from_file_location

import pytest
import torch
import torch.nn.functional as F
from conftest import SIZES
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from baichuan import BaichuanConfig, BaichuanForCausalLM, modeling_baichuan
from baichuan.modeling_baichuan import NormHead, Rotated, rotary_cos_sin
from support.model.directory import ModelDirectory


def as_llama(model: BaichuanForCausalLM) -> LlamaForCausalLM:
    config = LlamaConfig(**SIZES, attn_implementation=model.config._attn_implementation)
    state = {}
    for name, tensor in model.state_dict().items():
        if "W_pack" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                state[name.replace("W_pack", f"{letter}_proj")] = part
        else:
            state[name] = F.normalize(tensor.float(), dim=-1).to(tensor.dtype) if name == "lm_head.weight" else tensor
    llama = LlamaForCausalLM(config).to(next(model.parameters()).dtype)
    llama.load_state_dict(state)
    return llama.eval()


@pytest.fixture(params=["sdpa", "eager"])
def pair(request):
    torch.manual_seed(0)
    model = BaichuanForCausalLM._from_config(BaichuanConfig(**SIZES), attn_implementation=request.param)
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at initialisation, so that every part shows in the logits
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim == 1 else 0.08))
        model.lm_head.weight.mul_(torch.rand(SIZES["vocab_size"], 1) * 5)  # rows of very different lengths
    return model.eval(), as_llama(model)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    ids = torch.randint(3, SIZES["vocab_size"], (3, 23))
    left, right = torch.ones_like(ids), torch.ones_like(ids)
    left[1, :7] = left[2, :3] = 0
    right[1, -7:] = right[2, -3:] = 0
    return ids, {"none": None, "left": left, "right": right}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_equal_llama(pair, batch, padding):
    model, llama = pair
    ids, masks = batch
    mask = masks[padding]
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    with torch.no_grad():
        difference = (model(ids, attention_mask=mask).logits - llama(ids, attention_mask=mask).logits)[real]
    assert difference.abs().max() <= 1e-5


def test_loss_and_gradients_equal_llama(pair, batch):
    model, llama = pair
    ids, masks = batch
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.6, -100).masked_fill(masks["right"] == 0, -100)
    ours = model(ids, attention_mask=masks["right"], labels=labels)
    theirs = llama(ids, attention_mask=masks["right"], labels=labels)
    assert ours.logits is None
    assert abs(ours.loss - theirs.loss) <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    for mine, other in zip(model.model.layers, llama.model.layers):
        parts = [getattr(other.self_attn, f"{letter}_proj").weight.grad for letter in "qkv"]
        torch.testing.assert_close(mine.self_attn.W_pack.weight.grad, torch.cat(parts), atol=1e-5, rtol=1e-5)
        for name in ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"):
            ours_grad, their_grad = mine.get_submodule(name).weight.grad, other.get_submodule(name).weight.grad
            torch.testing.assert_close(ours_grad, their_grad, atol=1e-5, rtol=1e-5)
    # The stored head is not normalised; the gradient passes through the normalisation.
    weight = model.lm_head.weight.detach().clone().requires_grad_()
    (F.normalize(weight, dim=-1) * llama.lm_head.weight.grad).sum().backward()
    torch.testing.assert_close(model.lm_head.weight.grad, weight.grad, atol=1e-5, rtol=1e-5)


def test_cache_and_token_by_token_equal_llama(pair, batch):
    model, llama = pair
    ids, _ = batch
    expected = llama(ids).logits
    with torch.no_grad():
        first = model(ids[:, :9], use_cache=True)
        steps, cache = [first.logits], first.cache
        for position in range(9, ids.shape[1]):
            output = model(ids[:, position : position + 1], cache=cache, use_cache=True)
            steps.append(output.logits)
    assert (torch.cat(steps, dim=1) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_within_its_rounding(pair, batch, dtype):
    """Against float32, our error is that of LLaMA in the same dtype: at most half as large again."""
    model, llama = pair
    ids, _ = batch
    exact = llama(ids).logits
    with torch.no_grad():
        ours = (model.to(dtype)(ids).logits.float() - exact).abs().mean()
        theirs = (as_llama(model)(ids).logits.float() - exact).abs().mean()
    assert torch.isfinite(ours)
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("first", [0, 3400])
def test_long_positions_equal_llama(pair, first):
    """Up to 600 tokens, the last of them from the cache; bfloat16 knows no whole numbers between 256 and 258.

    In half precision LLaMA keeps its angles in float32, as it does when transformers loads it.
    """
    model, llama = pair
    ids = torch.randint(3, SIZES["vocab_size"], (1, 600), generator=torch.Generator().manual_seed(2))
    positions = torch.arange(600)[None] + first
    given = {} if first == 0 else {"position_ids": positions}  # by itself the model counts from 0

    def last_logits():
        begun = model(ids[:, :590], use_cache=True, **({"position_ids": positions[:, :590]} if given else {}))
        later = {"position_ids": positions[:, 590:]} if given else {}
        rest = model(ids[:, 590:], cache=begun.cache, use_cache=True, **later)
        return torch.cat((begun.logits[:, 560:], rest.logits), dim=1).float()

    with torch.no_grad():
        exact = llama(ids, position_ids=positions).logits[:, 560:]
        assert (model(ids, **given).logits[:, 560:] - exact).abs().max() <= 2e-5
        assert (last_logits() - exact).abs().max() <= 2e-5
        half = as_llama(model.to(torch.bfloat16))
        half.model.rotary_emb = llama.model.rotary_emb
        theirs = (half(ids, position_ids=positions).logits[:, 560:].float() - exact).abs().mean()
        assert (last_logits() - exact).abs().mean() <= 1.3 * theirs


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1.2e-7), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_rotation_and_its_gradient_are_products_of_complex_numbers(dtype, rounding):
    """Of pairs (x[i], x[i + d/2]) with e^(i · angle) in float64, and of gradients with e^(-i · angle); rounded once."""
    torch.manual_seed(0)
    positions = torch.stack((torch.arange(40), torch.arange(3000, 3040)))  # (b, l)
    packed, grads = torch.randn(2, 40, 3, 4, 16).to(dtype).requires_grad_(), torch.randn(3, 2, 4, 40, 16).to(dtype)
    cos, sin = rotary_cos_sin(positions, 16)
    rotated = Rotated.apply(packed, cos, sin)
    torch.autograd.backward(rotated, [*grads])

    def turned(x, sign):  # (b, h, l, d) → the same; angles as the model has them, in float32
        angles = torch.atan2(sin, cos).double()[..., 8:]
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), sign * angles)
        return torch.cat((turned.real, turned.imag), -1)

    query, key, value = packed.detach().permute(2, 0, 3, 1, 4)
    expected = [turned(query, 1), turned(key, 1), value, turned(grads[0], -1), turned(grads[1], -1), grads[2]]
    found = [*rotated, *packed.grad.permute(2, 0, 3, 1, 4)]
    for is_, should_be in zip(found, expected):
        assert is_.dtype == dtype
        torch.testing.assert_close(is_.double(), should_be.double(), rtol=rounding, atol=2e-6)


def test_functions_that_two_threads_may_not_call_first_are_called_at_import():
    """Seen in 14 of 25 fresh processes: the first cosine of a process, taken by two threads, was wrong by 1.5e-4."""
    called = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket.__name__ in ("cos", "sin", "sqrt"):
                called.append((function.overloadpacket.__name__, args[0].numel()))
            return function(*args, **(kwargs or {}))

    again = spec_from_file_location("baichuan.imported_again", modeling_baichuan.__file__)
    with Recorder():
        again.loader.exec_module(module_from_spec(again))
    assert called == [("cos", 1), ("sin", 1), ("sqrt", 1)]


def test_generate_equals_llama(pair, batch):
    model, llama = pair
    ids, masks = batch
    arguments = {"attention_mask": masks["left"], "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(ids, **arguments)
    assert ours.tolist() == llama.generate(ids, **arguments).tolist()
    beams = model.generate(ids, num_beams=3, **arguments)
    assert beams.tolist() == llama.generate(ids, num_beams=3, **arguments).tolist()


def test_logits_to_keep(pair, batch):
    model, _ = pair
    ids, _ = batch
    logits = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([3, 5])).logits, logits[:, [3, 5]])


def test_loss_of_parts_adds_up_and_z_loss(pair, batch):
    """num_items_in_batch divides each part of a step by the whole step's tokens."""
    model, _ = pair
    ids, _ = batch
    whole = model(ids, labels=ids).loss
    tokens = ids.numel() - len(ids)  # the first token of a row has nothing before it
    parts = [model(row[None], labels=row[None], num_items_in_batch=tokens).loss for row in ids]
    torch.testing.assert_close(sum(parts), whole)
    assert model(ids, labels=torch.full_like(ids, -100)).loss == 0
    model.config.z_loss_weight = 0.01
    expected = whole + 0.01 * model(ids).logits[:, :-1].amax(-1).pow(2).mean()
    torch.testing.assert_close(model(ids, labels=ids).loss, expected)


def test_hidden_states_and_attentions_are_recorded(pair, batch):
    model, llama = pair
    ids, _ = batch
    ours = model(ids, output_hidden_states=True)
    theirs = llama(ids, output_hidden_states=True)
    assert len(ours.hidden_states) == SIZES["num_hidden_layers"] + 1
    for mine, other in zip(ours.hidden_states, theirs.hidden_states):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
    if model.config._attn_implementation == "eager":
        attentions = model(ids, output_attentions=True).attentions
        torch.testing.assert_close(attentions[0].sum(-1), torch.ones_like(attentions[0].sum(-1)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(pair, batch, reentrant):
    model, _ = pair
    ids, _ = batch
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.W_pack.weight.grad.clone())
    torch.testing.assert_close(*gradients)


# ---------------------------------------------------------------- the head


def test_frozen_head_normalises_once_and_notices_changes(monkeypatch):
    head = NormHead(16, 50).requires_grad_(False)
    before, computed = head.weight.clone(), []
    compute = head._compute_reciprocals
    monkeypatch.setattr(head, "_compute_reciprocals", lambda: computed.append(1) or compute())
    x = torch.randn(4, 16)
    for _ in range(5):
        head(x)
    assert len(computed) == 1
    head.eval()(x)  # at which the published head overwrites its weight
    assert len(computed) == 2 and torch.equal(head.weight, before)
    with torch.no_grad():
        head.weight.mul_(torch.rand(50, 1) + 0.5)
    torch.testing.assert_close(head(x), x @ F.normalize(head.weight, dim=-1).T)
    assert len(computed) == 3
    head.load_state_dict({"weight": torch.randn(50, 16)})
    torch.testing.assert_close(head(x), x @ F.normalize(head.weight, dim=-1).T)
    head.weight.data = torch.randn(50, 16)
    torch.testing.assert_close(head(x), x @ F.normalize(head.weight, dim=-1).T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_head_works_in_half_precision_on_the_cpu(dtype):
    head = NormHead(64, 100).to(dtype)
    head.weight.data[0] = 0  # a row without direction: logit 0, no nan
    x = torch.randn(5, 64, dtype=dtype)
    logits = head(x)
    assert torch.isfinite(logits).all() and (logits[:, 0] == 0).all()
    exact = x.float() @ F.normalize(head.weight.float(), dim=-1).T
    torch.testing.assert_close(logits, exact, atol=0.02, rtol=0.02)


# ---------------------------------------------------------------- what other programs rely on


def test_the_mask_is_converted_once_and_needs_no_copy(checkpoint, monkeypatch):
    """The kernel would turn a boolean mask into numbers in each layer, and copy one whose rows are not aligned."""
    length, used = 21, []
    sees = torch.ones(1, 1, length, length).tril().bool()
    attend = torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, attn_mask=None, **others):
        used.append(attn_mask)
        return attend(*arguments, attn_mask=attn_mask, **others)

    model = ModelDirectory(checkpoint).load(torch.bfloat16)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + length)[None], attention_mask=sees, use_cache=False)
    assert len(used) == model.config.num_hidden_layers > 1
    assert len({mask.data_ptr() for mask in used}) == 1
    mask = used[0]
    assert mask.dtype == torch.bfloat16 and mask.stride(-1) == 1 and all(step % 16 == 0 for step in mask.stride()[:-1])
    assert torch.equal(mask, torch.where(sees, 0.0, -torch.inf).to(torch.bfloat16))


def test_an_unknown_argument_is_refused_by_name(checkpoint):
    model, ids = BaichuanForCausalLM.from_pretrained(checkpoint), torch.tensor([[5, 9, 77, 130]])
    with pytest.raises(TypeError, match="kv_store"):
        model(ids, kv_store=None)
    with pytest.raises(TypeError, match="kv_store"):
        model.generate(ids, max_new_tokens=2, kv_store=None)
    with pytest.raises(TypeError, match="past_key_values"):  # as the cache was called before transformers 5.24
        model(ids, past_key_values=None)


def test_from_pretrained_takes_what_libraries_pass_by_name(checkpoint):
    options = {"ignore_mismatched_sizes": False, "output_loading_info": True}
    model, info = BaichuanForCausalLM.from_pretrained(pretrained_model_name_or_path=checkpoint, **options)
    assert isinstance(model, BaichuanForCausalLM) and not info["missing_keys"]


def test_tensors_that_do_not_fit_are_named(checkpoint, tmp_path):
    directory = shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(directory / "model.safetensors")
    weights |= {"surplus": torch.ones(2), "model.norm.weight": torch.ones(7)}
    del weights["lm_head.weight"]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"missing lm_head.weight; unexpected surplus; model.norm.weight has shape \(7,\)"
    ):
        BaichuanForCausalLM.from_pretrained(directory)
