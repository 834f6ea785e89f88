"""docs/integrations/architectures.md says what fused_forward does: some of each verdict here, all on request."""

from __future__ import annotations

import os
import re

import hf_architectures
import pytest
import torch
import transformers
from hf_architectures import MIXED, PAGE, REASONS, RIGHT, SHIFTED, classes, row, verdict

from qempo_fast.integrations.hf import fused_forward

# At least one class of each verdict; of those that mix sequences one by attention and one by its state.
SLICE = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"),
    *("OPTForCausalLM", "MambaForCausalLM", "Lfm2ForCausalLM", "BartForCausalLM", "WhisperForCausalLM"),
    *(
        "BertLMHeadModel",
        "Cohere2VisionForConditionalGeneration",
        "XLMWithLMHeadModel",
        "Blip2ForConditionalGeneration",
    ),
    *("BlipForConditionalGeneration", "IdeficsForVisionText2Text", "Pix2StructForConditionalGeneration"),
)
TEXT = PAGE.read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (`(\w+)` \|.*)$", TEXT, re.MULTILINE))
ROWS = {name: f"| {line}" for line, name in ROWS.items()}
VERSION = re.search(r"of transformers ([\w.]+)\.\n", TEXT)[1]  # type: ignore[index]
same_version = pytest.mark.skipif(
    transformers.__version__ != VERSION, reason=f"the page is of transformers {VERSION}: write it again"
)


def test_the_slice_has_every_verdict_of_the_page() -> None:
    found = {tuple(part.strip() for part in line.split("|")[3:5]) for line in ROWS.values()}
    here = {tuple(part.strip() for part in ROWS[name].split("|")[3:5]) for name in SLICE}
    assert found == here
    assert {log_probs for log_probs, _ in found} == {RIGHT, SHIFTED, *(f"refused: {why}" for why in REASONS.values())}
    assert {packed for _, packed in found} == {RIGHT, MIXED, ""}


@same_version
def test_the_page_has_every_class_once() -> None:
    others = re.findall(r"^- `(\w+)`$", TEXT, re.MULTILINE)
    assert sorted([*ROWS, *others]) == list(classes())
    assert len(ROWS) > 220


@same_version
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLICE)
def test_a_row_of_the_page(name: str) -> None:
    found = verdict(name, classes()[name])
    assert found is not None
    assert row(found) == ROWS[name]


def test_a_decoder_of_berts_kind_is_refused_without_is_decoder() -> None:
    model = hf_architectures.make("bert", "BertLMHeadModel")
    config = model.config
    config.is_decoder = False
    with pytest.raises(ValueError, match="model: wanted a causal model, whose hidden states do not depend on later"):
        fused_forward(transformers.BertLMHeadModel(config))


@same_version
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.environ.get("QEMPO_ARCHITECTURES") != "all", reason="two minutes: QEMPO_ARCHITECTURES=all")
def test_the_whole_page() -> None:
    torch.manual_seed(0)
    wanted = "python -P tests/hf_architectures.py --write"
    assert hf_architectures.page() == TEXT, wanted
