"""Configuration of Baichuan2-7B. A field that config.json lacks takes its 7B value; a field unknown here is kept."""

import os

import transformers
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

TESTED = ["5.24"]  # minor releases of transformers under which answers were compared, the oldest first


def refuse_untested_transformers(version: str = transformers.__version__):
    """A release that changes what it passes can make a model answer nonsense without a word, so an unknown one is refused.

    Raises: ImportError: names the remedy. BAICHUAN_ANY_TRANSFORMERS=1 in the environment insists.
    """
    minor = ".".join(version.split(".")[:2])
    if minor not in TESTED and os.environ.get("BAICHUAN_ANY_TRANSFORMERS") != "1":
        raise ImportError(
            f"transformers {version} is installed; this model was tested with {', '.join(TESTED)}: "
            f'pip install "transformers=={TESTED[-1]}.*", or set BAICHUAN_ANY_TRANSFORMERS=1 to try all the same'
        )


refuse_untested_transformers()


@strict
class BaichuanConfig(PreTrainedConfig):
    """Sizes of the decoder; the fields and their names are those of the published config.json.

    Raises: StrictDataclassError: a field has the wrong type, a size is out of its range, or heads have no even size.
    """

    model_type = "baichuan"

    vocab_size: int = 125_696
    hidden_size: int = 4096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    model_max_length: int = 4096  # tokens of conversation and reply together; history is cut to fit
    initializer_range: float | int = 0.02
    rms_norm_eps: float | int = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    z_loss_weight: float | int = 0.0

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Called by @strict after every construction."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            most = 1000 if name == "num_hidden_layers" else 2**24  # a damaged file must not fill the memory
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} must be at least 1 and at most {most}, not {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):  # rotary positions pair the two halves of a head
            sizes = f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            raise ValueError(f"{sizes}: the first must be a multiple of twice the second")
