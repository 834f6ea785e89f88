"""Triton kernels against float64, on the GPU or in the interpreter; and the offline compiler."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton runs on Linux only")

from qempo_fast.cli.compile import Usage, _attempt, _hsaco_usage, _uncovered, _verdict, signatures
from qempo_fast.kernels._common import Signature
from qempo_fast.kernels.segment_sum import segment_sum_bwd, segment_sum_fwd

# Lengths of the segments, each with what it is there for. The kernels walk blocks of 1024 tokens.
CASES = {
    "one token": [1],
    "no segment": [],
    "empty segments only, N = 0": [0, 0, 0],
    "empty first, twice in a row, last": [0, 3, 0, 0, 1025, 7, 0],
    "one under, on and over a block": [1023, 1024, 1025],
    "one segment over many blocks": [5001],
    "more segments than a power of two": [i % 5 for i in range(257)],
}
DTYPES = [
    (torch.float32, torch.int32),
    (torch.float32, torch.int64),
    (torch.float64, torch.int64),
    (torch.bfloat16, torch.int64),
    (torch.float16, torch.int32),
]


def offsets(lengths: list[int], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=dtype)


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("dtype", "cu_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_segment_sum_fwd(lengths: list[int], dtype: torch.dtype, cu_dtype: torch.dtype, device: torch.device) -> None:
    # Offset from zero: in a cancelling sum a dropped or doubled token could hide in the noise.
    values = (torch.randn(sum(lengths), dtype=torch.float64) - 3).to(dtype)
    out = segment_sum_fwd(values.to(device), offsets(lengths, cu_dtype).to(device))
    truth = torch.tensor(
        [part.sum().item() for part in values.double().split(lengths)] if lengths else [], dtype=torch.float64
    )
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.shape == truth.shape
    # Each lane adds length / 1024 terms, then comes a tree of depth 10: where all signs are equal the error
    # stays under (n / 1024 + 10) eps times the sum.
    bound = (
        torch.tensor([(n / 1024 + 10) * torch.finfo(out.dtype).eps for n in lengths], dtype=torch.float64) * truth.abs()
    )
    assert (out.cpu().double() - truth).abs().le(bound).all()


@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize(("dtype", "cu_dtype"), DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_segment_sum_bwd(lengths: list[int], dtype: torch.dtype, cu_dtype: torch.dtype, device: torch.device) -> None:
    grad = torch.randn(len(lengths)).to(dtype)
    out = segment_sum_bwd(grad.to(device), offsets(lengths, cu_dtype).to(device), sum(lengths))
    expected = grad.repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    assert out.dtype == dtype
    assert torch.equal(out.cpu(), expected)


def test_segment_sum_takes_strided_input_and_leaves_it_alone(device: torch.device) -> None:
    wide = torch.randn(2, 40, dtype=torch.float64, device=device).mT
    values, cu = wide[:, 1], torch.stack([offsets([15, 25])] * 2, 1)[:, 0].to(device)
    before, cu_before = wide.clone(), cu.clone()
    torch.testing.assert_close(segment_sum_fwd(values, cu), torch.stack([values[:15].sum(), values[15:].sum()]))
    grad = torch.tensor([[1.0, 9.0], [2.0, 9.0]], device=device)[:, 0]
    assert segment_sum_bwd(grad, cu, 40).tolist() == [1.0] * 15 + [2.0] * 25
    assert torch.equal(wide, before)
    assert torch.equal(cu, cu_before)


def test_segment_sum_is_bitwise_repeatable(device: torch.device) -> None:
    values, cu = torch.randn(9000, device=device) * 1e4, offsets([4000, 5000]).to(device)
    assert torch.equal(segment_sum_fwd(values, cu), segment_sum_fwd(values, cu))


@pytest.mark.parametrize(
    ("cu", "wrong"),
    [([0, 5, 3, 8], [1]), ([0, 5, 9], [1]), ([-1, 5, 8], [0]), ([0, 2**40, 8], [0, 1])],
    ids=["falls", "past the end", "negative", "far outside"],
)
def test_segment_sum_fwd_makes_a_wrong_segment_nan_and_no_other(
    cu: list[int], wrong: list[int], device: torch.device
) -> None:
    values = torch.arange(1.0, 9.0, device=device)
    out = segment_sum_fwd(values, torch.tensor(cu, device=device)).tolist()
    for s, total in enumerate(out):
        if s in wrong:
            assert total != total
        else:
            assert total == values[cu[s] : cu[s + 1]].sum().item()


@pytest.mark.parametrize(
    ("cu", "expected"),
    [([2, 5], [None, None, 7.0, 7.0, 7.0, None]), ([0, 4, 3, 6], [7.0, 7.0, 7.0, 9.0, 9.0, 9.0])],
    ids=["tokens in no segment", "falls"],
)
def test_segment_sum_bwd_of_wrong_offsets(cu: list[int], expected: list[float | None], device: torch.device) -> None:
    grad = torch.tensor([7.0, 8.0, 9.0][: len(cu) - 1], device=device)
    out = segment_sum_bwd(grad, torch.tensor(cu, device=device), 6).tolist()
    for got, want in zip(out, expected, strict=True):
        # A token that overlapping segments share has no right answer: one of theirs, or NaN.
        assert got != got if want is None else (got != got or got in (7.0, 8.0, 9.0))


def test_every_kernel_lists_its_signatures() -> None:
    listed = signatures()
    assert {s.kernel.__name__ for s in listed} >= {"_segment_sum_fwd_kernel", "_segment_sum_bwd_kernel"}
    for signature in listed:
        names = set(signature.types) | set(signature.constexprs)
        assert names == set(signature.kernel.arg_names), signature.kernel.__name__


def compile_command(
    *args: str, script: str = "from qempo_fast.cli import main; main()"
) -> subprocess.CompletedProcess[str]:
    """Run the compile command in a process of its own: in this one Triton may be in interpreter mode."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"COLUMNS": "200"}
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL)


