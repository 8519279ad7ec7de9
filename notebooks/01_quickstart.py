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
# # Find the defects of a model in ten lines
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sd-lens/sd-lens/blob/main/notebooks/01_quickstart.ipynb)
#
# In trained language models the first token, and some delimiters, suddenly get a huge residual norm in one early block and keep it over most of the model: "massive activations", "attention
# sinks", *singular defects*. This notebook finds these tokens in a model, the block and the sublayer that make them, and the direction they all point to
# ([Wang, Zhang, Salzmann, ICML 2025](https://arxiv.org/abs/2502.07004)).
#
# It runs on `tiny`, the small trained model that ships with sd_lens, in seconds on a CPU, and what it says of the results is said of `tiny`. For another model change `MODEL`; the pictures and numbers follow.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "git+https://github.com/sd-lens/sd-lens"], check=True)

# %% tags=["parameters"]
MODEL = "tiny"  # or a folder, a hub name, or a TransformerLens model you already have

# %% [markdown]
# ## The ten lines

# %%
import sd_lens

model = sd_lens.load(MODEL)
prompts = [
    "The cat sat on the mat.\nIt purred.",
    "Water boils at a lower temperature in the mountains, because the air pressure is lower there.",
    "def area(width, height):\n    return width * height\n",
]
trace = sd_lens.trace_norms(model, prompts)
defects = sd_lens.find_defects(trace)
sublayers = sd_lens.attribute_sublayers(model, defects)
table = sd_lens.block_directions(model)

# %%
print(defects)
print(sublayers)
print(table)

# %% [markdown]
# That is the whole finding: which tokens explode, in which block, that its FFN writes the norm (for `tiny`), and how far the block's leading singular vector, which is known from the weights alone, lies from the direction
# that the exploded tokens point to. The rest of the notebook looks at each of them.
#
# ## Which tokens?
#
# A token counts as high-norm where its norm is at least six times the median of the others after the same block.

# %%
defects.to_dataframe()

# %% [markdown]
# The first prompt's tokens, coloured by the logarithm of their norm after the block at which it stands out most. White is the median of the other tokens.

# %%
from sd_lens.display.tokens import colored_tokens

colored_tokens(trace, prompt=0)

# %% [markdown]
# For `tiny` it is the BOS token `<s>` of every prompt, and no other.
#
# ## Where does the norm come from, and does it go again?

# %%
trace.plot(prompt=0)

# %% [markdown]
# For `tiny` the norm of `<s>` grows before, jumps in block 2, and stays until the end: there is an explosion block and no decay block. Many larger models have a decay block near the end as well.
#
# ## Is it attention or the FFN?
#
# The projection on the defect direction splits exactly into the stream before the block, what attention adds and what the FFN adds.

# %%
from sd_lens.display.figures import sublayer_bars

sublayer_bars(sublayers)

# %%
for share in sublayers.shares:
    print(f"block {share.block}: the {share.main_part} writes it; the FFN has {share.ffn_share:.0%} of the step")

# %% [markdown]
# ## Do the weights know?
#
# Each block, linearised, has a leading left singular vector: where it sends most. Below is its angle to the measured direction of the high-norm tokens; 90° is unrelated.

# %%
table.plot()

# %%
print(table.sentence())

# %% [markdown]
# For `tiny` the explosion block is the one that points there, and its FFN alone does so more closely still. No activation was needed to compute the maps.
#
# ## What do heads do with such a token?
#
# Attention patterns of the heads that pay most to the first token, the strongest first: queries ("destination") from the top down, keys ("source") from left to right. Run the cell and point at a small map to
# enlarge it.

# %%

sd_lens.head_patterns(model, prompts[0], k=4).plot()

# %% [markdown]
# For `tiny` these heads are attention sinks: most queries pay more than half of their attention to the exploded token.
#
# ## What to do with it
#
# High-norm tokens spoil means, PCA and the training of sparse autoencoders. The mask says which to leave out.

# %%
mask = defects.mask()
print(f"{int(mask.sum())} of {len(trace.tokens)} tokens masked")

# %% [markdown]
# `sd_lens.report(model, prompts, "report.html")` puts all of this, and more, on one page. The next notebook, `02_anatomy_of_an_explosion`, follows the explosion back to single neurons.

# %% [markdown]
# What is said of `tiny` above is checked here.

# %%
if MODEL == "tiny":
    assert {(token.pos, token.token) for token in defects.tokens} == {(0, "<s>")}
    assert len(defects.tokens) == len(prompts)
    assert (defects.explosion_blocks, defects.decay_blocks) == ((2,), ())
    assert [share.main_part for share in sublayers.shares] == ["ffn"]
    assert min(range(6), key=lambda block: table.row(block).angle_deg) == 2
    assert table.row(2, "ffn").angle_deg < table.row(2).angle_deg
    shown = sd_lens.head_patterns(model, prompts[0], k=4).patterns
    assert (shown[:, 2:, 0] > 0.5).float().mean() > 0.5
