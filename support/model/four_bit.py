"""The base in four bits, the book's own way: QLoRA (Dettmers et al. 2023, arXiv 2305.14314), by bitsandbytes.

Each weight of the decoder's linear layers becomes one of 16 values (NF4, close together where a normal distribution has
most of its weights), times a scale for every 64 of them; the scales are themselves held in 8 bits (double quantisation).
To be multiplied, a weight is turned back into 16 bits. Embedding, norms, head and adapters stay as they are.

PEFT's `prepare_model_for_kbit_training` is not called: it holds norms, embedding and head in float32, but the norms are
computed in float32 here whatever they are held in, and the rest would only take more memory.
"""

from importlib.util import find_spec

from transformers import BitsAndBytesConfig

from support.errors import UserError

BLOCK = 64  # weights that share a scale


def check_four_bit(model_directory):
    """Raises: UserError where --load_in_4bit cannot work with this installation or this model."""
    if find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: needs bitsandbytes: pip install -r requirements-4bit.txt -c constraints.txt")
    config = model_directory.config
    if config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        sizes = f"hidden_size {config.hidden_size} or intermediate_size {config.intermediate_size}"
        raise UserError(f"{model_directory.path}: {sizes} is no multiple of {BLOCK}: --load_in_4bit needs it")


def loading(dtype, device) -> dict:
    """Arguments of `from_pretrained` that make the decoder's linear layers four-bit ones, on `device`."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head"],
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def keep_as_loaded(model):
    """On a CPU with AVX512-BF16 bitsandbytes would round the scales anew, for good, at the first answer. Not here."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
