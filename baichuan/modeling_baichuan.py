"""Baichuan2: a LLaMA-like decoder with packed query-key-value projections and a normalised output head.

Parameter names are the checkpoint's own. Shapes in comments: b batch, l tokens, h heads, d head size,
n supervised tokens, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_baichuan import BaichuanConfig
from .generation_utils import ChatMixin

# What transformers may pass beyond the parameters of `forward`; all of it goes on to the attention functions.
KNOWN_ARGUMENTS = {
    *("output_attentions", "output_hidden_states", "is_causal"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),  # lengths of packed sequences
    *("read_index", "write_index", "block_table", "logits_indices", "logits_processor_args"),  # of generate_batch
}

# MKL looks a function up at its first call. Made by two threads at once, that call may compute with an error of 1e-4
# (pytorch/pytorch issue 188792). One number takes one thread. The square root is AdamW's.
for function in (torch.cos, torch.sin, torch.sqrt):
    function(torch.ones(1, device="cpu"))


def rotary_cos_sin(position_ids: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of the rotary position embedding (Su et al. 2021, arXiv 2104.09864), base 10,000.

    Recomputed at each forward (a few hundred numbers a token, shared by all layers): there is no table
    whose length could be exceeded, and no buffer that a half-precision cast could spoil.

    Args:
        position_ids: (b or 1, l) integers.
    Returns:
        cos and sin, each (b or 1, 1, l, d) in float32; the first half of the angles is negative, for `rotate`.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    angles = position_ids[:, None, :, None].float() / 10_000.0**exponent  # (b, 1, l, d/2)
    angles = torch.cat((-angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn each pair (x[i], x[i + d/2]) by its position's angle. x: (…, b, h, l, d), any dtype; the result is float32."""
    turned, half = x * cos, x.shape[-1] // 2
    turned[..., :half].addcmul_(x[..., half:], sin[..., :half])
    turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return turned


class Rotated(torch.autograd.Function):
    """packed (b, l, 3, h, d) → query and key, rotated, and value: (b, h, l, d). Autograd's own would move twice the bytes."""

    @staticmethod
    def forward(ctx, packed, cos, sin):
        ctx.save_for_backward(cos, sin)
        turned, value = packed.permute(2, 0, 3, 1, 4).split((2, 1))
        return *rotate(turned, cos, sin).to(packed.dtype), value.squeeze(0)

    @staticmethod
    def backward(ctx, *grads):  # what was turned by an angle has its gradient turned back by it
        cos, sin = ctx.saved_tensors
        grad = torch.stack([grad.transpose(1, 2) for grad in grads], dim=2)  # (b, l, 3, h, d)
        turned = grad[:, :, :2].permute(2, 0, 3, 1, 4)
        turned.copy_(rotate(turned, cos, -sin))
        return grad, None, None


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """True where attention is allowed → 0 there and -inf elsewhere, as torch's attention would make it in every layer.

    Its kernel on a GPU reads rows that begin at multiples of 16; others it would copy in every layer as well.
    """
    length = mask.shape[-1]
    rows = torch.full((*mask.shape[:-1], length + -length % 16), -torch.inf, dtype=dtype, device=mask.device)
    return rows[..., :length].masked_fill_(mask, 0)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """softmax(q kᵀ · scaling + mask) v, step by step; (b, h, l, d) → (b, l, h, d). For reading attention weights."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class Attention(nn.Module):
    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.is_causal = True  # read by transformers' attention functions
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, cos, sin, cache: Cache | None = None, **kwargs):
        batch, length, _ = hidden_states.shape
        packed = self.W_pack(hidden_states).view(batch, length, 3, -1, self.head_dim)  # (b, l, 3, h, d)
        query, key, value = Rotated.apply(packed, cos, sin)  # each (b, h, l, d)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(self, query, key, value, attention_mask, scaling=self.head_dim**-0.5, **kwargs)
        return self.o_proj(output.reshape(batch, length, -1)), weights


class MLP(nn.Module):
    """Gated feed-forward network (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(GradientCheckpointingLayer):
    """Each half behind an RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), which torch computes in float32."""

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden_states, attention_mask, cos, sin, cache=None, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), attention_mask, cos, sin, cache, **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class NormHead(nn.Linear):
    """Output head whose rows count by direction alone: logits = x · row / max(‖row‖₂, 1e-12).

    The stored weight is never touched. Instead of a normalised copy (1 GB at 7B) the head keeps the V reciprocal
    norms, and multiplies the logits by them; they are computed anew only when the weight has changed or is being
    trained, since they are then part of the gradient.
    """

    def __init__(self, hidden_size: int, vocab_size: int):
        super().__init__(hidden_size, vocab_size, bias=False)
        self._reciprocal_norms = (None, None)  # (what the weight was, its reciprocal norms)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (…, hidden_size) → logits (…, V) in float32."""
        logits, scales = F.linear(x, self.weight).float(), self.reciprocal_norms()
        return logits * scales if scales.requires_grad else logits.mul_(scales)  # in place: V numbers a token are many

    def reciprocal_norms(self) -> torch.Tensor:
        """1 / ‖row‖₂ of every row: (V,) in float32, which float16 rows need on the CPU too."""
        weight = self.weight
        trained = weight.requires_grad and torch.is_grad_enabled()
        if trained or weight.is_inference():  # inference tensors do not count their changes
            return self._compute_reciprocals()
        state = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._reciprocal_norms[0] != state:
            with torch.no_grad():
                self._reciprocal_norms = (state, self._compute_reciprocals())
        return self._reciprocal_norms[1]

    def _compute_reciprocals(self) -> torch.Tensor:
        return torch.linalg.vector_norm(self.weight, dim=-1, dtype=torch.float32).clamp_min(1e-12).reciprocal()

    def train(self, mode: bool = True):
        self._reciprocal_norms = (None, None)  # a training loop may have written through `.data`, which goes uncounted
        return super().train(mode)


