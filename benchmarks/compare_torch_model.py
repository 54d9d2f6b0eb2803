"""Compares the time of GLIP-T with that of the PyTorch network that `export` writes, on one machine, alternating in one run.

The same random weights on both sides, 480 x 640 pixels, 256 tokens, batch 1, float32: `forward`, and `step`: forward,
the gradient of a fixed random projection of all outputs, and one AdamW update of every parameter. No dropout, targets
or losses on either side, since the exported network has none. See `benchmarks/alternating.py`.

    python -m benchmarks.compare_torch_model --threads 1 2 --rounds 3
    python -m benchmarks.compare_torch_model --device gpu --threads 4
"""

from typing import Any

import numpy as np

from benchmarks.alternating import Runs, Settings, main
from glip_jax.config import Config

HEIGHT, WIDTH, TOKENS = 480, 640, 256
RATE = 1e-6


def _arrays(config: Config) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    """Pixels [1 H W 3], tokens [1 T], and the random projections of logits, deltas and centerness."""
    from glip_jax.structures import boxes as box

    rng = np.random.default_rng(0)
    anchors = sum(int(np.prod(box.level_shape((HEIGHT, WIDTH), s))) for s in config.model.pyramid.strides)
    shapes = ((1, anchors, TOKENS), (1, anchors, 4), (1, anchors))
    pixels = rng.standard_normal((1, HEIGHT, WIDTH, 3), np.float32)
    tokens = rng.integers(1000, 30000, (1, TOKENS))
    projection = [rng.standard_normal(shape, np.float32) / shape[1] for shape in shapes]
    return {"pixels": pixels, "tokens": tokens}, projection


def _parameters(config: Config) -> Any:
    import jax

    from benchmarks.sample import abstract_params

    init, _ = abstract_params(config)
    return jax.block_until_ready(jax.jit(init)(jax.random.key(0)))


def glip_runs(settings: Settings) -> Runs:
    """glip_jax, compiled at the first call."""
    import jax
    import jax.numpy as jnp
    import optax

    from benchmarks.sample import tiny
    from glip_jax.models.glip import GLIP

    config = tiny(remat=settings.remat)
    inputs, projection = _arrays(config)
    model, optimizer = GLIP(config.model), optax.adamw(RATE)
    state: dict[str, Any] = {"params": _parameters(config)}
    state["moments"] = jax.jit(optimizer.init)(state["params"])
    pixels, tokens = jnp.asarray(inputs["pixels"]), jnp.asarray(inputs["tokens"], jnp.int32)
    weights = [jnp.asarray(x) for x in projection]
    extent, mask = jnp.asarray([[HEIGHT, WIDTH]]), jnp.ones((1, TOKENS), bool)

    def forward(params: Any) -> Any:
        return model.apply({"params": params}, pixels, extent, tokens, mask)

    def step(params: Any, moments: Any) -> Any:
        def projected(params: Any) -> Any:
            return sum(jnp.vdot(x, w) for x, w in zip(jax.tree.leaves(forward(params)), weights))

        updates, moments = optimizer.update(jax.grad(projected)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    compiled_forward, compiled_step = jax.jit(forward), jax.jit(step, donate_argnums=(0, 1))

    def run_step() -> None:
        found = compiled_step(state["params"], state["moments"])
        state["params"], state["moments"] = jax.block_until_ready(found)

    return {"forward": lambda: jax.block_until_ready(compiled_forward(state["params"])) and None, "step": run_step}


def torch_runs(settings: Settings) -> Runs:
    """The exported network, eager."""
    import torch

    from benchmarks.sample import tiny
    from glip_jax.weights.export import full_state, network_settings
    from glip_jax.weights.portable.glip_network import GlipNetwork

    config = tiny()
    inputs, projection = _arrays(config)
    torch.set_num_threads(settings.threads)
    device = "cuda" if settings.device == "gpu" else "cpu"
    network = GlipNetwork(network_settings(config.model))
    state = full_state(_parameters(config), config.model)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    network = network.to(device).eval()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    pixels = torch.from_numpy(np.ascontiguousarray(inputs["pixels"].transpose(0, 3, 1, 2))).to(device)
    tokens = torch.from_numpy(inputs["tokens"]).to(device)
    weights, mask = [torch.from_numpy(x).to(device) for x in projection], torch.ones_like(tokens)

    def finish() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.inference_mode():
            network(pixels, tokens, mask)
        finish()

    def step() -> None:
        optimizer.zero_grad()
        outputs = network(pixels, tokens, mask)
        torch.stack([(x * w).sum() for x, w in zip(outputs, weights)]).sum().backward()
        optimizer.step()
        finish()

    return {"forward": forward, "step": step}


if __name__ == "__main__":
    main("benchmarks.compare_torch_model", __doc__ or "", {"glip_jax": glip_runs, "exported torch model": torch_runs})
