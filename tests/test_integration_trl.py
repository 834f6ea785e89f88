"""TRL's kernel seam, and the trainers of pairs and of stored groups, on a tiny model."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from datasets import Dataset
from peft import LoraConfig
from tolerances import assert_as_good
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl_models import dpo_config, history, load, new_model, pairs, perturbed, stored_groups, tokenizer

import qempo_fast as qf
from qempo_fast.integrations import _tell
from qempo_fast.integrations.hf import fused_forward
from qempo_fast.integrations.trl import (
    OfflineGroupTrainer,
    PreferenceTrainer,
    QualityConstraintCallback,
    use_fused_logps,
)
from qempo_fast.integrations.trl.kernel import _OUTPUTS, _pass_over_logits

STOCK = trl_utils._ChunkedLogProbFunction


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_model(tmp_path_factory.mktemp("model"))


def seam() -> Any:
    return trl_utils._ChunkedLogProbFunction


def head(n: int, scale: float, bias: bool) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias or None, targets; weights come in equal pairs, so that the largest logit is always tied."""
    g = torch.Generator().manual_seed(n)
    hidden = torch.randn(n, 24, generator=g)
    weight = scale * torch.randn(50, 24, generator=g).repeat_interleave(2, 0)
    targets = torch.randint(100, (n,), generator=g)
    best = (hidden @ weight.t()).argmax(1)
    targets[: n // 2] = best[: n // 2]  # the first of the tied two
    targets[: n // 4] += 1  # the second: not top 1
    return hidden, weight, torch.randn(50, generator=g).repeat_interleave(2) if bias else None, targets


# n, spread of the logits, bias, temperature, softcap, logit scale, outputs
SEAM_CASES = [
    (40, 1.0, False, 1.0, None, 1.0, _OUTPUTS),  # peaked: the flag follows from the statistics for most rows
    (40, 0.01, False, 1.0, None, 1.0, _OUTPUTS),  # flat: it does not
    (300, 0.3, True, 0.7, 5.0, 0.25, _OUTPUTS),  # Gemma's cap, Cohere's scale, more rows than a tile has
    (7, 0.3, True, 0.7, None, 2.0, _OUTPUTS),  # bias: in the mean logit too
    (7, 0.3, False, 1.3, 5.0, 1.0, ("log_probs", "is_top1")),  # flag without the mean
    (7, 0.3, False, 1.0, None, 1.0, ("log_probs",)),
    (0, 0.3, True, 1.0, None, 1.0, _OUTPUTS),  # an all-masked micro-batch
]


@pytest.mark.parametrize(("n", "scale", "bias", "temperature", "softcap", "logit_scale", "outputs"), SEAM_CASES)
def test_kernel_equals_trls(
    n: int, scale: float, bias: bool, temperature: float, softcap: Any, logit_scale: float, outputs: tuple[str, ...]
) -> None:
    tensors = head(n, scale, bias)
    rest = (temperature, 32, softcap, logit_scale, outputs)

    def run(kernel: Any, dtype: torch.dtype) -> tuple[Any, list[Any]]:
        leaves = [None if x is None else x.to(dtype, copy=True).requires_grad_() for x in tensors[:3]]
        out = kernel.apply(*leaves, tensors[3], *rest)
        loss = (out[0] * torch.linspace(-1, 2, n)).sum()
        if out[1] is not None:
            loss = loss + 0.5 * out[1].square().sum()
        loss.backward()
        return out, [None if x is None else x.grad for x in leaves]

    with use_fused_logps():
        ours, our_grads = run(seam(), torch.float32)
    plain, plain_grads = run(STOCK, torch.float32)
    leaves = [None if x is None else x.double().requires_grad_() for x in tensors[:3]]
    settings = {"temperature": temperature, "softcap": softcap, "logit_scale": logit_scale}
    truth = qf.reference.linear_logps(*leaves[:2], tensors[3], bias=leaves[2], entropy=True, sum_sq=True, **settings)
    loss = (truth.logps * torch.linspace(-1, 2, n)).sum()
    if "entropy" in outputs:
        loss = loss + 0.5 * truth.entropy.square().sum()
    loss.backward()
    for name, a, b, c in zip(_OUTPUTS[:3], ours, plain, truth, strict=False):
        assert (a is None) == (b is None) == (name not in outputs), name
        if a is not None:
            assert a.dtype == torch.float32
            assert_as_good(name, a.detach(), b.detach(), c.detach(), torch.float32, unit=1.0)
    for name, a, b in zip(_OUTPUTS[3:], ours[3:], plain[3:], strict=True):
        assert (a is None) == (b is None) == (name not in outputs), name
    if "mean_logits" in outputs:
        torch.testing.assert_close(ours[3], plain[3], rtol=1e-5, atol=1e-6)
    if "is_top1" in outputs:
        assert torch.equal(ours[4], plain[4])
        assert not n or 0 < int(ours[4].sum()) < n
    for name, a, b, leaf in zip(("hidden", "weight", "bias"), our_grads, plain_grads, leaves, strict=True):
        if leaf is not None:
            assert_as_good(name, a, b, leaf.grad, torch.float32, floor=32.0)


def test_a_pass_over_the_logits_is_rarely_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    from qempo_fast.integrations.trl import kernel

    seen = []
    monkeypatch.setattr(kernel, "_pass_over_logits", lambda h, *a: seen.append(len(h)) or _pass_over_logits(h, *a))
    hidden, weight, _, targets = head(40, 3.0, False)
    weight[1::2] -= 0.01 * hidden.mean(0)  # no ties
    with use_fused_logps():
        top1 = seam().apply(hidden, weight, None, targets, 1.0, 32, None, 1.0, _OUTPUTS)[4]
    assert torch.equal(top1, (hidden @ weight.t()).argmax(1) == targets)
    assert sum(seen) < 20


def test_a_pass_over_the_logits_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from qempo_fast.integrations.trl import kernel

    monkeypatch.setattr(kernel, "_TILE", (16, 3))  # every third equal pair of columns lies in two tiles
    # Whole numbers: a sum then does not depend on the width of its tile, and equal columns stay equal.
    hidden, weight, bias = (x.round() for x in head(40, 1.0, True)[:3])
    settings = {"temperature": 0.7, "logit_scale": 0.05, "softcap": 5.0}
    mean, best = _pass_over_logits(hidden, weight, bias, settings)
    z = 5.0 * torch.tanh(0.05 * (hidden @ weight.t() + bias) / 5.0) / 0.7
    torch.testing.assert_close(mean, z.mean(1))
    assert torch.equal(best, z.argmax(1))
    assert bool((best % 2 == 0).all())


def test_autocast_frozen_head_and_mixed_dtypes() -> None:
    hidden, weight, _, targets = head(40, 0.3, False)
    hidden.requires_grad_()
    results = []
    for kernel in (None, STOCK):
        with use_fused_logps(grad="exact"), torch.autocast("cpu", torch.bfloat16):
            logps, *_ = (kernel or seam()).apply(hidden, weight, None, targets, 1.0, 32, None, 1.0, ("log_probs",))
        (grad,) = torch.autograd.grad(logps.sum(), hidden)
        results.append((logps.detach(), grad))
    truth = torch.log_softmax(hidden.detach() @ weight.t(), 1).gather(1, targets[:, None])[:, 0]
    for logps, grad in results:
        assert logps.dtype == grad.dtype == torch.float32
        assert 1e-4 < (logps - truth).abs().max() < 0.1  # bfloat16's rounding: neither none nor more
    torch.testing.assert_close(results[0], results[1], rtol=0.05, atol=0.02)
    with use_fused_logps():  # cast_lm_head_to_fp32, or a norm that gives float32
        half = seam().apply(hidden, weight.bfloat16(), None, targets, 1.0, 32, None, 1.0, ("log_probs",))[0]
    assert half.dtype == torch.float32
    half.sum().backward()
    assert hidden.grad is not None


def test_patch_comes_and_goes() -> None:
    assert seam() is STOCK
    outer = use_fused_logps()
    with use_fused_logps(grad="exact"):
        assert seam().options["grad"] == "exact"
        assert seam().original is STOCK
    assert seam().options["grad"] == "auto"
    inner = use_fused_logps(grad="sampled")
    outer.remove()  # not the last one
    outer.remove()
    assert seam().options["grad"] == "sampled"
    inner.remove()
    assert seam() is STOCK


def test_what_the_op_cannot_do_falls_to_trl_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    hidden, weight, _, targets = head(8, 0.3, False)
    wanted = STOCK.apply(hidden, weight, None, targets, 1.0, 32, None, -1.0, _OUTPUTS)
    parted = torch.nn.Parameter(weight)
    parted.ds_id = 0
    with caplog.at_level(logging.WARNING), use_fused_logps():
        for _ in range(2):
            out = seam().apply(hidden, weight, None, targets, 1.0, 32, None, -1.0, _OUTPUTS)
            seam().apply(hidden, parted, None, targets, 1.0, 32, None, 1.0, _OUTPUTS)
    assert all(torch.equal(a, b) for a, b in zip(out, wanted, strict=True))
    assert len(caplog.records) == 2
    assert "logit_scale -1.0" in caplog.text
    assert "ZeRO-3" in caplog.text


def test_versions_without_the_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any) -> None: ...

    for kernel, message in ((None, "has no log-prob kernel"), (Other, "a log-prob kernel with other arguments")):
        monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", kernel)
        with pytest.raises(ImportError, match=rf'trl 1.* {message} .*pip install "trl>=1.16" \(tested with 1.16.0\)'):
            use_fused_logps()
    with pytest.raises(ValueError, match="grad: wanted"):
        use_fused_logps(grad="some")


@pytest.mark.parametrize("kind", [PreferenceTrainer, OfflineGroupTrainer])
def test_trainers_have_a_gradient_of_their_own(kind: Any, path: str, tmp_path: Path) -> None:
    data = {"train_dataset": pairs() if kind is PreferenceTrainer else stored_groups()}
    seen = []

    class Watched(kind):  # type: ignore[misc]
        def _compute_loss(self, *args: Any) -> torch.Tensor:
            with self._fused():
                seen.append({k: seam().options[k] for k in ("grad", "tau")})
            return super()._compute_loss(*args)

    for own in ({}, {"grad": "sampled"}, {"tau": 0.1}):
        trained(Watched, path, tmp_path, {"max_steps": 1}, **data, **own)
    with use_fused_logps(grad="sampled"):
        trained(Watched, path, tmp_path, {"max_steps": 1}, **data)
        trained(Watched, path, tmp_path, {"max_steps": 1}, **data, grad="exact")
    assert seam() is STOCK
    default = {"grad": "auto", "tau": None}
    sampled, exact = ({**default, "grad": g} for g in ("sampled", "exact"))
    assert seen == [default, sampled, {**default, "tau": 0.1}, sampled, exact]
    for wrong in ({"grad": "some"}, {"grad": "exact", "tau": 0.1}, {"fused": False, "grad": "sampled"}):
        with pytest.raises(ValueError, match=r"(grad|tau): wanted"):
            trained(kind, path, tmp_path, {"max_steps": 1}, **data, **wrong)


def test_the_gradient_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _tell.cache_clear()
    with caplog.at_level(logging.INFO, "qempo_fast"):
        for grad in ("auto", "sampled", "auto", "sampled"):
            use_fused_logps(grad=grad).remove()
    assert [(r.levelname, "sampled" in r.message) for r in caplog.records] == [("INFO", False), ("WARNING", True)]


def test_a_missing_trl_is_named() -> None:
    script = "import sys; sys.modules['trl'] = None\ntry:\n    import qempo_fast.integrations.trl\n"
    script += "except ImportError as e:\n    print(e)"
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'trl is not installed: pip install "qempo-fast[trl]"'


def trained(kind: Any, path: str, folder: Path, config: dict[str, Any] | None = None, **kw: Any) -> Any:
    trainer = kind(
        load(path),
        args=dpo_config(folder, **(config or {})),
        **{"train_dataset": pairs(), **kw},
        processing_class=tokenizer(),
    )
    trainer.train()
    return trainer


def test_dpo_is_trls(path: str, tmp_path: Path) -> None:
    stock = trained(DPOTrainer, path, tmp_path, {"max_steps": 4})
    with use_fused_logps():
        fused = trained(DPOTrainer, path, tmp_path, {"max_steps": 4})
    assert seam() is STOCK
    ours = trained(PreferenceTrainer, path, tmp_path, {"max_steps": 4}, loss="dpo")
    shared = ["loss", "grad_norm", "entropy", "num_tokens", "logps/chosen", "logps/rejected", "rewards/chosen"]
    shared += ["rewards/rejected", "rewards/margins", "rewards/accuracies"]
    for name in [*shared, "logits/chosen", "logits/rejected", "mean_token_accuracy"]:
        wanted = pytest.approx(history(stock, name), rel=1e-4, abs=1e-6)
        assert history(fused, name) == wanted, name
        if name in shared:
            assert history(ours, name) == wanted, name
    assert len(history(stock, "loss")) == 4
    assert history(stock, "loss")[3] != pytest.approx(history(stock, "loss")[0], rel=0.05)


# Loss, its hyperparameters, and the same computed from (chosen, rejected, ref_chosen, ref_rejected).
PAIR_CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("dpo", {"beta": 0.3, "label_smoothing": 0.1}, lambda *x: qf.dpo_loss(*x, beta=0.3, label_smoothing=0.1)),
    ("spl", {"alpha": 0.2}, lambda *x: qf.spl_pair_loss(*x, alpha=0.2, beta=0.1)),  # args.beta is 0.1
    ("spl", {"alpha": 0.2, "beta": 0.0}, lambda *x: qf.spl_pair_loss(*x, alpha=0.2, beta=0.0)),
    ("hdpo", {"alpha": 1.2}, lambda *x: qf.hdpo_loss(*x, alpha=1.2, beta=0.1)),
    ("qempo", {"lam": 20.0}, lambda *x: qf.qempo_pair_loss(*x[:2], lam=20.0)),
    ("qempo_kl", {"lam": 20.0, "mu": 1.0}, lambda *x: qf.qempo_kl_pair_loss(*x, lam=20.0, mu=1.0)),
    ("epa", {"n_weak": 0}, lambda *x: qf.dpo_loss(*x, beta=0.1)),
]