class BaichuanPreTrainedModel(PreTrainedModel):
    config_class = BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": DecoderLayer, "attentions": Attention}
    # Some older exports carry this table; it is computed here.
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """transformers' from_pretrained, except that a tensor that is missing, left over or misshapen is an error.

        Raises:
            ValueError: names the tensors that do not fit config.json.
            OSError: the directory has no config or no weights.
        """
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what was ignored is reported below
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
        problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
        for name, stored, expected in sorted(info["mismatched_keys"]):
            problems.append(f"{name} has shape {tuple(stored)}, config.json asks for {tuple(expected)}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise ValueError(f"{pretrained_model_name_or_path}: the weights do not fit the model: {shown}")
        return (model, info) if output_loading_info else model


class BaichuanModel(BaichuanPreTrainedModel):
    """The decoder without its head: token ids (b, l) → hidden states (b, l, hidden_size)."""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` is (b, tokens so far) with 1 for real tokens, or a finished (b, 1, l, tokens so far) mask.

        Raises: TypeError: an argument that nothing here knows. To ignore it would be to answer wrongly in silence.
        """
        if unknown := kwargs.keys() - KNOWN_ARGUMENTS:
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected argument: {', '.join(sorted(unknown))}")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (b, l, hidden)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        # Before positions are filled in: it would look for packed sequences among them, and wait for the device.
        mask = create_causal_mask(self.config, hidden_states, attention_mask, cache, position_ids)
        if self.config._attn_implementation == "sdpa" and mask is not None and mask.dtype == torch.bool:
            mask = additive_mask(mask, hidden_states.dtype)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(hidden_states.shape[1], device=hidden_states.device) + seen).unsqueeze(0)

        cos, sin = rotary_cos_sin(position_ids, self.config.head_dim)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, cos, sin, cache=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)


class BaichuanForCausalLM(BaichuanPreTrainedModel, ChatMixin, GenerationMixin):
    """Baichuan2 with its normalised head, training loss, and `chat()`."""

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.model = BaichuanModel(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        num_items_in_batch: int | torch.Tensor | None = None,
        loss_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits without `labels`; the loss, and no logits, with them.

        Args:
            input_ids: (b, l). `attention_mask`, `position_ids`: see BaichuanModel.
            labels: (b, l), -100 where nothing is supervised; the label of a token is predicted by the one before it.
            logits_to_keep: compute logits for this many last positions, or for the positions in this tensor; 0: all.
            num_items_in_batch: supervised tokens to divide the loss by, when this forward is only a part of a
                step; by default those of this call, which gives their mean.
            loss_positions: (n, 2) rows of (index into the flattened b·l hidden states, label). Stands for `labels`
                where the caller knows them already: on a GPU, finding them here waits for the device.
        Returns:
            loss, a float32 scalar (cross-entropy in nats, plus z_loss_weight · mean max-logit²), with logits None;
            or logits (b, kept, V) in the model's dtype.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, cache=cache,
                             inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs)  # fmt: skip
        hidden_states = outputs.last_hidden_state
        loss = logits = None
        if labels is not None or loss_positions is not None:
            if loss_positions is None:
                loss_positions = supervised_positions(labels)
            loss = self.loss(hidden_states, loss_positions, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept]).to(hidden_states.dtype)
        return CausalLMOutputWithPast(loss, logits, outputs.cache, outputs.hidden_states, outputs.attentions)

    def loss(self, hidden_states, loss_positions, num_items_in_batch=None) -> torch.Tensor:
        """The head and the cross-entropy at the supervised positions alone, four fifths of the tokens having no label."""
        index, label = loss_positions.unbind(-1)
        logits = self.lm_head(hidden_states.flatten(0, 1)[index])  # (n, V) float32
        loss = F.cross_entropy(logits, label, reduction="sum")
        if self.config.z_loss_weight:
            loss = loss + self.config.z_loss_weight * logits.amax(-1).pow(2).sum()
        return loss / (max(len(label), 1) if num_items_in_batch is None else num_items_in_batch)


def supervised_positions(labels: torch.Tensor) -> torch.Tensor:
    """labels (b, l) → (n, 2): the flattened position that predicts each supervised token, and that token."""
    batch, column = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    return torch.stack((batch * labels.shape[1] + column, labels[batch, column + 1]), dim=-1)
