"""Small random models of many architectures, as TransformerLens models.

Every model is in eval mode, on the CPU, deterministic, and has all of its parameters drawn at random (norm gains and
biases too), so that a formula that forgets one of them fails its test. The weights are drawn in the order of the
parameters' names from a generator of their own: they depend on the family, the seed and the names alone. The global
random state of torch is left as it was.

``FAMILIES`` lists what the installed TransformerLens can build: ``TransformerBridge`` models everywhere and, where
``HookedTransformer`` still exists (3.x), models of that class too, under names that begin with ``hooked_``.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformer_lens.model_bridge.sources import build_bridge_from_module

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # TransformerLens 4 has no HookedTransformer
    HookedTransformer = HookedTransformerConfig = None

VOCAB = 101
D_MODEL = 32
D_FF = 48
HEADS = 4
KV_HEADS = 2
D_HEAD = D_MODEL // HEADS
D_HEAD_WIDE = 12
"""For families whose heads need not add up to the model's width (Qwen3, Gemma)."""
BLOCKS = 3
CONTEXT = 64
WINDOW = 5
EXPERTS = 4
EXPERTS_PER_TOKEN = 2
BOS, EOS, PAD = 0, 1, 2
SPECIAL = 3
"""Ids below this one are special tokens (BOS, EOS, PAD); ``tokens`` never draws them."""


@dataclass(frozen=True)
class Family:
    """One architecture of the zoo, and what a test has to know about it."""

    name: str
    generation: str
    """``"bridge"`` (TransformerBridge around a Hugging Face model) or ``"hooked"`` (HookedTransformer)."""
    build: Callable[..., Any]
    """Builds the model; takes the optional keywords ``dtype`` and ``seed``."""
    moe: bool = False
    """The FFN is a mixture of experts."""
    parallel: bool = False
    """Attention and FFN both read the block's input."""
    post_norm: bool = False
    """A norm acts on a sublayer's output before it is added to the residual stream."""
    activation: str = "silu"
    """``"silu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"quick_gelu"``, ``"relu"`` or ``"relu2"``."""
    norm: str = "rms"
    """``"rms"`` or ``"ln"``."""
    gated: bool = True
    """The FFN multiplies the activated gate by an up projection."""
    stored_gain: bool = True
    """The norms' gains are parameters; where they are not, the norms add 1 to a parameter or have no gain."""
    output_scale: float = 1.0
    """What sublayers' outputs are multiplied by before they join the residual stream."""


# --- Hugging Face configurations -------------------------------------------------------------------------------------

_TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
_MHA = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    **_TOKENS,
}
_GQA = {**_MHA, "num_key_value_heads": KV_HEADS}
SIZES = {key: value for key, value in _GQA.items() if key != "tie_word_embeddings"}
"""What nearly every Hugging Face configuration takes, for `boot`."""
_GEMMA = {
    **_GQA,
    "num_hidden_layers": 4,
    "head_dim": D_HEAD_WIDE,
    "query_pre_attn_scalar": D_HEAD_WIDE,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": D_MODEL,
    "n_layer": BLOCKS,
    "n_head": HEADS,
    "n_inner": D_FF,
    "n_positions": CONTEXT,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **_TOKENS,
}
_NEOX = {**_MHA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "ffn_hidden_size": D_FF,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": CONTEXT,
    **_TOKENS,
}

