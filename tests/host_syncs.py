"""Counts operations that make the host wait for the device, whichever device the test runs on."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")


class HostSyncs(TorchDispatchMode):
    """`with HostSyncs() as syncs: ...; assert syncs.found == []`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in SYNCS:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
