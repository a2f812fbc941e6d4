"""Input checks. Each error message gives the expected and the actual value."""

import torch
from torch import Tensor


def cut_vocabulary(vocab_size: int | None, sizes: dict[str, int]) -> int:
    """Return the softmax vocabulary size: `vocab_size`, or the size shared by all of `sizes`.

    Raises:
        ValueError: `vocab_size` exceeds a vocabulary, or `sizes` differ and `vocab_size` is None.
    """
    if vocab_size is None:
        if len(set(sizes.values())) > 1:
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(
                f"The vocabularies differ ({found}); set vocab_size to the number of ids that they share."
            )
        return next(iter(sizes.values()))
    for name, size in sizes.items():
        if not 1 <= vocab_size <= size:
            raise ValueError(f"vocab_size is {vocab_size}, the {name} has {size} ids; expected 1 to {size}.")
    return vocab_size


def outside(ids: Tensor, num_ids: int) -> Tensor:
    """Which ids are `num_ids` or more, a number that the ids' own dtype may not hold."""
    return ids > min(num_ids - 1, torch.iinfo(ids.dtype).max)


def check_ids(name: str, ids_N: Tensor, num_ids: int) -> None:
    """Raise ValueError for an id outside [0, num_ids). Synchronises with the ids' device."""
    bad_N = (ids_N < 0) | outside(ids_N, num_ids)
    if bad_N.any():
        row = int(bad_N.nonzero()[0])
        raise ValueError(f"{name}[{row}] is {int(ids_N[row])}; expected an id in [0, {num_ids}).")


def check_integers(name: str, ids: Tensor) -> None:
    """Raise ValueError for ids that are not signed integers."""
    if ids.dtype not in (torch.int64, torch.int32, torch.int16):
        raise ValueError(f"{name} has dtype {ids.dtype}; expected int64, int32 or int16.")


def check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    """Raise ValueError if `tensor` and the hidden states are on different devices."""
    if tensor.device != hidden.device:
        raise ValueError(
            f"{name} is on {tensor.device}, the hidden states are on {hidden.device}; expected one device."
        )


def check_shape(name: str, tensor: Tensor, expected: tuple[int | None, ...]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; None matches any size."""
    same_rank = tensor.ndim == len(expected)
    if not same_rank or any(e is not None and e != s for s, e in zip(tensor.shape, expected, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{name} has shape {list(tensor.shape)}; expected [{wanted}].")
