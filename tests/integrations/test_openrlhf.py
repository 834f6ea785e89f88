"""OpenRLHF: its actor's forward and its advantages, run from its own source. Run by make test-integrations.

deepspeed, flash-attn and vllm need a GPU to install: stand-ins let OpenRLHF's modules import. Nothing here calls them
but flash-attn's padding, which is written out.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import qempo_fast as qf

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is in .venv-integrations only: make test-integrations", allow_module_level=True)


def unpad_input(x: torch.Tensor, mask: torch.Tensor) -> tuple[Any, ...]:
    """flash_attn.bert_padding's: (total, ...) rows, their places, cu_seqlens, the longest, all tokens' number."""
    indices = mask.flatten().nonzero().flatten()
    lengths = mask.sum(-1, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[indices], indices, cu_seqlens, int(lengths.max()), lengths


def pad_input(x: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    return x.new_zeros(batch * seqlen, *x.shape[1:]).index_copy(0, indices, x).unflatten(0, (batch, seqlen))


def stand_in(name: str, **attributes: Any) -> None:
    module = sys.modules[name] = ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__dict__.update(attributes)
    parent, _, leaf = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], leaf, module)


@pytest.fixture(scope="module")
def modules() -> Iterator[SimpleNamespace]:
    before = set(sys.modules)
    padding = {"unpad_input": unpad_input, "pad_input": pad_input}
    take = lambda x, indices: x[indices]  # noqa: E731
    rearrange = lambda x, _: x.flatten(0, 1)  # noqa: E731
    stand_in("deepspeed")
    stand_in("flash_attn")
    stand_in("flash_attn.bert_padding", index_first_axis=take, rearrange=rearrange, **padding)
    stand_in("flash_attn.utils")
    stand_in("flash_attn.utils.distributed", all_gather=None)
    stand_in("openrlhf.trainer.ray")
    stand_in("openrlhf.trainer.ray.launcher", RayActorGroup=object)
    ours = importlib.import_module("qempo_fast.integrations.openrlhf")
    actor, maker = importlib.import_module(ours._ACTOR), importlib.import_module(ours._MAKER)
    kept = actor.Actor.forward, maker.RemoteExperienceMaker.compute_advantages_and_returns
    yield SimpleNamespace(actor=actor, maker=maker, ours=ours, forward=kept[0], compute=kept[1])
    actor.Actor.forward, maker.RemoteExperienceMaker.compute_advantages_and_returns = kept
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("deepspeed", "flash_attn", "openrlhf"):
            del sys.modules[name]


def make_actor(modules: SimpleNamespace, packing: bool, temperature: float) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, attn_implementation="eager", **sizes))
    actor = modules.actor.Actor(model, temperature=temperature)
    actor.packing_samples, actor.is_vlm = packing, False
    return actor


@pytest.mark.parametrize(("packing", "temperature"), [(False, 0.7), (False, 1.0), (True, 0.7)])
def test_the_actor_gives_openrlhfs_own_log_probs(
    modules: SimpleNamespace, packing: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 40, (3, 9), generator=generator)
    # Packed rows need flash-attn to tell sequences apart: one sequence, its padding taken out.
    ids = ids[:1] if packing else ids
    attention = (torch.arange(9) >= torch.tensor([2, 0, 4])[: len(ids), None]).long()
    actions = (torch.arange(4) < torch.tensor([4, 2, 3])[: len(ids), None]).bool()
    asked = {"action_mask": actions, "attention_mask": attention, "return_output": True, "return_entropy": True}
    results = []
    # OpenRLHF compiles its entropy; the function is the same.
    monkeypatch.setattr(modules.actor, "compute_entropy", inspect.unwrap(modules.actor.compute_entropy))
    for fused in (False, True):
        actor = make_actor(modules, packing, temperature)
        modules.actor.Actor.forward = modules.forward
        if fused:
            modules.ours.use_fused_logps()
            modules.ours.use_fused_logps()  # twice is once
        logps, output = actor(ids, **asked)
        (logps.sum() + 0.3 * output.entropy[attention[:, 1:].bool()].sum()).backward()
        results.append((logps, output, [p.grad for p in actor.parameters()]))
        every = actor(ids, attention_mask=attention, return_logprobs=True)
        assert every.shape == (len(ids), 8)
    (logps, output, grads), (ours, ours_output, our_grads) = results
    assert "logits" in output
    assert "logits" not in ours_output
    torch.testing.assert_close(ours, logps, rtol=1e-5, atol=1e-5)
    seen = attention[:, 1:].bool()
    torch.testing.assert_close(ours_output.entropy[seen], output.entropy[seen], rtol=1e-5, atol=1e-5)
    for a, b in zip(our_grads, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    logits = actor(ids, attention_mask=attention, return_output=True)["logits"]
    assert logits.shape[-1] == 40  # what asks for logits gets them


def test_float32_logits_and_batch_invariant_reach_the_actor(modules: SimpleNamespace) -> None:
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(1))
    asked = {"attention_mask": torch.ones_like(ids), "return_logprobs": True}
    modules.actor.Actor.forward = modules.forward
    actor = make_actor(modules, False, 1.0)
    actor.model.bfloat16()
    hidden = actor.model.model(ids).last_hidden_state[:, :-1]
    how = {"logits_dtype": torch.float32, "batch_invariant": True}
    wanted, rounded = (qf.linear_logps(hidden, actor.model.lm_head.weight, ids[:, 1:], **h).logps for h in (how, {}))
    assert not torch.equal(wanted, rounded)
    try:
        modules.ours.use_fused_logps(**how)
        assert torch.equal(actor(ids, **asked), wanted)
        assert actor._qempo_fused.options["batch_invariant"]
        actor.is_vlm = True
        with pytest.raises(ValueError, match=r"^batch_invariant: wanted False for a vision model"):
            actor(ids, **asked)
        actor(ids, attention_mask=asked["attention_mask"], return_output=True)  # logits have no promise
        modules.ours.use_fused_logps()
        actor(ids, **asked)
    finally:
        modules.ours.use_fused_logps()


K, PROMPTS = 4, 2


def experiences(modules: SimpleNamespace) -> list[Any]:
    """Rows of both prompts mixed over two experiences, as dynamic batches leave them."""
    generator = torch.Generator().manual_seed(2)
    out = []
    for index, width in (([0, 5, 2], 4), ([7, 1, 3, 6, 4], 6)):
        mask = torch.arange(width) < torch.randint(1, width + 1, (len(index), 1), generator=generator)
        logps, ref = -torch.rand(2, len(index), width, generator=generator)
        out.append(
            modules.maker.Experience(
                index=index, action_mask=mask, action_log_probs=logps * mask, base_action_log_probs=ref * mask,
                rewards=torch.rand(len(index), generator=generator), kl=torch.zeros(len(index), width), info={},
                response_length=mask.sum(1), truncated=torch.zeros(len(index)),
            )
        )  # fmt: skip
    return out


def maker(modules: SimpleNamespace, mode: str = "seq-mean-token-mean") -> Any:
    space = SimpleNamespace
    penalties = space(overlong_buffer_len=None, stop_properly_penalty_coef=None)
    args = space(
        rollout=space(n_samples_per_prompt=K, max_new_tokens=8), actor=space(loss_agg_mode=mode),
        algo=space(advantage=space(estimator="reinforce_baseline", gamma=1.0, no_std_norm=False)),
        reward=space(clip_range=None, **vars(penalties)),
    )  # fmt: skip
    made = object.__new__(modules.maker.RemoteExperienceMaker)
    made.strategy, made.advantage_estimator, made.kl_ctl = space(args=args), "reinforce_baseline", space(value=0.0)
    return made


@pytest.mark.parametrize(
    ("name", "settings", "loss"),
    [
        ("spl", {"alpha": 0.2, "beta": 0.1}, lambda x, f, r, kw: qf.spl_loss(x, f, r, group_size=K, **kw)),
        ("rspo", {"k": 2}, lambda x, f, r, kw: qf.rspo_loss(x, r, group_size=K, **kw)),
    ],
)
def test_advantages_give_the_group_losss_gradient_under_its_ppo_loss(
    modules: SimpleNamespace, name: str, settings: dict[str, Any], loss: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modules.maker, "apply_length_penalties", lambda *_: None)
    modules.maker.RemoteExperienceMaker.compute_advantages_and_returns = modules.compute
    modules.ours.use_group_loss(name, **settings)
    made = maker(modules)
    rows = made.compute_advantages_and_returns(experiences(modules))
    policy_loss = importlib.import_module("openrlhf.models.loss").PolicyLoss(token_level_loss=False)
    total, found, where = 0.0, [], []
    for e in rows:
        leaf = e.action_log_probs.clone().requires_grad_()
        part = policy_loss(leaf, e.action_log_probs, e.advantages, e.action_mask, global_batch_size=8)[0]
        total, found = total + part, [*found, leaf]
        where += e.index
    grads = torch.autograd.grad(total, found)
    order = torch.tensor(where).argsort()
    leaves = [e.action_log_probs.clone().requires_grad_() for e in rows]
    sums = [(x * e.action_mask).sum(1) for x, e in zip(leaves, rows, strict=True)]
    ref = torch.cat([(e.base_action_log_probs * e.action_mask).sum(1) for e in rows])[order]
    truth = loss(torch.cat(sums)[order], ref, torch.cat([e.rewards for e in rows])[order], settings)
    wanted = torch.autograd.grad(truth, leaves)
    assert max(float(g.abs().max()) for g in wanted) > 1e-3
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_bad_settings_raise(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^loss: wanted 'qempo' or"):
        modules.ours.use_group_loss("sppo")
    with pytest.raises(ValueError, match=r"^embed: wanted a function"):
        modules.ours.use_group_loss("dqo")
    modules.maker.RemoteExperienceMaker.compute_advantages_and_returns = modules.compute
    modules.ours.use_group_loss("rspo", k=2)
    with pytest.raises(ValueError, match=r"^actor.loss_agg_mode: wanted 'seq-mean-token-mean'"):
        maker(modules, "token-mean").compute_advantages_and_returns([])


def test_a_moved_hook_fails_loudly(modules: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modules.actor.Actor, "forward", lambda self, sequences: None)
    with pytest.raises(ImportError, match=r"wanted openrlhf.models.actor.Actor.forward.*got arguments \('self', "):
        modules.ours.use_fused_logps()
    monkeypatch.delattr(modules.actor, "gather_and_pad_tensor")
    with pytest.raises(ImportError, match=r"gather_and_pad_tensor.*no such name"):
        modules.ours.use_fused_logps()


def test_the_options_that_the_page_names_exist() -> None:
    """Read, not run: the command line needs vllm to import."""
    text = Path(importlib.util.find_spec("openrlhf").origin).with_name("cli").joinpath("train_ppo_ray.py").read_text()
    assert '"--actor.loss_agg_mode"' in text
    assert 'choices=["token-mean", "seq-mean-token-mean"]' in text
    assert '"--algo.kl.init_coef"' in text
    assert '"--algo.kl.use_loss"' in text
