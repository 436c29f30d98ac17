"""The gate of ``make cuda-check`` on made-up machine code: loops, their order, counts, and exceeded budgets."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import cuda_check
import pytest
from cuda_check_budgets import Count, Kernel, budget, count, faults
from cuda_check_sass import Flow, functions, local_accesses

FAST = "fast_forward_kernel<Tiling<float, 8, 1>, (Half)0, true, false>"  # a tile: 4 exponentials; 4 elements a thread
LOOSE = Kernel("fast_forward_kernel<*", 1, 100, per_update=100, per_element=100)


def assemble(lines: Sequence[str], name: str = "kernel") -> str:
    """The listing of a function. "label:" names the next address; branches name labels; "n * x" repeats x."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in lines:
        if line.endswith(":"):
            labels[line[:-1]] = 16 * len(code)
        else:
            times, star, instruction = line.partition(" * ")
            code += [instruction] * int(times) if star else [line]
    text = [f"\t\tFunction : {name}", '\t.headerflags\t@"EF_CUDA_SM90"']
    for i, line in enumerate(code):
        *rest, last = line.split(" ")
        operand = f"{labels[last]:#x}" if last in labels else last
        text.append(f"        /*{16 * i:04x}*/  {' '.join([*rest, operand])} ;   /* 0x000fe20000000800 */")
        text.append(f"{'':50}/* 0x000fe20000000800 */")
    return "\n".join(text)


def flow(*lines: str) -> Flow:
    return Flow(functions(assemble([*lines, "EXIT"]))["kernel"])


# ---- loops -----------------------------------------------------------------------------------------------------------


def test_functions_instructions_have_predicates_names_and_operands():
    text = (
        assemble(["LDC R1, c[0x0][0x28]", "@!P0 BRA.U UP1, end", "end:", "EXIT"], "a") + "\n" + assemble(["RET"], "b")
    )
    found = functions(text)
    assert [(i.address, i.predicate, i.name, i.operands) for i in found["a"]] == [
        (0, "", "LDC", "R1, c[0x0][0x28]"),
        (16, "!P0", "BRA.U", "UP1, 0x20"),
        (32, "", "EXIT", ""),
    ]
    assert [i.name for i in found["b"]] == ["RET"]


def test_flow_nested_loops_inner_instructions_are_not_the_outer_loops():
    found = flow("outer:", "IADD3", "inner:", "2 * FFMA", "@P0 BRA inner", "FMUL", "@!P1 BRA outer")
    inner, outer = found.loops
    assert inner.parent is outer and outer.parent is None and outer.children == [inner]
    assert (found.pass_length(inner), found.pass_length(outer)) == (3, 3)
    assert found.own_count(outer, lambda i: i.opcode == "FFMA") == 0


def test_flow_two_backward_branches_to_one_header_are_one_loop_of_its_pass_length():
    found = flow("head:", "IADD3", "@P0 BRA head", "2 * FMUL", "@P1 BRA head")
    (loop,) = found.loops
    assert found.pass_length(loop) == 5


def test_flow_backward_branch_of_code_moved_out_of_line_is_no_loop():
    found = flow("IADD3", "@P0 BRA cold", "back:", "FMUL", "EXIT", "cold:", "2 * FADD", "BRA back")
    assert found.loops == []


def test_flow_unreachable_branch_to_itself_is_no_loop():
    assert flow("EXIT", "stop:", "BRA stop").loops == []


def test_flow_alternatives_count_the_longer_path_wherever_it_lies():
    lines = ["head:", "@P0 BRA cold", "FADD", "join:", "FMUL", "@P1 BRA head", "EXIT", "cold:", "3 * FADD", "BRA join"]
    found = flow(*lines)
    assert found.pass_length(found.loops[0]) == 1 + 3 + 1 + 2


def test_flow_path_with_accesses_of_16_bytes_counts_rather_than_a_longer_one():
    lines = ["head:", "@P0 BRA narrow", "LDG.E.128 R4, [R2]", "BRA join", "narrow:", "9 * LDG.E", "join:", "FMUL"]
    found = flow(*lines, "@P1 BRA head")
    assert found.pass_length(found.loops[0]) == 1 + 2 + 2


def test_flow_predicate_as_an_operand_is_a_branch_that_may_fall_through():
    found = flow("head:", "BRA P1, skip", "4 * FADD", "skip:", "@P0 BRA P2, head")
    assert found.pass_length(found.loops[0]) == 6


def test_flow_slow_path_of_diverged_warps_is_not_followed():
    lines = ["head:", "BRA.DIV UR4, slow", "SHFL", "back:", "@P0 BRA head", "EXIT", "slow:", "9 * SHFL", "BRA back"]
    found = flow(*lines)
    assert found.pass_length(found.loops[0]) == 3


