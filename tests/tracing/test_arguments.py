import re

import pytest
from shared import planted

from sd_lens.tracing.arguments import require_block, require_blocks
from sd_lens.tracing.delimiters import token_pathways
from sd_lens.tracing.pathways import scan_vocabulary
from sd_lens.tracing.repetition import repeated_tokens
from sd_lens.tracing.super_weights import super_weights


@pytest.mark.parametrize("block", [6, -1, True, 1.0, "explosion", None])
def test_what_is_no_block_is_refused(block):
    with pytest.raises(ValueError, match=rf"^block: got {re.escape(repr(block))}; allowed: 0 to 5$"):
        require_block(block, 6)
    require_block(5, 6)
    require_block("explosion", 6, names=("explosion",))


def test_several_blocks():
    assert require_blocks(range(2), 6, otherwise="or None") == [0, 1]
    with pytest.raises(ValueError, match=r"^blocks: got 2; allowed: some of 0 to 5, or None$"):
        require_blocks(2, 6, otherwise="or None")
    with pytest.raises(ValueError, match=r"^blocks: got 6; allowed: 0 to 5$"):
        require_blocks([1, 6], 6, otherwise="or None")


@pytest.mark.usefixtures("as_users_run_it")
def test_analyses_ask_before_any_work():
    model = planted().model
    never = [("blocks.0.hook_resid_pre", lambda stream, hook: pytest.fail("the model was run"))]
    with model.hooks(fwd_hooks=never):
        for run in (scan_vocabulary, token_pathways, repeated_tokens):
            with pytest.raises(ValueError, match=r"^block: got 'explosion'; allowed: 0 to 5$"):
                run(model, block="explosion")
        for blocks in (2, [True], [6]):
            with pytest.raises(ValueError, match=r"^blocks: got (2|True|6); allowed: "):
                super_weights(model, blocks=blocks)