def test_compile_builds_for_nvidia_and_amd_with_no_gpu() -> None:
    done = compile_command("compile", "--target", "cuda:90", "--target", "hip:gfx942", "--only", "segment_sum")
    assert done.returncode == 0, done.stdout + done.stderr
    header = next(line for line in done.stdout.splitlines() if "cuda:90" in line)
    assert header.index("cuda:90") < header.index("hip:gfx942")
    rows = [line.split("│") for line in done.stdout.splitlines() if "_segment_sum_" in line]
    # Three forward and two backward signatures, each for two targets, each with its registers counted.
    assert len(rows) == 5
    for cell in (cell for row in rows for cell in row[2:4]):
        registers, spilled, shared = map(int, cell.split("/"))
        assert registers > 0
        assert (spilled, shared in (0, 16, 32)) == (0, True)


@pytest.mark.parametrize("wrong", ["cuda:x", "cuda", "rocm:gfx942", "hip:90"])
def test_compile_refuses_an_unknown_target(wrong: str) -> None:
    done = compile_command("compile", "--target", wrong)
    assert done.returncode == 2
    assert "--target: wanted cuda:<capability>" in done.stderr
    assert repr(wrong) in done.stderr


def test_compile_refuses_the_interpreter_and_a_name_that_fits_nothing() -> None:
    script = "import os; os.environ['TRITON_INTERPRET'] = '1'; from qempo_fast.cli import main; main()"
    done = compile_command("compile", script=script)
    assert (done.returncode, "TRITON_INTERPRET is set" in done.stderr) == (2, True)
    done = compile_command("compile", "--only", "no_such_kernel")
    assert (done.returncode, "'no_such_kernel'" in done.stderr) == (2, True)


_FAULTY = """
import triton
import triton.language as tl

@triton.jit
def _fat_kernel(x_ptr, BLOCK: tl.constexpr):
    # 512 live values a thread in one warp: more than the registers there are, with all else that they hold.
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x / tl.sum(x * x, 0))

@triton.jit
def _broken_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), no_such_name)
"""
_RUN_FAULTY = """
import sys
sys.path.insert(0, sys.argv[1])
from rich.console import Console
import faulty
from qempo_fast.cli import compile as command
from qempo_fast.kernels._common import Signature
def of(kernel, block, hot):
    return Signature(kernel, {"x_ptr": "*fp32"}, {"BLOCK": block}, hot=hot, num_warps=1)
block = 16384 if sys.argv[3].startswith("cuda") else 32768
command.signatures = lambda: {
    "hot": [of(faulty._fat_kernel, block, True)],
    "cold": [of(faulty._fat_kernel, block, False)],
    "broken": [of(faulty._broken_kernel, 64, False)],
}[sys.argv[2]]
sys.exit(command.run([sys.argv[3]], "", Console()))
"""


