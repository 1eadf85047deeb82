"""Loops compiled in memory for the machine at hand, when llvmlite (`influent[fast]`) is installed.

Where it is not, `usable` says so, and whoever asks takes PyTorch instead: the numbers are the same up to rounding.
A loop takes 20 to 250 ms to compile, once a process; nothing is left on disk. Who gives a loop addresses answers for
what lies there. Not here: what the loops are for (kernels.py, products.py, tileproducts.py, pairprograms.py,
packing.py).
"""

import ctypes
import importlib
import importlib.util
import logging
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int8, UInt8
from torch import Tensor

log = logging.getLogger(__name__)

# What the loops read at once: theirs and their callers', here because loops.py itself takes llvmlite to import.
LANES = 16  # numbers of a vector
STEP = {"int8": 16, "int4": 16, "sign": 2}  # bytes of a row, and the least that a row must have
PLANES = {"int8": 1, "int4": 2, "sign": 1}  # vectors of sixteen numbers in them: an int4's low halves and high halves
PAIRS = 4  # pairs side by side, which share what is loaded of X
TILE_STEP = {"bfloat16": 64, "int8": 64, "int4": 32, "sign": 8}  # bytes of a row that a left tile has
TILE_PLANES = {"bfloat16": 1, "int8": 1, "int4": 2, "sign": 2}  # left tiles that are made of the same bytes
TILE_BLOCK = 32  # rows at a time: two left tiles, which meet a right one before it is let go
TILE_RING = {1: 16, 3: 12}  # left tiles that wait, in cache, for so many right tiles a step
TILE_SPAN = {1: 512, 3: 64}  # steps of a row that meet all rows before the next, for so many right tiles a step
# Steps that are summed before they are weighed: of codes to less than 2^30, since a product is below 2^14.
TILE_PIECE = {"bfloat16": 32, "int8": 512, "int4": 512, "sign": 512}
TILE_LINE = 8  # numbers of a line of their tables
TILE_PIECES = 3  # of a query's number, in columns side by side if there are few queries, else in a tile each
TILE_FEW = {4: 1, 8: 2, 16: 5}  # the columns that a right tile has, and for how many queries' pieces they do
TILE_BASE = 254  # of the digits

# The module and the arguments of each loop: p for an address, n for a number.
_LOOPS = {
    "product": ("loops", "pnnnnnppn"),
    "between": ("loops", "pnpnnpnnnpnp"),
    "unpack": ("loops", "pnnnp"),
    "dense": ("tiles", "pnnnnnnpp"),
    "lay": ("tilequeries", "pnn"),
    "fold": ("tilescores", "pnnpn"),
    "pairs": ("pairtiles", "pnnpnp"),
    "pieces": ("pairqueries", "pnn"),
}
_TILES = (
    "amx-tile",
    "amx-int8",
    "amx-bf16",
    "avx512f",
    "avx512bw",
    "avx512vnni",
    "gfni",
)  # what loops with tiles are compiled for
_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA = 158, 0x1023, 18  # of Linux on x86: a process asks for its tiles, once


@lru_cache(maxsize=1)
def usable() -> bool:
    """Whether loops can be compiled here."""
    if sys.byteorder != "little" or importlib.util.find_spec("llvmlite") is None:
        return False
    try:
        from llvmlite import binding  # pyright: ignore[reportMissingImports]

        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        binding.get_host_cpu_features()
    except (ImportError, OSError, RuntimeError) as e:
        log.warning("llvmlite is installed but cannot be used, so packed rows are scored more slowly: %s", e)
        return False
    return True


@lru_cache(maxsize=1)
def tiles_usable() -> bool:
    """Whether loops with matrix tiles (AMX) can be compiled and run here: a processor that has them, on Linux, which
    keeps them from programs that have not asked."""
    if not usable() or not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return False
    from llvmlite import binding  # pyright: ignore[reportMissingImports]

    if not all(binding.get_host_cpu_features().get(feature) for feature in _TILES):
        return False
    try:
        for name, options in (("pairs", ("bfloat16",)), ("dense", ("sign", 3, 16)), ("fold", (1, 4))):
            binding.parse_assembly(_written(name, *options)).verify()  # that LLVM has the instructions by these names
    except RuntimeError as e:
        log.warning("this llvmlite does not know the loops with matrix tiles, which are done without: %s", e)
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _ASK_PERMISSION, _TILE_DATA) == 0


def _written(name: str, *options: str | int) -> str:
    return getattr(importlib.import_module(f".{_LOOPS[name][0]}", __package__), name)(*options)


@cache
def loop(name: str, *options: str | int) -> Callable[..., None]:
    """The compiled function `name` of its module, which says what its arguments are; only where `usable`, and those
    with tiles only where `tiles_usable`."""
    where, kinds = _LOOPS[name]
    if not (usable() if where == "loops" else tiles_usable()):  # which asks for the tiles, too
        raise RuntimeError(f"loop {name!r} cannot be run here")
    from llvmlite import binding  # pyright: ignore[reportMissingImports]

    module = binding.parse_assembly(_written(name, *options))
    module.verify()
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3
    )
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kinds = [ctypes.c_void_p if kind == "p" else ctypes.c_int64 for kind in kinds]
    function: Any = ctypes.CFUNCTYPE(None, *kinds)(engine.get_function_address(name))
    function.engine = engine  # which owns the code
    return function


def readable(queries: Sequence[Float[Tensor, "Q _"]]) -> list[Float[Tensor, "Q _"]]:
    """Each as loops read it: float32 on the CPU, a query after the other. Those that are so are not copied."""
    return [
        q if q.dtype is torch.float32 and q.is_cpu and q.is_contiguous()
        else q.detach().to("cpu", torch.float32).contiguous()
        for q in queries
    ]  # fmt: skip


def unpack(codes: Int8[Tensor, "*n p"] | UInt8[Tensor, "*n p"], bits: str, length: int) -> Float[Tensor, "*n {length}"]:
    """The codes of rows of `length` numbers as float32."""
    assert codes.device.type == "cpu"
    codes = codes.contiguous()
    size = codes.shape[-1]
    out = torch.empty((*codes.shape[:-1], length), dtype=torch.float32)
    if out.numel():
        loop("unpack", bits)(codes.data_ptr(), size, codes.numel() // size, length, out.data_ptr())
    return out


def in_parts(n: int, least: int, run: Callable[[int, int], None]) -> None:
    """run(lo, hi) over all of range(n), on as many threads as PyTorch has, each of at least `least` numbers."""
    count = max(1, min(torch.get_num_threads(), n // least))
    cuts = [n * i // count for i in range(count + 1)]
    if count == 1:
        run(0, n)
        return
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(run, cuts, cuts[1:]))
