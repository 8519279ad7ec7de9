import pytest
import torch
import zoo
from streams import norms_alone, points, ragged, streams_alone, worst
from tokenizer import with_tokenizer

from sd_lens.models.planted import planted
from sd_lens.tracing.defects import defect_direction, find_defects
from sd_lens.tracing.norms import trace_norms
from sd_lens.tracing.trace import NormTrace

LENGTHS = (7, 1, 12, 3, 12, 2)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_norms_are_those_of_each_prompt_alone(family):
    model = zoo.cached(family)
    prompts = ragged(zoo.VOCAB, LENGTHS)
    alone = [stream.norm(dim=-1) for stream in streams_alone(model, prompts)]
    wanted = torch.cat(alone, dim=1)
    for batch_tokens in (4096, 8, 1):  # all at once; fewer than the longest prompt has; one prompt at a time
        trace = trace_norms(model, prompts, batch_tokens=batch_tokens)
        assert worst(trace.norms, wanted) < 1e-5
    assert trace.norms.dtype == torch.float32
    assert torch.equal(trace.tokens, torch.cat(prompts))
    assert trace.prompt.tolist() == [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert trace.position.tolist() == [place for length in LENGTHS for place in range(length)]
    assert (trace.n_prompts, trace.d_model, trace.n_blocks) == (6, zoo.D_MODEL, model.cfg.n_layers)
    assert trace.direction is None
    for number, length in enumerate(LENGTHS):
        assert worst(trace.of_prompt(number), alone[number]) < 1e-5
        assert trace.texts_of(number) == [f"<{token}>" for token in prompts[number].tolist()]
        assert len(trace.texts_of(number)) == length


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama", "opt"])
def test_norms_whose_squares_half_precision_cannot_hold(family, dtype):
    model = zoo.build(family)
    with torch.no_grad():
        model.W_E.mul_(2000.0)
    prompts = ragged(zoo.VOCAB, (5, 9))
    wanted = norms_alone(model, prompts)
    assert wanted[0].min() > 1000  # a square above 1e6; float16 ends at 65504
    model.to(dtype)
    trace = trace_norms(model, prompts, batch_tokens=1)
    assert trace.norms.dtype == torch.float32
    assert worst(trace.norms, wanted) < 0.03
    assert worst(trace.norms, norms_alone(model, prompts)) < 1e-6  # of the same half-precision streams


def counting(ran, block):
    return lambda stream, hook: ran.append(block)


@pytest.mark.parametrize(
    "family", [name for name in ("llama", "gpt_neox_parallel", "gemma2", "hooked_llama") if name in zoo.FAMILIES]
)
def test_a_trace_that_stops_early_runs_no_later_block(family):
    model = zoo.cached(family)
    prompts = ragged(zoo.VOCAB, (4, 6))
    full, n_blocks = trace_norms(model, prompts).norms, model.cfg.n_layers
    for stop_at in range(1, n_blocks + 1):
        ran: list[int] = []
        counters = [(f"blocks.{block}.hook_attn_out", counting(ran, block)) for block in range(n_blocks)]
        with model.hooks(fwd_hooks=counters):
            trace = trace_norms(model, prompts, stop_at=stop_at, direction_prompts=0)
        assert sorted(set(ran)) == list(range(stop_at))
        assert torch.equal(trace.norms, full[: stop_at + 1])
        assert trace.n_blocks == n_blocks


def test_text_is_traced_like_its_tokens():
    model = with_tokenizer("llama")
    trace = trace_norms(model, ["ab.", "é"])
    assert trace.tokens.tolist() == [0, 4, 5, model.tokenizer.convert_tokens_to_ids("."), 0, 3]
    assert trace.texts == ("<bos>", "a", "b", ".", "<bos>", "<unk>")
    assert trace.texts_of(1) == ["<bos>", "<unk>"]
    assert worst(trace.norms, norms_alone(model, [trace.tokens[:4], trace.tokens[4:]])) < 1e-5
    bare = trace_norms(model, ["ab.", "é"], prepend_bos=False)
    assert bare.texts == ("a", "b", ".", "<unk>")
    assert worst(bare.norms, norms_alone(model, [trace.tokens[1:4], trace.tokens[5:]])) < 1e-5


def test_padding_is_cut_off_and_left_padding_refused():
    model = with_tokenizer("gpt2")
    texts = ["abcdefg", "ab", "abcd"]
    padded = trace_norms(model, model.to_tokens(texts))
    assert padded.tokens.tolist() == [0, *range(4, 11), 0, 4, 5, 0, *range(4, 8)]
    assert worst(padded.norms, trace_norms(model, texts).norms) < 1e-6
    with pytest.raises(ValueError, match=r"^prompts: .*padded on the left"):
        trace_norms(model, torch.tensor([[2, 0, 4], [0, 4, 5]]))


def test_dropout_is_off_whatever_mode_the_model_is_in():
    model, prompts = planted("gpt2").model, ragged(96, (6, 4))
    wanted = trace_norms(model, prompts).norms
    model.train()
    with torch.no_grad():
        assert not torch.equal(model(prompts[0].unsqueeze(0)), model(prompts[0].unsqueeze(0)))
    assert torch.equal(trace_norms(model, prompts).norms, wanted)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"stop_at": 0}, "stop_at: got 0; allowed: 1 to 3"),
        ({"stop_at": 4}, "stop_at: got 4; allowed: 1 to 3"),
        ({"batch_tokens": 0}, "batch_tokens: got 0; allowed: at least 1"),
        ({"direction_prompts": -1}, "direction_prompts: got -1; allowed: 0 or more"),
        ({"min_ratio": 1.0}, "min_ratio: got 1.0; allowed: above 1"),
        ({"min_ratio": 0.5, "direction_prompts": 0}, "min_ratio: got 0.5; allowed: above 1"),
        ({"min_ratio": float("nan")}, "min_ratio: got nan; allowed: above 1"),
        ({"prompts": []}, "prompts: got no prompt; allowed: "),
        ({"prompts": "text"}, "prompts: got text for a model without tokenizer; allowed: token ids"),
    ],
    ids=str,
)
def test_what_cannot_be_traced_is_refused_before_the_model_runs(options, reason):
    model = zoo.cached("llama")
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never), pytest.raises(ValueError, match=f"^{reason}"):
        trace_norms(model, **{"prompts": torch.ones(1, 4, dtype=torch.long), **options})


