"""Which machine `--topology` means, and what its chips have and can do."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
from typing import Any, NamedTuple

import jax

from kdrl_jax.training.memory import GIB
from kdrl_jax.training.performance import Peak, peak_of
from kdrl_jax.types import UserError
from kdrl_jax.versions import libtpu_problem

GPU_FRACTION = 0.75
"""Of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""


class Chip(NamedTuple):
    """A kind of device. FLOP/s and memory bandwidth are in `performance.DATA_SHEETS`."""

    kind: str
    """Of `jax.Device.device_kind`."""
    memory: float
    """GiB. TPU: what its compiler lets a program have; GPU: what nvidia-smi shows."""
    link: float
    """Bytes per second that a chip can receive from the others."""
    clock: float = 0.0
    """Hz, of a TPU's cores: what the compiler's cycles are of."""
    cores: int = 1
    """Per chip, as names like v5p-32 count."""
    axes: int = 0
    """Of a TPU's torus."""


# Links: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} (interchip interconnect, one direction); NVIDIA
# data sheets (NVLink, one direction). Clocks: from peak FLOP/s and the matrix units of a chip, four
# or eight of 128 x 128 (scaling book: jax-ml.github.io/scaling-book/tpus); the compiler's cycles
# for a large product then give 88 to 93 % of the peak (v6e: 70 %).
CHIPS = {
    "v4": Chip("TPU v4", 30.75, 300e9, 1.05e9, cores=2, axes=3),
    "v5e": Chip("TPU v5 lite", 15.75, 200e9, 1.5e9, axes=2),
    "v5p": Chip("TPU v5", 95.74, 600e9, 1.75e9, cores=2, axes=3),
    "v6e": Chip("TPU v6 lite", 31.25, 400e9, 1.75e9, axes=2),
    "a100-40": Chip("NVIDIA A100-SXM4-40GB", 40.0, 300e9),
    "a100-80": Chip("NVIDIA A100-SXM4-80GB", 80.0, 300e9),
    "h100": Chip("NVIDIA H100 80GB HBM3", 79.6, 450e9),
    "h200": Chip("NVIDIA H200", 140.4, 450e9),
    "b200": Chip("NVIDIA B200", 179.0, 900e9),
}
ALIASES = {"v5litepod": "v5e", "a100": "a100-80"}
# Slices by their chips, as cloud.google.com/tpu/docs lists them.
SLICES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: (
        *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8"),
        *("8x8x16", "8x16x16", "16x16x16"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """Some chips of one kind.

    Attributes:
      name: 'v5p:2x2x4' or 'h100:8'.
    """

    name: str
    chip: Chip
    count: int

    @property
    def is_tpu(self) -> bool:
        """Whether the compiler needs no chip to be at hand."""
        return self.chip.axes > 0

    @property
    def peak(self) -> Peak:
        """The data sheet's."""
        peak = peak_of(self.chip.kind)
        assert peak is not None  # a test looks every kind up
        return peak

    @property
    def limit(self) -> float:
        """Bytes of a chip's memory that a run may have."""
        if self.is_tpu:
            return self.chip.memory * GIB
        fraction = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_FRACTION)
        return self.chip.memory * GIB * float(fraction)


def parse_topology(text: str) -> Machine:
    """'v5p:2x2x4', or as the provider says it 'v5p-32'; 'h100:8'.

    Raises:
      UserError: unknown; with the nearest that is known.
    """
    found = re.fullmatch(r"(v\w+?)-(\d+)|([\w-]+?):([\dx]+)", text.strip().lower())
    name, size = (found[1] or found[3], found[2] or found[4]) if found else (text, "")
    name = ALIASES.get(name, name)
    chip = CHIPS.get(name)
    if found is None or chip is None or (found[1] and not chip.axes):
        near = difflib.get_close_matches(name.split(":")[0], [*CHIPS, *ALIASES], 1, cutoff=0.0)[0]
        near = ALIASES.get(near, near)
        example = f"{near}:{SLICES[CHIPS[near].axes][2]}" if CHIPS[near].axes else f"{near}:8"
        raise UserError(
            f"--topology: {text!r} is not known; the nearest is {example!r}; write CHIP:SHAPE or "
            f"CHIP:COUNT of {', '.join(CHIPS)}, or a TPU's type such as v5p-32"
        )
    if not chip.axes:
        if not size.isdigit() or int(size) < 1:
            raise UserError(f"--topology: {text!r}: write a number of GPUs, like {name}:8")
        return Machine(f"{name}:{size}", chip, int(size))
    by_chips = {math.prod(map(int, s.split("x"))): s for s in SLICES[chip.axes]}
    if found[1]:
        cores = int(size)
        if cores % chip.cores or cores // chip.cores not in by_chips:
            counts = [n * chip.cores for n in by_chips]
            near_count = min(counts, key=lambda n: abs(n - cores))
            raise UserError(
                f"--topology: {text!r} is no slice of {name}; the nearest is {name}-{near_count} "
                f"({name}:{by_chips[near_count // chip.cores]})"
            )
        size = by_chips[cores // chip.cores]
    sides = [int(side) for side in size.split("x") if side]
    if len(sides) != chip.axes or not all(sides):
        near_size = min(by_chips, key=lambda n: abs(n - math.prod(sides)))
        raise UserError(
            f"--topology: {text!r}: a slice of {name} has {chip.axes} sides; the nearest is "
            f"{name}:{by_chips[near_size]}"
        )
    return Machine(f"{name}:{size}", chip, math.prod(sides))


def require_compiler(machine: Machine) -> None:
    """Checks that the compiler of a machine fits jax, before anything is compiled.

    Raises:
      UserError: libtpu is not of the releases that jax requires; says which are.
    """
    if machine.is_tpu and (problem := libtpu_problem()):
        raise UserError(f"{problem}; or give --compile=none for the estimate alone")


def devices_of(machine: Machine) -> tuple[list[Any] | None, str]:
    """What programs can be compiled for, and where there is nothing, why.

    Of a TPU it is a description, which the package libtpu makes anywhere; of a GPU the device.
    """
    return _described(machine) if machine.is_tpu else _present(machine)


def _described(machine: Machine) -> tuple[list[Any] | None, str]:
    # Told so, libtpu asks no metadata server what machine this is.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # of this machine; any will do
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if machine.chip.cores > 1:  # both cores of a chip are one device, as in a run
        options["chip_config_name"] = "megacore"
    if machine.count == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        found = topologies.get_topology_desc(machine.name, platform="tpu", **options).devices
    except Exception as error:  # without the package, or of a shape that it does not know
        reason = str(error).splitlines()[0][:200]
        if "libtpu" in reason or "tpu" not in reason.lower():
            reason = f"no libtpu: pip install 'kdrl_jax[tpu]' ({reason})"
        return None, reason
    if len(found) != machine.count:
        return None, f"libtpu describes {len(found)} devices, not {machine.count}"
    return list(found), ""


def _present(machine: Machine) -> tuple[list[Any] | None, str]:
    try:
        devices = jax.devices("gpu")
    except RuntimeError:
        devices = []
    alike = [x for x in devices if peak_of(x.device_kind) == machine.peak]
    if len(alike) < machine.count:
        return None, f"needs {machine.count} x {machine.chip.kind}; {len(alike)} here"
    return alike[: machine.count], ""
