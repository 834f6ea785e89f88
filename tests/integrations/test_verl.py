"""verl: registries, estimators, the policy loss, and the fused slots' contracts. Run by make test-integrations."""

from __future__ import annotations

import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import qempo_fast as qf

pytest.importorskip("verl", reason="verl is in .venv-integrations only: make test-integrations")

import verl.models.transformers.dense_common as dense_common
import verl.utils.experimental.torch_functional as torch_slot
from omegaconf import OmegaConf
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.trainer.ppo import core_algos
from verl.utils.kernel import linear_cross_entropy as triton_slot

# verl's own, before the module under test takes their place.
VERL_GDPO = core_algos.compute_gdpo_outcome_advantage
VERL_FUSED = torch_slot.FusedLinearForPPOFunction

from qempo_fast.integrations import verl as ours  # noqa: E402

S, T, K = 8, 5, 4
UIDS = np.array(["b", "a", "b", "a", "a", "b", "b", "a"], dtype=object)


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(T) < torch.tensor([5, 3, 4, 1, 2, 5, 4, 3])[:, None]).long()
    logps = -torch.rand(2, S, T, generator=generator)
    rewards = torch.zeros(S, T).index_put((torch.arange(S), mask.sum(1) - 1), torch.rand(S, generator=generator))
    return {"old_log_probs": logps[0], "ref_log_prob": logps[1], "response_mask": mask, "token_level_rewards": rewards}


def estimate(settings: dict[str, Any] | None, data: dict[str, torch.Tensor], **extra: Any) -> torch.Tensor:
    """As verl's compute_advantage calls it."""
    config = OmegaConf.create({"gamma": 1.0, "lam": 1.0, **({"qempo_fast": settings} if settings else {})})
    advantages, returns = core_algos.get_adv_estimator_fn("gdpo")(
        token_level_rewards=data["token_level_rewards"], response_mask=data["response_mask"], config=config,
        index=UIDS, non_tensor_batch={"uid": UIDS, **extra}, batch=data,
    )  # fmt: skip
    assert torch.equal(advantages, returns)
    return advantages


LOSSES: list[tuple[str, dict[str, Any], Any]] = [
    ("spl", {"alpha": 0.2, "beta": 0.1}, lambda x, f, r, e, kw: qf.spl_loss(x, f, r, group_size=K, **kw)),
    ("qempo", {"lam": 5.0}, lambda x, f, r, e, kw: qf.qempo_loss(x, r, group_size=K, **kw)),
    ("qempo_kl", {"lam": 5.0, "mu": 2.0}, lambda x, f, r, e, kw: qf.qempo_kl_loss(x, f, r, group_size=K, **kw)),
    ("gvpo", {"beta": 0.2}, lambda x, f, r, e, kw: qf.gvpo_loss(x, f, r, group_size=K, **kw)),
    ("rspo", {"k": 2}, lambda x, f, r, e, kw: qf.rspo_loss(x, r, group_size=K, **kw)),
    ("dqo", {"alpha": 0.5}, lambda x, f, r, e, kw: qf.dqo_loss(x, r, e, group_size=K, **kw)),
]


@pytest.mark.parametrize(("name", "settings", "loss"), LOSSES, ids=[row[0] for row in LOSSES])
def test_estimator_and_policy_loss_have_the_group_losss_gradient(name: str, settings: dict, loss: Any) -> None:
    data = batch()
    mask = data["response_mask"]
    embeddings = torch.randn(S, 6, generator=torch.Generator().manual_seed(1))
    extra = {ours.EMBEDDING: np.array([*embeddings.numpy(), None], dtype=object)[:-1]} if name == "dqo" else {}
    advantages = estimate({"loss": name, **settings}, data, **extra)
    tokens = data["old_log_probs"].clone().requires_grad_()
    config = type("Actor", (), {"global_batch_info": {"dp_size": 1, "global_batch_size": S}})()
    found, metrics = core_algos.get_policy_loss_fn("qempo_sequence")(
        old_log_prob=data["old_log_probs"], log_prob=tokens, advantages=advantages, response_mask=mask.bool(),
        loss_agg_mode="token-mean", config=config, rollout_is_weights=None,
    )  # fmt: skip
    found.backward()
    assert metrics == {"actor/ppo_kl": 0.0}
    order = torch.from_numpy(np.argsort(UIDS, kind="stable"))
    leaf = data["old_log_probs"].clone().requires_grad_()
    sums = [(x * mask).sum(1)[order] for x in (leaf, data["ref_log_prob"], data["token_level_rewards"])]
    loss(*sums, embeddings[order], settings).backward()
    assert leaf.grad.abs().max() > 1e-3
    torch.testing.assert_close(tokens.grad, leaf.grad, rtol=1e-5, atol=1e-7)


