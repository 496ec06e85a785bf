"""One step's loads by layer: which layers the forward pass has waited for."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.copy.base import BlockCopy, CopyEvent, LayerLoader


class LayerPipeline:
    """Keeps the events of one load by layer, and whether the engine kept its promise to wait for each of them.

    An engine that does not (a model whose attention bypasses the hooks) would compute on KV that is not there yet; ``forward_ended``
    tells, and from then on the pipeline is not usable.
    """

    def __init__(self, loader: LayerLoader | None) -> None:
        self._loader = loader
        self._events: Sequence[CopyEvent] = ()
        self._open_layers: set[int] = set()
        self.is_usable = loader is not None and loader.num_layers > 1

    @property
    def is_loading(self) -> bool:
        """Whether there is something to wait for in this step."""
        return bool(self._open_layers)

    def start(self, copies: Sequence[BlockCopy]) -> CopyEvent:
        """Starts the load; the event of the last layer, which ends last."""
        assert self._loader is not None, "not usable"
        self._events = self._loader.scatter_layers(copies)
        self._open_layers = set(range(len(self._events)))
        return self._events[-1]

    def wait(self, layer: int | None) -> None:
        """Orders the engine's computation after one layer's load, or after all (None). Raises what the copy raised."""
        layers = self._open_layers.copy() if layer is None else self._open_layers & {layer}
        self._open_layers -= layers
        for open_layer in layers:
            self._events[open_layer].order_compute()

    def forward_ended(self) -> bool:
        """False where the forward pass did not wait for every layer. Then the pipeline is given up. Said once in a step."""
        has_all = not self._open_layers
        self._open_layers = set()
        self.is_usable = self.is_usable and has_all
        return has_all

    def reset(self) -> None:
        """Forgets the step's load."""
        self._events, self._open_layers = (), set()

    def close(self) -> None:
        """Closes the loader. Idempotent."""
        if self._loader is not None:
            self._loader.close()