def test_a_stream_that_is_not_finite_is_refused_with_where_it_begins():
    model, prompts = zoo.build("gpt2"), ragged(zoo.VOCAB, (4, 6))
    token = int(prompts[1][3])

    def spoil(mlp_out, hook):
        return mlp_out.masked_fill((running["tokens"] == token).unsqueeze(-1), torch.inf)

    def see(tokens, hook):
        running["tokens"] = tokens

    running = {}
    hooks = [("embed.hook_in", see), ("blocks.1.hook_mlp_out", spoil)]
    first = next((number, place) for number, ids in enumerate(prompts) for place in range(len(ids)) if ids[place] == token)
    with model.hooks(fwd_hooks=hooks), pytest.raises(ValueError, match=r"^model: its residual stream is NaN or inf") as error:
        trace_norms(model, prompts)
    assert f"after block 1 (prompt {first[0]}, position {first[1]}); allowed: " in str(error.value)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_model_is_refused():
    for thing in (None, "gpt2", torch.nn.Linear(2, 2)):
        for analysis in (trace_norms, defect_direction):
            with pytest.raises(ValueError, match=f"^model: got {type(thing).__name__}; allowed: "):
                analysis(thing, torch.ones(1, 4, dtype=torch.long))


def made_up(norms, lengths, **other):
    """A trace with these norms (point, token) of prompts of these lengths."""
    norms = torch.tensor(norms, dtype=torch.float32)
    total = sum(lengths)
    return NormTrace(
        norms=norms,
        tokens=torch.arange(10, 10 + total),
        prompt=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)),
        position=torch.tensor([place for length in lengths for place in range(length)]),
        texts=tuple("abcdefghij"[:total]),
        **{"model_name": "made up", "d_model": 8, "n_blocks": len(norms) - 1, **other},
    )


