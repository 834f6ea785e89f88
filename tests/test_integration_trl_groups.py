"""GroupTrainer: TRL's GRPO unchanged, and the gradient of each group loss however the rollout is cut."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils as trl_utils
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import GRPOTrainer
from trl_models import (
    dpo_config,
    grpo_config,
    history,
    load,
    new_model,
    pairs,
    perturbed,
    prompts,
    stored_groups,
    tokenizer,
    word_counts,
    word_reward,
)

import qempo_fast as qf
from qempo_fast.integrations.methods import GROUPS, by_name
from qempo_fast.integrations.trl import GROUP_LOSSES, GroupTrainer, QualityConstraintCallback


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return new_model(tmp_path_factory.mktemp("model"))


def built(kind: Any, path: str, folder: Path, config: dict[str, Any] | None = None, **kw: Any) -> Any:
    given = {"model": perturbed(path), "reward_funcs": word_reward, "train_dataset": prompts(), **kw}
    return kind(args=grpo_config(folder, **(config or {})), processing_class=tokenizer(), **given)


def trained(kind: Any, path: str, folder: Path, config: dict[str, Any] | None = None, **kw: Any) -> Any:
    trainer = built(kind, path, folder, config, **kw)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("config", "rollouts"),
    [
        ({"gradient_accumulation_steps": 2}, 4),  # TRL's default loss, on-policy
        ({"loss_type": "grpo", "beta": 0.1, "steps_per_generation": 2, "num_iterations": 2}, 1),  # ratios, reference
    ],
)
def test_grpo_is_trls(config: dict[str, Any], rollouts: int, path: str, tmp_path: Path) -> None:
    config = {"max_steps": 4, "learning_rate": 1e-3, **config}
    stock = trained(GRPOTrainer, path, tmp_path, config)
    ours = trained(GroupTrainer, path, tmp_path, config, loss="grpo", embedder=word_counts)
    for name in ("loss", "grad_norm", "entropy", "reward", "completions/mean_length"):
        assert history(ours, name) == pytest.approx(history(stock, name), rel=1e-4, abs=1e-6), name
    assert max(history(stock, "grad_norm")) > 0.1
    assert len(history(ours, "diversity_gain")) == rollouts
    assert 0 < history(ours, "diversity_gain")[0] < 0.6932  # log 2
    assert history(ours, "logdet")[0] > history(ours, "diversity_gain")[0]


class Watched(GroupTrainer):
    """Keeps what each rollout was, before TRL shuffles and cuts it, and the gradient of each optimiser step."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.rollouts = [*getattr(self, "rollouts", []), (output, *self._rollout)]
        return output


# Loss, its hyperparameters, and the same on (logps, ref_logps, rewards, texts) of whole groups of four.
CASES: list[tuple[str, dict[str, Any], Any]] = [
    ("qempo", {"lam": 20.0}, lambda x, f, r, t: qf.qempo_loss(x, r, lam=20.0, group_size=4)),
    (
        "qempo_kl",
        {"lam": 10.0, "mu": 1.0, "baseline": "mean"},
        lambda x, f, r, t: qf.qempo_kl_loss(x, f, r, lam=10.0, mu=1.0, group_size=4, baseline="mean"),
    ),
    ("spl", {"alpha": 0.1, "beta": 0.2}, lambda x, f, r, t: qf.spl_loss(x, f, r, alpha=0.1, beta=0.2, group_size=4)),
    ("gvpo", {}, lambda x, f, r, t: qf.gvpo_loss(x, f, r, beta=0.1, group_size=4)),
    ("rspo", {"k": 2}, lambda x, f, r, t: qf.rspo_loss(x, r, k=2, group_size=4)),
    ("dqo", {"alpha": 0.5}, lambda x, f, r, t: qf.dqo_loss(x, r, word_counts(t), alpha=0.5, group_size=4)),
    (
        "dqo",
        {"beta": 0.1, "baseline": "reward"},
        lambda x, f, r, t: qf.dqo_loss(x, r, word_counts(t), ref_logps=f, beta=0.1, baseline="reward", group_size=4),
    ),
]


