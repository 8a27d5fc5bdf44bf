"""What tests of experiments share."""

import jax
import pytest

from llm_jax.alignment import finetune
from llm_jax.parallel import mesh as mesh_lib


@pytest.fixture(scope="module")
def one_device():
    """For models that are fine-tuned: eight simulated devices would add nothing but time."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(finetune, "build_mesh", lambda training: mesh_lib.build(training.mesh, jax.devices()[:1]))
        yield
