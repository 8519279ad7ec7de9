"""Gaussians as inputs of the fit: what is one, its root, its file."""

import pytest
import torch

from sd_lens.linear.inputs import GaussianInput, root


def test_saved_and_loaded(tmp_path):
    for cov in (torch.rand(4), torch.eye(4)):
        before = GaussianInput(torch.randn(4), cov, 17)
        before.save(tmp_path / "inputs.safetensors")
        after = GaussianInput.load(tmp_path / "inputs.safetensors")
        assert torch.equal(before.mean, after.mean)
        assert torch.equal(before.cov, after.cov)
        assert after.n_tokens == 17


def test_another_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"mean": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds something else; allowed: sd_lens"):
        GaussianInput.load(tmp_path / "other.safetensors")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"path: .*junk cannot be read"):
        GaussianInput.load(tmp_path / "junk")


def test_repr():
    assert (
        repr(GaussianInput(torch.zeros(3), torch.eye(3), 12)) == "GaussianInput(d_model=3, full covariance, measured on 12 tokens)"
    )


@pytest.mark.parametrize(
    ("mean", "cov", "reason"),
    [
        (torch.zeros(3), torch.ones(4), r"cov: got shape \(4,\); allowed: \(3,\) or \(3, 3\)"),
        (torch.zeros(3), torch.ones(3, 4), r"cov: got shape \(3, 4\); allowed"),
        (torch.zeros(3), -torch.ones(3), r"cov: got a negative variance \(-1\)"),
        (torch.zeros(3), torch.full((3,), float("nan")), "cov: got NaN"),
        (torch.full((3,), float("inf")), torch.ones(3), "mean: got NaN or infinite"),
        (torch.zeros(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "cov: got a matrix with negative eigenvalues"),
        ([0.0], torch.ones(1), "mean: got list"),
        (torch.zeros(1), torch.tensor(1.0), "cov: got Tensor; allowed: a tensor of floating-point numbers with at least one axis"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "cov: got a matrix that is not symmetric"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_gaussian_is_refused(mean, cov, reason):
    with pytest.raises(ValueError, match=f"^{reason}"):
        GaussianInput(mean, cov)


def test_the_root_of_a_covariance_leaves_out_what_is_rounding():
    factor = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        cov = factor.to(dtype) @ factor.to(dtype).T
        found = root(GaussianInput(torch.zeros(20, dtype=dtype), cov))
        torch.testing.assert_close(found.root @ found.root, cov, rtol=1e-4, atol=1e-4)
        assert int(torch.linalg.matrix_rank(found.inverse.double(), rtol=1e-3)) == 3
        projection = found.root @ found.inverse
        torch.testing.assert_close(projection @ factor.to(dtype), factor.to(dtype), rtol=1e-3, atol=1e-3)
