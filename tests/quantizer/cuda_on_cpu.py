"""The CUDA kernels as C++ for the CPU: their arithmetic, indices and shuffles, without a GPU; slow."""

import ctypes
import subprocess
from pathlib import Path

from surogate_quantize.cuda import source as cuda

SHIM = Path(__file__).with_name("fibers.cpp")

ARGUMENTS = {
    "amax": ("Amax",),
    "nf4": ("Nf4", "Ledger"),
    "nf4_search": ("Nf4", "Ledger"),
    "nvfp4_1d": ("Nvfp4", "Ledger"),
    "nvfp4_2d": ("Nvfp4", "Ledger"),
    "nvfp4_1d_search": ("Nvfp4", "Ledger"),
    "nvfp4_2d_search": ("Nvfp4", "Ledger"),
    "fp8": ("Fp8", "Ledger"),
    "fp8_amax": ("Fp8",),
    "fp8_search_channels": ("Fp8Search",),
    "fp8_search_tiles": ("Fp8Search",),
}
"""Structures that a kernel takes by value; all but `amax` take the weight before them."""


class CpuKernels:
    """Compiles modules with g++ into a folder, and launches their kernels."""

    def __init__(self, folder):
        self._folder, self._libraries, self.launched = folder, {}, []

    def launch(self, name, blocks, arguments):
        """Runs a kernel; `arguments` are addresses of what it takes by value."""
        self.launched.append(name)
        kernel = name.rpartition("_")[0]
        module = kernel.partition("_")[0]
        if module not in self._libraries:
            self._libraries[module] = self._compiled(module)
        if kernel != "amax":
            arguments = [ctypes.c_void_p.from_address(arguments[0]).value, *arguments[1:]]
        padded = [*arguments, None, None][:3]
        getattr(self._libraries[module], f"launch_{name}")(ctypes.c_uint(blocks), *map(ctypes.c_void_p, padded))

    def _compiled(self, module):
        defines = [f"#define {name} {value}" for name, value in cuda._constants().items()]
        parts = [cuda._text(part) for part in cuda.MODULES[module] if part != "ptx"]
        launchers = [_launcher(name) for name in cuda.kernel_names(module)]
        text, library = self._folder / f"{module}.cpp", self._folder / f"{module}.so"
        text.write_text("\n".join([*defines, SHIM.read_text(), *parts, *launchers]))
        options = ["-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w", "-shared", "-fPIC"]
        subprocess.run(["g++", *options, "-o", str(library), str(text)], check=True)
        return ctypes.CDLL(str(library))


def _launcher(name):
    kernel, _, dtype = name.rpartition("_")
    structures = [f"*(const {structure}*)" for structure in ARGUMENTS[kernel]]
    taken = structures if kernel == "amax" else [f"(const {dtype}::Word*)", *structures]
    passed = ", ".join(f"{cast}{value}" for cast, value in zip(taken, "abc", strict=False))
    parameters = "const void* a, const void* b, const void* c"
    return (
        f"static void body_{name}({parameters}) {{ {name}({passed}); }}\n"
        f'extern "C" void launch_{name}(u32 n, {parameters}) {{ grid(body_{name}, n, a, b, c); }}'
    )
