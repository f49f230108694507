"""Messages between a trainer and its sampler processes: a small JSON header, then arrays as raw bytes.

No pickle. A message is two little-endian uint32 (length of the header, number of arrays), the header, and
each array's bytes, padded to 8. Received arrays share one buffer.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dngd.sampling.minibatch import LayerGraph
from dngd.sampling.slots import DTYPES, spec_of

_LENGTHS = struct.Struct("<II")
_PADDING = 8


class ConnectionLostError(ConnectionError):
    """The other side closed its end."""


def send(connection: socket.socket, header: dict[str, Any], arrays: Sequence[Tensor] = ()) -> None:
    """Send one message. arrays: contiguous CPU tensors. Raises OSError."""
    described = [spec_of(array) for array in arrays]
    encoded = json.dumps({**header, "arrays": described}).encode()
    connection.sendall(_LENGTHS.pack(len(encoded), len(arrays)) + encoded)
    for array in arrays:
        size = array.numel() * array.element_size()
        if size:
            connection.sendall(_bytes_of(array))
        if size % _PADDING:
            connection.sendall(bytes(_PADDING - size % _PADDING))


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[Tensor]]:
    """Return the next message. Raises ConnectionLostError at the end of the stream, OSError."""
    prefix = bytearray(_LENGTHS.size)
    _fill(connection, memoryview(prefix))
    header_size, num_arrays = _LENGTHS.unpack(prefix)
    encoded = bytearray(header_size)
    _fill(connection, memoryview(encoded))
    header: dict[str, Any] = json.loads(encoded)
    described = header.pop("arrays")
    assert len(described) == num_arrays, (len(described), num_arrays)
    spans: list[tuple[int, int]] = []
    end = 0
    for dtype, shape in described:
        size = DTYPES[dtype].itemsize * torch.Size(shape).numel()
        spans.append((end, size))
        end += -(-size // _PADDING) * _PADDING
    buffer = torch.empty(end, dtype=torch.uint8)
    if end:
        _fill(connection, _bytes_of(buffer))
    arrays = [
        buffer[first : first + size].view(DTYPES[dtype]).reshape(shape)
        for (first, size), (dtype, shape) in zip(spans, described, strict=True)
    ]
    return header, arrays


def pack_layers(layers: Sequence[LayerGraph]) -> tuple[list[dict[str, Any]], list[Tensor]]:
    """Return the layer graphs' sizes for a header, and their arrays in the order unpack_layers reads."""
    sizes: list[dict[str, Any]] = []
    arrays: list[Tensor] = []
    for layer in layers:
        sizes.append(
            {
                "num_src": layer.num_src,
                "num_dst": layer.num_dst,
                "global": layer.global_indices,
                "weighted": layer.edge_weight is not None,
            }
        )
        arrays += [layer.indptr, layer.indices, layer.degrees, layer.dst_nodes]
        if layer.edge_weight is not None:
            arrays.append(layer.edge_weight)
    return sizes, arrays


def unpack_layers(sizes: Sequence[dict[str, Any]], arrays: Iterator[Tensor]) -> tuple[LayerGraph, ...]:
    """Inverse of pack_layers; takes from arrays what it needs."""
    layers: list[LayerGraph] = []
    for size in sizes:
        indptr, indices, degrees, dst_nodes = (next(arrays) for _ in range(4))
        layers.append(
            LayerGraph(
                indptr=indptr,
                indices=indices,
                num_src=size["num_src"],
                num_dst=size["num_dst"],
                degrees=degrees,
                edge_weight=next(arrays) if size["weighted"] else None,
                dst_nodes=dst_nodes,
                global_indices=size["global"],
            )
        )
    return tuple(layers)


def _bytes_of(array: Tensor) -> memoryview:
    view: Any = array.numpy()
    return memoryview(view).cast("B")


def _fill(connection: socket.socket, view: memoryview) -> None:
    while view.nbytes:
        count = connection.recv_into(view)
        if count == 0:
            raise ConnectionLostError("the other process closed its end")
        view = view[count:]
