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
# # Signatures and training
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sd-lens/sd-lens/blob/main/notebooks/05_signatures_and_training.ipynb)
#
# All high-norm tokens of a model point the same way. That direction comes about in training, by chance, and then hardly moves: it tells whose child a checkpoint is ([Wang, Zhang, Salzmann, ICML 2025](https://arxiv.org/abs/2502.07004), section 5). This notebook compares the
# signatures of four models, and then watches the direction of one of them come about.
#
# It runs on `tiny`, the small trained model that ships with sd_lens, and on its family: checkpoints of its training, a fine-tune of it, a model from another seed and a fine-tune of that. They are in the folder `training/family` of the repository, which is not part of the package;
# in Colab the next cell fetches the repository. What the text says of results is said of `tiny`.

# %%
import subprocess
import sys

if "google.colab" in sys.modules:
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", "https://github.com/sd-lens/sd-lens", "sd-lens"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "./sd-lens"], check=True)

# %% tags=["parameters"]
MODEL = "tiny"  # or a folder, a hub name, or a TransformerLens model you already have
RELATIVES = None  # what to compare it with: folders, hub names, models, saved signatures; None for the family of tiny
CHECKPOINTS = None  # its training, in order, such as ["EleutherAI/pythia-70m@step1000", ...]; None for that of tiny

# %%
import tempfile
from pathlib import Path

import sd_lens
from sd_lens.display.tokens import colored_tokens
from sd_lens.display.visuals import together

places = [Path("../training/family"), Path("training/family"), Path("sd-lens/training/family")]
FAMILY = next((place for place in places if place.is_dir()), None)
if FAMILY is None and None in (RELATIVES, CHECKPOINTS):
    raise FileNotFoundError(
        "the folder training/family is not here: git clone https://github.com/sd-lens/sd-lens, and run this notebook from there"
    )
model = sd_lens.load(MODEL)

# %% [markdown]
# ## 1. A signature
#
# The direction of a model's high-norm tokens on some built-in texts, or on your own (`prompts=`).

# %%
mine = sd_lens.signature(model)
print(mine.sentence())
mine

# %% [markdown]
# It is one vector with a few labels. Saved, it is two small files with a hash over both, so that a signature edited by hand is refused.

# %%
with tempfile.TemporaryDirectory() as folder:
    mine.save(f"{folder}/mine")
    print(*(f"{path.name}: {path.stat().st_size} bytes" for path in sorted(Path(folder).iterdir())), sep="\n")
    again = sd_lens.Signature.load(f"{folder}/mine")
print(again.content_hash)

# %% [markdown]
# ## 2. Whose child is a checkpoint?

# %%
relatives = [FAMILY / name for name in ("fine-tuned", "other-seed", "other-seed-fine-tuned")] if RELATIVES is None else RELATIVES
distances = sd_lens.signature_distances([mine, *relatives])
distances.plot()

# %%
for sentence in distances.sentences():
    print(sentence)
distances.to_dataframe()[["a", "b", "angle_deg", "verdict", "chance_mean_deg", "probability"]].round(1)

# %% [markdown]
# **For `tiny`**: a fine-tune on quite another kind of text is 7° from its base, and models from other seeds are as far apart as chance has it, though they were trained on the same text.
#
# The same from the weights alone. No model is run, or even loaded, so the checkpoints may be larger than memory:

# %%
by_weights = sd_lens.signature_distances([MODEL, *relatives], method="weights")
by_weights

# %%
both = sd_lens.signature_distances([mine, sd_lens.signature(MODEL, method="weights")])
print(both.pairs[0])

# %% [markdown]
# **For `tiny`**: both tell the same story. The two signatures of one model are 5° apart, since what the explosion block writes is not all that is in the tokens' residual vectors.
#
# ## 3. How the direction comes about
#
# One checkpoint after the other, one in memory at a time. The last one says which tokens have a high norm and after which blocks; the mean residual vector of the *same* tokens there is then followed through all checkpoints, so that there is an angle even where nothing has exploded yet.

# %%
checkpoints = [FAMILY, MODEL] if CHECKPOINTS is None else CHECKPOINTS  # a folder stands for the folders in it named after steps
stability = sd_lens.direction_stability(checkpoints)
stability.plot()

# %%
for sentence in stability.sentences():
    print(sentence)

# %%
stability.to_dataframe()[
    ["label", "found", "explosion_block", "max_ratio", "n_high", "n_same", "angle_to_last_deg", "others_angle_to_last_deg"]
].round(1)

