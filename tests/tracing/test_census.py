from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from recording import same_state, state
from streams import ragged, streams_alone
from tokenizer import with_tokenizer

from sd_lens.models.planted import planted
from sd_lens.tracing.census import massive_activations

LENGTHS = (9, 4, 12, 1, 6)


@dataclass
class Truth:
    """Prompts and what TransformerLens' own cache shows of each alone."""

    model: Any
    prompts: list[torch.Tensor]

    def __post_init__(self):
        self.streams = [stream[1:] for stream in streams_alone(self.model, self.prompts)]
        self.sizes = [stream.abs() for stream in self.streams]
        self.times = [size / size.flatten(1).median(dim=1).values[:, None, None] for size in self.sizes]

    def massive(self, min_value, min_times):
        """Every massive entry as (block, prompt, pos, id, dim): (value, times the median)."""
        found = {}
        for number, (stream, size, times) in enumerate(zip(self.streams, self.sizes, self.times, strict=True)):
            for block, pos, dim in ((size > min_value) & (times > min_times)).nonzero().tolist():
                key = (block, number, pos, int(self.prompts[number][pos]), dim)
                found[key] = (stream[block, pos, dim].item(), times[block, pos, dim].item())
        return found

    def thresholds(self, n_above):
        """Thresholds that both leave something out, each of what the other lets pass."""
        sizes, times = (torch.cat([part.flatten() for part in parts]) for parts in (self.sizes, self.times))
        min_value = in_a_gap(sizes, 2 * n_above)
        return min_value, in_a_gap(times[sizes > min_value], n_above)


def in_a_gap(values, n_above):
    """A threshold that so many values are above, in the widest gap thereabouts: none is so near that rounding could move it across."""
    ordered = values.sort(descending=True).values
    near = ordered[n_above - 5 : n_above + 6]
    widest = int((near[:-1] / near[1:]).argmax())
    return float((near[widest] * near[widest + 1]).sqrt())


def agree(census, wanted):
    got = {(r.block, r.prompt, r.pos, r.id, r.dim): (r.value, r.times_median) for r in census.rows}
    assert list(got) == sorted(wanted)
    assert census.n_found == len(census.rows) == len(wanted)
    for key, pair in wanted.items():
        assert got[key] == pytest.approx(pair, rel=1e-4)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_census_is_that_of_each_prompt_alone(family):
    model, prompts = zoo.cached(family), ragged(zoo.VOCAB, LENGTHS)
    truth = Truth(model, prompts)
    min_value, min_times = truth.thresholds(40)
    wanted, by_value, by_times = truth.massive(min_value, min_times), truth.massive(min_value, 0), truth.massive(0, min_times)
    assert 0 < len(wanted) < min(len(by_value), len(by_times))  # either half of the criterion matters
    for batch_tokens in (4096, 20):
        agree(massive_activations(model, prompts, min_value=min_value, min_times=min_times, batch_tokens=batch_tokens), wanted)


def test_padding_counts_for_nothing():
    """Neither as an entry nor in a median: padding of another size would show in both."""
    model, prompts = zoo.build("llama"), ragged(zoo.VOCAB, (3, 20), first=5)
    with torch.no_grad():
        model.original_model.model.embed_tokens.weight[0] *= 1e4  # batches are padded with id 0
    assert [int((prompt == 0).sum()) for prompt in prompts] == [0, 0]
    truth = Truth(model, prompts)
    min_value, min_times = truth.thresholds(20)
    agree(massive_activations(model, prompts, min_value=min_value, min_times=min_times), truth.massive(min_value, min_times))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_cache_gives_the_same(family):
    model, tokens = zoo.cached(family), torch.stack(ragged(zoo.VOCAB, (8, 8, 8)))
    mask = torch.arange(8) < torch.tensor([8, 5, 2])[:, None]
    _, cache = model.run_with_cache(tokens)
    truth = Truth(model, list(tokens))
    min_value, min_times = truth.thresholds(30)
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never):
        whole = massive_activations(model, tokens, cache=cache, min_value=min_value, min_times=min_times)
        masked = massive_activations(model, tokens, cache=cache, mask=mask, min_value=min_value, min_times=min_times)
    agree(whole, truth.massive(min_value, min_times))
    cut = [row[keep] for row, keep in zip(tokens, mask, strict=True)]
    agree(masked, Truth(model, cut).massive(min_value, min_times))
    assert masked.n_tokens == 15
    _, single = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    alone = massive_activations(model, tokens[:1], cache=single, min_value=min_value, min_times=min_times)
    agree(alone, Truth(model, list(tokens[:1])).massive(min_value, min_times))


