import math

import pandas as pd
import pytest
import torch
import zoo
from recording import record, same_state, state
from shared import planted
from streams import norms_alone, points, ragged
from tokenizer import tiny_tokenizer, with_tokenizer
from transformer_lens.model_bridge.sources import build_bridge_from_module

import sd_lens
from sd_lens.tracing.delimiters import token_pathways
from sd_lens.tracing.pathways import scan_vocabulary

COLUMNS = [
    "id", "token", "n", "n_initial", "high_initial", "n_later", "high_later", "share_later", "n_first", "first_in_prompt_high",
    "n_repeat", "repeat_high", "earliest_high_pos", "max_ratio", "mean_norm", "initial_norm", "initial_ratio", "no_attention_norm",
    "no_attention_ratio", "pathway",
]  # fmt: skip
LENGTHS = (9, 4, 12, 1)


def without_attention(model, tokens):
    """Norms [point, batch, pos] with what attention adds set to zero."""
    names, kept = points(model.cfg.n_layers), {}
    hooks = [(f"blocks.{block}.hook_attn_out", lambda added, hook: added * 0) for block in range(model.cfg.n_layers)]
    hooks += [(name, lambda stream, hook, name=name: kept.update({name: stream.double().norm(dim=-1)})) for name in names]
    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    return torch.stack([kept[name] for name in names])


def by_themselves(model, ids):
    """Norms [point, id] alone at position 0, and without attention at position 1."""
    names, alone = points(model.cfg.n_layers), torch.tensor(ids).unsqueeze(1)
    initial = record(model, alone, names)
    initial = torch.stack([initial[name][:, 0].double().norm(dim=-1) for name in names])
    return initial, without_attention(model, alone.expand(-1, 2))[..., 1]


def by_hand(model, prompts, block, min_ratio):
    """The table, one token at a time."""
    norms = norms_alone(model, prompts)
    places = [(number, pos, int(token)) for number, prompt in enumerate(prompts) for pos, token in enumerate(prompt)]
    later = torch.tensor([pos > 0 for _, pos, _ in places])
    reference = norms[:, later].median(dim=1).values
    ratios = norms / reference.unsqueeze(1)
    ids, table = sorted({token for _, _, token in places}), {}
    initial, silent = by_themselves(model, ids)
    for number_of, token in enumerate(ids):
        mine = [place for place, (_, _, other) in enumerate(places) if other == token]
        is_high = {place: bool((ratios[1:, place] >= min_ratio).any()) for place in mine}
        at_start = [place for place in mine if places[place][1] == 0]
        after = [place for place in mine if places[place][1] > 0]
        firsts = [
            min((p for p in after if places[p][0] == number), key=lambda p: places[p][1])
            for number in {places[p][0] for p in after}
        ]
        repeats = [place for place in after if place not in firsts]
        alone = initial[block + 1, number_of], silent[block + 1, number_of]
        high_later = sum(is_high[p] for p in after)
        table[token] = {
            "n": len(mine),
            "n_initial": len(at_start),
            "high_initial": sum(is_high[p] for p in at_start),
            "n_later": len(after),
            "high_later": high_later,
            "share_later": high_later / len(after) if after else math.nan,
            "n_first": len(firsts),
            "first_in_prompt_high": sum(is_high[p] for p in firsts),
            "n_repeat": len(repeats),
            "repeat_high": sum(is_high[p] for p in repeats),
            "earliest_high_pos": min((places[p][1] for p in after if is_high[p]), default=None),
            "max_ratio": float(ratios[1:, mine].max()),
            "mean_norm": float(norms[block + 1, after].mean()) if after else math.nan,
            "initial_norm": float(alone[0]),
            "initial_ratio": float(alone[0] / reference[block + 1]),
            "no_attention_norm": float(alone[1]),
            "no_attention_ratio": float(alone[1] / reference[block + 1]),
        }
    return table