# name: (Hugging Face class prefix, config keywords, Family keywords)
_BRIDGES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", _GQA, {}),
    "llama_bias": ("Llama", {**_GQA, "attention_bias": True, "mlp_bias": True}, {}),
    "mistral": ("Mistral", {**_GQA, "head_dim": D_HEAD, "sliding_window": WINDOW}, {}),
    "qwen2": ("Qwen2", _GQA, {}),
    "qwen3": ("Qwen3", {**_GQA, "head_dim": D_HEAD_WIDE}, {}),
    "phi3": ("Phi3", {**_GQA, "original_max_position_embeddings": CONTEXT}, {}),
    "olmo2": ("Olmo2", _GQA, {"post_norm": True}),
    "gemma2": ("Gemma2", _GEMMA, {"post_norm": True, "activation": "gelu_tanh", "stored_gain": False}),
    "gemma3": ("Gemma3", _GEMMA, {"post_norm": True, "activation": "gelu_tanh", "stored_gain": False}),
    "granite": ("Granite", {**_GQA, "residual_multiplier": 0.3}, {"output_scale": 0.3}),
    "olmo": ("Olmo", _GQA, {"norm": "ln", "stored_gain": False}),
    "nemotron": ("Nemotron", _GQA, {"activation": "relu2", "norm": "ln", "gated": False, "stored_gain": False}),
    "mixtral": (
        "Mixtral",
        {**_GQA, "num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN},
        {"moe": True},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            **_GQA,
            "head_dim": D_HEAD_WIDE,
            "moe_intermediate_size": D_FF,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
        },
        {"moe": True},
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **_GQA,
            "moe_intermediate_size": D_FF // 2,
            "shared_expert_intermediate_size": D_FF,
            "num_experts": EXPERTS,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
        },
        {"moe": True},
    ),
    "olmoe": (
        "Olmoe",
        {**_GQA, "num_experts": EXPERTS, "num_experts_per_tok": EXPERTS_PER_TOKEN, "norm_topk_prob": True},
        {"moe": True},
    ),
    "gpt2": ("GPT2", _GPT2, {"activation": "gelu_tanh", "norm": "ln", "gated": False}),
    "gpt2_quick_gelu": (
        "GPT2",
        {**_GPT2, "activation_function": "quick_gelu"},
        {"activation": "quick_gelu", "norm": "ln", "gated": False},
    ),
    "gptj": (
        "GPTJ",
        {**_GPT2, "rotary_dim": 4},
        {"parallel": True, "activation": "gelu_tanh", "norm": "ln", "gated": False},
    ),
    "gpt_neox_parallel": ("GPTNeoX", _NEOX, {"parallel": True, "activation": "gelu", "norm": "ln", "gated": False}),
    "gpt_neox_sequential": (
        "GPTNeoX",
        {**_NEOX, "use_parallel_residual": False},
        {"activation": "gelu", "norm": "ln", "gated": False},
    ),
    "phi": (
        "Phi",
        {**_NEOX, "num_key_value_heads": HEADS},
        {"parallel": True, "activation": "gelu_tanh", "norm": "ln", "gated": False},
    ),
    "falcon": ("Falcon", _FALCON, {"parallel": True, "activation": "gelu", "norm": "ln", "gated": False}),
    "falcon_new": (
        "Falcon",
        {
            **_FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 1,
            "num_ln_in_parallel_attn": 2,
            "multi_query": False,
        },
        {"parallel": True, "activation": "gelu", "norm": "ln", "gated": False},
    ),
    "opt": (
        "OPT",
        {
            "vocab_size": VOCAB,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": D_FF,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": CONTEXT,
            "dropout": 0.0,
            **_TOKENS,
        },
        {"activation": "relu", "norm": "ln", "gated": False},
    ),
    "mpt": (
        "Mpt",
        {
            "vocab_size": VOCAB,
            "d_model": D_MODEL,
            "n_layers": BLOCKS,
            "n_heads": HEADS,
            "max_seq_len": CONTEXT,
            **_TOKENS,
        },
        {"activation": "gelu", "norm": "ln", "gated": False},
    ),
    "bloom": (
        "Bloom",
        {"vocab_size": VOCAB, "hidden_size": D_MODEL, "n_layer": BLOCKS, "n_head": HEADS, **_TOKENS},
        {"activation": "gelu_tanh", "norm": "ln", "gated": False},
    ),
}

# --- HookedTransformer configurations --------------------------------------------------------------------------------

