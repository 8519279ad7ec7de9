"""How scans run: no block too many, batches bounded, half precision."""

import pytest
import torch
import zoo
from streams import ragged

from sd_lens.models.loading import weights_of
from sd_lens.tracing.pathways import scan_vocabulary
from sd_lens.tracing.vocabulary_scan import PATHWAYS

IDS = torch.tensor([90, 3, 41])


def test_no_later_block_is_run_and_batches_are_bounded():
    model, ran = zoo.cached("llama"), []
    hooks = [(f"blocks.{b}.hook_resid_post", lambda x, hook, b=b: ran.append((b, tuple(x.shape[:2])))) for b in range(3)]
    with model.hooks(fwd_hooks=[*hooks, ("unembed.hook_out", lambda x, hook: pytest.fail("logits were computed"))]):
        scan_vocabulary(model, "second", block=1, control=20, batch_tokens=10, prompts=ragged(zoo.VOCAB, (5, 5)))
        assert {block for block, _ in ran} == {0, 1}
        assert max(batch * pos for _, (batch, pos) in ran) == 10
        ran.clear()
        scan_vocabulary(model, "initial", control=0, prompts=ragged(zoo.VOCAB, (5, 5)))


def test_an_id_whose_stream_overflows_is_named():
    model = zoo.build("gpt2", dtype=torch.float16)
    with torch.no_grad():
        model.W_E[50] = 6e4
        weights_of(model)[0].ffn.b_out[3] = 7e3
    prompts = torch.arange(3, 13).reshape(1, 10)
    assert scan_vocabulary(model, ids=[49, 51], block=0, prompts=prompts, control=0).norms.isfinite().all()
    with pytest.raises(ValueError, match=r"^model: its residual stream is NaN or infinite after block 0 \(id 50 at position 0\)"):
        scan_vocabulary(model, ids=[49, 50, 51], block=0, prompts=prompts, control=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    full, half = zoo.build("llama"), zoo.build("llama", dtype=dtype)
    for pathway in PATHWAYS:
        wanted, got = (scan_vocabulary(model, pathway, ids=IDS, block=1, control=0) for model in (full, half))
        assert got.norms.dtype == torch.float32
        assert got.coefficients.dtype == torch.float32
        torch.testing.assert_close(got.norms, wanted.norms, rtol=0.05, atol=0)
        torch.testing.assert_close(got.coefficients, wanted.coefficients, rtol=0.05, atol=0.1)