def agree(table, wanted):
    assert table.rows.columns.tolist() == COLUMNS
    assert sorted(table.rows.id) == sorted(wanted)
    for row in table.rows.to_dict("records"):
        for name, value in wanted[row["id"]].items():
            if value is None:
                assert pd.isna(row[name]), name
            else:
                assert row[name] == pytest.approx(value, rel=1e-5, nan_ok=True), (row["id"], name)


def prompts_of_few_ids(seed=0):
    """Short prompts in which every id stands several times."""
    return ragged(9, LENGTHS, seed=seed)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_every_family_by_brute_force(family):
    model, prompts, block, min_ratio = zoo.cached(family), prompts_of_few_ids(), 1, 1.1
    wanted = by_hand(model, prompts, block, min_ratio)
    assert sum(row["high_later"] for row in wanted.values()) > 0
    assert sum(row["n_repeat"] for row in wanted.values()) > 5
    table = token_pathways(model, prompts, block=block, min_ratio=min_ratio, batch_tokens=10)
    agree(table, wanted)
    assert (table.block, table.n_tokens, table.n_prompts, table.min_ratio) == (block, sum(LENGTHS), len(LENGTHS), min_ratio)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_cache_gives_what_the_prompts_give(family):
    model, prompts = zoo.cached(family), prompts_of_few_ids(seed=1)
    tokens = torch.full((len(prompts), max(LENGTHS)), 50)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: "resid" in name)
    table = token_pathways(model, tokens, cache=cache, mask=mask, block=2, min_ratio=1.1)
    agree(table, by_hand(model, prompts, 2, 1.1))


def test_a_cache_must_reach_the_block():
    model, tokens = zoo.cached("llama"), torch.stack(ragged(9, (6, 6)))
    kept = ["blocks.0.hook_resid_pre", "blocks.0.hook_resid_post"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in kept)
    with pytest.raises(ValueError, match=r"^cache: it lacks blocks\.1\.hook_resid_post; allowed: a cache with all that is needed"):
        token_pathways(model, tokens, cache=cache, block=1)
    assert token_pathways(model, tokens, cache=cache).block == 0


def text():
    tokens = torch.randint(96, (4, 20), generator=torch.Generator().manual_seed(0))
    tokens[tokens == 7] = 8
    tokens[0, 5] = tokens[1, 0] = tokens[1, 9] = tokens[1, 12] = 96
    tokens[2, :5] = 7
    tokens[3, 15] = 7
    return tokens


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_on_the_planted_head_ids_explode_by_where_they_stand(architecture):
    truth, tokens = planted(architecture, pathway="head"), text()
    table = token_pathways(truth.model, tokens)
    rows = table.rows.set_index("id")
    starts = sorted(tokens[:, 0].tolist())
    assert table.block == truth.explosion_block
    assert sorted(table.high().id) == starts
    # Repeats of the first token see nothing but copies of themselves; the same token elsewhere is ordinary.
    repeated = rows.loc[7]
    assert (repeated.high_initial, repeated.high_later, repeated.n_later) == (1, 4, 5)
    assert (repeated.n_first, repeated.first_in_prompt_high, repeated.n_repeat, repeated.repeat_high) == (2, 1, 3, 3)
    assert repeated.earliest_high_pos == 1
    assert repeated.pathway == "context"
    for token in starts:
        assert rows.pathway[token] == ("context" if token == 7 else "initial")
    assert rows.initial_norm.tolist() == pytest.approx([truth.norm] * len(rows), rel=0.02)
    assert rows.no_attention_ratio.max() < 2
    assert repr(table) == f"TokenPathways(planted: {len(rows)} token ids, block 1: 3 initial, 1 context)"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_on_the_planted_embedding_one_id_explodes_wherever_it_stands(architecture):
    truth = planted(architecture, pathway="embedding")
    table = token_pathways(truth.model, text())
    assert table.block == truth.explosion_block
    assert table.high().id.tolist() == [96]
    row = table.high().iloc[0]
    assert table.rows.id[0] == 96  # what is high-norm comes first
    assert (row.n_initial, row.high_initial, row.n_later, row.high_later, row.share_later) == (1, 1, 3, 3, 1)
    assert (row.n_first, row.first_in_prompt_high, row.n_repeat, row.repeat_high) == (2, 2, 1, 1)
    assert (row.earliest_high_pos, row.pathway) == (5, "self")
    assert [row.mean_norm, row.initial_norm, row.no_attention_norm] == pytest.approx([truth.norm] * 3, rel=0.02)
    assert table.rows.no_attention_ratio[1:].max() < 2
    assert table.sentences() == (
        f"'<96>' is high-norm at position 0 of 1 of 1 prompts and in 3 of 3 later places; without attention it has "
        f"{row.no_attention_ratio:.3g} times the ordinary norm.",
    )
    # The norms of ids alone are those of a vocabulary scan.
    ids = table.rows.id.tolist()
    for pathway in ("initial", "no_attention"):
        scan = scan_vocabulary(truth.model, pathway, ids=ids, block=table.block, control=0)
        assert table.rows[f"{pathway}_norm"].tolist() == pytest.approx(scan.norms.tolist(), rel=1e-3), pathway  # but for positions


