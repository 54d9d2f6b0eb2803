"""How much of a batch goes through an attention at once, so that its logits stay in a TPU's on-chip memory."""

__all__ = ["images_at_once"]


def images_at_once(images: int, each: int, most: int) -> int:
    """The largest divisor of `images` of whose arrays, `each` bytes an image, no more than `most` bytes are there; at least 1."""
    return max(size for size in range(1, images + 1) if images % size == 0 and (size == 1 or size * each <= most))
