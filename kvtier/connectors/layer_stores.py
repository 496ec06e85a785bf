"""One step's stores by layer: what of them the forward pass has reached."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.copy.base import BlockCopy, CopyEvent, LayerStore, LayerStorer


class LayerStores:
    """Keeps a store that follows the forward pass. Layers that the engine does not tell of are stored at the end of the step.

    ``computed`` and ``finish`` end the store where they raise: then nothing of it runs any more.
    """

    def __init__(self, storer: LayerStorer | None) -> None:
        self._storer = storer
        self._store: LayerStore | None = None
        self._open_layers: set[int] = set()
        self.is_usable = storer is not None and storer.num_layers > 1

    @property
    def is_storing(self) -> bool:
        """Whether ``start`` was called in this step."""
        return self._store is not None

    def start(self, copies: Sequence[BlockCopy]) -> None:
        """Takes the step's blocks. Raises what the copier raises."""
        assert self._storer is not None, "not usable"
        self._store = self._storer.gather_layers(copies)
        self._open_layers = set(range(self._storer.num_layers))

    def computed(self, layer: int) -> None:
        """The engine has submitted a layer's computation. Raises what the copier raises; the store is over then.

        Raises RuntimeError where a layer comes twice: an engine that computes a step in parts tells of KV that is not there yet. From
        then on layers are not listened to.
        """
        store, self._store = self._store, None
        if store is None:
            return
        if layer not in self._open_layers:
            self.is_usable = False
            raise RuntimeError(f"layer {layer} was computed twice in one step; stores wait for the end of a step from now on")
        self._open_layers.discard(layer)
        store.copy_layer(layer)
        self._store = store

    def finish(self) -> CopyEvent:
        """Stores the layers that are left, and ends the step's store; its event. Raises what the copier raises."""
        store, self._store = self._store, None
        assert store is not None, "not started"
        layers, self._open_layers = sorted(self._open_layers), set()
        for layer in layers:
            store.copy_layer(layer)
        return store.end()