def test_without_our_section_gdpo_is_verls_own() -> None:
    data = batch()
    given = {"token_level_rewards": data["token_level_rewards"], "response_mask": data["response_mask"], "index": UIDS}
    given |= {"config": OmegaConf.create({"gamma": 1.0})}
    for a, b in zip(core_algos.get_adv_estimator_fn("gdpo")(**given), VERL_GDPO(**given), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("settings", "drop", "message"),
    [
        ({"loss": "sppo"}, None, "^loss: wanted 'qempo' or"),
        ({"loss": "spl", "alpha": 0.1, "beta": 0.1}, "ref_log_prob", "^ref_logps: "),
        ({"loss": "qempo", "lam": 2.0}, "old_log_probs", "^batch: wanted old_log_probs"),
        ({"loss": "dqo"}, None, "^embeddings: wanted one row for each response"),
    ],
)
def test_bad_settings_raise(settings: dict, drop: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(settings, {name: x for name, x in batch().items() if name != drop})


@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_the_triton_slots_contract(shape: tuple[int, ...]) -> None:
    """Labels of one or two dimensions; flat float32 outputs, both differentiable; verl's kernel itself needs CUDA."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, 16, generator=generator).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).requires_grad_()
    labels = torch.randint(0, 50, shape, generator=generator)
    logps, entropy = triton_slot.linear_cross_entropy(hidden, weight, labels, 0.7, "none")
    assert logps.shape == entropy.shape == (6,)
    assert logps.dtype == entropy.dtype == torch.float32
    truth, plain = VERL_FUSED.apply(hidden, weight, labels, 0.7, 512)
    torch.testing.assert_close(logps, truth.reshape(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, plain.reshape(-1), rtol=1e-5, atol=1e-5)
    incoming = torch.linspace(-1, 1, 6)
    grads = [
        torch.autograd.grad((a.reshape(-1) * incoming + b.reshape(-1) * incoming.flip(0)).sum(), (hidden, weight))
        for a, b in ((logps, entropy), (truth, plain))
    ]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    per_token = torch.full(shape, 0.7)
    assert torch.equal(triton_slot.linear_cross_entropy(hidden, weight, labels, per_token)[0], logps)
    with pytest.raises(ValueError, match=r"^reduction: wanted 'none'"):
        triton_slot.linear_cross_entropy(hidden, weight, labels, 1.0, "mean")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_verls_own_forward_runs_through_the_slots(backend: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 40}
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(num_attention_heads=2, num_key_value_heads=1, **sizes))
    ids = torch.randint(0, 40, (1, 9))
    forward = getattr(dense_common, f"forward_with_{backend}_backend")
    out = forward(model, input_ids=ids, temperature=0.9, return_dict=True)
    z = model(input_ids=ids).logits / 0.9
    labels = ids.roll(-1, -1)
    truth = z.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(out.log_probs.reshape(-1), truth.reshape(-1), rtol=1e-5, atol=1e-5)
    assert out.log_probs.shape == ((9,) if backend == "triton" else (1, 9))


def test_the_gradient_of_the_slots_can_be_made_exact() -> None:
    """In bfloat16 two equal calls give two gradients, unless the generator is set before each, or grad is "exact"."""
    g = torch.Generator().manual_seed(0)
    weight, labels = torch.randn(4000, 16, generator=g).bfloat16(), torch.arange(40)
    hidden = weight[:40].clone().requires_grad_()

    def gradient(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        logps, entropy = triton_slot.linear_cross_entropy(hidden, weight, labels)
        return torch.autograd.grad(logps.sum() + entropy.sum(), hidden)[0]

    try:
        ours.use_fused_logps(tau=0.1)
        assert not torch.equal(gradient(1), gradient(2))
        assert torch.equal(gradient(1), gradient(1))
        ours.use_fused_logps(grad="exact")
        assert torch.equal(gradient(1), gradient(2))
        with pytest.raises(ValueError, match=r"^grad: wanted 'auto'"):
            ours.use_fused_logps(grad="some")
        with pytest.raises(ValueError, match=r"^tau: wanted None"):
            ours.use_fused_logps(grad="exact", tau=0.1)
    finally:
        ours.use_fused_logps()


def test_float32_logits_and_a_rows_bits_reach_the_slots() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(300, 16, generator=g), torch.randn(5000, 16, generator=g)
    labels = torch.randint(5000, (300,), generator=g)
    half = (hidden.bfloat16(), weight.bfloat16(), labels)
    wanted = qf.linear_logps(*half, logits_dtype=torch.float32, entropy=True)
    slots = (triton_slot.linear_cross_entropy, lambda *x: torch_slot.FusedLinearForPPO()(*x))
    try:
        for how in ({}, {"logits_dtype": torch.float32}):
            ours.use_fused_logps(**how)
            for slot in slots:
                found = slot(*half)
                assert [torch.equal(*pair) for pair in zip(found, wanted[:2], strict=True)] == [bool(how)] * 2
        for how in ({}, {"batch_invariant": True}):
            ours.use_fused_logps(tau=0.05, **how)  # a sampled step has other tiles than rows that are scored
            for slot in slots:
                batch, some = (
                    slot(hidden.requires_grad_(), weight, labels),
                    slot(hidden[9:99].detach(), weight, labels[9:99]),
                )
                assert [torch.equal(a[9:99], b) for a, b in zip(batch, some, strict=True)] == [bool(how)] * 2
        with pytest.raises(ValueError, match=r"^logits_dtype: wanted None or torch.float32"):
            ours.use_fused_logps(logits_dtype=torch.float16)
        with pytest.raises(TypeError, match=r"^batch_invariant: wanted a bool"):
            ours.use_fused_logps(batch_invariant=1)
        ours.use_fused_logps(logits_dtype=torch.float32)  # before a model is there, whose dtype may not go with it
        with pytest.raises(ValueError, match=r"^logits_dtype: wanted None with float64"):
            triton_slot.linear_cross_entropy(hidden.double(), weight.double(), labels)
    finally:
        ours.use_fused_logps()


def test_the_slots_are_ours_and_callers_look_them_up_when_they_run() -> None:
    assert triton_slot.linear_cross_entropy is ours.linear_cross_entropy
    for name in ("forward_with_torch_backend", "forward_with_triton_backend"):
        source = inspect.getsource(getattr(dense_common, name))
        assert "import FusedLinearForPPO" in source or "import linear_cross_entropy" in source


def test_compute_advantage_still_hands_the_batch_to_that_name() -> None:
    """Read, not run: the trainer's module needs an inference engine to import."""
    source = Path(importlib.util.find_spec("verl.trainer.ppo").origin).with_name("ray_trainer.py").read_text()
    assert 'if adv_estimator in (AdvantageEstimator.GDPO, "gdpo"):' in source
    assert 'adv_kwargs["batch"] = data.batch' in source
    losses = Path(importlib.util.find_spec("verl.workers").origin).with_name("utils") / "losses.py"
    call = losses.read_text().split("pg_metrics = policy_loss_fn(", 1)[1].split("\n    )", 1)[0]
    for name in list(inspect.signature(ours.sequence_policy_loss).parameters):
        assert f"{name}=" in call


def test_a_moved_hook_fails_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_algos, "agg_loss", lambda loss_mat: None)
    with pytest.raises(ImportError, match=r"wanted verl.*agg_loss.*got arguments \['loss_mat'\]"):
        ours.check_hooks()
    monkeypatch.delattr(core_algos, "agg_loss")
    with pytest.raises(ImportError, match=r"agg_loss.*no such name"):
        ours.check_hooks()


def test_one_variable_loads_it_in_every_process() -> None:
    script = "import verl, sys; print('qempo_fast.integrations.verl' in sys.modules)"
    environment = {**os.environ, "VERL_USE_EXTERNAL_MODULES": "qempo_fast.integrations.verl"}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split()[-1:] == ["True"], done.stderr
