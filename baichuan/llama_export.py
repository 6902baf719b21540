"""Baichuan2 as a plain LLaMA model, for programs that do not know Baichuan.

Baichuan2-7B is a LLaMA once the packed projections are split and the rows of the head have length 1. Its tokenizer is a
SentencePiece model, here rebuilt as the tokenizer.json of the `tokenizers` library. What comes out needs no code of ours.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import LlamaConfig

from .configuration_baichuan import BaichuanConfig
from .tokenization_baichuan import RESERVED, BaichuanTokenizer


def save_llama(directory: Path, config: BaichuanConfig, tokenizer: BaichuanTokenizer):
    """Write all of a LLaMA model but its weights and its generation_config.json. Raises: ValueError."""
    llama_config(config).save_pretrained(directory)
    fast = fast_tokenizer(tokenizer)
    fast.save(str(directory / "tokenizer.json"))
    # llama.cpp takes the scores of the pieces from here. In this copy text cannot spell a reserved piece.
    (directory / "tokenizer.model").write_bytes(tokenizer._encoder.serialized_model_proto())
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the name that transformers 4 and 5 both know
        "model_max_length": config.model_max_length,
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("unk", "bos", "eos", "pad")},
        # What sanitize_control_tokens keeps out of texts besides eos; by default, whatever symbol the template contains.
        "chat_control_tokens": turn_marker_tokens(tokenizer),
        # For llama.cpp, which would add a bos and a space, and know no symbols.
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {id: token.__getstate__() for id, token in fast.get_added_tokens_decoder().items()},
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")


def llama_config(config: BaichuanConfig) -> LlamaConfig:
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    same += ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    return LlamaConfig(
        **{name: getattr(config, name) for name in (*same, "dtype", "merged_adapter")},
        architectures=["LlamaForCausalLM"],
        num_key_value_heads=config.num_attention_heads,
        rms_norm_eps=float(config.rms_norm_eps),  # of which it takes no integer
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
    )


def llama_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Rename Baichuan's (name, tensor) pairs to LLaMA's: W_pack becomes q, k and v, the head's rows have length 1."""
    for name, tensor in tensors:
        if name.endswith(".W_pack.weight"):
            for part, rows in zip("qkv", tensor.chunk(3)):
                yield name.replace("W_pack", f"{part}_proj"), rows
        elif name == "lm_head.weight":
            yield name, F.normalize(tensor.float(), eps=1e-12).to(tensor.dtype)
        else:
            yield name, tensor


def fast_tokenizer(tokenizer: BaichuanTokenizer) -> Tokenizer:
    """The same tokenizer in the `tokenizers` library, except that text can spell eos and the turn markers.

    That is how a chat template places them. Callers keep them out of what users write, in transformers with
    `apply_chat_template(…, sanitize_control_tokens=True)`.
    """
    model = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    pieces = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    vocab = {piece: id for id, (piece, _, _) in enumerate(pieces)}
    pairs = merges({piece: score for piece, score, type in pieces if type == kind.NORMAL})
    fast = Tokenizer(BPE(vocab, pairs, unk_token=tokenizer.unk_token, byte_fallback=True))
    # SentencePiece writes a space as U+2581.
    fast.normalizer = normalizers.Replace(" ", "▁")
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    # Symbols that SentencePiece cuts out of the text before anything else: the longest at each place, as here.
    # Of the reserved ones, only the turn markers are ever asked for.
    symbols = [piece for piece, _, type in pieces if type == kind.USER_DEFINED and not RESERVED.fullmatch(piece)]
    fast.add_tokens([AddedToken(symbol, normalized=False, special=False) for symbol in symbols])
    controls = [tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, *turn_marker_tokens(tokenizer)]
    fast.add_special_tokens([AddedToken(control, normalized=False, special=True) for control in controls])
    return fast


def turn_marker_tokens(tokenizer: BaichuanTokenizer) -> list[str]:
    return tokenizer.convert_ids_to_tokens([tokenizer.user_token_id, tokenizer.assistant_token_id])


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Every pair of pieces that forms a piece, best first.

    SentencePiece joins whichever neighbours form the piece of the highest score; the `tokenizers` library goes by the
    rank of the pair in this list.
    """
    pairs = [
        (left, right)
        for piece in scores
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in scores and (right := piece[cut:]) in scores
    ]
    return sorted(pairs, key=lambda pair: -scores[pair[0] + pair[1]])
