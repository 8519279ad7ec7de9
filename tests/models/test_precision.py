"""A model run in another precision: against a copy all of whose weights were converted, to the bit."""

from __future__ import annotations

import pytest
import torch
import zoo

from sd_lens.models import precision
from sd_lens.models.precision import require_runnable, running_in

TOKENS = torch.arange(3, 15).unsqueeze(0)


def tensors(model):
    # Through the class: bridges give their parameters other names of their own.
    parts = [model, getattr(model, "original_model", model)]
    return {id(one): one for part in parts for one in [*torch.nn.Module.parameters(part), *torch.nn.Module.buffers(part)]}


def converted(family, dtype):
    """A new model whose parameters, and those buffers that stand for parameters, are of a dtype."""
    model = zoo.build(family)
    if family.startswith("hooked_"):
        return model.to(dtype, print_details=False)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.original_model.named_buffers():
        if name.endswith("bias") and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    model.cfg.dtype = dtype
    return model


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_to_the_bit_as_a_converted_model(family):
    model = zoo.build(family)
    before = {key: (one.data_ptr(), one.dtype) for key, one in tensors(model).items()}
    for dtype in (torch.bfloat16, torch.float16) if family in ("llama", "gpt2") else (torch.bfloat16,):
        with torch.no_grad(), running_in(model, dtype):
            got = model(TOKENS)
        assert got.dtype == dtype
        with torch.no_grad():
            assert torch.equal(got, converted(family, dtype)(TOKENS))
        assert model.cfg.dtype == torch.float32
        assert {key: (one.data_ptr(), one.dtype) for key, one in tensors(model).items()} == before


def test_one_block_at_a_time():
    model = zoo.build("llama")
    seen = []

    def look(value, hook):
        seen.append([next(block.parameters()).dtype for block in model.blocks])

    with torch.no_grad(), running_in(model, torch.float16):
        assert {next(block.parameters()).dtype for block in model.blocks} == {torch.float32}
        model.run_with_hooks(TOKENS, fwd_hooks=[(f"blocks.{block}.hook_resid_pre", look) for block in range(3)])
    wide, half = torch.float32, torch.float16
    assert seen == [[half, wide, wide], [wide, half, wide], [wide, wide, half]]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_the_weights_are_back(error):
    model = zoo.build("llama")
    before = {key: (one.data_ptr(), one.dtype) for key, one in tensors(model).items()}
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.blocks]

    def fail(value, hook):
        raise error

    with pytest.raises(error), torch.no_grad(), running_in(model, torch.bfloat16):
        model.run_with_hooks(TOKENS, fwd_hooks=[("blocks.1.hook_resid_post", fail)])
    assert {key: (one.data_ptr(), one.dtype) for key, one in tensors(model).items()} == before
    assert [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in model.blocks] == hooks
    assert model.cfg.dtype == torch.float32


def test_dtypes_are_checked(as_users_run_it, monkeypatch):
    model = zoo.cached("llama")
    assert require_runnable(model, ["float32", torch.bfloat16, "bfloat16"]) == [torch.float32, torch.bfloat16]
    for wrong, shown in (("int8", "'int8'"), (torch.float8_e4m3fn, "float8_e4m3fn"), (torch.int32, "int32"), (3, "3")):
        with pytest.raises(ValueError, match=rf"^dtypes: got {shown}; allowed: float64, float32"):
            require_runnable(model, [wrong])
    with pytest.raises(ValueError, match=r"^dtypes: got none"):
        require_runnable(model, [])

    def cannot(dtype, device):
        raise RuntimeError("\"addmm\" not implemented for 'Half'\nmore")

    monkeypatch.setattr(precision, "_try", cannot)
    with pytest.raises(
        ValueError, match=r"^dtypes: got float16, which cpu cannot run \(\"addmm\" not implemented for 'Half'\); allowed:"
    ):
        require_runnable(model, ["float16"])
