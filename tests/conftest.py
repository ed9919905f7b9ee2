"""Settings of every test run: several fake devices, exact products, cached compilation."""

import gc
import os
import resource
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little: unoptimised code halves their time, the older emitter of
# fused loops (gone with jaxlib 0.11.2) takes off a quarter, one thread a process leaves the other
# core to the other worker.
FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
FLAGS += " --xla_cpu_multi_thread_eigen=false"
if version("jaxlib").split(".")[:2] == ["0", "10"]:
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nothing is timed: a test has the same program in every run.
os.environ.setdefault("AATJAX_KERNELS", "fixed")
# The TPU's compiler: no TPU is asked for, and both workers may load it.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
# The same small programs are compiled by both workers, by what they start and by the next run:
# compiled programs are kept in pytest's own cache folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = Path(__file__).resolve().parents[1] / ".pytest_cache" / "compiled"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Processes that tests start import the installed package, not the checkout they are started in.
os.environ.setdefault("PYTHONSAFEPATH", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

# Tracing makes many objects that live on; the default thresholds spend a tenth of the time on them.
gc.set_threshold(200_000, 50, 100)

# Checking every array against its annotation costs 8 s a process: CI does it in a run of its own.
if os.environ.get("AATJAX_TYPECHECK"):
    from jaxtyping import install_import_hook

    install_import_hook(["aatjax", "aatjax_kernels"], "typecheck.check")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def real_audio() -> Path:
    """The folder of real recordings (esc10, fsdd, ...); tests that need it skip without it."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("AATJAX_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real audio in {folder}: set AATJAX_TEST_DATA to the folder that has it")
    return folder


@pytest.fixture(scope="session")
def small_ast(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Weights of an AST of one block, which compiles fast."""
    import dataclasses

    from flax import nnx

    from aatjax import surgery
    from aatjax.convert.write import write_native
    from aatjax.models.ast import AST
    from aatjax.models.config import ASTConfig

    config = dataclasses.replace(ASTConfig.size("tiny", frames=64, num_classes=3), depth=1)
    path = tmp_path_factory.mktemp("weights") / "one_block.safetensors"
    write_native(path, surgery.arrays(AST(config, rngs=nnx.Rngs(0))), config)
    return str(path)


@pytest.fixture
def shallow_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`random:tiny` has two blocks in place of twelve."""
    from aatjax.models.config import SIZES

    monkeypatch.setitem(SIZES["tiny"], "depth", 2)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees the programs of the modules so far where they have come to need gigabytes."""
    yield
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 4 * 2**20:  # KiB on Linux
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def own_index(tmp_path_factory: pytest.TempPathFactory):
    """Keeps the index of weights that were loaded out of the user's cache."""
    from aatjax.convert import known_weights

    folder = tmp_path_factory.mktemp("index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known_weights, "find_user_cache", lambda: folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def stated_gpu():
    """A GPU for the tests that lower Triton kernels on a machine without one, as JAX 0.12 asks."""
    try:
        from jax._src.pallas.triton import gpu_info
    except ImportError:  # an older JAX lowers them without
        yield
        return
    stated = gpu_info._get_gpu_info_impl(gpu_info.GpuVersion.H100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_info, "get_gpu_info", lambda: stated)
        yield