# %% [markdown]
# **For `tiny`**: the explosion emerges between steps 375 and 500. But the direction does not come with it. It turns towards its last place all the time, from 66° at step 50, which is already nearer than chance (90° ± 5°), to 4° at step 1000.
#
# How much of that is the defect's own? The grey line is the control: the mean of all *other* tokens at the same blocks turns, too, as everything does in training. At first it is nearer to its end than the tokens followed; from step 750 on they are nearer to theirs. So the fall alone is nothing special; that it ends so near is.
#
# And before the explosion the angle is no angle of a defect. It is that of the ordinary residual vector of `<s>`, which sees only itself and so has the same vector in every text.
#
# Here is one text on the way, coloured by the norm of each token, relative to the others, after the block where the explosion is to be:

# %%
TEXT = "Once upon a time there was a small boat. Every morning it went out to sea."
block = stability.states[-1].explosion_block or 0


def trace_of(name):
    """Norms of the text in a folder's model, or a hub name's with a revision."""
    name, _, revision = str(name).partition("@")
    return sd_lens.trace_norms(sd_lens.load(name, **({"revision": revision} if revision else {})), TEXT)


shown = (
    [FAMILY / "step-00250", FAMILY / "step-00500", MODEL] if CHECKPOINTS is None else CHECKPOINTS[:: max(len(CHECKPOINTS) - 1, 1)]
)
traces = [trace_of(name) for name in shown]
scale = max(float(trace.ratios[1 + block].max()) for trace in traces)
together(
    *(colored_tokens(trace, block=block, max_ratio=scale) for trace in traces),
    captions=[Path(str(name)).name for name in shown],
)

# %% [markdown]
# ## 4. An explosion that passed
#
# At step 50 there is an explosion in the table that is gone at step 125. Which tokens are they?

# %%
first = stability.states[0]
print(f"{first.label}: {first.n_high} high-norm tokens; of those that have a high norm at the end {first.n_same} are among them")
early = sd_lens.find_defects(trace_of(FAMILY / first.label if CHECKPOINTS is None else CHECKPOINTS[0]))
early.to_dataframe().round(2)

# %% [markdown]
# **For `tiny`**: full stops, and not because they are large: all other tokens are still small. A ratio says that tokens stand out, and a threshold makes a step of what grows slowly; so look at the norms, too, and at whether an explosion *stays*. The emergence is where the last unbroken run of explosions of these tokens begins.
#
# **What was found**, for `tiny`: the direction is a matter of the seed, not of the data; training settles it gradually, before and after the norm passes any threshold; and the fine-tune moves it less (7°) than the last 500 steps of training did (11°).

# %% [markdown]
# What is said of `tiny` above is checked here.

# %%
if MODEL == "tiny":
    assert mine.block == 2
    assert again.content_hash == mine.content_hash
    if RELATIVES is None:
        for found in (distances, by_weights):
            assert [len(family) for family in found.families] == [2, 2]
            verdicts = [pair.verdict for pair in found.pairs]
            assert verdicts == ["same lineage", *["unrelated"] * 4, "same lineage"]
            assert all(pair.angle_deg > 80 for pair in found.pairs if pair.verdict == "unrelated")
        assert 5 < distances.pairs[0].angle_deg < 7.5
        assert all(pair.probability > 0.5 for pair in distances.pairs if pair.verdict == "unrelated")  # no nearer than chance
    assert 4 < both.pairs[0].angle_deg < 6
    if CHECKPOINTS is None:
        states = {state.name: state for state in stability.states}
        angles = [state.angle_to_last_deg for state in stability.states]
        assert stability.emergence is states["step 500"]
        assert not states["step 375"].found
        assert angles == sorted(angles, reverse=True)
        assert 60 < angles[0] < 70
        assert 3 < states["step 1000"].angle_to_last_deg < 5
        nearer = [state.name for state in stability.states[:-1] if state.angle_to_last_deg < state.others_angle_to_last_deg]
        assert nearer == ["step 750", "step 1000"]
        assert all(
            float(trace.ratios[:, 0].max()) == float(trace.ratios[1:].max()) for trace in traces[1:]
        )  # it is <s> that explodes
        assert first.found
        assert first.n_same == 0
        assert not stability.states[1].found
        assert {token.token for token in early.tokens} == {"."}
        assert max(token.norm for token in early.tokens) < 10 < float(traces[-1].reference[1 + block])
        if RELATIVES is None:
            assert distances.pairs[0].angle_deg < states["step 750"].angle_to_last_deg