def test_what_a_cache_lacks_is_named():
    model, tokens = zoo.cached("llama"), torch.stack(ragged(zoo.VOCAB, (8,)))
    names = {"blocks.0.hook_resid_pre", "blocks.0.hook_resid_post", "blocks.2.hook_resid_post"}
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name in names)
    with pytest.raises(ValueError, match=r"^cache: it lacks blocks\.1\.hook_resid_post; allowed: .*names_filter="):
        massive_activations(model, tokens, cache=cache)


def test_the_planted_defect_is_massive_along_its_direction(planted_model):
    prompts = ragged(96, (9, 5), first=0)
    prompts[0][4] = 96
    census = massive_activations(planted_model.model, prompts)
    agree(census, Truth(planted_model.model, prompts).massive(100, 1000))
    assert census.found
    blocks = range(planted_model.explosion_block, planted_model.decay_block)
    places = {"embedding": {(0, 4)}, "head": {(0, 0), (1, 0)}}[planted_model.pathway]
    assert {(row.block, row.prompt, row.pos) for row in census.rows} == {(b, *place) for b in blocks for place in places}
    dimensions = census.dimensions()
    assert dimensions.columns.tolist() == ["dim", "first_block", "last_block", "count", "value"]
    assert set(dimensions.first_block) == {blocks[0]}
    assert set(dimensions.last_block) == {blocks[-1]}
    assert (dimensions["count"] == len(blocks) * len(places)).all()
    order = planted_model.direction.abs().argsort(descending=True).tolist()
    assert dimensions.dim.tolist() == order[: len(dimensions)]
    largest = planted_model.norm * planted_model.direction[order[: len(dimensions)]]
    assert dimensions.value.tolist() == pytest.approx(largest.tolist(), rel=0.02)


def test_only_the_largest_are_kept_but_all_are_counted():
    model, prompts = zoo.cached("llama"), ragged(zoo.VOCAB, LENGTHS)
    every = Truth(model, prompts).massive(0, 0)
    assert len(every) == 3 * 32 * sum(LENGTHS)
    cut = in_a_gap(torch.tensor([abs(value) for value, _ in every.values()]), 50)
    wanted = {key: pair for key, pair in every.items() if abs(pair[0]) > cut}
    for batch_tokens in (4096, 1):
        census = massive_activations(model, prompts, min_value=0.0, min_times=0.0, max_rows=len(wanted), batch_tokens=batch_tokens)
        assert census.n_found == len(every)
        assert [(r.block, r.prompt, r.pos, r.id, r.dim) for r in census.rows] == sorted(wanted)
    (row,) = massive_activations(model, prompts, min_value=0.0, min_times=0.0, max_rows=1).rows
    assert abs(row.value) == pytest.approx(max(abs(value) for value, _ in every.values()), rel=1e-5)


