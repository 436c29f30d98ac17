"""The library of kernels: build_info, linked symbols, vector instructions of the hot loops; and its absence."""

import ctypes
import json
import os
import pkgutil
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eaml_ext
from eaml_ext.ops import _library

X86 = platform.machine() in ("x86_64", "AMD64")
ELF = sys.platform == "linux"

STABLE_C = re.compile(r"^(?:aoti_torch_|torch_)\w+$")


@pytest.fixture(scope="module")
def library(reference_only):
    if reference_only:
        pytest.skip("inspects the library of kernels, which this pass hides")
    return str(_library.path)


def tool(*command: str) -> str:
    if not ELF or shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} of binutils, and a binary of Linux")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def python(code: str, path: Path | None = None) -> subprocess.CompletedProcess:
    """Run code, with the package in the folder ``path``."""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env, cwd=path)


@pytest.fixture
def package(tmp_path):
    """A copy of the package's Python files, without kernels."""
    shutil.copytree(_library.path.parent, tmp_path / "eaml_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path / "eaml_ext"


# ---- build_info --------------------------------------------------------------------------------------------------


def test_build_info_has_every_key(reference_only):
    info = eaml_ext.build_info()
    assert info["torch"] == torch.__version__
    assert info["kernels"] is not reference_only
    if reference_only:
        assert set(info) == {"kernels", "torch"}
        return
    assert set(info) == {"kernels", "torch", "compiler", "simd", "cuda", "torch_target"}
    assert re.match(r"(gcc|clang|msvc) \d+", info["compiler"])
    assert info["cuda"] is None or re.match(r"\d+\.\d+", info["cuda"])
    assert re.fullmatch(r"\d+\.\d+", info["torch_target"])
    if X86 and ELF:
        assert info["simd"] in ("x86-64-v4 (AVX-512)", "x86-64-v3 (AVX2)", "x86-64 (SSE2)")


def test_build_info_torch_target_is_not_newer_than_torch(library):
    def release(version: str) -> list[int]:
        return [int(part) for part in version.split(".")[:2]]

    assert release(eaml_ext.build_info()["torch_target"]) <= release(torch.__version__)


def test_kernels_every_op_is_registered_for_cpu(library):
    names = [name for name in torch._C._dispatch_get_all_op_names() if re.match("eaml_ext::[^_]", name)]
    assert {"eaml_ext::knn", "eaml_ext::selective_scan", "eaml_ext::causal_conv1d"} <= set(names)
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"), name


def test_library_is_no_module_of_the_package(library):
    assert Path(library).exists() and not [m for m in pkgutil.iter_modules(eaml_ext.__path__) if "kernels" in m.name]


def test_binding_calls_the_ops(library):
    binding = pytest.importorskip("eaml_ext._C", reason="eaml_ext._C is not built")
    info = json.loads(binding.build_info())
    assert {**info, "kernels": True, "torch": torch.__version__} == eaml_ext.build_info()
    for dim in (1, 7, 64):
        assert binding.knn_panel_rows(dim, True) == torch.ops.eaml_ext._knn_panel_rows(dim, True) > 3
        assert binding.knn_panel_rows(dim, False) == dim + 3


# ---- the stable ABI ----------------------------------------------------------------------------------------------


def undefined(library: str) -> list[str]:
    lines = tool("nm", "-D", "--undefined-only", library).splitlines()
    return [line.split()[-1].split("@")[0] for line in lines if line.strip()]


def allowed(name: str) -> bool:
    """Return whether a symbol is of torch's stable C functions, the C++ standard library or the C library."""
    if name.startswith("_Z"):
        # std:: and its members, operators new and delete, the runtime's type information
        return bool(
            re.match(r"_ZN?[KVRO]*(?:S[a-z]|St)|_ZT[IVS]N?(?:St|S[a-z]|10__cxxabiv1|[a-z])|_Z(?:n|d)[wal]", name)
        )
    return bool(
        STABLE_C.match(name) or re.match(r"__cxa_|__gxx_|__dynamic_cast|_Unwind_|_ITM_|__gmon_start__", name)
    ) or libc(name)


def libc(name: str) -> bool:
    return hasattr(ctypes.CDLL(None), name)


def test_symbols_of_torch_are_of_stable_abi(library):
    names = undefined(library)
    demangled = tool("nm", "-D", "-C", "--undefined-only", library)
    assert not re.findall(r"\b(?:at|c10|caffe2|torch)::", demangled)
    assert any(STABLE_C.match(name) for name in names)
    unknown = [name for name in names if not allowed(name)]
    assert not unknown, unknown


def test_libraries_linked_are_of_torch_and_the_system(library):
    needed = re.findall(r"NEEDED.*\[(.+?)\.so", tool("readelf", "-d", library))
    known = {
        "libtorch",
        "libtorch_cpu",
        "libtorch_cuda",
        "libstdc++",
        "libgcc_s",
        "ld-linux-x86-64",
        "ld-linux-aarch64",
    }
    assert "libtorch_cpu" in needed
    assert set(needed) <= {*known, "libc", "libm", "librt", "libdl", "libpthread"}


# ---- vector instructions -----------------------------------------------------------------------------------------


def kernels(library: str, namespace: str, isa: str, precision: str, kernel: str) -> list[str]:
    """Return the instructions of a kernel's loops over time, of one instruction set."""
    if not X86:
        pytest.skip("x86-64 alone has AVX-512")
    kernel, dual = kernel.removesuffix("_dual"), kernel.endswith("_dual")
    vector = {"avx512": 64, "avx2": 32}[isa] // {"f": 4, "d": 8}[precision]
    number = rf"Dv{vector}_{precision}"
    state = rf"N\w*4DualI{number}E" if dual else number
    state = rf"N\w*7ComplexI{state}E" if namespace == "complex_states" else state
    # y or the gate; B and C as numbers or as vectors; as numbers, real states with a decay in common
    name, count = rf"{kernel}_blockILb[01]ELb[01]ELb[01]E{state}", 4
    if namespace == "real_states":
        count = {"forward": 5, "backward": 6}[kernel]
    if eaml_ext.build_info()["compiler"].startswith("clang"):  # clang inlines all of them into the entry
        name, count = rf"{len(kernel)}{kernel}ERK\w*InputsI{precision}E", 1
    names = re.findall(rf"\b\w*{namespace}\w*?{len(isa)}{isa}\w*?{name}\w*", tool("nm", library))
    bodies = [
        tool("objdump", "-d", "--no-show-raw-insn", f"--disassemble={name}", library).splitlines()
        for name in set(names)
    ]
    assert len(bodies) == count, names
    return [line for body in bodies for line in body]


@pytest.mark.parametrize("precision, suffix", [("f", "ps"), ("d", "pd")], ids=["float32", "float64"])
@pytest.mark.parametrize("kernel", ["forward", "backward", "forward_dual", "backward_dual"])
@pytest.mark.parametrize("namespace", ["real_states", "complex_states"])
@pytest.mark.parametrize("isa, register", [("avx512", "zmm"), ("avx2", "ymm")], ids=["AVX-512", "AVX2"])
def test_kernel_loops_use_full_vectors_and_no_wider_ones(library, isa, register, namespace, kernel, precision, suffix):
    body = kernels(library, namespace, isa, precision, kernel)
    fma = [line for line in body if re.search(rf"vf\w*m\w*{suffix} .*%{register}", line)]
    # exp multiplies by 2^n: by an instruction of AVX-512, else by a shift into the exponent's bits
    power = rf"vscalef{suffix}" if register == "zmm" else f"vpsll{'d' if suffix == 'ps' else 'q'}"
    powers = [line for line in body if re.search(rf"{power} .*%{register}", line)]
    assert len(fma) > 20 and len(powers) >= 4, (len(fma), len(powers))
    assert not [line for line in body if re.search(r"call.*\b(exp|sin|cos|fma)f?\b", line)]
    assert register == "zmm" or not [line for line in body if "%zmm" in line]
    # gcc broadcasts lane by lane where a callee is compiled for a smaller instruction set than its caller
    assert not [line for line in body if re.search(r"vbroadcasts[sd] .*\(.*\{%k", line)]


def test_wide_registers_stay_in_namespaces_of_their_instruction_set(library):
    """The linker keeps one copy of a header's function for all machines, so none may use wide registers."""
    if not X86:
        pytest.skip("x86-64 alone has AVX-512")
    current, wide = "", set()
    for line in tool("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:", line):
            current = match[1]
        elif "%zmm" in line or "%ymm" in line:
            wide.add(current)
    assert wide
    # clang wraps single instructions of AVX-512 in lambdas that only AVX-512 code calls
    ours = re.compile(r"4avx2|6avx512|[.]arch_x86[_-]64[_-]v[34]|[.]avx|ENKUlvE_clEv")
    assert not [name for name in wide if not ours.search(name)]


# ---- without kernels, without torch ------------------------------------------------------------------------------


USE = """
import sys, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import eaml_ext.ops, eaml_ext
    import torch
    from eaml_ext.ops import selective_scan, knn, PackedKeys
    x = torch.ones(1, 2, 3)
    selective_scan(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1])
    knn(x[0], x[0], 1)
    keys = PackedKeys(4, 3)
    keys.write(torch.arange(2), x[0])
    assert keys.search(x[0], 1).indices.tolist() == [[0], [0]]
ours = [w for w in caught if "eaml_ext" in str(w.message)]
"""
WITHOUT = """
assert len(ours) == 1 and ours[0].category is RuntimeWarning and ours[0].filename == "<string>", ours
assert eaml_ext.build_info() == {"kernels": False, "torch": torch.__version__}
print(ours[0].message)
"""


def write_nothing(library: Path) -> None:
    pass


def write_text(library: Path) -> None:
    library.write_text("no machine code")


def write_other_version(library: Path) -> None:
    library.with_name("_kernels-0.0.1.so").write_text("of another version")


def write_foreign(library: Path) -> None:
    shutil.copy(torch._C.__file__, library)


@pytest.mark.parametrize(
    "write, reason",
    [
        (write_nothing, r".* does not exist"),
        (write_text, r".*: (invalid ELF header|file too short|.*mach-o.*)"),
        (write_other_version, rf"_kernels-0\.0\.1\.so is of another version than eaml_ext {eaml_ext.__version__}"),
        (write_foreign, r".* does not register eaml_ext::_build_info"),
    ],
)
def test_import_without_loadable_kernels_warns_once_with_reason_and_command(package, write, reason):
    write(package / _library.path.name)
    message = python(USE + WITHOUT, package.parent).stdout.strip()
    assert "\n" not in message
    assert re.match(rf"eaml_ext: compiled kernels are not available \({reason}\); ", message), message
    assert message.endswith("in the source folder: pip install --force-reinstall --no-deps --no-cache-dir .")


def test_package_with_library_alone_works_without_binding(library, package):
    (package / Path(library).name).symlink_to(library)
    (package / "_kernels-0.0.1.so").write_text("of another version")
    code = """
assert not ours, ours
import json
print(json.dumps(eaml_ext.build_info()))
"""
    hide = 'import sys; sys.modules["eaml_ext._C"] = None\n'  # an import of it fails
    assert json.loads(python(hide + USE + code, package.parent).stdout) == eaml_ext.build_info()


@pytest.mark.parametrize("first", ["library", "package"])
def test_kernels_run_whichever_of_library_and_schemas_is_loaded_first(library, package, first):
    """The package's own library is hidden; another copy is loaded before or after the import."""
    load = f"import torch; torch.ops.load_library({library!r})\n"
    use = """
import warnings
warnings.simplefilter("ignore")
import torch
from eaml_ext.ops import selective_scan
x = torch.ones(1, 2, 3)
def run():
    profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profile:
        selective_scan(x, x, -torch.ones(2, 1), x[:, :1], x[:, :1])
    return {event.key for event in profile.key_averages()}
"""
    check = """
assert torch.ops.eaml_ext._build_info()
calls = run()
assert "eaml_ext::selective_scan" in calls and "aten::exp" not in calls, calls
"""
    python(load + use + check if first == "library" else use + load + check, package.parent)


def test_import_of_package_is_silent_and_loads_no_torch():
    done = python("import sys, eaml_ext; dir(eaml_ext); assert 'torch' not in sys.modules, 'torch was imported'")
    assert done.stdout == done.stderr == ""
