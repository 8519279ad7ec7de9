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
# # Patching the explosion subspace
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sd-lens/sd-lens/blob/main/notebooks/03_patching_the_explosion_subspace.ipynb)
#
# One direction in what one FFN reads sets a token's norm off. Is that so, causally? This notebook takes the direction out, puts it back, makes it stronger, and asks each time what changes, in an ordinary TransformerLens workflow and beside a control that does the same damage elsewhere.
#
# It runs on `tiny`, the small trained model that ships with sd_lens; what the text says of results is said of `tiny`. For another model, one with an explosion, change `MODEL`; pictures and printed numbers follow.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "git+https://github.com/sd-lens/sd-lens"], check=True)

# %% tags=["parameters"]
MODEL = "tiny"  # or a folder, a hub name, or a TransformerLens model you already have

# %%
import pandas as pd
import torch

import sd_lens
from sd_lens.display.tokens import colored_tokens
from sd_lens.display.visuals import together

model = sd_lens.load(MODEL)
TEXT = "Once upon a time there was a small boat. Every morning it went out to sea."
tokens = model.to_tokens(TEXT)

# %% [markdown]
# ## 1. The subspace
#
# `ExplosionSubspace.at` finds the explosion block and takes the leading singular vectors of its FFN's linear map: the *right* ones are what sets it off (the trigger side), the *left* ones are where it writes (the direction side).

# %%
defects = sd_lens.find_defects(sd_lens.trace_norms(model, TEXT))
if not defects.found:
    raise ValueError(f"{MODEL} has no explosion in this text: {defects}")
subspace = sd_lens.ExplosionSubspace.at(model, rank=2, defects=defects)
subspace

# %% [markdown]
# Does the real FFN, which is not linear, answer to that vector as its map does?

# %%
subspace.response_curve().plot()

# %%
print(subspace.response_curve().sentence())
print(subspace.probe_singular_vectors())

# %% [markdown]
# **For `tiny`**: it answers far more than the linear map says, with the square of what it is given, and to one sign only. That is a gated FFN: both of its branches grow. Among its singular vectors one stands alone.
#
# Which tokens have any of it?

# %%
subspace.coefficients(TEXT).plot()

# %% [markdown]
# **For `tiny`**: the first token has most of what there can be, and all others have none, or a little of the opposite.
#
# ## 2. Two lines in a workflow of your own
#
# An intervention is a list of hooks for `run_with_hooks`, or a context around any code that runs the model.

# %%
ablation = subspace.ablate(side="both", positions="initial")
with torch.no_grad():
    logits = model.run_with_hooks(tokens, fwd_hooks=ablation.fwd_hooks())
    print(f"the ablation moves the logits by up to {float((logits - model(tokens)).abs().max()):.1f}")

before = sd_lens.trace_norms(model, TEXT)
with ablation.attached():
    after = sd_lens.trace_norms(model, TEXT)

first = [[float(trace.ratios[1 + block, 0]) for block in range(model.cfg.n_layers)] for trace in (before, after)]
pd.DataFrame(first, index=["untouched", "ablated"]).rename_axis(
    columns="norm of the first token, times the others', after block"
).round(2)

# %%
scale = float(before.ratios.max())
together(
    colored_tokens(before, block=subspace.block, max_ratio=scale),
    colored_tokens(after, block=subspace.block, max_ratio=scale),
    captions=["untouched", "ablated"],
)

# %% [markdown]
# **For `tiny`**: what the explosion block would have made is gone. The block before it is untouched, so its smaller rise is still there; taking out the trigger of both blocks removes that as well:

# %%
earlier = (
    sd_lens.ExplosionSubspace.at(model, max(subspace.block - 1, 0)).ablate()
    + sd_lens.ExplosionSubspace.at(model, subspace.block).ablate()
)
with earlier.attached():
    print(f"largest ratio of the first token: {float(sd_lens.trace_norms(model, TEXT).ratios[1:, 0].max()):.2f}")

# %% [markdown]
# ## 3. Is it the subspace, or is it the damage?
#
# Any change to a stream does something. The control moves the same tokens by the same length, along random directions that have none of the subspace.

# %%
found = sd_lens.consequences(
    model, rank=2, sides=("trigger", "both"), where=("initial", "everywhere"), controls=10, generate=["Once upon a time"]
)
columns = ["intervention", "side", "where", "loss", "kl", "peak_ratio", "sink_rate", "sink_attention"]
found.to_dataframe()[columns].round(3)

# %%
found.plot()

# %%
for sentence in found.sentences():
    print(sentence)

# %% [markdown]
# **For `tiny`**: the norm goes, and only with the subspace. The loss hardly notices when the trigger alone is taken out; taking the direction out of the stream costs about as much as a random change of that size. And attention does not follow the norm: with the trigger gone the sink heads look at the first token *more*;
# with the direction gone less, as they do under the control. In this model the sink is not made by the norm of block 2.
#
# What it writes then:

