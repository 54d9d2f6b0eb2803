"""Setting of every test: CPU, eight fake devices, a persistent compilation cache, shapes and types checked at run time.

The variables are set before jax is imported and reach the processes that tests start, so these find the same cache.
"""

import os
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]

_FLAG = "--xla_force_host_platform_device_count"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_ROOT / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from jaxtyping import install_import_hook

# Annotations of arrays bind in tests only; outside they cost nothing. The hook must stand before glip_jax is imported.
install_import_hook("glip_jax", "beartype.beartype")