def direct(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(S,) log-probs of the responses, by another road than TRL's."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    with fused_forward(model, check=False):
        out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    return out.logps.sum(1)


def built(kind: Any, path: str, folder: Path, data: Any = None, config: dict[str, Any] | None = None, **kw: Any) -> Any:
    """A trainer whose policy differs from its reference, which TRL loads from path."""
    args = dpo_config(folder, **(config or {}))
    return kind(perturbed(path), args=args, train_dataset=data or pairs(), processing_class=tokenizer(), **kw)


@pytest.mark.parametrize(("loss", "kwargs", "wanted"), PAIR_CASES)
def test_pair_losses(loss: str, kwargs: dict[str, Any], wanted: Any, path: str, tmp_path: Path) -> None:
    trainer = built(PreferenceTrainer, path, tmp_path, loss=loss, loss_kwargs=kwargs)
    batch = next(iter(trainer.get_train_dataloader()))
    value = trainer.compute_loss(trainer.model, dict(batch))
    value.backward()
    twin = perturbed(path)
    with torch.no_grad():
        refs = direct(load(path), batch).chunk(2)
    expected = wanted(*direct(twin, batch).chunk(2), *refs)
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    reads = loss not in ("qempo",) and kwargs.get("beta") != 0.0
    assert (trainer.ref_model is not None) == reads


def test_epa_with_weak_negatives(path: str, tmp_path: Path) -> None:
    kw = {"loss": "epa", "loss_kwargs": {"n_weak": 2, "beta": 0.5}}
    trainer = built(
        PreferenceTrainer, path, tmp_path, data=pairs(6), config={"max_steps": -1, "num_train_epochs": 1}, **kw
    )
    rows = [trainer.train_dataset[i] for i in range(4)]
    batch = trainer.data_collator([dict(r) for r in rows])
    assert len(batch["input_ids"]) == 4 * 4
    third = batch["input_ids"][8 + 3][batch["attention_mask"][8 + 3] == 1].tolist()
    assert third == rows[3]["prompt_ids"] + rows[0]["chosen_ids"]  # one step on from the last is the first
    last = batch["input_ids"][12 + 1][batch["completion_mask"][12 + 1] == 1].tolist()
    assert last == rows[3]["chosen_ids"]
    value = trainer.compute_loss(trainer.model, dict(batch))
    with torch.no_grad():
        x, f = direct(perturbed(path), batch).view(4, 4), direct(load(path), batch).view(4, 4)
    u = 0.5 * (x - f)
    torch.testing.assert_close(value, -(u[0] - u.logsumexp(0)).mean(), rtol=1e-5, atol=1e-6)
    trainer.train()
    assert trainer.state.global_step == 1  # of six prompts one batch of four; the other two would have too few


def test_reference_can_be_precomputed(path: str, tmp_path: Path) -> None:
    kw = {"loss": "spl", "loss_kwargs": {"alpha": 0.2}}
    losses = []
    for precompute in (False, True):
        trainer = trained(PreferenceTrainer, path, tmp_path, {"precompute_ref_log_probs": precompute}, **kw)
        assert (trainer.ref_model is None) == precompute
        losses.append(history(trainer, "loss") + history(trainer, "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_lora(gradient_checkpointing: bool, path: str, tmp_path: Path) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    kw = {"loss": "qempo_kl", "loss_kwargs": {"lam": 1.0, "mu": 2.0}, "peft_config": peft}
    config = {"max_steps": 12, "learning_rate": 3e-2, "gradient_checkpointing": gradient_checkpointing}
    trainer = trained(PreferenceTrainer, path, tmp_path, config, **kw)
    losses = history(trainer, "loss")
    assert losses[-1] + losses[-2] < losses[0] + losses[1]
    assert trainer.ref_model is None  # the adapters off are the reference
    frozen = load(path).state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name
    with pytest.raises(ValueError, match="lm_head"):
        trained(PreferenceTrainer, path, tmp_path, peft_config=LoraConfig(target_modules=["lm_head"]))


def test_evaluation(path: str, tmp_path: Path) -> None:
    kw = {"loss": "hdpo", "loss_kwargs": {"alpha": 1.5}, "eval_dataset": pairs(3)}
    trainer = trained(PreferenceTrainer, path, tmp_path, **kw)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] > 0
    assert "eval_rewards/margins" in metrics


@pytest.mark.parametrize(
    ("loss", "kwargs", "alpha", "beta"),
    [
        ("gvpo", {"beta": 0.2}, 0.2, 0.2),
        ("spl", {"alpha": 0.3, "beta": 0.1}, 0.3, 0.1),
        ("qempo", {"lam": 5.0}, 0.2, 0.0),
        ("qempo_kl", {"lam": 10.0, "mu": 1.0}, 0.2, 0.1),
    ],
)
def test_stored_groups(loss: str, kwargs: dict[str, Any], alpha: float, beta: float, path: str, tmp_path: Path) -> None:
    trainer = built(OfflineGroupTrainer, path, tmp_path, data=stored_groups(), loss=loss, loss_kwargs=kwargs)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["offsets"].diff().sort().values.tolist() == [2, 3, 3, 4]
    lengths = sorted(len(ids) for ids in trainer.train_dataset["response_ids"] for ids in ids)
    assert sorted(batch["completion_mask"].sum(1).tolist()) == lengths
    value = trainer.compute_loss(trainer.model, dict(batch))
    value.backward()
    twin = perturbed(path)
    with torch.no_grad():
        ref = direct(load(path), batch) if beta else None
    expected = qf.variance_loss(
        direct(twin, batch), ref, batch["rewards"], alpha=alpha, beta=beta, offsets=batch["offsets"]
    )
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    for (name, p), q in zip(trainer.model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert (trainer.ref_model is not None) == (beta > 0)


def test_stored_groups_train(path: str, tmp_path: Path) -> None:
    kw = {"train_dataset": stored_groups(), "loss_kwargs": {"beta": 0.5}}
    trainer = trained(OfflineGroupTrainer, path, tmp_path, {"max_steps": 20}, **kw)
    losses = history(trainer, "loss")
    assert losses[-1] < 0.3 * losses[0]
    assert history(trainer, "reward")[0] == pytest.approx(
        torch.cat([torch.tensor(r) for r in stored_groups()["rewards"]]).mean()
    )


def test_bad_input(path: str, tmp_path: Path) -> None:
    def pair(config: dict[str, Any] | None = None, **kw: Any) -> None:
        args = dpo_config(tmp_path, **(config or {}))
        PreferenceTrainer(path, args=args, train_dataset=pairs(), processing_class=tokenizer(), **kw)

    holder = [QualityConstraintCallback(qf.QualityConstraint(0.9))]
    for config, kw, message in [
        ({}, {"loss": "ipo"}, "loss: wanted 'dpo' or 'spl' or .* got 'ipo'"),
        ({}, {"loss": "qempo", "loss_kwargs": {"lam": 0.0}}, "lam: wanted"),
        ({}, {"loss": "spl", "loss_kwargs": {"alpha": -1.0}}, "alpha: wanted"),
        ({"loss_type": ["ipo"]}, {}, "args.loss_type: wanted it left out, since loss='dpo' does not read it"),
        ({"label_smoothing": 0.1}, {}, "args.label_smoothing: wanted it left out"),
        ({"beta": 0.0}, {}, "beta: wanted"),
        ({}, {"callbacks": holder}, "callbacks: wanted no QualityConstraintCallback"),
        ({}, {"loss": "epa", "loss_kwargs": {"n_weak": 4}}, "per_device_train_batch_size: wanted more than n_weak = 4"),
        ({"precompute_ref_log_probs": True}, {"loss": "epa", "loss_kwargs": {"n_weak": 1}}, "precompute_ref_log_probs"),
    ]:
        with pytest.raises(ValueError, match=message):
            pair(config, **kw)
    for kw, message in [
        ({"loss": "spl"}, "loss_kwargs: .*alpha"),
        ({"loss": "epa"}, "loss_kwargs: .*n_weak"),
        ({"loss": "dpo", "loss_kwargs": {"alpha": 1.0}}, "loss_kwargs: loss='dpo' takes beta, .*, got alpha"),
    ]:
        with pytest.raises(TypeError, match=message):
            pair(**kw)

    def offline(data: Any, **kw: Any) -> None:
        args = dpo_config(tmp_path)
        OfflineGroupTrainer(load(path), args=args, train_dataset=data, processing_class=tokenizer(), **kw)

    one = Dataset.from_list([{"prompt": "w1", "responses": ["w2"], "rewards": [1.0]}])
    for data, kw, message in [
        (pairs(), {}, "train_dataset: wanted the columns prompt, responses and rewards, got chosen, prompt, rejected"),
        (one, {}, "train_dataset: wanted two or more responses .* got 1 and 1"),
        (stored_groups(), {"loss": "dqo"}, "loss: wanted .*'gvpo'"),
        (stored_groups(), {"loss": "qempo", "loss_kwargs": {"lam": 0.0}}, "lam: wanted"),
        (stored_groups(), {"callbacks": holder}, "callbacks: wanted no QualityConstraintCallback"),
        (stored_groups(), {"loss": "spl", "loss_kwargs": {"alpha": 1.0, "beta": -1.0}}, "beta: wanted"),
    ]:
        with pytest.raises(ValueError, match=message):
            offline(data, **kw)
    with pytest.raises(TypeError, match=r"loss_kwargs: .*mu"):
        offline(stored_groups(), loss="qempo", loss_kwargs={"lam": 1.0, "mu": 1.0})
    trainer = built(PreferenceTrainer, path, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="compute_metrics: wanted None"):
        trainer.compute_loss(trainer.model, copy.copy(dict(batch)), return_outputs=True)


def test_a_model_built_in_memory_has_no_reference_to_load(path: str, tmp_path: Path) -> None:
    given = {"args": dpo_config(tmp_path), "processing_class": tokenizer()}
    made = AutoModelForCausalLM.from_config(load(path).config)
    made.config._name_or_path = ""
    message = "ref_model: wanted one, or a model loaded from a name or a folder, .* got a model built in memory"
    for kind, data in ((PreferenceTrainer, pairs()), (OfflineGroupTrainer, stored_groups())):
        with pytest.raises(ValueError, match=message):
            kind(made, train_dataset=data, **given)
        assert kind(made, load(path), train_dataset=data, **given).ref_model is not None
        assert kind(made, train_dataset=data, **given, loss="qempo", loss_kwargs={"lam": 5.0}).ref_model is None
    peft = LoraConfig(r=4, target_modules=["q_proj"])
    assert PreferenceTrainer(made, train_dataset=pairs(), **given, peft_config=peft).ref_model is None


def test_a_column_that_nothing_reads_is_named(path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = stored_groups()
    built(OfflineGroupTrainer, path, tmp_path, data=data)
    assert "train_dataset" not in caplog.text
    extra = data.add_column("logps", [[-1.0] * len(r) for r in data["rewards"]])
    built(OfflineGroupTrainer, path, tmp_path, data=extra)
    assert caplog.text.count("train_dataset: read are prompt, responses and rewards, not logps") == 1


def test_where_qempo_kl_is_qempo_the_log_says_so(path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mu, lines in ((1.0, 0), (0.0, 1)):
        kw = {"loss": "qempo_kl", "loss_kwargs": {"lam": 5.0, "mu": mu}}
        for kind, data in ((PreferenceTrainer, pairs()), (OfflineGroupTrainer, stored_groups())):
            caplog.clear()
            built(kind, path, tmp_path, data=data, **kw)
            assert caplog.text.count("loss='qempo_kl' is QEMPO here: mu is 0") == lines, kind
