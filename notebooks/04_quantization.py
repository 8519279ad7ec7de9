# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What to spare when quantising
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sd-lens/sd-lens/blob/main/notebooks/04_quantization.ipynb)
#
# A model in eight bits (weights and activations, "W8A8") is small and fast. With one range per tensor it can also be bad, and the reason is a single token: where its norm explodes, one hidden activation is hundreds of times as large as all others, and the eight bits are spent on it. So keep the few projections that read it in
# high precision ([Wang, Zhang, Salzmann, ICML 2025](https://arxiv.org/abs/2502.07004), section 6). This notebook measures what quantising costs, finds the smallest set of projections to spare, and prints it as settings for torchao and llm-compressor.
#
# It runs on `tiny`, the small trained model that ships with sd_lens; what the text says of results is said of `tiny`. For another model change `MODEL`; pictures and printed numbers follow.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "git+https://github.com/sd-lens/sd-lens"], check=True)

# %% tags=["parameters"]
MODEL = "tiny"  # or a folder, a hub name, or a TransformerBridge you already have

# %%
import pandas as pd
import torch

import sd_lens
from sd_lens.applications.texts import default_text
from sd_lens.display.tokens import colored_tokens, token_view
from sd_lens.display.visuals import together
from sd_lens.models.projections import projections

model = sd_lens.load(MODEL)
text = default_text()[:6_000]  # the first third of a text that ships with sd_lens, to be quick; put your own here

# %% [markdown]
# ## 1. What does it cost?
#
# Every linear projection of the blocks is rounded to eight bits: its weights, and what it reads. *RTN* rounds to the nearest step; *SmoothQuant* first moves outliers from activations into weights. Nothing is spared, or one block's down-projection, or those of the explosion and decay blocks. The model is as it was afterwards.

# %%
study = sd_lens.quantization_study(model, text)
for sentence in study.sentences():
    print(sentence)
study

# %%
study.plot()

# %% [markdown]
# **For `tiny`**: quantising costs little, since its outliers are mild, but most of what it costs is lost in one of 42 projections: the down-projection of block 2, where the norm explodes. Block 1, which prepares the explosion, accounts for nearly all the rest. SmoothQuant changes nothing about it: it smooths what comes out of a norm,
# and the outlier is behind the neurons.
#
# ## 2. Why there?
#
# What every projection reads at most and typically, its weights likewise, and what rounding leaves of it, token by token.

# %%
study.plot_ranges()

# %% [markdown]
# Which token is it? Above: the tokens by the norm that they leave the explosion block with. Below: which share of what the block's down-projection reads is rounded to zero, though it is not small for that token (at least a tenth of the token's largest).

# %%
PROMPT = "Return a new list containing all items from the iterable in ascending order."


def lost_share(model, block):
    """Per token, the share of its large hidden activations that one range of eight bits for the whole prompt rounds to zero."""
    kept = []
    down_projection = next(one for one in projections(model) if one.is_down and one.block == block)
    handle = down_projection.module.register_forward_pre_hook(lambda _, args: kept.append(args[0][0].detach().abs()))
    try:
        with torch.no_grad():
            model(model.to_tokens(PROMPT))
    finally:
        handle.remove()
    hidden = kept[0]
    large = hidden >= hidden.amax(-1, keepdim=True) / 10
    gone = hidden < hidden.max() / 127 / 2
    return ((large & gone).sum(-1) / large.sum(-1)).tolist()


trace = sd_lens.trace_norms(model, PROMPT)
defects = sd_lens.find_defects(trace)
if not defects.found:
    raise ValueError(f"{MODEL} has no explosion in this prompt: {defects}")
block = defects.explosion_blocks[-1]
shares = lost_share(model, block)
together(
    colored_tokens(trace, block=block),
    token_view(trace.texts_of(0), shares, limit=1.0),
    captions=[f"norm after block {block}", "share of large hidden activations that is rounded to zero"],
)

# %% [markdown]
# **For `tiny`**: the one token that explodes keeps everything, and most others lose much of what they have. If so, a range for every token should help:

