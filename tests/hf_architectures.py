"""Every causal language model of transformers, tiny and random: how each is made, and what fused_forward says of it.

HF_HUB_OFFLINE=1 .venv/bin/python -P tests/hf_architectures.py --write     # all, into the page: five minutes
HF_HUB_OFFLINE=1 .venv/bin/python -P tests/hf_architectures.py llama opt   # some, printed
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qempo_fast.integrations.hf import fused_forward

PAGE = Path(__file__).resolve().parents[1] / "docs" / "integrations" / "architectures.md"
# The classes that the registry has for causal language models and for text from images, by model type.
CAUSAL = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
IMAGES = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

VOCABULARY = 96
LAYERS, HEADS, GROUPS, HEAD, WIDTH, INNER, CONTEXT, EXPERTS = 4, 4, 2, 8, 32, 48, 128, 4


def _each(value: int, *names: str) -> dict[str, int]:
    return dict.fromkeys(names, value)


# Sizes by the names that configs have for them.
SIZES: dict[str, Any] = {
    **_each(
        VOCABULARY, "vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "encoder_hash_byte_group_vocab"
    ),
    **_each(LAYERS, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"),
    **_each(LAYERS, "num_encoder_layers", "num_decoder_layers", "num_blocks", "depth", "vision_layers"),
    **_each(HEADS, "num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "linear_num_heads"),
    **_each(HEADS, "encoder_attention_heads", "decoder_attention_heads", "num_encoder_attention_heads"),
    **_each(HEADS, "num_decoder_attention_heads", "mamba_n_heads", "mamba_num_heads", "swa_num_attention_heads"),
    **_each(HEADS, "index_n_heads", "linear_num_value_heads"),
    **_each(GROUPS, "num_key_value_heads", "num_kv_heads", "num_query_groups", "swa_num_key_value_heads"),
    **_each(GROUPS, "linear_num_key_heads"),
    **_each(
        HEAD, "head_dim", "dim_head", "kv_channels", "d_head", "attention_head_size", "linear_head_dim", "swa_head_dim"
    ),
    **_each(HEAD, "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "linear_key_head_dim", "linear_value_head_dim"),
    **_each(HEAD, "rotary_dim", "global_head_dim", "d_rel", "index_head_dim"),
    **_each(2 * HEAD, "qk_head_dim", "attention_head_dim", "mamba_d_head", "mamba_head_dim", "mamba_headdim"),
    **_each(WIDTH, "hidden_size", "d_model", "n_embd", "emb_dim", "embedding_size", "embedding_dim", "dim_model_base"),
    **_each(WIDTH, "word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "attention_hidden_size"),
    **_each(WIDTH, "lru_width", "projection_dim", "hc_lowrank", "ple_embed_dim", "embed_dim", "out_hidden_size"),
    **_each(
        INNER, "intermediate_size", "moe_intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "dff"
    ),
    **_each(INNER, "dim_ff", "ffn_hidden_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"),
    **_each(INNER, "shared_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size", "feed_forward_size"),
    **_each(INNER, "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size", "d_inner", "n_inner"),
    **_each(CONTEXT, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
    **_each(CONTEXT, "max_target_positions", "model_max_length", "original_max_position_embeddings"),
    **_each(CONTEXT, "sliding_window", "window_size", "attention_chunk_size", "local_attention", "sliding_window_size"),
    **_each(EXPERTS, "num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"),
    **_each(
        2,
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "zero_expert_num",
        "num_experts_per_token",
        "first_k_dense_replace",
    ),
    **_each(1, "n_group", "topk_group", "n_shared_experts", "num_nextn_predict_layers"),
    **_each(16, "kv_lora_rank", "q_lora_rank", "mamba_d_state", "ssm_state_size", "state_size", "time_step_rank"),
    **_each(16, "mamba_dt_rank", "hidden_size_per_layer_input", "laurel_rank", "o_lora_rank", "adapter_rank"),
    **_each(16, "router_hidden_size", "gated_norm_rank", "pronunciation_embed_dim", "shape_embed_dim"),
    **_each(16, "pronunciation_vocab_size", "shape_vocab_size", "patch_size", "prompt_mid_dim"),
    **_each(32, "image_size", "num_mel_bins"),
    **_each(8, "chunk_size", "mamba_chunk_size", "index_topk", "block_size"),
    "max_window_layers": 1,
    "max_source_positions": 32,
    "rel_extent": 32,
    "query_pre_attn_scalar": HEAD,
    "num_kv_shared_layers": 0,
    "layer_types": None,
    "mlp_layer_types": None,
}
# What the names above do not say, by model type, and by the part of its config.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91, "IMGIMGB": 92}},
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16, "n_groups": 2},
    "mistral4": {"head_dim": 16},
    "nemotron_h": {"n_groups": 2},
    "xmod": {"default_language": "en_XX"},
    "glm46v.text_config": _SECTIONS,
    "glm4v.text_config": _SECTIONS,
    "glm4v_moe.text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 0]}},
    "glm_ocr.text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}, "head_dim": 8},
    "paddleocr_vl.text_config": _SECTIONS,
    "qwen2_5_omni_thinker.text_config": _SECTIONS,
    "qwen2_5_vl.text_config": _SECTIONS,
    "qwen2_vl.text_config": _SECTIONS,
    "step3p7.text_config": {"sliding_window": CONTEXT},
}


# They want an image, a language or another model's states with each call.
NEEDS_MORE = {
    *("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration", "Kosmos2ForConditionalGeneration"),
    *("InstructBlipVideoForConditionalGeneration", "HunYuanVLForConditionalGeneration"),
    *("Florence2ForConditionalGeneration", "Pix2StructForConditionalGeneration", "UdopForConditionalGeneration"),
    *("PPFormulaNetForConditionalGeneration", "T5Gemma2ForConditionalGeneration", "VisionEncoderDecoderModel"),
    *("BlipForConditionalGeneration", "PI0ForConditionalGeneration", "IdeficsForVisionText2Text"),
}
HEAD = """# Architectures

