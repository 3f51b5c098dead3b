"""How a shortage of memory is told from other errors, in the training and in the evaluation."""

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is PyTorch's way of saying that the memory is used up, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
