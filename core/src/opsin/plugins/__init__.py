"""Plugins: found through entry points, checked, and indexed by what they provide.

Importing plugins is guarded and happens in sorted order; what comes out does not depend on the order. Three
things can be wrong with a plugin, and they are treated differently:

- It cannot be imported, or a hook raises: it is kept in `Plugins.failures` with its reason, which is quoted
  when somebody asks for something missing. It is fatal only when the plugin was named in the allow list.
- It breaks the contract (unknown hook, unknown argument, wrong return type): `PluginError`, at once.
- It claims what another one claims: `PluginConflictError`, unless ``prefer`` decides.
"""

from opsin.plugins.discovery import load_plugins
from opsin.plugins.index import Plugins

__all__ = ["Plugins", "load_plugins"]