After this page you know what `fused_forward` makes of each causal language model of transformers {version}.

Each was made small, four layers with random weights in float32, and patched as [transformers](transformers.md) says.
Where the table says right, log-probs equal those of the model's own logits, and those of packed rows equal the same
rows apart. What is refused raises, with the reason: at the patch, at a call with labels, or at the first packed row.
The same checks run on **your** model: a config that the table does not know, other attention kernels or code of your
own are looked at then, not looked up here.

Of {n} classes {right} have right log-probs from `labels`, and {packed} right packed rows. "With `shift_labels`": the
model's own loss does not shift its labels; calls with `labels` raise, calls with `shift_labels` are right. Decoders of
BERT's kind are here with `is_decoder=True` in their config; without it their hidden states depend on later tokens, and
they are refused.

| class | model types | log-probs | packed rows |
|---|---|---|---|
"""


class Verdict(NamedTuple):
    """What fused_forward says of a class of models; ``packed`` is empty where log-probs are refused."""

    name: str
    log_probs: str
    packed: str


RIGHT, SHIFTED, MIXED = "right", "right with `shift_labels`", "refused: it mixes the sequences"
# What an error of fused_forward says, in the words of the page.
REASONS = {
    "whose labels are its input's next tokens": "an encoder-decoder, whose labels are not its input",
    "output embeddings": "no output head to be found",
    "computes as torch.nn.Linear does": "its head is no `torch.nn.Linear`",
    "runs on token ids": "it does not run on token ids alone",
    "scaled and capped": "its logits are not its head's, scaled and capped",
    "do not depend on later tokens": "its hidden states depend on later tokens",
}


def shrink(config: Any, path: str) -> Any:
    """The same kind of config with small sizes. Lists by layer are left to what the config makes of the sizes."""
    given: dict[str, Any] = {}
    values = config.to_dict()
    for key, value in values.items():
        part = vars(config).get(key)
        if isinstance(part, transformers.PretrainedConfig):
            given[key] = shrink(part, f"{path}.{key}")
        elif key in SIZES and (type(value) is int or (value is None and key in ("head_dim", "num_key_value_heads"))):
            given[key] = SIZES[key] if value is None else min(value, SIZES[key])
        elif key == "is_decoder" and not config.is_encoder_decoder:
            given[key] = True
        elif re.search(r"(bos|eos|pad|sep|cls|start)_token_id$", key):
            given[key] = {"pad": 0, "bos": 1}.get(key[:3], 2)
        elif key.endswith(("_token_id", "_token_index")) and isinstance(value, int):
            given[key] = 90 + len(given) % 6
        elif isinstance(value, dict) and "mrope_section" in value:
            given[key] = {**value, "mrope_section": [2, 1, 1]}
    if "kv_lora_rank" in values:
        given["num_key_value_heads"] = HEADS
    return type(config)(**given | EXTRA.get(path, {}))


def make(model_type: str, name: str) -> Any:
    """A tiny model with random weights of the size that keeps hidden states and logits near 1."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    config = CONFIG_MAPPING[model_type]()
    # One name of the registry may stand for a config of several parts, of which the class takes the text's.
    if kind.config_class is not type(config) and hasattr(config, "text_config"):
        config = config.text_config
    model = kind(shrink(config, model_type)).float().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.normal_(std=module.weight.shape[-1] ** -0.5)
    return model