def test_numbers_of_a_small_trace_by_hand():
    trace = made_up([[1, 2, 3, 4, 5], [50, 2, 4, 30, 8]], (3, 2))
    # The tokens after the first of their prompt are 2, 3, 5 and 2, 4, 8.
    assert trace.reference.tolist() == [3, 4]
    assert trace.ratios.tolist() == [pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3]), [12.5, 0.5, 1, 7.5, 2]]
    assert trace.high_norm().tolist() == [[False] * 5, [True, False, False, True, False]]
    assert trace.high_norm(7.5).tolist()[1] == [True, False, False, True, False]
    assert trace.high_norm(7.6).tolist()[1] == [True, False, False, False, False]
    assert not trace.high_norm(1.5)[0].any()  # after the embedding nothing has exploded yet
    frame = trace.to_dataframe()
    assert frame.columns.tolist() == ["prompt", "pos", "token", "id", "block", "norm", "ratio"]
    assert frame.to_numpy().tolist()[3:6] == [
        [1, 0, "d", 13, -1, 4.0, pytest.approx(4 / 3)],
        [1, 1, "e", 14, -1, 5.0, pytest.approx(5 / 3)],
        [0, 0, "a", 10, 0, 50.0, 12.5],
    ]
    assert trace.of_prompt(1).tolist() == [[4, 5], [30, 8]]
    assert repr(trace) == "NormTrace(made up: 5 tokens of 2 prompts, 1 of 1 blocks)"
    for prompt in (-1, 2):
        with pytest.raises(ValueError, match=f"^prompt: got {prompt}; allowed: 0 to 1"):
            trace.of_prompt(prompt)
        with pytest.raises(ValueError, match=f"^prompt: got {prompt}; allowed: 0 to 1"):
            trace.texts_of(prompt)


def test_prompts_of_one_token_have_nothing_to_be_compared_with():
    trace = trace_norms(zoo.cached("llama"), ragged(zoo.VOCAB, (1, 1)))
    assert torch.isnan(trace.reference).all()
    assert not trace.high_norm().any()
    with pytest.raises(ValueError, match=r"^trace: every prompt has one token only; allowed: "):
        find_defects(trace)


def same(one, other):
    """Whether two traces are equal to the bit."""
    ours, theirs = (vars(trace) | {"direction": None} for trace in (one, other))
    ours, theirs = ({k: v for k, v in side.items() if k != "reference"} for side in (ours, theirs))
    directions = [trace.direction and vars(trace.direction) | {"direction": None} for trace in (one, other)]
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(v, theirs[k]) if isinstance(v, torch.Tensor) else v == theirs[k] for k, v in ours.items())
        and directions[0] == directions[1]
        and (not one.direction or torch.equal(one.direction.direction, other.direction.direction))
    )


def test_a_saved_trace_comes_back_to_the_bit(tmp_path, planted_model):
    trace = trace_norms(planted_model.model, [*ragged(96, (9, 4)), torch.tensor([5, 96])])
    assert trace.direction is not None
    strange = ("é", "\n", '"', "日本", "\ud800", "", *trace.texts[6:])
    trace = NormTrace(**{**{k: v for k, v in vars(trace).items() if k != "reference"}, "texts": strange})
    trace.save(tmp_path / "trace.safetensors")
    again = NormTrace.load(tmp_path / "trace.safetensors")
    assert same(trace, again)
    assert repr(find_defects(again)) == repr(find_defects(trace))
    none = trace_norms(zoo.cached("llama"), ragged(zoo.VOCAB, (3,)), stop_at=2)
    none.save(str(tmp_path / "none"))
    assert same(none, NormTrace.load(str(tmp_path / "none")))


def test_a_file_without_a_trace_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"norms": torch.ones(2)}, tmp_path / "other.safetensors", metadata={"format": "pt"})
    save_file({"norms": torch.ones(2)}, tmp_path / "bare.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all, but long enough for a header")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    for name in ("other", "bare", "text", "empty"):
        with pytest.raises(ValueError, match=rf"^path: .*{name}\.safetensors holds no trace; allowed: a file written by"):
            NormTrace.load(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"^path: no file .*nowhere"):
        NormTrace.load(tmp_path / "nowhere")


def test_what_the_documentation_says_a_planted_model_shows():
    trace = trace_norms(planted().model, torch.arange(10).unsqueeze(0))
    assert points(6)[2] == "blocks.1.hook_resid_post"
    assert (trace.ratios > 1000).nonzero().tolist() == [[2, 0], [3, 0], [4, 0]]


def test_a_trace_cannot_be_saved_into_a_folder_that_is_not_there(planted_model, tmp_path):
    trace = trace_norms(planted_model.model, ragged(96, (5, 4)))
    for path in (tmp_path / "nowhere" / "trace.safetensors", tmp_path):
        with pytest.raises(ValueError, match=r"^path: got .*allowed"):
            trace.save(path)
