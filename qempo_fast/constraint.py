"""QEMPO's constraint: multipliers for a held quality, solved on a finite set or learnt during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import _check
from .reference.family import AlphaBeta, optimum

# How far, in nats, max_kl may lie below the smallest attainable KL, and, as a share of the largest |reward|,
# min_reward above the best reward, before they count as infeasible: callers pass the KL and reward of a policy
# they computed themselves, which rounding puts on either side of the bound (a sharp KL-RLHF policy over rewards
# up to 1e4 had a mean reward 1.8e-12 above all of them).
_KL_SLACK = 1e-10
_REWARD_SLACK = 1e-12
# Buffers of a QualityConstraint, the last two where it is damped.
_STATE = ("lam", "mu", "integral", "gap")


class QempoSolution(NamedTuple):
    """Multipliers and policy of ``solve_qempo``."""

    lam: float
    mu: float
    probs: torch.Tensor


def target_distribution(
    rewards: torch.Tensor, ref_logps: torch.Tensor | None = None, *, alpha: float, beta: float = 0.0
) -> torch.Tensor:
    """The optimum of E[r] + alpha H(pi) + beta E[log pi_ref] on a finite set of responses.

        pi* = pi_ref^(beta / alpha) exp(r / alpha) / Z

    Derived. alpha = beta is KL-RLHF and DPO, alpha = 1 / lam with beta = 0 QEMPO.

    Args:
        rewards: (..., n) float, finite.
        ref_logps: (..., n) float, log-probs of the reference; a constant added to them changes nothing.
            Needed where beta > 0. Minus infinity, a response that the reference never gives, is allowed.
        alpha: weight of the entropy, > 0.
        beta: weight of the cross-entropy to the reference, >= 0.

    Returns:
        (..., n) probabilities; float32, or float64 for float64 rewards.

    Raises:
        TypeError, ValueError: rewards of another type or not finite; another shape or device of ref_logps; a
            hyperparameter out of range.
    """
    _check.positive("alpha", alpha)
    _check.number("beta", beta, low=0.0)
    _check.tensor("rewards", rewards)
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        _check.bad_value("rewards", "at least 1 dimension and 1 response", f"shape {tuple(rewards.shape)}")
    _check.finite("rewards", rewards)
    if ref_logps is None:
        if beta > 0:
            _check.bad_value("ref_logps", "the reference's log-probs, since beta > 0", None)
    else:
        _check.tensor("ref_logps", ref_logps, shape=rewards.shape, device=rewards.device)
        if _check.readable(ref_logps) and bool((ref_logps.isnan() | (ref_logps == torch.inf)).any()):
            _check.bad_value("ref_logps", "log-probs without NaN or plus infinity", "some")
        if beta > 0 and _check.readable(ref_logps) and bool((ref_logps == -torch.inf).all(-1).any()):
            _check.bad_value("ref_logps", "a response that the reference gives", "minus infinity for all")
    dtype = torch.promote_types(rewards.dtype, torch.float32)
    reference = None if ref_logps is None else ref_logps.to(dtype)
    return optimum(rewards.to(dtype), reference, alpha=alpha, beta=beta)


def solve_qempo(
    rewards: torch.Tensor,
    ref_logps: torch.Tensor | None = None,
    *,
    min_reward: float,
    max_kl: float | None = None,
) -> QempoSolution:
    """The most entropic policy on a finite set whose mean reward is held, and its KL too if asked.

        max H(pi)  s.t.  E_pi[r] >= min_reward  and  KL(pi || pi_ref) <= max_kl
        pi = exp((lam r + mu log pi_ref) / (1 + mu)) / Z,   lam, mu >= 0, each 0 where its constraint is slack

    Derived (KKT conditions) for the problem that the abstract of 2602.15894 states. In float64 on the CPU, by
    Newton steps inside a bracket.

    A min_reward equal, to 1e-12 of the rewards, to the largest has only a limit: lam = inf and all mass on the
    best responses, uniform there, or as max_kl makes it. A max_kl equal, to 1e-10, to the smallest that
    min_reward leaves has one feasible policy, pi_ref tilted to min_reward (or pi_ref itself): mu = inf, and
    lam = inf unless pi_ref meets min_reward.

    Args:
        rewards: (n,) float, finite, n >= 1.
        ref_logps: (n,) float, finite log-probs of the reference, normalised here over the n responses. Needed
            with max_kl; not used without.
        min_reward: R, the mean reward to hold.
        max_kl: K, the cap on KL(pi || pi_ref) in nats, >= 0; None for no cap (QEMPO instead of QEMPO-KL).

    Returns:
        (lam, mu, probs): two floats, and (n,) float64 probabilities on the device of rewards, or on the CPU where that
            has no float64.

    Raises:
        TypeError, ValueError: a tensor of another type, shape or not finite (one problem a call: rewards are
            1-D); min_reward above the largest reward; a max_kl that no policy with min_reward meets. The last
            two name the attainable bound.
    """
    _check.tensor("rewards", rewards, ndim=1)
    if rewards.numel() == 0:
        _check.bad_value("rewards", "at least one response", "an empty tensor")
    _check.present("rewards", rewards)
    r = rewards.detach().cpu().double()
    _check.finite("rewards", r)
    _check.number("min_reward", min_reward)
    # NumPy's float32 would keep its precision in all that follows.
    min_reward = float(min_reward)
    f = None
    if max_kl is not None:
        _check.number("max_kl", max_kl, low=-_KL_SLACK)
        max_kl = max(float(max_kl), 0.0)
        if ref_logps is None:
            _check.bad_value("ref_logps", "the reference's log-probs, since max_kl is given", None)
        _check.tensor("ref_logps", ref_logps, shape=rewards.shape)
        _check.present("ref_logps", ref_logps)
        f = torch.log_softmax(ref_logps.detach().cpu().double(), dim=0)
        _check.finite("ref_logps", f)
    best, worst = float(r.max()), float(r.min())
    if not math.isfinite(worst - best):
        _check.bad_value("rewards", "a spread that float64 can hold", f"rewards from {worst} to {best}")
    if min_reward > best + _REWARD_SLACK * max(abs(best), abs(worst)):
        _check.bad_value("min_reward", f"at most {best}, the largest reward", min_reward)
    # Distances below the best reward keep their digits where min_reward is close to it.
    gaps, floor = r - best, min(min_reward - best, 0.0)
    if floor == 0.0 and float(gaps.min()) < 0.0:
        top = gaps == 0.0
        _, mu, p = _solve(gaps[top], None if f is None else f[top], 0.0, max_kl)
        probs = torch.zeros_like(r).masked_scatter(top, p)
        return QempoSolution(math.inf, mu, _follow(lambda x: x.to(rewards.device), probs))
    lam, mu, probs = _solve(gaps, f, floor, max_kl)
    return QempoSolution(lam, mu, _follow(lambda x: x.to(rewards.device), probs))


def _solve(r: torch.Tensor, f: torch.Tensor | None, floor: float, cap: float | None) -> QempoSolution:
    """Solve with r <= 0, floor 0 or inside (min r, 0), by which of the two constraints bind."""
    # 1. The KL cap does not bind: mu = 0.
    lam, p = _tilt(r, torch.zeros_like(r), floor)
    if f is None or cap is None or _kl(p, f) <= cap:
        return QempoSolution(lam, 0.0, p)
    # 2. No policy that meets the floor is closer to the reference than its own tilt.
    lam, p = _tilt(r, f, floor)
    closest = _kl(p, f)
    if cap < closest - _KL_SLACK * (1.0 + closest):
        _check.bad_value("max_kl", f"at least {closest:.12g}, the smallest that min_reward leaves", cap)
    if cap <= closest + _KL_SLACK * (1.0 + closest):
        return QempoSolution(math.inf if lam > 0.0 else 0.0, math.inf, p)

    # 3. It binds: softmax(a r + t f) with KL = cap, where t = mu / (1 + mu) falls from 1 to 0 as cap grows.
    def excess(t: float) -> tuple[float, float]:
        a, q = _tilt(r, t * f, floor)
        centred_r, centred_f = r - (q * r).sum(), f - (q * f).sum()
        slope = float((q * centred_f**2).sum())
        if a > 0.0:
            slope -= float((q * centred_r * centred_f).sum() ** 2 / (q * centred_r**2).sum())
        return _kl(q, f) - cap, -(1.0 - t) * slope

    t = _root(excess, 0.0, 1.0)
    a, p = _tilt(r, t * f, floor)
    return QempoSolution(a / (1.0 - t), t / (1.0 - t), p)


def _tilt(r: torch.Tensor, base: torch.Tensor, floor: float) -> tuple[float, torch.Tensor]:
    """The smallest a >= 0 at which p = softmax(a r + base) has E_p[r] >= floor, and p."""

    def shortfall(a: float) -> tuple[float, float]:
        p = torch.softmax(a * r + base, dim=0)
        mean = (p * r).sum()
        return floor - float(mean), -float((p * (r - mean) ** 2).sum())

    a = 0.0
    if shortfall(0.0)[0] > 0.0:
        high = 1.0 / -float(r.min())
        while shortfall(high)[0] > 0.0:
            high *= 2.0
        a = _root(shortfall, 0.0, high)
    return a, torch.softmax(a * r + base, dim=0)


def _root(f: Callable[[float], tuple[float, float]], low: float, high: float) -> float:
    """Root of a falling function between low (f > 0) and high (f <= 0); f returns value and slope."""
    x = 0.5 * (low + high)
    for _ in range(200):
        value, slope = f(x)
        low, high = (x, high) if value > 0.0 else (low, x)
        step = x - value / slope if slope < 0.0 else math.inf
        if abs(step - x) <= 1e-15 * x:
            break
        new = step if low < step < high else 0.5 * (low + high)
        if not low < new < high:
            break
        x = new
    return x


def _kl(p: torch.Tensor, f: torch.Tensor) -> float:
    return float((torch.xlogy(p, p) - p * f).sum())


class QualityConstraint(torch.nn.Module):
    """Multipliers that hold mean reward at least min_reward, and KL at most max_kl, during training.

        additive:        lam <- lam + lr (R - mean r),       mu <- max(0, mu + kl_lr (KL - K))
        multiplicative:  lam <- lam exp(lr (R - mean r)),    mu <- max(0, (1 + mu) exp(kl_lr (KL - K)) - 1)
        then lam is held inside [lam_min, lam_max], mu under mu_max;  alpha = (1 + mu) / lam, beta = mu / lam
        damping > 0:     these are the integrals, and a second step of lr * damping * (smoothed gap), taken afresh
                         from them each time, gives lam and mu

    Derived: dual ascent on QEMPO's and QEMPO-KL's Lagrangian; the abstract of 2602.15894 states the
    constraints, not this rule. The multiplicative step is mirror ascent on the same dual (entropy mirror map
    in lam and in 1 + mu), with the same fixed points; it moves by a share of lam, so one lr serves whether
    the answer is near 1 or near 100.

    The policy answers lam only after tens of steps, and an integral winds up meanwhile: the reward overshoots
    and entropy is lost on the way. A good start for rewards of 0 or 1 is lam at a ceiling with a meaning,
    the most entropy that an answer can have: ``nats = max_tokens * math.log(V)`` and ``QualityConstraint(R,
    lam=nats, lam_max=nats, lr=1.0, step="multiplicative")``; divide nats by the step of a finer reward. Add
    ``mu=1.0``, and twice that ceiling, (1 + mu) nats, to stay near the reference, or ``max_kl=K, kl_lr=0.02`` to
    cap the KL. Quality comes first; above the floor lam falls and the rest buys entropy. Where no
    ceiling is known, damping (proportional-integral control of a multiplier, 2007.03964, without its derivative
    term) limits the overshoot: ``lr=0.1, damping=30, smoothing=0.9`` from a low lam. docs/losses.md has the
    measurements. A gap in KL is often ten times one in reward: kl_lr has to be smaller.

    lam is the weight of reward against entropy. Below lam_min alpha would grow without bound (lam = 0 asks
    for the uniform policy), so lam stays at lam_min while the constraint is slack.

    Use it as ``loss = qf.spl_loss(l, f, r, group_size=k, alpha=c.alpha, beta=c.beta)``, or
    ``qf.qempo_kl_loss(..., lam=float(c.lam), mu=float(c.mu))``, then ``c.update(r)``, with
    ``kl=(l - f).mean()`` where max_kl is set. Across ranks give update() the gathered rewards, or the ranks
    drift apart.

    Args:
        min_reward: R.
        max_kl: K in nats, >= 0, or None for no KL constraint. mu then stays at its start: 0 is QEMPO, and
            above 0 the constraint scales SPL at a held alpha / beta = (1 + mu) / mu.
        lr: step of lam, > 0, and of mu unless kl_lr is given.
        kl_lr: step of mu, > 0.
        lam: start of lam, inside [lam_min, lam_max].
        mu: start of mu, inside [0, mu_max].
        lam_min: smallest lam, > 0.
        lam_max: largest lam: it bounds the wind-up where min_reward cannot be reached.
        mu_max: largest mu, the same for max_kl.
        step: "additive" or "multiplicative".
        damping: for how many updates' worth of lr the present gap counts, >= 0. 0 is integral control alone.
        smoothing: share of the past in the running mean of the gap that damping multiplies, in [0, 1): it
            keeps the noise of a batch out of lam. The integral sees each gap once, unsmoothed.

    Attributes:
        lam, mu: float64 scalar buffers, saved in the state_dict; so are integral and gap, (2,), where
            damping > 0. They stay float64 when a model around them is cast or a state of another dtype is loaded, and
            on the CPU when it moves to a device without float64 (mps) or without values (meta).
        alpha, beta: floats, the family's numbers for the losses.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    lam: torch.Tensor
    mu: torch.Tensor
    integral: torch.Tensor
    gap: torch.Tensor

    def __init__(
        self,
        min_reward: float,
        *,
        max_kl: float | None = None,
        lr: float = 0.05,
        kl_lr: float | None = None,
        lam: float = 1.0,
        mu: float = 0.0,
        lam_min: float = 1e-2,
        lam_max: float = 1e4,
        mu_max: float = 1e4,
        step: str = "additive",
        damping: float = 0.0,
        smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check.number("min_reward", min_reward)
        if max_kl is not None:
            _check.number("max_kl", max_kl, low=0.0)
        _check.positive("lr", lr)
        _check.positive("kl_lr", lr if kl_lr is None else kl_lr)
        _check.positive("lam_min", lam_min)
        _check.number("lam_max", lam_max, low=lam_min)
        _check.number("lam", lam, low=lam_min, high=lam_max)
        _check.positive("mu_max", mu_max)
        _check.number("mu", mu, low=0.0, high=mu_max)
        _check.choice("step", step, ("additive", "multiplicative"))
        _check.number("damping", damping, low=0.0)
        _check.number("smoothing", smoothing, low=0.0, high=1.0, open_high=True)
        self.min_reward, self.max_kl = float(min_reward), None if max_kl is None else float(max_kl)
        self.lr, self.kl_lr = float(lr), float(lr if kl_lr is None else kl_lr)
        self.lam_min, self.lam_max, self.mu_max, self.step = float(lam_min), float(lam_max), float(mu_max), step
        self.damping, self.smoothing = float(damping), float(smoothing)
        self.register_buffer("lam", _state(float(lam)))
        self.register_buffer("mu", _state(float(mu)))
        if damping:
            self.register_buffer("integral", _state([float(lam), float(mu)]))
            # NaN until the first update: a running mean that started at 0 would hide the gap that is largest.
            self.register_buffer("gap", _state([math.nan, math.nan]))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QualityConstraint:
        # A model cast to bfloat16 casts its submodules, and lam = 20 in bfloat16 cannot move by less than
        # 0.06. So the multipliers take from fn the device alone; what else a subclass has takes all of it.
        before = dict(self._buffers)
        own = {name: self._buffers.pop(name) for name in _STATE if name in before}
        try:
            super()._apply(fn, recurse)
            own = {name: _follow(fn, buffer) for name, buffer in own.items()}
        finally:
            # In the order that the state_dict had.
            after = self._buffers | own
            self._buffers.clear()
            self._buffers.update({name: after[name] for name in before})
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._widen()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._widen()

    def _widen(self) -> None:
        """Back to float64 what was assigned or cast past _apply: a step of 4e-4 does not move lam = 1e4 in float32."""
        for name in _STATE:
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype is not torch.float64 and not buffer.is_meta:
                self._buffers[name] = _check.double(buffer)

    @property
    def alpha(self) -> float:
        return AlphaBeta.of_qempo(float(self.lam), float(self.mu)).alpha

    @property
    def beta(self) -> float:
        return AlphaBeta.of_qempo(float(self.lam), float(self.mu)).beta

    @torch.no_grad()
    def update(self, rewards: torch.Tensor | float, kl: torch.Tensor | float | None = None) -> QualityConstraint:
        """One dual step from this batch's rewards, and its KL (mean of l - f, or any estimate); returns self.

        Args:
            rewards: any shape, float, finite, of samples of the current policy; or their mean.
            kl: the same for KL(pi || pi_ref); wanted exactly where max_kl is set.
        """
        reward = _mean("rewards", rewards)
        if (kl is None) != (self.max_kl is None):
            wanted = "None, since there is no max_kl" if self.max_kl is None else "an estimate, since max_kl is set"
            _check.bad_value("kl", wanted, "None" if kl is None else "one")
        excess = None if self.max_kl is None else _mean("kl", kl) - self.max_kl
        self._widen()
        self._move(0, self.min_reward - reward)
        if excess is not None:
            self._move(1, excess)
        return self

    def _move(self, which: int, gap: float) -> None:
        """One step of lam (0) or mu (1) for a gap that is positive where its constraint is broken."""
        buffer, lr, low, high = (
            (self.lam, self.lr, self.lam_min, self.lam_max),
            (self.mu, self.kl_lr, 0.0, self.mu_max),
        )[which]

        # lam itself, and 1 + mu, are what the multiplicative step scales. Beyond exp(700) lam_max and mu_max decide.
        def stepped(x: float, by: float) -> float:
            if self.step == "additive":
                x += by
            elif which:
                # Not (1 + x) exp(by) - 1, which loses the digits of a small mu.
                x += (1.0 + x) * math.expm1(min(by, 700.0))
            else:
                x *= math.exp(min(by, 700.0))
            return min(max(x, low), high)

        if not self.damping:
            buffer.fill_(stepped(float(buffer), lr * gap))
            return
        past = float(self.gap[which])
        mean = gap if math.isnan(past) else self.smoothing * past + (1.0 - self.smoothing) * gap
        integral = stepped(float(self.integral[which]), lr * gap)
        self.gap[which], self.integral[which] = mean, integral
        buffer.fill_(stepped(integral, lr * self.damping * mean))

    def extra_repr(self) -> str:
        bounds = f"min_reward={self.min_reward}, max_kl={self.max_kl}"
        return f"{bounds}, lr={self.lr}, step={self.step!r}, damping={self.damping}"


def _mean(name: str, x: Any) -> float:
    """Mean of a tensor or a number, finite."""
    if isinstance(x, torch.Tensor):
        _check.tensor(name, x)
        _check.present(name, x)
        if x.numel() == 0:
            _check.bad_value(name, "at least one value", "an empty tensor")
        x = float(_check.double(x.detach()).mean())
        if not math.isfinite(x):
            _check.bad_value(name, "finite values", f"a mean of {x}")
    _check.number(name, x)
    return float(x)


def _state(x: float | list[float]) -> torch.Tensor:
    """A buffer on torch's default device, or on the CPU where that cannot hold it."""
    buffer = torch.tensor(x, dtype=torch.float64, device="cpu")
    return _follow(lambda t: t.to(torch.get_default_device()), buffer)


def _follow(fn: Callable[[torch.Tensor], torch.Tensor], buffer: Any) -> Any:
    """buffer where fn puts it; on the CPU where that device has no float64 or, as meta, no values."""
    if buffer is None:
        return None
    try:
        device = fn(buffer).device
    except (TypeError, RuntimeError):
        # Apple's GPUs refuse float64. What fn does to no dtype it refuses here, too.
        fn(buffer.float())
        return buffer.cpu()
    return buffer if device.type == "meta" else buffer.to(device)
