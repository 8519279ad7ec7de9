import pytest
import torch
import zoo
from recording import record
from torch.utils._python_dispatch import TorchDispatchMode

from sd_lens.models import embeddings
from sd_lens.models.embeddings import embedding_norms, in_place_of_embedding, joining_norm, trained_ids


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norms_of_the_rows_and_of_what_joins_the_stream(family, monkeypatch):
    model = zoo.cached(family)
    wanted = model.W_E.detach().double().norm(dim=-1)
    ids = torch.tensor([100, 3, 3, 0])
    for numbers in (2**22, 7 * zoo.D_MODEL, 1):
        monkeypatch.setattr(embeddings, "_CHUNK", numbers)
        torch.testing.assert_close(embedding_norms(model).double(), wanted, rtol=1e-6, atol=0)
        torch.testing.assert_close(embedding_norms(model, ids).double(), wanted[ids], rtol=1e-6, atol=0)
    names = ["blocks.0.hook_resid_pre", *(["hook_pos_embed"] if "hook_pos_embed" in model.hook_dict else [])]
    seen = record(model, torch.arange(zoo.VOCAB)[:, None], names)
    joining = seen["blocks.0.hook_resid_pre"] - seen.get("hook_pos_embed", torch.zeros(()))
    for batch_tokens in (4096, 60):
        mean = joining_norm(model, torch.arange(zoo.VOCAB), batch_tokens=batch_tokens)
        assert mean == pytest.approx(float(joining.double().norm(dim=-1).mean()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norms_whose_squares_half_precision_cannot_hold(dtype):
    model = zoo.build("llama")
    with torch.no_grad():
        model.W_E.mul_(2000.0)
    wanted = model.W_E.detach().double().norm(dim=-1)
    assert wanted.min() > 1000
    model.to(dtype)
    norms = embedding_norms(model)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms.double(), wanted, rtol=1e-2, atol=0)


class Largest(TorchDispatchMode):
    """How many numbers the largest new tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and func is not torch.ops.aten.detach.default:
            self.numbers = max(self.numbers, out.numel())
        return out


def test_no_tensor_is_as_large_as_the_matrix(monkeypatch):
    model = zoo.cached("llama")
    monkeypatch.setattr(embeddings, "_CHUNK", 10 * zoo.D_MODEL)
    with Largest() as made:
        embedding_norms(model)
    assert made.numbers == 10 * zoo.D_MODEL


def test_a_bad_embedding_is_named():
    model = zoo.build("llama")
    with torch.no_grad():
        model.W_E[17, 3] = float("nan")
    with pytest.raises(ValueError, match=r"^model: the embedding of id 17 is NaN or infinite; allowed: finite weights"):
        embedding_norms(model)
    assert len(embedding_norms(model, torch.tensor([16, 18]))) == 2
    with pytest.raises(ValueError, match="of id 17 is NaN"):
        embedding_norms(model, torch.tensor([16, 17]))


def test_untrained_is_up_to_a_tenth_of_the_mean():
    assert trained_ids(torch.tensor([19.0, 1.0])).tolist() == [True, False]
    assert trained_ids(torch.tensor([19.0, 1.0, 1.01])).tolist() == [True, True, True]
    assert not trained_ids(torch.zeros(3)).any()


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_other_vectors_take_the_last_embeddings_place_and_nothing_elses(family):
    model = zoo.cached(family)
    tokens = zoo.tokens(model, 3, 4)
    vectors = torch.randn(3, zoo.D_MODEL, generator=torch.Generator().manual_seed(0))
    names = ["blocks.0.hook_resid_pre", "hook_embed", *(["hook_pos_embed"] if "hook_pos_embed" in model.hook_dict else [])]
    before = record(model, tokens, names)
    kept = []
    reading = ("blocks.0.hook_resid_pre", lambda stream, hook: kept.append(stream.clone()))
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[*in_place_of_embedding(vectors), reading])
    wanted = before["blocks.0.hook_resid_pre"].clone()
    wanted[:, -1] = vectors
    if "hook_pos_embed" in before:
        wanted[:, -1] += before["hook_pos_embed"].expand_as(wanted)[:, -1]
    torch.testing.assert_close(kept[0], wanted, rtol=0, atol=1e-6)
    # The very embeddings that were there change nothing.
    same = in_place_of_embedding(before["hook_embed"][:, -1])
    with torch.no_grad():
        torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=same), model(tokens), rtol=1e-4, atol=1e-5)