def test_what_a_model_adds_for_position_0_is_no_ids_own():
    """Learned positions, the first of them loud: every first token explodes, with attention or without, and no id by itself."""
    hf = zoo.hf_model("gpt2")
    with torch.no_grad():
        hf.transformer.wpe.weight[0].mul_(1000)
    model = build_bridge_from_module(hf, architecture=type(hf).__name__, hf_config=hf.config).eval()
    prompts = [torch.tensor([5, 6, 7, 8]), torch.tensor([9, 7, 8, 6])]
    assert without_attention(model, torch.stack(prompts))[1:, :, 0].min() > 100
    table = token_pathways(model, prompts, block=1)
    assert dict(zip(table.high().id, table.high().pathway, strict=True)) == {5: "initial", 9: "initial"}
    assert table.rows.initial_ratio.min() > 10
    assert table.rows.no_attention_ratio.max() < 3


def made_up(rows):
    """The table of a cache with these norms after block 0; ids alone have norms near 1 in the zoo's model."""
    model, norms = zoo.cached("llama"), torch.tensor(rows)
    unit = torch.zeros(zoo.D_MODEL)
    unit[0] = 1.0
    cache = {"blocks.0.hook_resid_pre": torch.ones_like(norms).unsqueeze(-1) * unit}
    cache["blocks.0.hook_resid_post"] = 100 * norms.unsqueeze(-1) * unit
    return lambda tokens: token_pathways(model, torch.tensor(tokens), cache=cache, mask=torch.ones_like(norms).bool())


