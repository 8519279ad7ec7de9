import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sd_lens.models.batches import batches, equally_long


def numbered(lengths):
    """Prompts whose ids count through all tokens, from 1: an id is 1 + its token's place among all tokens."""
    ids = iter(range(1, 1 + sum(lengths)))
    return [torch.tensor([next(ids) for _ in range(length)]) for length in lengths]


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20), batch_tokens=st.integers(1, 40))
def test_every_token_is_run_once_among_its_own_prompt(lengths, batch_tokens):
    prompts, seen = numbered(lengths), []
    made = batches(prompts, batch_tokens=batch_tokens)
    for batch in made:
        assert batch.tokens.numel() <= batch_tokens or len(batch.tokens) == 1
        for tokens, mask, flat in zip(batch.tokens, batch.mask, batch.flat, strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [True] * length + [False] * (len(mask) - length)
            prompt = tokens[:length].tolist()
            assert prompt in [own.tolist() for own in prompts]
            assert (flat[:length] + 1).tolist() == prompt
            seen += prompt
            assert ((tokens[length:] == 0) & (flat[length:] == 0)).all()
        assert batch.mask.any(0).all()  # no column of padding alone
    assert sorted(seen) == list(range(1, 1 + sum(lengths)))
    widths = [batch.tokens.shape[1] for batch in made]
    assert widths == sorted(widths, reverse=True)
    shortest = [int(batch.mask.sum(1).min()) for batch in made]
    assert all(a >= b for a, b in zip(shortest, widths[1:], strict=False))  # sorted by length: the padding is small


def test_a_batch_is_filled_and_a_long_prompt_stands_alone():
    made = batches(numbered([3, 9, 2, 3, 1]), batch_tokens=6)
    assert [batch.mask.sum(1).tolist() for batch in made] == [[9], [3, 3], [2, 1]]
    assert made[1].flat.tolist() == [[0, 1, 2], [14, 15, 16]]


@pytest.mark.parametrize("batch_tokens", [0, -1])
def test_a_batch_holds_at_least_one_token(batch_tokens):
    with pytest.raises(ValueError, match=f"^batch_tokens: got {batch_tokens}; allowed: at least 1"):
        batches(numbered([3]), batch_tokens=batch_tokens)


def test_batches_of_equally_long_prompts_are_views_in_order():
    sequences = torch.arange(22).reshape(11, 2)
    for batch_tokens, rows in ((100, 11), (22, 11), (9, 4), (2, 1), (1, 1)):
        work = equally_long(sequences, batch_tokens=batch_tokens)
        assert max(len(batch.tokens) for batch in work) == rows
        assert torch.equal(torch.cat([batch.tokens for batch in work]), sequences)
        assert torch.equal(torch.cat([batch.flat for batch in work]).flatten(), torch.arange(22))
        assert all(bool(batch.mask.all()) and batch.mask.shape == batch.tokens.shape for batch in work)
        assert all(batch.tokens.untyped_storage().data_ptr() == sequences.untyped_storage().data_ptr() for batch in work)
    with pytest.raises(ValueError, match=r"^batch_tokens: got 0; allowed: at least 1"):
        equally_long(sequences, batch_tokens=0)
