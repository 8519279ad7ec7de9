import pytest
import torch
import zoo
from recording import same_state, state
from shared import planted
from tokenizer import with_tokenizer

from sd_lens.models.loading import load
from sd_lens.tracing.confirmation import PREFIX, confirm_in_context
from sd_lens.tracing.pathways import scan_vocabulary


def norm_by_hand(model, tokens, block):
    name = f"blocks.{block}.hook_resid_post"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens.unsqueeze(0), names_filter=name)
    return float(cache[name][0, -1].double().norm())


def test_only_a_planted_embedding_is_confirmed(planted_model):
    truth = planted_model
    scan = scan_vocabulary(truth.model, "initial", control=0)
    found = confirm_in_context(truth.model, scan, k=4)
    prefix = found.prefix.tolist()
    assert len(set(prefix)) == 6
    assert not set(prefix) & set(found.rows.id)
    assert found.confirmed.id.tolist() == ([] if truth.pathway == "head" else [truth.trigger_token])
    assert found.rows.group.tolist() == ["candidate"] * 4 + ["control"] * 4
    assert not found.rows.explodes[4:].any()
    n = len(found.confirmed)
    text = "".join(f"<{token}>" for token in prefix)
    assert repr(found) == f"Confirmation(planted, initial: {n} of 4 candidates and 0 of 4 control ids explode after {text!r})"
    for row in found.rows.itertuples():
        assert row.norm == pytest.approx(norm_by_hand(truth.model, torch.tensor([*prefix, row.id]), scan.block), rel=1e-5)
        assert row.ratio == pytest.approx(row.norm / scan.reference)
        assert row.explodes == (row.ratio >= 6)
        place = scan.ids.tolist().index(row.id)
        assert (row.scan_norm, row.token) == (float(scan.norms[place]), f"<{row.id}>")
        assert row.scan_ratio == pytest.approx(row.scan_norm / scan.reference)
    again, other = (confirm_in_context(truth.model, scan, k=4, seed=seed) for seed in (0, 1))
    assert again.prefix.tolist() == prefix
    assert other.prefix.tolist() != prefix


def test_a_single_token_to_look_at_brings_a_planted_head_back():
    # After itself an id still sees nothing but itself.
    truth = planted(pathway="head")
    scan = scan_vocabulary(truth.model, ids=torch.arange(20), control=0)
    candidate = int(scan.top(1).id[0])
    found = confirm_in_context(truth.model, scan, k=1, prefix=torch.tensor([candidate, candidate]))
    assert found.confirmed.id.tolist() == [candidate]
    assert found.rows.explodes.tolist() == [True, False]


def test_the_shipped_models_bos_explodes_wherever_it_stands():
    model = load("tiny")
    found = confirm_in_context(model, scan_vocabulary(model, "no_attention", control=0))
    assert found.confirmed.token.tolist() == ["<s>"]
    assert (len(found.rows), found.rows.explodes.sum()) == (20, 1)
    assert torch.equal(found.prefix, model.to_tokens(PREFIX)[0])
    assert found.prefix_text == "<s>" + PREFIX
    bare = confirm_in_context(model, scan_vocabulary(model, "no_attention", control=0), k=2, prefix="So", prepend_bos=False)
    assert torch.equal(bare.prefix, model.to_tokens("So", prepend_bos=False)[0])
    assert bare.confirmed.token.tolist() == ["<s>"]
    assert found.to_dataframe().equals(found.rows)


def test_candidates_come_first_and_control_ids_are_about_the_median():
    model = with_tokenizer("llama")
    with torch.no_grad():
        model.W_E[7] *= 0.01
    scan = scan_vocabulary(model, ids=torch.arange(5, 36), block=1, control=0)
    trained = [token for token in range(5, 36) if token != 7]
    ranked = sorted(trained, key=lambda token: -float(scan.norms[token - 5]))
    rows = confirm_in_context(model, scan, k=4, prefix="abc").rows
    assert rows.id.tolist() == [*ranked[:4], *ranked[13:17]]  # of 30
    for k, control in ((12, ranked[12:24]), (20, ranked[20:]), (40, [])):
        assert confirm_in_context(model, scan, k=k, prefix="abc").rows.id.tolist() == [*ranked[:k], *control]


@pytest.mark.parametrize("batch_tokens", [1, 20])
def test_batches_change_nothing(batch_tokens):
    model = zoo.cached("gpt2")
    scan = scan_vocabulary(model, ids=torch.arange(5, 25), block=1, control=0)
    before = state(model)
    wanted, got = (confirm_in_context(model, scan, k=3, batch_tokens=size).rows.norm for size in (4096, batch_tokens))
    assert got.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    assert same_state(before, state(model))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k: got 0; allowed: at least 1"),
        ({"prefix": ""}, "prefix: got an empty prompt; allowed"),
        ({"prefix": torch.zeros(1, 2, dtype=torch.long)}, r"prefix: got shape \(1, 2\); allowed: one text"),
        ({"prefix": torch.tensor([500])}, "prefix: prompt 0 has token ids 500 to 500; allowed: 0 to 100"),
        ({"prefix": torch.zeros(64, dtype=torch.long)}, "prefix: prompt 0 has 65 tokens; allowed: at most 64"),
    ],
)
def test_what_is_refused(options, message):
    model = with_tokenizer("llama")
    scan = scan_vocabulary(model, ids=[5, 6, 7], block=1, control=0)
    never = [("hook_embed", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=f"^{message}"):
        confirm_in_context(model, scan, **options)


def test_scans_that_cannot_be_confirmed():
    model = zoo.build("llama")
    with pytest.raises(ValueError, match=r"^model: got planted of 6 blocks and 97 ids; allowed: the model that was scanned"):
        confirm_in_context(planted().model, scan_vocabulary(model, ids=[5], block=1, control=0))
    with torch.no_grad():
        model.W_E[5] = 0.0
    with pytest.raises(ValueError, match=r"^scan: none of its ids was trained; allowed: a scan of at least one trained id"):
        confirm_in_context(model, scan_vocabulary(model, ids=[5], block=1, control=0))
    scan = scan_vocabulary(model, block=1, control=0)
    with pytest.raises(ValueError, match=r"^prefix: got none, and all ids are candidates; allowed: token ids"):
        confirm_in_context(model, scan, k=100)
