"""Compares the time of GLIP-T with that of MM-Grounding-DINO-T of `transformers` on torch, on one CPU, alternating in one run.

Full sizes, random weights, 480 x 640 pixels, 256 tokens, batch 1, float32: `forward` in evaluation mode, and `step`,
forward + loss + backward in training mode (dropout on; targets assigned, no optimizer). See `benchmarks/alternating.py`.

    python -m benchmarks.compare_mm_grounding_dino --threads 1 2 --rounds 3
"""

from typing import Any

from benchmarks.alternating import Runs, Settings, main

HEIGHT, WIDTH, TOKENS, BOXES = 480, 640, 256, 10


def glip_runs(settings: Settings) -> Runs:
    """glip_jax, compiled at the first call."""
    import jax

    from benchmarks.sample import abstract_params, made_batch, tiny
    from glip_jax.distributed.mesh import make_mesh
    from glip_jax.models.glip import GLIP, normalize
    from glip_jax.training.step import first_gradients, glip_objective

    config = tiny(remat=settings.remat)
    init, _ = abstract_params(config)
    params = jax.block_until_ready(jax.jit(init)(jax.random.key(0)))
    batch = jax.tree.map(jax.numpy.asarray, made_batch(config, HEIGHT, WIDTH, boxes=BOXES))
    model = GLIP(config.model)

    def forward(params: dict, batch: Any) -> object:
        image = normalize(batch.image, batch.size, config.model.input)
        return model.apply({"params": params}, image, batch.extent, batch.tokens, batch.token_mask)

    mesh = make_mesh(config.mesh)
    objective = glip_objective(config)
    compiled_forward = jax.jit(forward)

    def gradients(params: dict, batch: Any) -> object:
        return first_gradients(params, batch, config, mesh, objective)

    compiled_step = jax.jit(gradients)
    return {
        "forward": lambda: jax.block_until_ready(compiled_forward(params, batch)) and None,
        "step": lambda: jax.block_until_ready(compiled_step(params, batch)) and None,
    }


def mm_grounding_dino(threads: int) -> Any:
    """MM-Grounding-DINO-T of transformers with random weights, on so many threads of torch."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    backbone = transformers.SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, image_size=224,
        out_indices=[2, 3, 4], drop_path_rate=0.2,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return transformers.MMGroundingDinoForObjectDetection(
        transformers.MMGroundingDinoConfig(
            backbone_config=backbone, text_config=transformers.BertConfig(), max_text_len=TOKENS
        )
    )


def peer_runs(settings: Settings) -> Runs:
    """The PyTorch network, eager."""
    import torch

    model = mm_grounding_dino(settings.threads)
    pixels = torch.randn(1, 3, HEIGHT, WIDTH)
    # [CLS] name . name . ... [SEP]: 127 phrases fill 256 tokens; 1012 is the full stop.
    names = torch.randint(2000, 30000, (TOKENS // 2 - 1,))
    dots = torch.full_like(names, 1012)
    tokens = torch.cat([torch.tensor([101]), torch.stack([names, dots], 1).flatten(), torch.tensor([102])])[None]
    inputs = {
        "pixel_values": pixels,
        "pixel_mask": torch.ones(1, HEIGHT, WIDTH, dtype=torch.long),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "token_type_ids": torch.zeros_like(tokens),
    }
    boxes = torch.cat([torch.rand(BOXES, 2) * 0.5 + 0.25, torch.rand(BOXES, 2) * 0.25 + 0.05], 1)
    labels = [{"class_labels": torch.arange(BOXES), "boxes": boxes}]

    def forward() -> None:
        model.eval()
        with torch.inference_mode():
            model(**inputs)

    def step() -> None:
        model.train()
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()

    return {"forward": forward, "step": step}


if __name__ == "__main__":
    main("benchmarks.compare_mm_grounding_dino", __doc__ or "", {"glip_jax": glip_runs, "mm_grounding_dino": peer_runs})