def test_flow_indirect_branch_is_refused():
    with pytest.raises(ValueError, match="0x10: BRX is not followed"):
        flow("IADD3", "BRX R2")


def test_flow_sequences_alternatives_are_apart_and_successive_loops_together():
    lines = ["chunk:", "@P0 BRA b"]
    for name, after in (("a", "BRA c"), ("b", "IADD3")):
        lines += [f"{name}:", "FFMA", f"@P1 BRA {name}", after]
    found = flow(*lines, "c:", "FMUL", "@P1 BRA c", "@P2 BRA chunk")
    *inner, chunk = found.loops
    headers = [[found.blocks[loop.header][0].address // 16 for loop in s] for s in found.sequences(chunk, inner)]
    assert sorted(headers) == [[1, 7], [4, 7]]


# ---- counts ----------------------------------------------------------------------------------------------------------

RECURRENCE = ["4 * MUFU.EX2", "8 * FFMA"]


def loop(name: str, *body: str) -> list[str]:
    return [f"{name}:", *body, f"@P0 BRA {name}"]


def scan(*extra: str) -> list[str]:
    """A chunk loop with staging, two versions of the recurrence, and a recurrence of the last chunk behind it."""
    whole, resets = loop("whole", *RECURRENCE), loop("resets", "6 * ISETP", *RECURRENCE)
    chunk = ["chunk:", "9 * STS", "MUFU.EX2", *extra, "@P3 BRA resets", *whole, "BRA join", *resets, "join:", "8 * STG"]
    return [*chunk, "@P0 BRA chunk", *loop("tail", *RECURRENCE, "40 * IADD3"), "EXIT"]


def counted(lines: Sequence[str], name: str = FAST, kernel: Kernel = LOOSE) -> Count:
    return count(name, functions(assemble(lines))["kernel"], kernel)


def test_count_forward_version_without_resets_and_the_chunk_loop_count():
    # 13 instructions for 4 exponentials; staging, two branches and the end of the chunk for 32 steps / 8 lanes
    assert counted(scan()) == Count(13 / 4, (9 + 1 + 1 + 1 + 8 + 1) / 4)


def test_count_unrolled_tiles_count_by_their_exponentials():
    lines = [line.replace("4 * MUFU", "8 * MUFU").replace("8 * FFMA", "16 * FFMA") for line in scan()]
    assert counted(lines).per_update == 25 / 8


def test_count_backward_sums_the_cheaper_version_of_both_directions():
    two = Kernel("fast_backward_kernel<*", 1, 255, per_update=100, per_element=100)
    lines = scan()
    at = lines.index("8 * STG")
    lines[at:at] = loop("back", *RECURRENCE, "7 * SHFL")
    assert counted(lines, FAST.replace("forward", "backward"), two).per_update == 13 / 4 + 20 / 4
    with pytest.raises(ValueError, match="expected 2 recurrence loops"):
        counted(scan(), kernel=two)


def test_count_staging_loop_counts_for_each_element_of_its_vectors():
    lines = scan(*loop("stage", "LDG.E.128 R4, [R2]", "6 * STS"))
    plain = counted(scan()).per_element
    assert counted(lines) == Count(13 / 4, plain + 8 / 4)  # 4 numbers of float32
    assert counted(lines, FAST.replace("(Half)0", "(Half)1")) == Count(13 / 4, plain + 8 / 8)


def test_count_loop_over_shared_memory_counts_for_each_load():
    for unrolled in (1, 4):
        lines = scan(*loop("sums", f"{unrolled} * LDS.64", f"{unrolled} * FADD"))
        assert counted(lines).per_element == counted(scan()).per_element + (2 * unrolled + 1) / unrolled


def test_count_sums_of_warps_count_in_the_recurrence():
    two = Kernel("fast_backward_kernel<*", 1, 255, per_update=100, per_element=100)
    lines = scan()
    at = lines.index("8 * STG")
    lines[at:at] = loop("back", *RECURRENCE, *loop("warps", "4 * LDS.128", "STG.E.128 [R2], R4"))
    # 256 threads store 2 x 32 x 8 numbers of a chunk, 4 in a pass of 6 instructions
    sums = 6 * (2 * 32 * 8 / 4 / 256) / 32
    assert counted(lines, FAST.replace("forward", "backward"), two).per_update == 13 / 4 + 13 / 4 + sums


@pytest.mark.parametrize(
    "other", [loop("a", "3 * FADD"), loop("a", "LDS", *loop("b", "FADD"))], ids=["plain", "nested"]
)
def test_count_loop_of_unknown_passes_in_the_chunk_is_refused_for_elements_alone(other):
    with pytest.raises(ValueError, match="loads no element"):
        counted(scan(*other))
    assert counted(scan(*other), kernel=Kernel("*", 1, 100, per_update=100)) == Count(13 / 4, None)


def test_count_loop_of_unknown_passes_in_a_recurrence_is_refused():
    lines = scan()
    at = lines.index("whole:") + 1
    lines[at:at] = ["LDS", *loop("inner", "FADD")]
    with pytest.raises(ValueError, match="stores no 16 bytes"):
        counted(lines)


def test_count_without_a_recurrence_is_refused():
    with pytest.raises(ValueError, match="no recurrence loop"):
        counted(["FFMA", *loop("alone", *RECURRENCE), "EXIT"])
    with pytest.raises(ValueError, match="no Tiling"):
        counted(scan(), "pack_kernel")


def test_count_local_memory_of_any_kernel():
    lines = ["LDL.64 R2, [R1]", "@P0 STL [R1+0x8], R3", "LDS R4, [R5]", "LDG.E R4, [R5]", "EXIT"]
    assert local_accesses(functions(assemble(lines))["kernel"]) == 2
    found = counted(lines, "pack_kernel", Kernel("pack_kernel", 1, 128))
    assert faults("pack_kernel", found, LOOSE) == ["pack_kernel: 2 loads and stores of local memory, budget 0"]
    assert faults("pack_kernel", found, Kernel("*", 1, 128, local=2)) == []
    assert faults("pack_kernel", found, Kernel("*", 1, 128, local=1)) != []


# ---- budgets ---------------------------------------------------------------------------------------------------------


def test_faults_exceeded_budget_names_kernel_count_and_budget():
    found, tight = Count(7.1875, 39.75), Kernel("*", 1, 100, per_update=7.1, per_element=39)
    assert faults(FAST, found, Kernel("*", 1, 100, per_update=7.1875, per_element=39.75)) == []
    assert faults(FAST, found, tight) == [
        f"{FAST}: 7.19 instructions a state and step, budget 7.1",
        f"{FAST}: 39.75 instructions an element, budget 39",
    ]
    assert faults(FAST, found, tight, limited=False) == []


@pytest.mark.parametrize(
    "name, registers",
    [
        ("forward_kernel<Tiling<float, 16, 4>, false>", 96),
        ("forward_kernel<Tiling<float, 16, 4>, true>", None),
        ("forward_kernel<Tiling<float, 32, 8>, false>", None),
        ("backward_kernel<Tiling<Dual<float>, 4, 4>, true>", 255),
        ("local_backward_kernel<Tiling<float, 4, 4>>", None),
        ("filter_kernel<4, true>", None),
    ],
)
def test_budget_hot_kernels_alone_have_one(name, registers):
    found = budget(name)
    assert (found and found.registers) == registers


SYMBOL = "_Z19fast_forward_kernelI6TilingIfLi8ELi1EEL4Half0ELb1ELb0EEvPf"
LOG = """ptxas info    : Compiling entry function '{}' for 'sm_90'
ptxas info    : Function properties for {}
    {} bytes stack frame, {} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {} registers, used 1 barriers
"""


def check(monkeypatch, folder: Path, kernel: Kernel, stack: int, spilled: int, registers: int) -> list[str]:
    """Check a library of one made-up kernel with the given resources."""
    library = folder / "library.so"
    library.write_bytes(SYMBOL.encode())
    monkeypatch.setattr(cuda_check, "listing", lambda *_: assemble(scan(), SYMBOL))
    monkeypatch.setattr(cuda_check, "HOT", (kernel,))
    monkeypatch.setattr(cuda_check, "budget", lambda name: budget(name, (kernel,)))
    return cuda_check.check(library, LOG.format(SYMBOL, SYMBOL, stack, spilled, registers), ["sm_90"])


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="demangles by c++filt of binutils")
def test_check_prints_counts_with_budgets_and_returns_each_fault(monkeypatch, tmp_path, capsys):
    assert check(monkeypatch, tmp_path, LOOSE, 0, 0, 100) == []
    assert f"100 of 100   3.25 of 100   5.25 of 100  {FAST}" in capsys.readouterr().out
    tight = Kernel(LOOSE.pattern, 2, 99, per_update=3, per_element=5)
    assert check(monkeypatch, tmp_path, tight, 8, 4, 100) == [
        "fast_forward_kernel<*: 1 kernels for sm_90, expected 2",
        f"{FAST}: 3.25 instructions a state and step, budget 3 (sm_90)",
        f"{FAST}: 5.25 instructions an element, budget 5 (sm_90)",
        f"{FAST}: 100 registers, budget 99 (sm_90)",
        f"{FAST}: 4 bytes spilled, 8 bytes of stack, budget 0 (sm_90)",
    ]