def scores(model: Any, output: dict[str, torch.Tensor]) -> torch.Tensor:
    """(S,) log-probs of the completions, from logits, at the temperature 0.8 of these tests."""
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    log_p = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1] / 0.8, -1)
    tokens = log_p.gather(2, ids[:, 1:, None])[..., 0][:, -output["completion_ids"].shape[1] :]
    return (tokens * output["completion_mask"]).sum(1)


@pytest.mark.parametrize("rollouts", [1, 2])
@pytest.mark.parametrize(("loss", "kwargs", "wanted"), CASES)
def test_gradient_is_that_of_whole_groups(
    loss: str,
    kwargs: dict[str, Any],
    wanted: Any,
    rollouts: int,
    path: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forwards, plain = [], qf.weighted_logps
    monkeypatch.setattr(qf, "weighted_logps", lambda *a, **k: (forwards.append(len(a[2])), plain(*a, **k))[1])
    # Micro-batches of two rows cut every group of four; with two rollouts a step each counts half.
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1, "temperature": 0.8}
    config |= {"steps_per_generation": 4 // rollouts, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    trainer = built(Watched, path, tmp_path, config, loss=loss, loss_kwargs=kwargs, embedder=word_counts)
    before = perturbed(path)
    trainer.train()
    assert len(trainer.rollouts) == rollouts
    assert len(forwards) == 4  # gradients were made in the forward of each micro-batch
    total = 0.0
    for output, texts, rewards in trainer.rollouts:
        with torch.no_grad():
            ref = scores(load(path), output)
        total = total + wanted(scores(before, output), ref, rewards[:, 0], texts) / rollouts
    total.backward()
    assert history(trainer, "loss") == pytest.approx([total.item()], rel=1e-4, abs=1e-5)
    largest = max(p.grad.abs().max() for p in before.parameters())
    assert largest > 1e-3
    for (name, p), q in zip(trainer.model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(
            q.detach() - p.detach(), q.grad, rtol=1e-3, atol=2e-5 * float(largest) + 1e-6, msg=name
        )
    reads = kwargs.get("beta", 0.0) > 0 or loss in ("gvpo", "qempo_kl")
    assert (trainer.ref_model is not None) == reads
    assert bool(history(trainer, "kl")) == reads
    alpha = loss not in ("rspo", "dqo") or reads
    assert bool(history(trainer, "sequence_entropy")) == alpha


def test_what_a_tool_wrote_does_not_count(path: str, tmp_path: Path) -> None:
    trainer = built(Watched, path, tmp_path, {"max_steps": 1}, loss="qempo", loss_kwargs={"lam": 5.0})
    trainer.train()
    output, _, rewards = trainer.rollouts[0]
    output["tool_mask"] = torch.ones_like(output["completion_mask"])
    output["tool_mask"][:, 1::2] = 0
    trainer._add_coefficients(trainer._method, output, rewards, None, 4)
    model = trainer.model
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
    log_p = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1], -1).gather(2, ids[:, 1:, None])
    tokens = log_p[..., 0][:, -output["completion_ids"].shape[1] :]
    x = (tokens * output["completion_mask"] * output["tool_mask"]).sum(1)
    wanted = qf.qempo_loss(x, rewards[:, 0], lam=5.0, group_size=4)
    loss = trainer._compute_loss(model, output)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(value, model.lm_head.weight, retain_graph=True)[0] for value in (loss, wanted)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"])
