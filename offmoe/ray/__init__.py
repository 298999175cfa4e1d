"""Several machines by Ray: a model per worker, for Ray Data (`Generator`) and Ray Serve (`deployment`)."""

from offmoe.ray.generator import Generator
from offmoe.ray.serving import deployment

__all__ = ["Generator", "deployment"]
