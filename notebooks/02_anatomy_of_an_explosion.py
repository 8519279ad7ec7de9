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
# # Anatomy of an explosion
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sd-lens/sd-lens/blob/main/notebooks/02_anatomy_of_an_explosion.ipynb)
#
# A token's norm explodes in one block. Who writes it, down to the neurons? What sets it off? Which tokens could do the same, and what does attention make of them? This notebook follows one explosion from its size to its
# cause, with every split exact: the parts add up to what is measured.
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
import sd_lens
from sd_lens.display.figures import norm_heatmap, scan_pathways
from sd_lens.display.tokens import colored_tokens
from sd_lens.display.visuals import together

model = sd_lens.load(MODEL)
TEXT = "Once upon a time there was a small boat. Every morning it went out to sea,\nand every evening it came home."

# %% [markdown]
# ## 1. Norms: which token, in which block?
#
# `trace_norms` keeps one number per token and block, and measures the defect direction on the way.

# %%
trace = sd_lens.trace_norms(model, TEXT)
defects = sd_lens.find_defects(trace)
if not defects.found:
    raise ValueError(f"{MODEL} has no explosion in this text: {defects}")
block = defects.explosion_blocks[-1]
print(defects)

# %%
norm_heatmap(trace)

# %% [markdown]
# The same tokens in their text, coloured by the logarithm of their norm, both times on the same scale: before the explosion block, and after it.

# %%
scale = float(trace.ratios.max())
together(
    colored_tokens(trace, block=max(block - 1, 0), max_ratio=scale),
    colored_tokens(trace, block=block, max_ratio=scale),
    captions=[f"after block {max(block - 1, 0)}", f"after block {block}"],
)

# %% [markdown]
# **For `tiny`**: one token, `<s>`, and one block, 2. The block before has raised its norm to three times that of the others already; block 2 makes it more than twelve times. Full stops, the line break and the comma stay ordinary: this model has
# no delimiters that explode.
#
# ## 2. Direction: where does it point, and do the weights know?
#
# The *defect direction* is the mean of all high-norm vectors. It is the same after every later block if the angle between these vectors is small.

# %%
direction = defects.direction
print(f"{direction.n_vectors} vectors, {direction.mean_pairwise_angle_deg:.1f}° apart on average")

# %% [markdown]
# Every block, linearised, sends most of its output along its leading left singular vector. The table computes it for each block and each sublayer, from the weights alone, and compares it with the measured direction.

# %%
table = sd_lens.block_directions(model)
table.plot()

# %%
for part in ("attention", "ffn", "block"):
    row = table.row(block, part)
    print(f"block {block}, {part}: {row.angle_deg:.1f}° away; its largest singular value is {row.gap:.1f} times the second")

# %% [markdown]
# **For `tiny`**: the explosion block points at the defect direction, and it does so because its FFN does. The FFN's largest singular value also stands far out: whatever is in the right place of its input is sent there, strongly.
#
# ## 3. Attribution: who writes the norm?
#
# The stream is a sum of what embedding, heads and FFNs wrote, so that its projection on the defect direction splits over them exactly. FFNs split further over their neurons.

# %%
norm = sd_lens.attribute_norm(model, TEXT, neurons=True)
norm.plot()

# %%
norm.plot(inside=norm.block)

# %%
main = norm.main
print(f"projection after block {norm.block}: {float(norm.total[main]):.1f}; left unexplained: {float(norm.residual[main]):.1e}")
heads = sum(float(value) for part, value in zip(norm.components, norm.values[main], strict=True) if part.kind == "head")
print(f"all heads together: {heads / float(norm.total[main]):.1%}")
neurons = norm.top(4, inside=norm.block)
print(f"the first four neurons of its FFN, {', '.join(neurons.name)}: {neurons.share.sum():.0%} of the whole")

# %% [markdown]
# **For `tiny`**: the FFN of block 2 writes more than three quarters of the norm, the FFNs before it nearly all of the rest, attention less than a hundredth. Inside the FFN four of 344 neurons do it.
#
# ## 4. Trigger: what sets the FFN off?
#
# What an FFN answers to most is its leading *right* singular vector, the trigger. How much of it is in what the FFN reads is the *coefficient*; it splits over the same components.

# %%
trigger = sd_lens.attribute_trigger(model, TEXT, neurons=True)
trigger.plot()