def test_only_the_first_of_each_prompt():
    table = made_up([[1.0, 20.0, 1.0, 1.0, 1.0], [1.0, 1.0, 30.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])
    every = table([[4, 5, 6, 5, 5], [4, 6, 5, 5, 7], [4, 6, 6, 7, 8]])
    row = every.high().iloc[0]
    assert (row.id, row.n_later, row.high_later, row.n_first, row.first_in_prompt_high) == (5, 5, 2, 2, 2)
    assert (row.n_repeat, row.repeat_high, row.earliest_high_pos, row.max_ratio) == (3, 0, 1, 30)
    assert row.pathway == "context"
    assert every.sentences()[0].startswith("'<5>' is high-norm in 2 of 5 places, only the first of each prompt; without attention ")
    some = table([[4, 5, 6, 5, 5], [4, 6, 5, 5, 7], [4, 5, 6, 7, 8]])
    assert some.sentences()[0].startswith("'<5>' is high-norm in 2 of 6 places, never but the first of a prompt; ")
    both = table([[5, 5, 6, 5, 5], [4, 6, 5, 5, 7], [4, 5, 6, 7, 8]])
    assert both.sentences()[0].startswith("'<5>' is high-norm in 2 of 6 later places, never but the first of a prompt; ")
    not_first = table([[4, 6, 6, 5, 5], [4, 5, 5, 5, 7], [4, 5, 6, 7, 8]])
    sentences = not_first.sentences()
    assert sentences[0].startswith("'<5>' is high-norm in 1 of 6 places; ")
    assert sentences[1].startswith("'<6>' is high-norm in 1 of 3 places, never but the first of a prompt; ")
    assert len(not_first.sentences(1)) == 1
    with pytest.raises(ValueError, match=r"^k: got 0; allowed: at least 1"):
        not_first.sentences(0)


def test_the_shipped_models_bos_explodes_for_being_the_bos():
    model = sd_lens.load("tiny")
    table = token_pathways(model)
    assert table.high().token.tolist() == ["<s>"]
    row = table.high().iloc[0]
    assert (row.high_initial, row.n_later, row.pathway) == (6, 0, "self")
    assert row.no_attention_ratio > 6
    assert math.isnan(row.share_later)
    # So it does in the middle of a text, and without it nothing does.
    whole = model.to_tokens("The quick brown fox jumps over the lazy dog.")
    middle = token_pathways(model, torch.cat([whole, whole], dim=1)).high()
    assert middle[["high_initial", "high_later", "pathway"]].values.tolist() == [[1, 1, "self"]]
    bare = token_pathways(model, prepend_bos=False)
    assert bare.rows.pathway.unique().tolist() == ["none"]
    assert repr(bare).endswith(": none is high-norm)")
    assert bare.sentences() == ()


def test_strings_and_their_bos():
    model = with_tokenizer("llama")
    bos, a, b = tiny_tokenizer().convert_tokens_to_ids(["<bos>", "a", "b"])
    tables = [token_pathways(model, ["aab", "ba"], prepend_bos=prepend) for prepend in (None, False)]
    places = [table.rows.set_index("id").n_later.to_dict() for table in tables]
    assert places == [{bos: 0, a: 3, b: 2}, {a: 2, b: 1}]
    assert tables[0].rows.set_index("id").token.to_dict() == {bos: "<bos>", a: "a", b: "b"}


def test_without_an_explosion_the_block_is_where_some_id_stands_out_most():
    model, prompts = zoo.cached("llama"), prompts_of_few_ids()
    table = token_pathways(model, prompts)
    assert table.high().empty
    ids = sorted({int(token) for prompt in prompts for token in prompt})
    norms = norms_alone(model, prompts)
    later = torch.cat([torch.arange(len(prompt)) > 0 for prompt in prompts])
    alone, silent = by_themselves(model, ids)
    ratios = torch.cat([alone, silent], dim=1)[1:] / norms[1:, later].median(dim=1, keepdim=True).values
    assert table.block == int(ratios.amax(1).argmax())
    assert max(table.rows.initial_ratio.max(), table.rows.no_attention_ratio.max()) == pytest.approx(float(ratios.max()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block": 3}, "block: got 3; allowed: 0 to 2"),
        ({"block": -1}, "block: got -1; allowed: 0 to 2"),
        ({"min_ratio": 1.0}, "min_ratio: got 1.0; allowed: above 1"),
        ({"batch_tokens": 0}, "batch_tokens: got 0; allowed: at least 1"),
    ],
)
def test_options_out_of_range(options, message):
    model = zoo.cached("llama")
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=f"^{message}"):
        token_pathways(model, zoo.tokens(model), **options)


def test_single_tokens_have_nothing_to_compare_with():
    with pytest.raises(ValueError, match="every prompt has one token only"):
        token_pathways(planted().model, torch.arange(5).unsqueeze(1))


def test_it_leaves_no_trace_and_makes_its_figure(monkeypatch):
    model = zoo.build("llama")
    before, random = state(model), torch.get_rng_state()
    table = token_pathways(model, zoo.tokens(model))
    assert same_state(before, state(model))
    assert torch.equal(random, torch.get_rng_state())
    copy = table.to_dataframe()
    copy["n"] = 0
    assert table.rows.n.min() > 0
    monkeypatch.setattr("sd_lens.display.figures.pathway_table_figure", lambda result: ("drawn", result), raising=False)
    assert table.plot() == ("drawn", table)