_HOOKED_BASE = {
    "d_model": D_MODEL,
    "d_head": D_HEAD,
    "n_heads": HEADS,
    "d_mlp": D_FF,
    "n_layers": BLOCKS,
    "n_ctx": CONTEXT,
    "d_vocab": VOCAB,
    "device": "cpu",
}
_HOOKED_LN = {**_HOOKED_BASE, "normalization_type": "LN"}
_HOOKED_RMS = {
    **_HOOKED_BASE,
    "normalization_type": "RMS",
    "act_fn": "silu",
    "gated_mlp": True,
    "positional_embedding_type": "rotary",
    "n_key_value_heads": KV_HEADS,
    "final_rms": True,
}
_HOOKED_NEOX = {**_HOOKED_LN, "act_fn": "gelu", "positional_embedding_type": "rotary", "rotary_dim": D_HEAD // 2}

# name: (HookedTransformerConfig keywords, Family keywords)
_HOOKED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({**_HOOKED_RMS, "original_architecture": "LlamaForCausalLM"}, {}),
    "mistral": (
        {
            **_HOOKED_RMS,
            "original_architecture": "MistralForCausalLM",
            "use_local_attn": True,
            "window_size": WINDOW,
            "attn_types": ["local"] * BLOCKS,
        },
        {},
    ),
    "qwen2": ({**_HOOKED_RMS, "original_architecture": "Qwen2ForCausalLM"}, {}),
    "qwen3": (
        {**_HOOKED_RMS, "original_architecture": "Qwen3ForCausalLM", "use_qk_norm": True, "d_head": D_HEAD_WIDE},
        {},
    ),
    "olmo2": (
        {**_HOOKED_RMS, "original_architecture": "Olmo2ForCausalLM", "n_key_value_heads": None},
        {"post_norm": True},
    ),
    "gemma2": (
        {
            **_HOOKED_RMS,
            "original_architecture": "Gemma2ForCausalLM",
            "d_head": D_HEAD_WIDE,
            "n_layers": 4,
            "act_fn": "gelu_pytorch_tanh",
            "use_normalization_before_and_after": True,
            "use_local_attn": True,
            "window_size": WINDOW,
            "attn_types": ["local", "global"] * 2,
            "attn_scores_soft_cap": 50.0,
            "output_logits_soft_cap": 30.0,
        },
        {"post_norm": True, "activation": "gelu_tanh"},
    ),
    "mixtral": (
        {
            **_HOOKED_RMS,
            "original_architecture": "MixtralForCausalLM",
            "num_experts": EXPERTS,
            "experts_per_token": EXPERTS_PER_TOKEN,
            "norm_topk_prob": True,
        },
        {"moe": True},
    ),
    "gpt2": (
        {**_HOOKED_LN, "original_architecture": "GPT2LMHeadModel", "act_fn": "gelu_new"},
        {"activation": "gelu_tanh", "norm": "ln", "gated": False},
    ),
    "gpt_neox_parallel": (
        {**_HOOKED_NEOX, "original_architecture": "GPTNeoXForCausalLM", "parallel_attn_mlp": True},
        {"parallel": True, "activation": "gelu", "norm": "ln", "gated": False},
    ),
    "gpt_neox_sequential": (
        {**_HOOKED_NEOX, "original_architecture": "GPTNeoXForCausalLM"},
        {"activation": "gelu", "norm": "ln", "gated": False},
    ),
    "phi": (
        {
            **_HOOKED_NEOX,
            "original_architecture": "PhiForCausalLM",
            "act_fn": "gelu_new",
            "parallel_attn_mlp": True,
        },
        {"parallel": True, "activation": "gelu_tanh", "norm": "ln", "gated": False},
    ),
    "opt": (
        {**_HOOKED_LN, "original_architecture": "OPTForCausalLM", "act_fn": "relu"},
        {"activation": "relu", "norm": "ln", "gated": False},
    ),
    "bloom": (
        {
            **_HOOKED_LN,
            "original_architecture": "BloomForCausalLM",
            "act_fn": "gelu_fast",
            "positional_embedding_type": "alibi",
            "post_embedding_ln": True,
        },
        {"activation": "gelu_tanh", "norm": "ln", "gated": False},
    ),
}

# --- random parameters -----------------------------------------------------------------------------------------------


def _normal(shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
    return std * torch.randn(shape, generator=generator, dtype=torch.float64)


def _generator(name: str, seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) + 7919 * seed)


def _is_norm(module: torch.nn.Module) -> bool:
    return "Norm" in type(module).__name__