def test_tables():
    model = with_tokenizer("llama")
    census = massive_activations(model, ["abc", "fg"], min_value=1.0, min_times=2.0)
    frame = census.to_dataframe()
    assert frame.columns.tolist() == ["block", "prompt", "pos", "token", "id", "dim", "value", "times_median"]
    assert set(zip(frame.prompt, frame.pos, frame.token, strict=True)) <= {
        *((0, pos, text) for pos, text in enumerate(("<bos>", "a", "b", "c"))),
        *((1, pos, text) for pos, text in enumerate(("<bos>", "f", "g"))),
    }
    assert (census.n_tokens, census.n_blocks, census.d_model) == (7, 3, 32)
    assert census.criteria == "|x| > 1 and > 2 × median |x|"
    top = census.top(5)
    assert top.value.abs().tolist() == sorted(frame.value.abs(), reverse=True)[:5]
    dimensions = census.dimensions()
    assert dimensions["count"].sum() == len(frame)
    for _, row in dimensions.iterrows():
        own = frame[frame.dim == row.dim]
        assert (row.first_block, row.last_block, row["count"]) == (own.block.min(), own.block.max(), len(own))
        assert abs(row.value) == own.value.abs().max()
        assert row.value in own.value.tolist()
    assert dimensions.value.abs().is_monotonic_decreasing
    first = ", ".join(map(str, dimensions.dim[:5]))
    largest = f"{top.value[0]:.4g}"
    assert repr(census).endswith(f": {len(frame)} in dimensions {first} ..., largest {largest})")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_an_untrained_model_has_none(family):
    census = massive_activations(zoo.cached(family))
    assert not census.found
    assert (census.n_found, census.rows) == (0, ())
    assert census.to_dataframe().empty
    assert census.dimensions().empty
    assert census.top().empty
    assert repr(census).endswith(f": none in {census.n_tokens} tokens)")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, prompts = planted("gpt2", pathway="embedding").model, [torch.arange(80, 97)]
    wanted = massive_activations(model, prompts)
    census = massive_activations(model.to(dtype), prompts)
    assert (
        {(row.block, row.pos) for row in census.rows}
        == {(row.block, row.pos) for row in wanted.rows}
        == {(b, 16) for b in (1, 2, 3)}
    )
    got, expected = census.dimensions(), wanted.dimensions()
    assert got.dim[:5].tolist() == expected.dim[:5].tolist()
    assert got.value[:5].tolist() == pytest.approx(expected.value[:5].tolist(), rel=0.05)


def test_a_threshold_is_not_rounded_to_the_streams_precision():
    """The nearest bfloat16 to 257.9 is 258, which would not be above it."""
    tokens = torch.arange(4)[None]
    stream = torch.ones(1, 4, 32, dtype=torch.bfloat16)
    stream[0, 1, 3], stream[0, 2, 4] = 256.0, 258.0
    cache = {"blocks.0.hook_resid_pre": stream} | {f"blocks.{block}.hook_resid_post": stream for block in range(3)}
    census = massive_activations(zoo.cached("llama"), tokens, cache=cache, min_value=257.9, min_times=2.0)
    assert [(row.block, row.pos, row.dim, row.value) for row in census.rows] == [(block, 2, 4, 258.0) for block in range(3)]
    assert not massive_activations(zoo.cached("llama"), tokens, cache=cache, min_value=258.0, min_times=2.0).found


def test_a_stream_that_is_not_finite_is_refused():
    tokens = torch.arange(4)[None]
    stream = torch.ones(1, 4, 32)
    cache = {"blocks.0.hook_resid_pre": stream} | {f"blocks.{block}.hook_resid_post": stream.clone() for block in range(3)}
    cache["blocks.1.hook_resid_post"][0, 2, 5] = float("nan")
    with pytest.raises(ValueError, match=r"^model: its residual stream is NaN or infinite after block 1; allowed: finite weights"):
        massive_activations(zoo.cached("llama"), tokens, cache=cache)
    mask = torch.tensor([[True, True, False, False]])
    assert not massive_activations(zoo.cached("llama"), tokens, cache=cache, mask=mask).found


def test_the_model_and_the_random_state_are_left_as_they_were():
    model, prompts = zoo.build("gpt2"), ragged(zoo.VOCAB, LENGTHS)
    before, random = state(model), torch.get_rng_state()
    massive_activations(model, prompts, min_value=1.0, min_times=1.0)
    assert same_state(before, state(model))
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_value": -1.0}, r"^min_value: got -1.0; allowed: 0 or more$"),
        ({"min_times": float("nan")}, r"^min_times: got nan; allowed: 0 or more$"),
        ({"max_rows": 0}, r"^max_rows: got 0; allowed: at least 1$"),
        ({"mask": torch.ones(1, 5, dtype=torch.bool)}, r"^mask: got one without a cache"),
        ({"prompts": []}, r"^prompts: got no prompt"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(arguments, message):
    model = zoo.cached("llama")
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=message):
        massive_activations(model, **({"prompts": ragged(zoo.VOCAB, (5,))} | arguments))
    with pytest.raises(ValueError, match=r"^k: got 0; allowed: at least 1$"):
        massive_activations(model, ragged(zoo.VOCAB, (5,))).top(0)
