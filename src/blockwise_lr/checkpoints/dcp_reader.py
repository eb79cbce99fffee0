"""Reading torch.distributed.checkpoint's folders without running what a hostile one may hold."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from blockwise_lr.errors import UserError

_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "pathlib": {"Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"},
}


class _Unpickler(pickle.Unpickler):
    """The classes of a description of tensors, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and (name == "Size" or isinstance(getattr(torch, name, None), torch.dtype)):
            return getattr(torch, name)
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in the description of tensors")


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, which unpickles the description of tensors, without its freedom.

    The tensors themselves are read by ``torch.load(weights_only=True)`` anyway.
    """

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The description of the tensors in the folder.

        Raises:
            UserError: it is damaged, or holds what does not belong there.
        """
        path = Path(self._get_metadata_path(kwargs.get("rank")))
        try:
            with path.open("rb") as file:
                found = _Unpickler(file).load()
            if not isinstance(found, Metadata):
                raise pickle.UnpicklingError(f"it holds {type(found).__name__}")
        except Exception as error:  # pickle's errors are of many classes
            raise UserError(
                f"{path} is not a description of tensors ({error}): choose another checkpoint"
            ) from None
        if found.storage_meta is not None:
            found.storage_meta.load_id = self.load_id
        return found