@torch.no_grad()
def _redraw(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Draw every parameter of a Hugging Face model or a HookedTransformer anew, in the order of their names.

    Gains keep the value they are built with (1, or 0 where the norm adds 1 itself) as their mean.
    """
    modules = dict(model.named_modules())
    for name, parameter in sorted(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        leaf = leaf.removeprefix("_")  # HookedTransformer keeps grouped keys and values in _W_K, _b_K, ...
        module, shape = modules[owner], parameter.shape
        if _is_norm(module) and leaf in ("weight", "w"):
            value = parameter[0].item() + _normal(shape, 0.2, generator)
        elif parameter.ndim == 1 or leaf.startswith("b_") or leaf in ("bias", "b"):
            value = _normal(shape, 0.1, generator)
        elif isinstance(module, torch.nn.Embedding) or leaf in ("W_E", "W_pos"):
            value = _normal(shape, 0.4, generator)
        else:
            if leaf == "W_O":  # (heads, d_head, d_model)
                fan_in = shape[0] * shape[1]
            elif leaf.startswith("W_") or type(module).__name__ == "Conv1D":  # (..., in, out)
                fan_in = shape[-2]
            else:  # (..., out, in)
                fan_in = shape[-1]
            value = _normal(shape, fan_in**-0.5, generator)
        parameter.copy_(value)


# --- building --------------------------------------------------------------------------------------------------------


def _bridge_family(name: str) -> str:
    if name not in _BRIDGES:
        raise KeyError(f"{name!r} is not a bridge family of the zoo; there are {', '.join(_BRIDGES)}")
    return name


def hf_model(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The random Hugging Face model behind the bridge family ``name``, in eval mode, before any bridge is put on it."""
    prefix, keywords, _ = _BRIDGES[_bridge_family(name)]
    return _hf_model(prefix, keywords, _generator(name, seed), seed).to(dtype).eval()


def _hf_model(prefix: str, keywords: dict[str, Any], generator: torch.Generator, seed: int) -> Any:
    suffix = {"GPT2": "LMHeadModel", "OpenAIGPT": "LMHeadModel"}.get(prefix, "ForCausalLM")
    config_class = getattr(transformers, f"{prefix}TextConfig" if prefix == "Gemma3" else f"{prefix}Config")
    model_class = getattr(transformers, prefix + suffix)
    # copies, because configurations keep and change the dictionaries and lists they are given
    keywords = {key: value.copy() if isinstance(value, dict | list) else value for key, value in keywords.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**keywords, attn_implementation="eager", experts_implementation="eager"))
    _redraw(model, generator)
    model.config.architectures = [model_class.__name__]
    return model


def _bridged(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        bridge = build_bridge_from_module(model, architecture=type(model).__name__, hf_config=model.config)
    return bridge.eval()


def _build_bridge(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    return _bridged(hf_model(name, dtype=dtype, seed=seed))


def boot(prefix: str, *, seed: int = 0, **keywords: Any) -> Any:
    """A random model of any Hugging Face family, by the prefix of its classes; for what is tested on one architecture only."""
    return _bridged(_hf_model(prefix, keywords, _generator(prefix, seed), seed).eval())


def _build_hooked(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    keywords, _ = _HOOKED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HookedTransformer(HookedTransformerConfig(**keywords, dtype=dtype))
    _redraw(model, _generator(f"hooked_{name}", seed))
    return model.to(dtype, print_details=False).eval()


def _families() -> dict[str, Family]:
    found = [
        Family(name=name, generation="bridge", build=functools.partial(_build_bridge, name), **facts)
        for name, (_, _, facts) in _BRIDGES.items()
    ]
    if HookedTransformer is not None:
        found += [
            Family(name=f"hooked_{name}", generation="hooked", build=functools.partial(_build_hooked, name), **facts)
            for name, (_, facts) in _HOOKED.items()
        ]
    return {family.name: family for family in found}


FAMILIES: dict[str, Family] = _families()
"""The families the installed TransformerLens can build, by name."""


def build(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A new model of the family ``name``; the weights are the same for every ``dtype``, but for rounding."""
    return FAMILIES[name].build(dtype=dtype, seed=seed)


@functools.cache
def cached(name: str, seed: int = 0) -> Any:
    """The float32 model of ``(name, seed)``, built once per process and shared: leave it as you found it."""
    return build(name, seed=seed)


def tokens(model: Any, batch: int = 2, pos: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids (batch, pos) of ``model``'s vocabulary, without the special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SPECIAL, int(model.cfg.d_vocab), (batch, pos), generator=generator)
