"""Baichuan2's tokenizer: SentencePiece BPE in which no text can become a control token."""

import json
import os
import re
from itertools import groupby

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import BatchEncoding, PreTrainedTokenizer

from .generation_utils import messages_to_ids

RESERVED = re.compile(r"<reserved_\d+>")  # the pieces from which the published model takes its turn markers


class BaichuanTokenizer(PreTrainedTokenizer):
    """Text ↔ ids. Adds neither bos nor eos unless asked to.

    The published tokenizer lets text reach control tokens in two ways: SentencePiece matches `<reserved_107>`, a
    user-defined symbol, and transformers cuts `</s>` out of the text. Here both stay plain text; ids of control
    tokens come from `messages_to_ids`, or from `convert_tokens_to_ids` for a caller who means them.

    Args:
        vocab_file: tokenizer.model.
        generation_config_file: generation_config.json, from which the turn markers are read; found beside vocab_file.
        user_token_id, assistant_token_id: the turn markers, which a saved tokenizer carries itself.
        add_bos_token, add_eos_token: what `encode` and `__call__` add around a text.
        split_special_tokens: False restores transformers' habit of cutting `</s>` out of plain text.
    """

    vocab_files_names = {"vocab_file": "tokenizer.model", "generation_config_file": "generation_config.json"}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(
        self,
        vocab_file: str,
        generation_config_file: str | None = None,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        user_token_id: int | None = None,
        assistant_token_id: int | None = None,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        clean_up_tokenization_spaces: bool = False,
        split_special_tokens: bool = True,
        **kwargs,
    ):
        kwargs.pop("sp_model_kwargs", None)  # in the published file, always empty
        kwargs.pop("use_fast", None)
        self.vocab_file = vocab_file
        with open(vocab_file, "rb") as file:
            self._load(file.read())
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        if user_token_id is None and generation_config_file is not None:
            with open(generation_config_file, encoding="utf-8-sig") as file:
                settings = json.load(file)
            user_token_id, assistant_token_id = settings.get("user_token_id"), settings.get("assistant_token_id")
        self.user_token_id = user_token_id
        self.assistant_token_id = assistant_token_id
        super().__init__(
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            pad_token=pad_token,
            user_token_id=user_token_id,
            assistant_token_id=assistant_token_id,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            clean_up_tokenization_spaces=clean_up_tokenization_spaces,
            split_special_tokens=split_special_tokens,
            **kwargs,
        )
        if user_token_id is not None:  # whatever template the files hold, this is the layout that the model knows
            self.chat_template = chat_template(*self.convert_ids_to_tokens([user_token_id, assistant_token_id]))

    def _load(self, model: bytes):
        """Two processors over one model: the published one decodes; its copy, which encodes, matches no control piece."""
        self.sp_model = sentencepiece.SentencePieceProcessor(model_proto=model)
        proto = sentencepiece_model_pb2.ModelProto.FromString(model)
        changes = proto.normalizer_spec.name != "identity" or proto.normalizer_spec.add_dummy_prefix
        if proto.pieces and changes:
            told = "changes the text before it cuts it, as Baichuan 1's does: take Baichuan2's"
            raise ValueError(f"{self.vocab_file} {told}")
        for piece in proto.pieces:
            if RESERVED.fullmatch(piece.piece):
                piece.type = piece.CONTROL
        self._encoder = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    @property
    def vocab_size(self) -> int:
        return self.sp_model.get_piece_size()

    def get_vocab(self) -> dict[str, int]:
        return {self.sp_model.id_to_piece(id): id for id in range(self.vocab_size)} | self.added_tokens_encoder

    def text_to_ids(self, text: str | list[str]) -> list[int] | list[list[int]]:
        """Plain text → ids, with nothing added. A list of texts is encoded on all cores."""
        return self._encoder.encode(text)

    def _tokenize(self, text: str, **kwargs) -> list[str]:
        return self._encoder.encode(text, out_type=str)

    def _convert_token_to_id(self, token: str) -> int:
        return self.sp_model.piece_to_id(token)

    def _convert_id_to_token(self, index: int) -> str:
        return self.sp_model.id_to_piece(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        special = set(self.all_special_tokens)
        runs = groupby(tokens, key=special.__contains__)
        return "".join("".join(run) if control else self.sp_model.decode_pieces(list(run)) for control, run in runs)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None) -> list[int]:
        bos = [self.bos_token_id] if self.add_bos_token else []
        eos = [self.eos_token_id] if self.add_eos_token else []
        first = bos + token_ids_0 + eos
        return first if token_ids_1 is None else first + bos + token_ids_1 + eos

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        path = os.path.join(save_directory, (filename_prefix + "-" if filename_prefix else "") + "tokenizer.model")
        with open(path, "wb") as file:
            file.write(self.sp_model.serialized_model_proto())
        return (path,)

    def apply_chat_template(
        self,
        conversation: list[dict],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = True,
        **kwargs,
    ):
        """Messages → ids through `messages_to_ids`, so that no text becomes a marker; the text with tokenize=False.

        Raises: ValueError: malformed messages, or a template of the caller's own, which only rendering to text can follow.
        """
        if not tokenize:
            kwargs |= {"add_generation_prompt": add_generation_prompt, "tokenize": False}
            return super().apply_chat_template(conversation, **kwargs)
        kwargs.pop("sanitize_control_tokens", None)  # it always is so here
        if unsupported := [name for name, value in kwargs.items() if value]:
            raise ValueError(f"with tokenize=True this is not supported: {', '.join(unsupported)}")
        ids = messages_to_ids(self, conversation, add_generation_prompt=add_generation_prompt)
        encoded = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        encoded = BatchEncoding(encoded, tensor_type=return_tensors, prepend_batch_axis=return_tensors is not None)
        return encoded if return_dict else encoded["input_ids"]


def chat_template(user_marker: str, assistant_marker: str) -> str:
    """The layout of `messages_to_ids` as a Jinja template, for engines that render text."""
    return (
        "{%- for message in messages -%}"
        f"{{%- if message['role'] == 'user' -%}}{{{{- '{user_marker}' -}}}}"
        f"{{%- elif message['role'] == 'assistant' -%}}{{{{- '{assistant_marker}' -}}}}{{%- endif -%}}"
        "{{- message['content'] -}}"
        "{%- endfor -%}"
        f"{{%- if add_generation_prompt -%}}{{{{- '{assistant_marker}' -}}}}{{%- endif -%}}"
    )
