"""Which tokens an intervention means: exactly these are edited, whatever the batch looks like."""

from __future__ import annotations

import editing
import pytest
import torch
import zoo
from recording import record
from tokenizer import tiny_tokenizer, with_tokenizer

from sd_lens.interventions.positions import ids_of
from sd_lens.models.loading import weights_of

BLOCK = 1
NAMES = [f"blocks.{BLOCK}.hook_{name}" for name in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
TOKENS = torch.tensor([[7, 8, 7, 9, 10, 8], [8, 11, 12, 7, 9, 9]])
DELIMITERS = (8, 9)
MASK = torch.tensor([[False, True, True, False, False, False], [True, False, False, False, False, True]])

MEANT = {
    "all": ("all", torch.ones(2, 6, dtype=torch.bool)),
    "initial": ("initial", torch.tensor([[1, 0, 0, 0, 0, 0]] * 2).bool()),
    "delimiters": ("delimiters", torch.tensor([[0, 1, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1]]).bool()),
    "a mask": (MASK, MASK),
    "a mask of one row": (MASK[1:], MASK[1:].expand(2, 6)),
    "a shorter mask": (MASK[:, :2], MASK & (torch.arange(6) < 2)),
    "a longer mask": (torch.cat([MASK, MASK], dim=1), MASK),
    "a list": ([4, 0, 99], torch.tensor([[1, 0, 0, 0, 1, 0]] * 2).bool()),
}


def edited_at(model, tokens, positions, meant):
    """Whether exactly the tokens in ``meant`` are edited, on either side, and as they should be."""
    subspace, weights = editing.random_subspace(model, BLOCK, delimiters=DELIMITERS), weights_of(model)[BLOCK]
    before = record(model, tokens, NAMES)
    x = editing.normalised_stream(weights, before)
    wanted = {
        "trigger": (NAMES[2], editing.answer(weights, editing.without(subspace.right, x))),
        "direction": (NAMES[3], editing.without(subspace.left, before[NAMES[3]])),
    }
    for side, (name, changed) in wanted.items():
        with subspace.ablate(side=side, positions=positions).attached():
            after = record(model, tokens, [name])[name]
        assert torch.equal(after[~meant], before[name][~meant])
        torch.testing.assert_close(after[meant], changed[meant], rtol=1e-5, atol=1e-5)
        assert ((after - before[name]).abs().amax(-1) > 1e-4).tolist() == meant.tolist()


@pytest.mark.parametrize("which", MEANT)
@pytest.mark.parametrize(
    "family",
    [name for name in ("llama", "gpt2", "bloom", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES],
)
def test_exactly_the_tokens_meant_are_edited(family, which):
    edited_at(zoo.cached(family), TOKENS, *MEANT[which])


def reader(family):
    """A model with a tokenizer whose padding id is no BOS."""
    if zoo.FAMILIES[family].generation == "bridge":
        return with_tokenizer(family)
    model = zoo.build(family)
    model.set_tokenizer(tiny_tokenizer())
    return model


READERS = [name for name in ("llama", "gpt2", "hooked_llama", "hooked_gpt2") if name in zoo.FAMILIES]


@pytest.mark.parametrize("family", READERS)
def test_padding_on_the_left_is_not_first(family):
    model = reader(family)
    pad = zoo.PAD
    left = torch.tensor([[7, 8, 9, 10, 8], [pad, pad, 8, 9, 7], [pad, pad, pad, pad, 8], [pad] * 5])
    first = torch.zeros(4, 5, dtype=torch.bool)
    first[0, 0] = first[1, 2] = first[2, 4] = True
    edited_at(model, left, "initial", first)
    later = torch.zeros(4, 5, dtype=torch.bool)
    later[0, [1, 2, 4]] = later[1, 3] = True  # an 8 that begins its prompt is none
    edited_at(model, left, "delimiters", later)


@pytest.mark.parametrize("family", READERS)
def test_padding_on_the_right_changes_nothing(family):
    model = reader(family)
    right = torch.tensor([[7, 8, 9, 10, 8], [8, 9, 7, zoo.PAD, zoo.PAD]])
    first = torch.zeros(2, 5, dtype=torch.bool)
    first[:, 0] = True
    edited_at(model, right, "initial", first)
    subspace = editing.random_subspace(model, BLOCK, delimiters=DELIMITERS)
    for positions in ("initial", "delimiters", "all"):
        with torch.no_grad(), subspace.ablate(side="both", positions=positions).attached():
            together, alone = model(right), model(right[1:, :3])
        torch.testing.assert_close(together[1:, :3], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<bos>"])
def test_texts_padded_on_the_left(pad):
    """As a model pads them itself, with the mask that belongs to it: the same as one by one; also where the padding is BOS, as GPT-2's is."""
    model = with_tokenizer("llama")
    model.tokenizer.pad_token = pad
    texts = ["abcdef", "bcd", "b"]
    comma = model.to_tokens("b", prepend_bos=False)[0].tolist()
    subspace = editing.random_subspace(model, BLOCK, delimiters=tuple(comma))
    for positions in ("initial", "delimiters"):
        with torch.no_grad(), subspace.ablate(side="both", positions=positions).attached():
            together = model(texts, padding_side="left")
            for row, text in enumerate(texts):
                alone = model(text)[0]
                torch.testing.assert_close(together[row, -len(alone) :], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pad", ["<pad>", "<bos>"])
def test_a_source_is_laid_on_prompts_wherever_they_begin(pad):
    """Patching from the same texts changes nothing, padded on the right or on the left; and from others it is as one by one."""
    model = with_tokenizer("llama")
    model.tokenizer.pad_token = pad
    texts, others = ["abcdef", "bcde", "cd"], ["fedcba", "edcb", "ba"]
    subspace = editing.random_subspace(model, BLOCK)
    with torch.no_grad():
        for padding_side in ("right", "left"):
            plain = model(texts, padding_side=padding_side)
            with subspace.patch(texts, side="both").attached():
                torch.testing.assert_close(model(texts, padding_side=padding_side), plain, rtol=1e-5, atol=1e-5)
            with subspace.patch(others, side="both").attached():
                together = model(texts, padding_side=padding_side)
            for row, (text, other) in enumerate(zip(texts, others, strict=True)):
                with subspace.patch(other, side="both").attached():
                    alone = model(text)[0]
                shown = together[row, -len(alone) :] if padding_side == "left" else together[row, : len(alone)]
                torch.testing.assert_close(shown, alone, rtol=1e-4, atol=1e-5)
                assert float((alone - model(text)[0]).abs().max()) > 1e-3


def test_a_prompt_may_begin_with_several_of_the_id_that_it_is_padded_with():
    """No attention mask hides them, so they are the prompt's own."""
    model = with_tokenizer("llama")
    model.tokenizer.pad_token = "<bos>"
    tokens = torch.tensor([[0, 7, 8], [0, 0, 8]])
    first = torch.zeros(2, 3, dtype=torch.bool)
    first[:, 0] = True
    edited_at(model, tokens, "initial", first)


@pytest.mark.parametrize("positions", [MASK, [0]], ids=["mask", "list"])
def test_a_mask_of_other_rows_is_refused_in_the_run(positions):
    model = zoo.cached("llama")
    ablate = editing.random_subspace(model, BLOCK).ablate(positions=positions)
    with torch.no_grad():
        if isinstance(positions, list):
            model.run_with_hooks(TOKENS[:1], fwd_hooks=ablate.fwd_hooks())
        else:
            with pytest.raises(ValueError, match=r"positions: got a mask of 2 rows; allowed: the run's 1, or 1 for all of them"):
                model.run_with_hooks(TOKENS[:1], fwd_hooks=ablate.fwd_hooks())
        assert torch.equal(model(TOKENS), model(TOKENS))


def test_ids_are_distinct_and_sorted():
    assert ids_of([5, 3, 5]) == ids_of(torch.tensor([3, 5, 3])) == (3, 5)