def logps(model: Any, ids: torch.Tensor, shifted: bool, **kwargs: Any) -> torch.Tensor:
    """(B, L - 1) log-probs of all tokens but the first."""
    found: torch.Tensor
    if shifted:
        labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
        found = model(input_ids=ids, shift_labels=labels, **kwargs).logps[:, :-1]
    else:
        found = model(input_ids=ids, labels=ids, **kwargs).logps[:, 1:]
    return found


def judge(model: Any) -> Verdict:
    """What fused_forward says of a model. What it lets pass is compared with the logits path, and packed with apart."""
    name = type(model).__name__
    try:
        handle = fused_forward(model)
    except (TypeError, ValueError) as error:
        return Verdict(name, f"refused: {next(why for said, why in REASONS.items() if said in str(error))}", "")
    ids = torch.randint(3, 80, (2, 11), generator=torch.Generator().manual_seed(7))
    packed, shifted = RIGHT, False
    with handle, torch.no_grad():
        try:
            logps(model, ids, shifted)
        except ValueError as error:
            shifted = said(error, "labels: wanted None and shift_labels")
        apart = logps(model, ids, shifted)
        try:
            handle.check(packed=True)
        except ValueError as error:
            packed = MIXED if said(error, "cu_seqlens: wanted one sequence") else ""
        else:
            together = logps(model, ids.reshape(1, -1), shifted, cu_seqlens=torch.tensor([0, 11, 22]))
            together = torch.nn.functional.pad(together, (1, 0)).view(2, 11)[:, 1:]
            torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
        plain = (
            model(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        )
        torch.testing.assert_close(apart, plain, rtol=1e-4, atol=1e-4)
    return Verdict(name, SHIFTED if shifted else RIGHT, packed)


def said(error: Exception, start: str) -> bool:
    """True; another error is none of a verdict."""
    if not str(error).startswith(start):
        raise error
    return True


def classes() -> dict[str, list[str]]:
    """Classes of the registry, each with its model types."""
    found: dict[str, set[str]] = {}
    for names in (CAUSAL, IMAGES):
        for model_type, name in names.items():
            found.setdefault(name, set()).add(model_type)
    return {name: sorted(types) for name, types in sorted(found.items())}


def verdict(name: str, model_types: list[str]) -> Verdict | None:
    """Of the first of its model types that this file can make small, or None."""
    for model_type in model_types:
        try:
            model = make(model_type, name)
            if name not in NEEDS_MORE:
                model(input_ids=torch.arange(3, 19)[None], use_cache=False)
        except Exception:
            logging.getLogger(__name__).info("%s as %s", name, model_type, exc_info=True)
        else:
            return judge(model)
    return None


def row(found: Verdict) -> str:
    return f"| `{found.name}` | {', '.join(classes()[found.name])} | {found.log_probs} | {found.packed} |"


def page() -> str:
    """The page, of all architectures."""
    verdicts = {name: verdict(name, types) for name, types in classes().items()}
    made = [found for found in verdicts.values() if found is not None]
    right, packed = (sum(getattr(v, key) == RIGHT for v in made) for key in ("log_probs", "packed"))
    head = HEAD.format(version=transformers.__version__, n=len(made), right=right, packed=packed)
    others = "\n".join(f"- `{name}`" for name, found in verdicts.items() if found is None)
    return head + "\n".join(map(row, made)) + f"\n\nNot made small here, so not tried:\n\n{others}\n"


def main() -> None:
    warnings.simplefilter("ignore")
    if sys.argv[1:] == ["--write"]:
        logging.disable(logging.CRITICAL)
        PAGE.write_text(page(), encoding="utf-8")
        return
    logging.basicConfig(level=logging.INFO)
    for name, types in classes().items():
        if name in sys.argv or set(types) & set(sys.argv):
            print(verdict(name, types))


if __name__ == "__main__":
    main()
