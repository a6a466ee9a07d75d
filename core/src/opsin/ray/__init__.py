"""opsin on a Ray cluster: ``pip install 'opsin[ray]'``.

Ray places whole engines: an engine's tensor-parallel ranks are processes of its own machine, as without Ray.

* `app`: a Ray Serve application, the same server as ``opsin serve``'s.
* `build`: the same for ``serve run opsin.ray:build model=... replicas=2``.
* ``opsin batch --ray``: a job over all nodes, by Ray Data.
"""

from opsin.ray.deploy import app, build

__all__ = ["app", "build"]