# %%
values = {row.group: float(total) for row, total in zip(trigger.rows, trigger.total, strict=True)}
print("coefficients:", ", ".join(f"{group} tokens {value:.2f}" for group, value in values.items()))
print(f"the most there could be: {model.cfg.d_model**0.5:.1f}")
for part in trigger.top(2).itertuples():
    print(f"{part.name}: {part.share:.0%}", end="")
    if part.kind == "ffn":
        first = trigger.top(3, inside=int(part.block))
        print(" by", ", ".join(f"{neuron.name} ({neuron.share:.0%})" for neuron in first.itertuples()), end="")
    print()

# %% [markdown]
# **For `tiny`** it is a chain through the FFNs: a few neurons of block 0 recognise `<s>`, one neuron of block 1, L1N51, turns that into most of the trigger, and block 2 explodes. Other tokens stand on the other side of the
# trigger: their coefficients are negative on average.
#
# ## 5. Pathways: which tokens can do it?
#
# Every token id, put into one and the same place: alone at position 0, alone with attention switched off, and after another token. If an id explodes without attention, then by its own embedding and the FFNs.

# %%
scans = [sd_lens.scan_vocabulary(model, place) for place in ("initial", "no_attention", "second")]
scan_pathways(scans)

# %%
for scan in scans:
    exploding = scan.self_exploding()
    print(
        f"{scan.pathway}: {len(exploding)} of {int(scan.trained.sum())} ids explode {exploding.token.tolist()[:8]}; random embeddings: {scan.control_share:.1%}"
    )

# %%
tokens = sd_lens.token_pathways(model)
for sentence in tokens.sentences():
    print(sentence)

# %% [markdown]
# **For `tiny`**: of 1024 ids only `<s>` explodes, and it does so in every place, also without attention. So this is not "whatever comes first explodes", the pathway of initial tokens that large models show; it is the pathway that the
# paper finds for delimiters, taken by the one token that stood first in all of the training text.
#
# ## 6. Sinks: what does attention do with it?
#
# How much of its attention each head pays to high-norm tokens, and to position 0.

# %%
sinks = sd_lens.sink_attention(model)
sinks.plot()

# %%
strongest = sinks.top(1).iloc[0]
print(
    f"sink rate: {sinks.sink_rate:.0%} of heads; the strongest, L{int(strongest.block)}H{int(strongest['head'])}, pays {strongest.to_high:.0%}"
)
early = [f"L{b}H{h}" for b, h in sinks.sink_heads if b <= block]
print(f"sinks that read the stream before the FFN of block {block} has written: {', '.join(early) or 'none'}")

# %% [markdown]
# The patterns themselves, of the four heads that pay most to the first token of a short text. Run the cell and point at a small map to enlarge it.

# %%
sd_lens.head_patterns(model, "Once upon a time there was a small boat.", k=4).plot()

# %% [markdown]
# **For `tiny`**: about a quarter of the heads are sinks. Some of them are so before the norm has exploded, so that the sink does not wait for the large norm: what these heads look for in `<s>` is there earlier.
#
# ## In short

# %%
from sd_lens.anatomy import anatomy
from sd_lens.pathways import pathways

for sentence in (*anatomy(model, TEXT).sentences(), *pathways(model, TEXT).sentences()):
    print(sentence)

# %% [markdown]
# The next notebook, `03_patching_the_explosion_subspace`, takes the trigger away and looks at what the model loses.
#
# What is said of `tiny` above is checked here.

# %%
if MODEL == "tiny":
    assert ([token.token for token in defects.tokens], defects.explosion_blocks) == (["<s>"], (2,))
    assert 2 < float(trace.ratios[block, 0]) < 4 < 12 < float(trace.ratios[block + 1, 0]) < 13
    assert direction.mean_pairwise_angle_deg < 15
    assert table.row(2, "ffn").angle_deg < 10
    assert table.row(2, "ffn").gap > 3
    shares = {part.name: part.share for part in norm.top(3).itertuples()}
    assert 0.7 < shares["L2 FFN"] < 0.8 < 0.98 < sum(shares.values())
    assert abs(heads) < 0.01 * float(norm.total[main])
    assert neurons.share.sum() > 0.95 * shares["L2 FFN"]
    assert trigger.top(1, inside=1).name[0] == "L1N51"
    assert trigger.top(1, inside=1).share[0] > 0.5
    assert values["other"] < 0 < 8 < values["initial"]
    assert all(scan.self_exploding().token.tolist() == ["<s>"] for scan in scans)
    assert tokens.high().pathway.tolist() == ["self"]
    assert 0.2 < sinks.sink_rate < 0.3
    assert early