# %%
found.texts

# %% [markdown]
# A sink head's attention, before and after:

# %%
head = sd_lens.sink_attention(model, TEXT).top(1).iloc[0]
heads = [(int(head.block), int(head["head"]))]
untouched = sd_lens.head_patterns(model, TEXT, heads)
with ablation.attached():
    ablated = sd_lens.head_patterns(model, TEXT, heads)
together(untouched.plot(), ablated.plot(), captions=["untouched", "ablated"])

# %% [markdown]
# ## 4. Where does the information enter? A sweep
#
# A clean prompt, and the same with its first token replaced, which does not explode. Run the corrupted one, and give it one thing of the clean one: the component in the subspace, in one block, at one position.

# %%
clean = tokens
corrupted = clean.clone()
corrupted[:, 0] = corrupted[:, 1]
sweep = sd_lens.patch_sweep(model, clean, corrupted, controls=3)
sweep.plot()

# %%
sweep.top(4)

# %% [markdown]
# **For `tiny`**: one number at one position, the coefficient that the FFN of block 2 reads at the first token, brings back three quarters of the norm, and what the FFN of block 1 reads there an eighth. No other position does anything, and neither do random directions.
#
# The same in the stream: how far does the written direction bring back the predictions? The metric is now the KL divergence of the clean run's predictions to the patched run's.

# %%
predictions = sd_lens.patch_sweep(model, clean, corrupted, side="direction", metric="kl", controls=3)
predictions.plot()

# %%
predictions.to_dataframe().query("position == 0")[["block", "value", "recovered", "control", "control_std"]].round(3)

# %% [markdown]
# **For `tiny`**: a first token that is not `<s>`, but has the direction from block 1 or 2 on, makes the model predict nearly what it would after `<s>`: four fifths of the divergence are gone, and a random displacement of that length undoes at most a quarter. In later blocks it comes too late: the heads that read it have read already.
#
# ## 5. The dose
#
# Steering multiplies the coefficient. By 1 it is the identity; by less, the norm falls with the square.

# %%
doses = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25]
rows = []
for dose in doses:
    with subspace.steer(dose, positions="initial").attached():
        trace = sd_lens.trace_norms(model, TEXT)
        with torch.no_grad():
            loss = float(model(tokens, return_type="loss"))
    rows.append({"dose": dose, "norm after the block": float(trace.norms[1 + subspace.block, 0]), "loss": loss})
pd.DataFrame(rows).round(3)

# %% [markdown]
# Gradients flow through every intervention. So the loss can be asked what it would like the coefficient to be, where it is and where the trigger has been taken out:

# %%
there = subspace.coefficients(TEXT).values[0]
for name, coefficients in (("as it is", there), ("taken out", torch.zeros_like(there))):
    target = coefficients.clone().requires_grad_()
    steered = subspace.steer(target=target, positions="initial")
    loss = model.run_with_hooks(tokens, fwd_hooks=steered.fwd_hooks(), return_type="loss")
    (slope,) = torch.autograd.grad(loss, target)
    print(f"{name}: c = {float(target[0]):.2f}, loss {float(loss):.4f}, slope {float(slope[0]):+.4f} nats per unit of c")

# %% [markdown]
# **What was found**, for `tiny`: one vector in what one FFN reads causes the explosion, and what it writes can be taken out of the stream with it. Nothing is left behind: after each cell the model has the hooks and weights that it had before.

# %% [markdown]
# What is said of `tiny` above is checked here.

# %%
if MODEL == "tiny":
    assert subspace.block == 2
    assert subspace.response_curve().exponent > 1.9
    assert subspace.response_curve().asymmetry > 100
    assert subspace.probe_singular_vectors().spike > 10
    assert max(first[0]) > 10
    assert max(first[1][2:]) < 1.5
    table = found.to_dataframe().set_index(["intervention", "side", "where"])
    untouched_row = table.loc["none"].iloc[0]
    gone, random = table.loc[("ablate", "trigger", "initial")], table.loc[("random control", "trigger", "initial")]
    assert abs(gone.loss - untouched_row.loss) < 0.01
    assert gone.sink_attention > untouched_row.sink_attention
    assert random.peak_ratio > 0.8 * untouched_row.peak_ratio
    written, random = table.loc[("ablate", "both", "initial")], table.loc[("random control", "both", "initial")]
    assert max(random.sink_attention, written.sink_attention) < untouched_row.sink_attention
    assert [(int(row.block), int(row.position)) for row in sweep.top(2).itertuples()] == [(2, 0), (1, 0)]
    assert 0.7 < sweep.top(1).recovered.item() < 0.8
    assert predictions.to_dataframe().query("position == 0").recovered.max() > 0.8