# %%
finer = sd_lens.quantization_study(
    model, text, granularities=["per_token"], each_block=False, recommend=None, ranges=False, methods=["rtn"]
)
pd.DataFrame(
    {
        "perplexity": {
            "full precision": study.full.perplexity,
            "RTN, a range per tensor": study.row("rtn", "per_tensor").perplexity,
            "the same, explosion and decay blocks spared": study.row("rtn", "per_tensor", "explosion and decay").perplexity,
            "RTN, a range per token and output": finer.row("rtn", "per_token").perplexity,
        }
    }
).round(2)

# %% [markdown]
# **For `tiny`**: it does; next to nothing is lost then. Per-token ranges must be computed while the model runs, which not every kernel can do. Sparing a projection or two is the cheap alternative.
#
# ## 3. Outliers as strong as LLaMA2's
#
# `tiny` is a mild case. `amplified()` is the same model with its explosion made ten times as strong by hand, and a decay block, which `tiny` has not: two of its neurons are overwritten, and its loss stays what it was.

# %%
strong = sd_lens.amplified()
print(strong)
strong_study = sd_lens.quantization_study(strong.model, text)
for sentence in strong_study.sentences():
    print(sentence)
strong_study.table()[["method", "granularity", "full precision", "none", "explosion and decay"]].round(2)

# %%
strong_study.plot()

# %%
strong_trace = sd_lens.trace_norms(strong.model, PROMPT)
together(
    colored_tokens(strong_trace, block=strong.explosion_block),
    token_view(strong_trace.texts_of(0), lost_share(strong.model, strong.explosion_block), limit=1.0),
    captions=["amplified: norm", "amplified: share rounded to zero"],
)

# %% [markdown]
# Now it hurts, and the pattern is the paper's (LLaMA2-7B on WikiText-2: 5.47 in full precision, 10.18 with RTN, 6.51 with the two down-projections spared; SmoothQuant 13.87 and 6.78): nearly all that is lost comes back when two of 42 projections are spared. Nobody told the search which two:

# %%
strong_study.recommendation

# %% [markdown]
# ## 4. Settings to paste
#
# The recommendation, for two libraries that quantise Hugging Face models.

# %%
print(study.recommendation.torchao())

# %%
print(study.recommendation.llm_compressor())

# %% [markdown]
# With the extra `sd-lens[quantization]`, `quantization_study(..., backend="torchao")` runs torchao's own int8 kernels instead of rounded floating-point numbers, as a check on this study.
#
# What is said above is checked here.

# %%
if MODEL == "tiny":
    assert defects.explosion_blocks == study.explosion_blocks == (2,)
    assert study.decay_blocks == ()
    lost = study.row("rtn", "per_tensor").loss - study.full.loss
    assert 0.01 < lost < 0.08
    assert study.recovered("rtn", "per_tensor") > 0.5
    assert study.recovered("rtn", "per_tensor", "block 1") > 0.2
    assert max(abs(study.recovered("rtn", "per_tensor", f"block {block}")) for block in (0, 3, 4, 5)) < 0.15
    assert abs(study.row("smoothquant", "per_tensor").loss - study.row("rtn", "per_tensor").loss) < 0.2 * lost
    assert len([one for one in projections(model) if one.block is not None]) == 42
    assert shares[0] == 0
    assert sum(share > 0.3 for share in shares[1:]) > len(shares) / 2
    assert abs(finer.row("rtn", "per_token").loss - study.full.loss) < 0.1 * lost
    assert abs(strong_study.full.loss - study.full.loss) < 0.01
    assert strong_study.row("rtn", "per_tensor").loss - strong_study.full.loss > 3 * lost
    strong_names = {f"model.layers.{block}.mlp.down_proj" for block in (strong.explosion_block, strong.decay_block)}
    assert set(strong_study.recommendation.spared) == strong_names
    assert strong_study.recommendation.within_budget
    assert strong_study.recovered("rtn", "per_tensor") > 0.85
    assert strong_study.recovered("smoothquant", "per_tensor") > 0.85
