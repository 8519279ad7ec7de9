"""How much of a subspace is in every token: against products with what hooks show."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record
from streams import ragged
from tokenizer import with_tokenizer

from sd_lens.models.loading import load, weights_of
from sd_lens.tracing.source import source_of

BLOCK = 1
NAMES = [f"blocks.{BLOCK}.hook_{name}" for name in ("resid_pre", "attn_out", "resid_post")]


def by_hand(subspace, prompt, side):
    """Of one prompt by itself."""
    seen = record(subspace.model, prompt.unsqueeze(0), NAMES)
    if side == "direction":
        return (seen[NAMES[2]] @ subspace.left)[0]
    return (editing.normalised_stream(weights_of(subspace.model)[BLOCK], seen) @ subspace.right)[0]


@pytest.mark.parametrize(
    "family",
    [
        name
        for name in ("llama", "gpt2", "gpt_neox_parallel", "phi", "gemma2", "olmo2", "qwen2_moe", "hooked_olmo2")
        if name in zoo.FAMILIES
    ],
)
def test_of_every_token(family):
    model = zoo.cached(family)
    subspace, prompts = editing.random_subspace(model, BLOCK), ragged(zoo.VOCAB, (4, 6, 2))
    for side in ("trigger", "direction"):
        found = subspace.coefficients(prompts, side=side, batch_tokens=9)
        wanted = torch.cat([by_hand(subspace, prompt, side) for prompt in prompts])
        torch.testing.assert_close(found.values, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.tokens, torch.cat(prompts))
    assert found.prompt.tolist() == [0] * 4 + [1] * 6 + [2] * 2
    assert found.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]


@pytest.mark.parametrize("family", [name for name in ("llama", "gpt_neox_parallel", "hooked_gpt2") if name in zoo.FAMILIES])
def test_from_a_cache_or_a_source_as_from_prompts(family):
    model = zoo.cached(family)
    subspace, tokens = editing.random_subspace(model, BLOCK), zoo.tokens(model, 2, 5)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    for side in ("trigger", "direction"):
        wanted = subspace.coefficients([tokens[0], tokens[1, :3]], side=side)
        for found in (
            subspace.coefficients(tokens, cache=cache, mask=mask, side=side),
            subspace.coefficients(source_of(model, [tokens[0], tokens[1, :3]], may_need=()), side=side),
        ):
            torch.testing.assert_close(found.values, wanted.values, rtol=1e-5, atol=1e-5)
            assert torch.equal(found.tokens, wanted.tokens)
    with torch.no_grad():
        _, small = model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_pre")
    with pytest.raises(ValueError, match=r"cache: .*blocks\.1\.hook_resid_pre"):
        subspace.coefficients(tokens, cache=small)


def test_half_precision_is_read_and_float32_computed():
    model = zoo.build("llama", dtype=torch.bfloat16)
    subspace, prompts = editing.random_subspace(model, BLOCK), ragged(zoo.VOCAB, (4, 6))
    found = subspace.coefficients(prompts)
    assert found.values.dtype == torch.float32
    # In one batch, of which the longer prompt is the first row.
    padded = torch.nn.utils.rnn.pad_sequence(prompts[::-1], batch_first=True)
    x = editing.normalised_stream(weights_of(model)[BLOCK], record(model, padded, NAMES))
    wanted = torch.cat([x[1, :4], x[0]]) @ subspace.right
    torch.testing.assert_close(found.values, wanted, rtol=2e-2, atol=2e-2)


def test_as_a_table():
    model = with_tokenizer("llama")
    subspace = editing.random_subspace(model, BLOCK)
    found = subspace.coefficients(["ab", "c"])
    frame = found.to_dataframe()
    assert frame.columns.tolist() == ["prompt", "pos", "token", "id", "c0", "c1"]
    assert frame.token.tolist() == ["<bos>", "a", "b", "<bos>", "c"]
    assert frame.id.tolist() == torch.cat([model.to_tokens(text)[0] for text in ("ab", "c")]).tolist()
    assert torch.equal(torch.tensor(frame[["c0", "c1"]].to_numpy()), found.values)
    top = found.top(2)
    assert top.c0.abs().tolist() == sorted(found.values[:, 0].abs().tolist(), reverse=True)[:2]
    best = top.iloc[0]
    assert repr(found) == (
        f"Coefficients(model, trigger of block 1: 5 tokens, largest {best.c0:.3g} at {best.token!r}, position {best.pos})"
    ).replace("(model", f"({found.model_name}")
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        found.top(0)


def test_of_the_shipped_model():
    """As docs/tiny.md tells: BOS has 8.7 of the trigger."""
    from sd_lens.interventions.subspace import ExplosionSubspace

    found = ExplosionSubspace.at(load("tiny"), 2).coefficients()
    best = found.top(1).iloc[0]
    assert (best.token, best.pos) == ("<s>", 0)
    assert best.c0 == pytest.approx(8.72, abs=0.01)