def test_grpo_on_policy_is_foretold(
    kind: str, level: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's losses at the policy that sampled: the gradient made in the forward is that of TRL's own loss code."""
    config = {"max_steps": 1, "loss_type": kind, "importance_sampling_level": level}
    trainer = built(Watched, path, tmp_path, config, loss="grpo")
    trainer.train()
    output = trainer.rollouts[0][0]
    # Some rows longer than others, and a tool's tokens.
    output["completion_mask"][::2, -2:] = 0
    output["tool_mask"] = torch.ones_like(output["completion_mask"])
    output["tool_mask"][:, 1] = 0
    foretold, plain = [], qf.weighted_logps
    monkeypatch.setattr(qf, "weighted_logps", lambda *a, **k: (foretold.append(len(a[2])), plain(*a, **k))[1])
    weight = trainer.model.lm_head.weight
    trainer.model.train()

    def gradient(**more: Any) -> torch.Tensor:
        return torch.autograd.grad(trainer._compute_loss(trainer.model, {**output, **more}), weight)[0]

    found = gradient()
    assert len(foretold) == (kind != "vespo")
    ids = output["completion_ids"]
    before = len(foretold)
    with torch.no_grad():
        old, *_ = trainer._token_logps(trainer.model, output)
    unknown = gradient(old_per_token_logps=old)  # as after the first of several updates
    assert len(foretold) == before
    assert old.shape == ids.shape
    assert found.abs().max() > 1e-4
    torch.testing.assert_close(found, unknown, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [{"beta": 0.1}, {"top_entropy_quantile": 0.5}, {"entropy_coef": 0.01}])
def test_grpo_with_more_in_its_loss_is_not_foretold(
    config: dict[str, Any], path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qf, "weighted_logps", None)
    assert history(trained(GroupTrainer, path, tmp_path, {"max_steps": 1, **config}, loss="grpo"), "grad_norm")[0] > 0


def test_rewards_of_several_functions_are_weighted(path: str, tmp_path: Path) -> None:
    def other(completions: list[str], **_: Any) -> list[float | None]:
        return [None if i % 2 else 2.0 + i for i in range(len(completions))]

    config = {"reward_weights": [1.0, 0.5], "max_steps": 1}
    kw = {"reward_funcs": [word_reward, other], "loss": "rspo", "loss_kwargs": {"k": 1, "baseline": "none"}}
    trainer = trained(Watched, path, tmp_path, config, **kw)
    output, texts, _ = trainer.rollouts[0]
    rewards = [w + 0.5 * (o or 0.0) for w, o in zip(word_reward(texts), other(texts), strict=True)]
    torch.testing.assert_close(output["coefficients"], -torch.tensor(rewards) / len(rewards))


@pytest.mark.parametrize("loss", ["rspo", "spl"])
def test_training_raises_the_reward(loss: str, path: str, tmp_path: Path) -> None:
    config = {"max_steps": 40, "per_device_train_batch_size": 16, "num_generations": 8}
    kwargs = {"rspo": {"k": 2}, "spl": {"alpha": 0.01, "beta": 0.01}}[loss]
    trainer = trained(GroupTrainer, path, tmp_path, config, loss=loss, loss_kwargs=kwargs)
    rewards = torch.tensor(history(trainer, "reward"))
    assert rewards[-10:].mean() > rewards[:10].mean() + 0.15


def test_lora(path: str, tmp_path: Path) -> None:
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    kw = {"model": load(path), "loss": "gvpo", "loss_kwargs": {"beta": 0.2}, "peft_config": peft}
    trainer = trained(GroupTrainer, path, tmp_path, {"max_steps": 3}, **kw)
    kl = history(trainer, "kl")
    assert kl[0] == pytest.approx(0.0, abs=1e-4)  # the adapters off are the reference, and start at it
    assert abs(kl[2]) > 1e-4
    frozen = load(path).state_dict()
    for name, value in trainer.model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name


def test_evaluation(path: str, tmp_path: Path) -> None:
    config = {"per_device_eval_batch_size": 4, "num_generations_eval": 2}
    kw = {"loss": "qempo_kl", "loss_kwargs": {"lam": 10.0, "mu": 1.0}, "eval_dataset": prompts(4)}
    trainer = trained(GroupTrainer, path, tmp_path, config, **kw, embedder=word_counts)
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_reward", "eval_diversity_gain", "eval_sequence_entropy", "eval_kl"} <= set(metrics)


def constraint_run(
    path: str, folder: Path, steps: int, resume: str | None = None, damping: float = 0.0, **kw: Any
) -> Any:
    settings = {"min_reward": 0.9, "lr": 0.5, "lam": 5.0, "mu": 0.5, "max_kl": 1e-3, "kl_lr": 0.1}
    settings |= {"damping": damping, "smoothing": 0.5}
    callback = QualityConstraintCallback(qf.QualityConstraint(**settings))
    config = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, **kw}
    trainer = built(GroupTrainer, path, folder, config, loss="qempo_kl", callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback.constraint


def test_constraint_moves_the_multipliers_and_is_in_checkpoints(path: str, tmp_path: Path) -> None:
    trainer, constraint = constraint_run(path, tmp_path, 3)
    lam, reward, kl = (history(trainer, name) for name in ("lam", "reward", "kl"))
    steps = [lam[0], *(x + 0.5 * (0.9 - r) for x, r in zip(lam, reward, strict=True))]
    assert lam[0] == 5.0
    assert [*lam, float(constraint.lam)] == pytest.approx(steps, rel=1e-4)
    assert history(trainer, "mu")[1] == pytest.approx(0.5 + 0.1 * (kl[0] - 1e-3), rel=1e-4)
    checkpoint = tmp_path / "out" / "checkpoint-2"
    saved = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]
    assert saved["QualityConstraintCallback"]["args"]["constraint"]["lam"] == pytest.approx(lam[2])
    for restore in (False, True):
        again, resumed = constraint_run(
            path, tmp_path, 3, resume=str(checkpoint), restore_callback_states_from_checkpoint=restore
        )
        assert history(again, "lam")[-1] == pytest.approx(lam[2], rel=1e-5)
        assert restore or float(resumed.lam) > lam[2]


@pytest.mark.parametrize("restore", [False, True])
def test_a_checkpoint_has_what_damping_remembers(restore: bool, path: str, tmp_path: Path) -> None:
    trainer, whole = constraint_run(path, tmp_path, 3, damping=4.0)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    kw = {"damping": 4.0, "restore_callback_states_from_checkpoint": restore}
    again, _ = constraint_run(path, tmp_path, 3, resume=checkpoint, **kw)
    resumed = next(c.constraint for c in again.callback_handler.callbacks if isinstance(c, QualityConstraintCallback))
    assert history(again, "lam")[-1] == pytest.approx(history(trainer, "lam")[-1], rel=1e-5)
    assert resumed.state_dict().keys() == {"lam", "mu", "integral", "gap"}
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("loss", "names"), [("qempo", ["lam"]), ("spl", ["alpha", "beta"])])
def test_constraint_sets_what_each_loss_has(loss: str, names: list[str], path: str, tmp_path: Path) -> None:
    constraint = qf.QualityConstraint(0.9, lam=5.0, mu=0.5 if loss == "spl" else 0.0)
    callbacks = [QualityConstraintCallback(constraint)]
    wanted = {name: float(getattr(constraint, name)) for name in names}
    trainer = built(Watched, path, tmp_path, {"max_steps": 1}, loss=loss, callbacks=callbacks)
    before = perturbed(path)
    trainer.train()
    output, texts, _ = trainer.rollouts[0]
    output["completion_mask"] = output["completion_mask"].float()
    ids = torch.cat([output["prompt_ids"], output["completion_ids"]], 1)
    assert len(ids) == 4
    rewards = torch.tensor(word_reward(texts))

    def logps(model: Any) -> torch.Tensor:
        mask = torch.cat([output["prompt_mask"], output["completion_mask"]], 1)
        log_p = torch.log_softmax(model(input_ids=ids, attention_mask=mask).logits[:, :-1], -1)
        tokens = log_p.gather(2, ids[:, 1:, None])[..., 0][:, -output["completion_ids"].shape[1] :]
        return (tokens * output["completion_mask"]).sum(1).detach()

    x = logps(before)
    args = (x, logps(load(path)), rewards) if loss == "spl" else (x, rewards)
    _, coefficients = qf.coefficients(getattr(qf, f"{loss}_loss"), *args, group_size=4, **wanted)
    torch.testing.assert_close(output["coefficients"], coefficients, rtol=1e-4, atol=1e-5)


def test_bad_input(path: str, tmp_path: Path) -> None:
    qempo = {"loss": "qempo", "loss_kwargs": {"lam": 1.0}}
    holder = QualityConstraintCallback(qf.QualityConstraint(0.9))
    for config, kw, message in [
        ({}, {"loss": "ppo"}, "loss: wanted 'grpo' or .* got 'ppo'"),
        ({}, {"loss": "grpo", "loss_kwargs": {"lam": 1.0}}, "loss: wanted one that takes loss_kwargs"),
        ({}, {"loss": "grpo", "callbacks": [holder]}, "loss: wanted one that takes a QualityConstraintCallback"),
        ({}, {"loss": "dqo"}, "embedder: wanted a callable"),
        ({}, {"loss": "qempo", "loss_kwargs": {"lam": 0.0}}, "lam: wanted"),
        ({}, {"loss": "rspo", "loss_kwargs": {"k": 5}}, "k: wanted at most 4"),
        ({"beta": 0.1}, qempo, "args.beta: wanted 0 with loss='qempo'"),
        ({"loss_type": "grpo"}, qempo, "args.loss_type: wanted it left out, since loss='qempo' does not read it"),
        (
            {"scale_rewards": "none", "mask_truncated_completions": True},
            qempo,
            "args.scale_rewards, args.mask_truncated_completions: wanted them left out, .*, got 'none', True",
        ),
        ({}, {"embedder": word_counts}, "embedder: wanted loss= named too: 'dqo' trains with it"),
        ({"num_iterations": 2}, qempo, "args: wanted num_iterations = 1 .* got 2, 1 and 1"),
        ({"steps_per_generation": 2}, qempo, "args: wanted .* one optimiser step, .* got 1, 1 and 2"),
        ({}, {**qempo, "callbacks": [holder]}, "loss_kwargs: wanted no lam, since a QualityConstraint sets it"),
        ({}, {"loss": "gvpo", "callbacks": [holder]}, "loss: wanted 'qempo', 'qempo_kl' or 'spl' with a Quality"),
        (
            {},
            {"loss": "qempo", "callbacks": [QualityConstraintCallback(qf.QualityConstraint(0.9, max_kl=1.0))]},
            "loss: wanted 'qempo_kl' or 'spl' with a constraint that has max_kl",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            built(GroupTrainer, path, tmp_path, config, **kw)
    for kw, message in [
        ({"loss": "qempo"}, "loss_kwargs: .*lam"),
        ({"loss": "gvpo", "loss_kwargs": {"alpha": 1.0}}, "loss_kwargs: loss='gvpo' takes beta, got alpha"),
        ({"loss": "rspo", "loss_kwargs": {"alpha": 1.0, "k": 2}}, "loss_kwargs: loss='rspo' takes k, .*, got alpha"),
    ]:
        with pytest.raises(TypeError, match=message):
            built(GroupTrainer, path, tmp_path, **kw)
    with pytest.raises(TypeError, match="constraint: wanted a QualityConstraint, got float"):
        QualityConstraintCallback(0.9)
    assert set(GROUP_LOSSES) == {"grpo", *by_name(GROUPS)} > {"qempo", "spl", "dqo"}


def test_a_model_built_in_memory_has_no_reference_to_load(path: str, tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_config(load(path).config)
    made.config._name_or_path = ""
    for config, kw in (({}, {"loss": "gvpo"}), ({"beta": 0.1}, {"loss": "grpo"})):
        with pytest.raises(
            ValueError, match=r"model: wanted one loaded from a name or a folder .* got a model built in"
        ):
            built(GroupTrainer, path, tmp_path, config, model=made, **kw)
    assert built(GroupTrainer, path, tmp_path, model=made, loss="rspo", loss_kwargs={"k": 2}).ref_model is None


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({}, None),
        ({"top_p": 1.0, "top_k": 0, "min_p": 0.0}, None),
        ({"generation_kwargs": {"top_k": 5}, "min_p": 0.1}, "top_k=5, min_p=0.1"),
        ({"generation_kwargs": {"top_p": 1.0}, "top_p": 0.9}, None),
        ({"top_p": 0.9}, "top_p=0.9"),
    ],
)
def test_a_sampler_that_is_not_the_policy_is_named(
    config: dict[str, Any], named: str | None, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kw = {"loss": "spl", "loss_kwargs": {"alpha": 0.1, "beta": 0.1}}
    trained(GroupTrainer, path, tmp_path, config, **kw)
    lines = [r.getMessage() for r in caplog.records if "cuts the tails off" in r.getMessage()]
    assert len(lines) == (named is not None)
    assert named is None or f"loss='spl' takes samples of the policy that it scores, and {named} cuts" in lines[0]


@pytest.mark.parametrize(
    ("settings", "lines"), [({}, 1), ({"mu": 0.5}, 0), ({"max_kl": 0.1}, 0), (None, 1), ({"loss": "qempo"}, 0)]
)
def test_where_qempo_kl_is_qempo_the_log_says_so(
    settings: dict[str, Any] | None, lines: int, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"min_reward": 0.9, **(settings or {})}
    kw: dict[str, Any] = {"loss": given.pop("loss", "qempo_kl")}
    if settings is None:
        kw["loss_kwargs"] = {"lam": 5.0, "mu": 0.0}
    else:
        kw["callbacks"] = [QualityConstraintCallback(qf.QualityConstraint(**given))]
    built(GroupTrainer, path, tmp_path, **kw)
    assert caplog.text.count("is QEMPO here: mu is 0, and only a QualityConstraint with max_kl moves it") == lines


def test_bad_rollouts(path: str, tmp_path: Path) -> None:
    for kw, message in [
        (
            {"loss": "rspo", "reward_funcs": lambda completions, **_: [None] * len(completions)},
            "reward_funcs: wanted a reward",
        ),
        ({"loss": "dqo", "embedder": lambda texts: torch.ones(1, 3)}, r"embedder\(...\): wanted shape \(4, any\)"),
    ]:
        kwargs = {"k": 2} if kw["loss"] == "rspo" else {}
        with pytest.raises(ValueError, match=message):
            trained(GroupTrainer, path, tmp_path, loss_kwargs=kwargs, **kw)
    trainer = built(GroupTrainer, path, tmp_path, loss="rspo", loss_kwargs={"k": 2})
    trainer.model.eval()
    trainer.num_generations_eval = 3  # a last evaluation batch that ends inside a group
    with pytest.raises(ValueError, match=r"batch: wanted whole groups of num_generations = 3 .* got 4 rows"):
        trainer._generate_and_score_completions([{"prompt": "w1 "}] * 4)


def test_the_page_runs_as_it_is_printed(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The page calls use_fused_logps() for good.
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", trl_utils._ChunkedLogProbFunction)
    page = Path(__file__).parents[1] / "docs" / "integrations" / "trl.md"
    given = {"model": load(path), "tokenizer": tokenizer(), "reward": word_reward, "embed": word_counts}
    given |= {"pairs": pairs(), "prompts": prompts(), "groups": stored_groups()}
    given |= {"dpo_config": dpo_config(tmp_path, max_steps=1), "grpo_config": grpo_config(tmp_path, max_steps=1)}
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    steps = []
    for source in blocks:
        exec(compile(source, page.name, "exec"), given)
        if "trainer.train()" in source:
            steps.append(given["trainer"].state.global_step)
    assert steps == [1, 1, 1, 1]