@pytest.mark.parametrize("target", ["cuda:80", "hip:gfx942"])
@pytest.mark.parametrize(
    ("which", "status", "said"),
    [("hot", 1, "bytes spilled in a hot kernel"), ("cold", 0, "0 failed"), ("broken", 1, "no_such_name")],
)
def test_compile_fails_on_a_spill_in_a_hot_kernel_and_on_an_error(
    which: str, status: int, said: str, target: str, tmp_path: Path
) -> None:
    (tmp_path / "faulty.py").write_text(_FAULTY)
    done = compile_command(str(tmp_path), which, target, script=_RUN_FAULTY)
    assert done.returncode == status, done.stdout + done.stderr
    assert said in done.stdout


def test_a_signature_for_some_targets_leaves_the_others_to_the_kernels_other_signatures() -> None:
    def kernel() -> None: ...

    nvidia, amd = Signature(kernel, {}, targets=("cuda",)), Signature(kernel, {}, targets=("hip:gfx942",))
    targets = ["cuda:80", "cuda:90", "hip:gfx942", "hip:gfx1100"]
    assert _uncovered([nvidia, amd], targets) == [("kernel", "hip:gfx1100")]
    assert _uncovered([nvidia], targets[:3]) == [("kernel", "hip:gfx942")]
    assert _uncovered([Signature(kernel, {})], targets) == []
    assert _attempt(nvidia, "hip:gfx942") == ("-", None)


def test_too_much_shared_memory_fails_where_the_limit_is_known() -> None:
    cold = Signature(None, {})
    assert "bytes of shared memory" in str(_verdict(cold, "hip:gfx942", Usage(64, 0, 70_000)))
    assert _verdict(cold, "cuda:90", Usage(64, 0, 70_000)) is None
    assert _verdict(cold, "cuda:75", Usage(64, 0, 10**6)) is None


def test_amd_spills_are_read_from_each_counter() -> None:
    metadata = (
        "    .agpr_count:     0\n    .private_segment_fixed_size: 0\n    .sgpr_spill_count: {sgpr}\n"
        "    .vgpr_count:     52\n    .vgpr_spill_count: {vgpr}\n"
    )
    assert _hsaco_usage(metadata.format(sgpr=0, vgpr=0)) == (52, 0)
    assert _hsaco_usage(metadata.format(sgpr=0, vgpr=3)) == (52, 12)
    assert _hsaco_usage(metadata.format(sgpr=2, vgpr=0)) == (52, 8)


_SPECIALIZED = """
import triton
from qempo_fast.cli import compile as command
from qempo_fast.kernels import linear_logps_fused as fused
built, compile = [], triton.compile
triton.compile = lambda *args, **more: built.append(compile(*args, **more)) or built[-1]
for signature in fused.COMPILE:
    on = signature.constexprs["SPECIALIZE"]
    for target in (t for t in ("cuda:90", "cuda:100") if t.startswith(signature.targets)):
        command.compile_one(signature, target)
        print(target, on, "ttg.warp_specialize(" in built[-1].asm["ttgir"])
"""


def test_a_specialised_kernel_has_warps_of_its_own_and_no_other_has() -> None:
    fused = pytest.importorskip("qempo_fast.kernels.linear_logps_fused")
    if not fused._SPECIALIZES:
        pytest.skip("Triton 3.9 or newer")
    done = compile_command(script=_SPECIALIZED)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert {(target, on) for target, on, _ in rows} == {
        (t, o) for t in ("cuda:90", "cuda:100") for o in ("True", "False")
    }
    assert all(on == found for _, on, found in rows), done.stdout
