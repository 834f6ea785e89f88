"""What has to survive fused_forward: copies, pickles, replicas, forwards that others wrapped, torch.compile."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import IDS, close, from_logits, gradients, logps, plain, rows, tiny
from test_integration_hf_checks import Masked, opt

import qempo_fast as qf
from qempo_fast.integrations.hf import FusedOutput, fused_forward, read_head

# ---- copies, pickles, replicas


def test_a_deep_copy_is_patched_on_its_own() -> None:
    model = tiny("llama")
    handle = fused_forward(model, temperature=0.7)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert float(logps(twin, IDS)[0, 1].detach()) == pytest.approx(-math.log(211), rel=1e-5)
    assert not torch.allclose(twin(input_ids=IDS).logits, model(input_ids=IDS).logits)
    handle.remove()
    assert isinstance(twin(input_ids=IDS, labels=IDS), FusedOutput)
    assert not isinstance(model(input_ids=IDS, labels=IDS), FusedOutput)
    fused_forward(twin).remove()  # a second patch leaves the first in place
    assert isinstance(twin(input_ids=IDS, labels=IDS), FusedOutput)


def test_a_pickle_is_patched() -> None:
    model = tiny("llama")
    handle = fused_forward(model, temperature=0.7, entropy=True)
    file = io.BytesIO()
    torch.save(model, file)
    handle.remove()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    out = loaded(input_ids=IDS, labels=IDS)
    assert out.entropy is not None
    with fused_forward(model, temperature=0.7):
        assert torch.equal(out.logps, logps(model, IDS))
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    assert not torch.equal(logps(loaded, IDS), out.logps)


def test_a_saved_model_is_plain(tmp_path: Path) -> None:
    model = tiny("qwen3")
    with fused_forward(model):
        wanted = logps(model, IDS)
        model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.Qwen3ForCausalLM
    close(plain(loaded, IDS), wanted)


def replica(model: Any) -> Any:
    """A replica as nn.DataParallel makes it on another GPU: plain tensors for weights, and the same __dict__."""
    made = {name: module._replicate_for_data_parallel() for name, module in model.named_modules()}
    for name, module in model.named_modules():
        copied = made[name]
        for key in module._modules:
            copied._modules[key] = made[f"{name}.{key}".lstrip(".")]
        copied._parameters = {}
        for key, p in module._parameters.items():
            setattr(copied, key, None if p is None else 0.5 * p)
    return made[""]


def test_a_replica_runs_on_its_own_weights() -> None:
    model = tiny("llama")
    with fused_forward(model):
        other = replica(model)
        close(logps(other, IDS), plain(other, IDS))
        assert not torch.allclose(logps(other, IDS), logps(model, IDS), atol=1e-2)
        logps(other, IDS).sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# ---- forwards that others wrapped


def prepared(model: Any, precision: str = "bf16") -> Any:
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    return accelerate.Accelerator(mixed_precision=precision, cpu=True).prepare(model)


@pytest.mark.parametrize(
    "order", ["prepare, fused", "fused, prepare", "prepare, fused, prepare", "fused, prepare, fused"]
)
def test_accelerates_autocast_is_kept(order: str) -> None:
    ids, mask, labels = rows()
    model = tiny("llama")
    with torch.autocast("cpu", torch.bfloat16):
        wanted = from_logits(model(input_ids=ids, attention_mask=mask).logits.float(), labels)[0]
    exact = from_logits(model(input_ids=ids, attention_mask=mask).logits, labels)[0]
    seen: list[torch.dtype] = []
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    handles = []
    for step in order.split(", "):
        if step == "fused":
            handles.append(fused_forward(model, grad="exact"))
        else:
            model = prepared(model)
    for twin in (model, copy.deepcopy(model)):
        seen.clear()
        out = twin(input_ids=ids, attention_mask=mask, labels=labels)
        assert isinstance(out, FusedOutput)
        twin(input_ids=ids, attention_mask=mask)
        assert seen == [torch.bfloat16] * 2
        assert out.logps.dtype == torch.float32
        assert (out.logps - wanted).abs().max() < 0.2 * (wanted - exact).abs().max() + 0.05
        assert (out.logps - exact).abs().max() > 1e-4
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert not twin(input_ids=ids, attention_mask=mask).logits.any()  # a copy answers with its own weights
    for handle in handles:
        handle.remove()
    seen.clear()
    assert not isinstance(model(input_ids=ids, labels=labels), FusedOutput)
    assert seen == [torch.bfloat16]
    assert "_qempo_patches" not in model.__dict__


def test_unwrapping_after_accelerate_leaves_the_patch() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    fused_forward(model)
    wanted = logps(model, IDS)
    model = prepared(model)
    bare = accelerate.utils.extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(logps(bare, IDS), wanted)
    assert bare(input_ids=IDS).logits.dtype == torch.float32


def test_heads_that_accelerate_places_or_offloads() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny("llama")
    wanted = plain(model, IDS)
    placed = accelerate.dispatch_model(copy.deepcopy(model), {"": "cpu"}, force_hooks=True)
    assert "forward" in placed.lm_head.__dict__
    with fused_forward(placed):
        close(logps(placed, IDS), wanted)
    # Layers on the meta device, brought to memory by accelerate when they run: checked at the first call.
    hooked = copy.deepcopy(model)
    accelerate.cpu_offload(hooked.model.layers, execution_device=torch.device("cpu"))
    assert next(hooked.model.layers.parameters()).is_meta
    with fused_forward(hooked):
        close(logps(hooked, IDS), wanted)
    odd = Masked(model.config).eval()
    accelerate.cpu_offload(odd.model.layers, execution_device=torch.device("cpu"))
    with fused_forward(odd), pytest.raises(ValueError, match="scaled and capped, got Masked"):
        logps(odd, IDS)
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model: wanted an output head in memory, got one that accelerate offloads"):
        fused_forward(offloaded)


def test_peft_heads() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, lora)
    with torch.no_grad():
        tuned.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    with fused_forward(tuned):
        out = tuned(input_ids=IDS, labels=IDS)
        close(out.logps, plain(tuned, IDS))
        out.loss.backward()
        assert tuned.base_model.model.lm_head.modules_to_save["default"].weight.grad is not None
        with tuned.disable_adapter():
            close(logps(tuned, IDS), plain(tuned, IDS))
        assert not torch.allclose(logps(tuned, IDS), tuned.base_model(input_ids=IDS, labels=IDS).logps * 1.5)


# ---- outputs


def test_tuples_and_what_else_the_call_asks_for() -> None:
    model = tiny("llama")
    model.set_attn_implementation("eager")
    with fused_forward(model, entropy=True):
        out = model(input_ids=IDS, labels=IDS, output_hidden_states=True, output_attentions=True)
        asked = model(input_ids=IDS, labels=IDS, return_dict=False)
    own = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    for x, y in zip(out.hidden_states + out.attentions, own.hidden_states + own.attentions, strict=True):
        assert torch.equal(x, y)
    assert isinstance(asked, tuple)
    assert all(torch.equal(x, y) for x, y in zip(asked, (out.loss, out.logps, out.entropy), strict=True))


def test_wrong_shapes_are_named() -> None:
    model = tiny("llama")
    with fused_forward(model):
        with pytest.raises(ValueError, match=r"labels: wanted shape \(2, 9\), as the head's input has, got \(2, 8\)"):
            model(input_ids=IDS, labels=IDS[:, 1:])
        with pytest.raises(ValueError, match=r"shift_labels: wanted shape \(2, 9\)"):
            model(input_ids=IDS, shift_labels=IDS[:, 1:])
        with pytest.raises(ValueError, match=r"labels: wanted shape \(2, 1\)"):
            model(input_ids=IDS, labels=IDS, logits_to_keep=1)
        with pytest.raises(TypeError, match="forward: wanted at most 8 arguments without their names, got 9"):
            model(*[None] * 9)


def test_trainer_refuses_to_take_log_probs_for_predictions(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = tiny("llama")
    args = transformers.TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(
        model, args, eval_dataset=data, compute_metrics=lambda e: {"v": e.predictions.shape[-1]}
    )
    with fused_forward(model):
        with pytest.raises(ValueError, match="compute_metrics: wanted None, or prediction_loss_only=True"):
            trainer.evaluate()
        with pytest.raises(ValueError, match="compute_metrics: wanted None"):
            trainer.predict(data)
        trainer.compute_metrics = None
        loss = trainer.evaluate()["eval_loss"]
    wanted = model(input_ids=IDS, labels=IDS).loss
    assert loss == pytest.approx(float(wanted.detach()), rel=1e-4)
    assert trainer.predict(data).predictions.shape == (2, 9, 211)


# ---- torch.compile


def test_compiled_in_one_graph() -> None:
    config = copy.deepcopy(tiny("llama").config)
    config.num_hidden_layers = 1
    model = transformers.LlamaForCausalLM(config).eval()
    packed, cu_seqlens = IDS.reshape(1, -1), torch.tensor([0, 9, 18])
    with fused_forward(model) as handle:
        wanted = logps(model, packed, cu_seqlens=cu_seqlens)
        grads = gradients(model, wanted, wanted)
        handle.check(packed=True)
        torch.compiler.reset()
        got = logps(torch.compile(model, backend="eager", fullgraph=True), packed, cu_seqlens=cu_seqlens)
        close(got, wanted)
        for key, grad in gradients(model, got, got).items():
            close(grad, grads[key])


def test_the_first_packed_row_may_be_a_compiled_one() -> None:
    """The graph breaks for the check."""
    model = opt()
    with fused_forward(model), pytest.raises(ValueError, match="cu_seqlens: wanted one sequence"):
        logps(torch.compile(model, backend="eager"), IDS.reshape(1, -1) % 50, cu_seqlens=torch.tensor([0, 9, 18]))


def test_read_head_reads_what_is_there() -> None:
    model = tiny("phi")
    head = read_head(model)
    assert head.weight is model.lm_head.weight
    assert head.bias is model.lm_head.bias
    got = qf.linear_logps(torch.randn(2, 32), head.weight, IDS[:, 0], bias=head.bias).logps
    assert got.shape == (2,)
